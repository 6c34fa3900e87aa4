"""The front: run, resume, plan, start, evaluate, predict, verify."""
