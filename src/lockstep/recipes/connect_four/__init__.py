"""Connect Four, for the recipe `game` and for `lockstep play`.

A *state* is OpenSpiel's position. *Self-play* is a game in which a network plays both sides. A
*simulation* is one position that a search evaluates.

rules        OpenSpiel's rules, and the planes that a network sees of a state
network      the network, and the player that follows its policy
tree_search  Gumbel AlphaZero search for many games at once
self_play    training positions from games of self-play
opponents    scripted players, for evaluation
terminal     games against a person, or against itself, in a terminal
"""
