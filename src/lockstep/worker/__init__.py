"""Stage 3, compute: the forkserver, the worker processes, and a step of training."""
