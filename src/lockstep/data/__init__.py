"""From sample indices to batches."""
