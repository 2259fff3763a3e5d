"""Circuits: which parts of a network carry a behaviour."""
