"""Results of fits: vectors, measurements, provenance, and their files."""
