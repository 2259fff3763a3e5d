"""Experiments on compression."""
