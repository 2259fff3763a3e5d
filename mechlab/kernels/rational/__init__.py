"""Group-wise rational functions (KAT, arXiv 2409.10594): element-wise P(x) / Q(x) with shared coefficients."""

from mechlab.kernels.dispatch import Choice
from mechlab.kernels.rational.api import choose, rational

__all__ = ["Choice", "choose", "rational"]
