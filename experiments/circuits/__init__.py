"""Experiments on circuits."""
