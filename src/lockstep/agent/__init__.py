"""Supervise: one agent per host starts workers, watches them and replaces them."""
