"""A norm that gives the integers of the next product: norm, scale, round and cast in one pass (arXiv 2406.18832)."""

from mechlab.kernels.dispatch import Choice
from mechlab.kernels.norm_int8.api import choose, norm_int8

__all__ = ["Choice", "choose", "norm_int8"]
