"""Worlds that generate data from a key."""
