"""mechlab: a JAX/Flax functional research framework, reference implementations of papers on one small core.

Import what you need from its packages; importing ``mechlab`` itself loads nothing, not even jax.

- ``mechlab.core``: sites, edits, parameter selection and transforms, sweeps, random streams, sharding.
- ``mechlab.models``: models with named sites.
- ``mechlab.kernels``: operations with kernels for TPUs and GPUs, one folder each.
- ``mechlab.methods``: one module per paper.
- ``mechlab.analysis``, ``mechlab.data``, ``mechlab.training``, ``mechlab.reporting``: what the methods share.
"""

__version__ = "0.1.0"
