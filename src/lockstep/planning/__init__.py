"""Stage 1, decompose: pure arithmetic over shards, blocks and bytes. No torch, no numpy."""
