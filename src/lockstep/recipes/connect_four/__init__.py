"""Connect Four for the recipe `game`: rules, search, self-play, opponents, and the terminal."""
