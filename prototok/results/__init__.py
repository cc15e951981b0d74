"""What a fit leaves behind: vectors, measurements, and their files."""
