"""Experiments on architectures."""
