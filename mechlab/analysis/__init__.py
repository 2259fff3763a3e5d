"""Arrays in, arrays out: statistics and scores that know no model."""

from mechlab.analysis.intervals import Interval, bootstrap_mean, paired_bootstrap, wilson
from mechlab.analysis.metrics import accuracy, correct, cross_entropy

__all__ = [
    "Interval",
    "accuracy",
    "bootstrap_mean",
    "correct",
    "cross_entropy",
    "paired_bootstrap",
    "wilson",
]
