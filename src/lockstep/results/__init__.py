"""Stage 5, aggregate: the run folder and everything in it."""
