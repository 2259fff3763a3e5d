"""Architectures: networks with other units, other losses or other starts."""
