"""Data sets: one file per kind of data, whether it lies on disk or ships with an installed library."""
