"""Benchmarks: speed, memory and scaling, side by side with what people would do instead, in one run.

Each module offers ``bench(preset, out) -> dict``; presets are "cpu" and "accel", and "smoke" for the tests.
"""
