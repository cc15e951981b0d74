"""Small parts that every package uses; they know nothing of models."""
