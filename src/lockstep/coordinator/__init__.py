"""Coordinate: one coordinator per job decides how far to go, and with which hosts."""
