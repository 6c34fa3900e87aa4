"""The user's optimizer, run on blocks of the parameters."""
