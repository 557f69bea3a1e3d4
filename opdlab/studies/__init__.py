"""Studies: variants of one configuration, run with paired seeds and compared."""
