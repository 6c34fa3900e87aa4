"""Stage 4, synchronise: barriers, sums in one fixed order, and what hosts exchange."""
