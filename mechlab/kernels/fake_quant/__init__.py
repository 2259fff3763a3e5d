"""Fake quantisation in one pass: StatsQ and LSQ (arXiv 2302.02210), and rounding to a grid per group."""

from mechlab.kernels.dispatch import Choice
from mechlab.kernels.fake_quant.api import choose, lsq, round_groups, statsq

__all__ = ["Choice", "choose", "lsq", "round_groups", "statsq"]
