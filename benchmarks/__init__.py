"""Lockstep measured against its alternatives: `python -m benchmarks.run`."""
