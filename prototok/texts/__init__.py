"""Target texts: token ids, files and data sets."""
