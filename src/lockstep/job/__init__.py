"""What the user hands in: a task, its settings, and where its code comes from."""
