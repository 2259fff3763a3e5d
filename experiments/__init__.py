"""The experiments of the 45 papers and the benchmarks, run by ``python -m experiments``."""
