"""What the recipes on texts share: a vocabulary, a transformer that can copy, and beam search."""
