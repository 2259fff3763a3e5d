"""Kernels, one folder an operation, all with the same files:

- ``reference.py``: the operation in plain ``jax.numpy``. It is the specification; every backend is tested against it.
- ``tpu.py``, ``gpu.py``: Pallas kernels: a layout each, the formulas are the reference's.
- ``api.py``: the function to call. It checks its arguments, picks a backend, and says why where it falls back.
- ``cost.py``: bytes that must move and arithmetic: the floor that a kernel is measured against.

What they share: ``dispatch`` picks the backend, ``row_blocks`` cuts arrays into blocks of whole rows, and
``mosaic_gpu`` has the settings of Hopper's matrix products.

Pallas is imported when a kernel is first used, never by importing these packages.
"""
