"""What the first two layers collapse to for the input [e, m, m, …, m]."""
