"""Arrays and what is computed with them alone: low-rank pairs, names, encodings, sketches and sums."""
