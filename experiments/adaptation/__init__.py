"""Experiments on adaptation."""
