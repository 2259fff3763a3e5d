"""Accelerators to lower for without having them: from jax 0.12 on Triton asks for a GPU's name."""

from __future__ import annotations

from jax.sharding import AbstractDevice, AbstractMesh

DEVICES = {
    "tpu": AbstractMesh((), ()),
    "gpu": AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")),
}
