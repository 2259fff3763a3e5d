"""Families of hub checkpoints: their config.json, and which tensor holds which parameter."""

from mechlab.models.families.fields import Fields
from mechlab.models.families.tables import FAMILIES, Family

__all__ = ["FAMILIES", "Family", "Fields"]
