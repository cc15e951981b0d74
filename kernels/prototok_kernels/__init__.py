"""The operations prototok is made of, one to a file."""
