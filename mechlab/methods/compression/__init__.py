"""Compression: fewer bits per weight."""
