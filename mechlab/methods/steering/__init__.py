"""Steering: edits of activations that change what a model does."""
