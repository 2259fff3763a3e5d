"""Matrix product of integers of 8 bits, scaled after the sum (arXiv 2406.18832): ``norm_int8`` makes its x."""

from mechlab.kernels.dispatch import Choice
from mechlab.kernels.w8a8.api import choose, w8a8_matmul

__all__ = ["Choice", "choose", "w8a8_matmul"]
