"""Stage 2, initialise: one shared copy of parameters and optimizer state on each host."""
