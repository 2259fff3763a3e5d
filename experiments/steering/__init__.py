"""Experiments on steering."""
