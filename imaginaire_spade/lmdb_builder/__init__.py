"""Build LMDB data sets: nothing that trains or generates imports this."""
