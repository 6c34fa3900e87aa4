"""A transformers model as a task."""
