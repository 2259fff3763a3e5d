"""Architectures and training schemes: what a network is built of, how it starts and how it is trained."""
