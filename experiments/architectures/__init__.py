"""Experiments on architectures and training schemes."""
