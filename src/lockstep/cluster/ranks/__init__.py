"""Ranks that torchrun, SLURM or people start."""
