"""From vectors back to text, and measures of a reconstruction."""
