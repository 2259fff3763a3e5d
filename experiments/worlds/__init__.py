"""Experiments that make subjects for other experiments."""
