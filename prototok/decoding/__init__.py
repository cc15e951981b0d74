"""From vectors back to text, and what a reconstruction is worth."""
