"""Which backend computes a call, of every operation that leaves it to ``dispatch``."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.kernels import dispatch
from mechlab.kernels.dispatch import Choice
from mechlab.kernels.fake_quant import choose as choose_fake
from mechlab.kernels.fake_quant import lsq
from mechlab.kernels.norm_int8 import choose as choose_norm
from mechlab.kernels.norm_int8 import norm_int8
from mechlab.kernels.sparse_matvec import as_slabs, sparse_matvec
from mechlab.kernels.sparse_matvec import choose as choose_sparse
from mechlab.kernels.w4a16 import choose as choose_w4a16
from mechlab.kernels.w4a16 import pack, w4a16_matmul
from mechlab.kernels.w8a8 import choose as choose_w8a8
from mechlab.kernels.w8a8 import w8a8_matmul
from mechlab.methods.compression.rounding import quantise
from tests.kernels.lowering import lowered

X = jnp.linspace(-1, 1, 4 * 256).reshape(4, 256)
CODES = jnp.ones((256, 128), jnp.int8)
PACKED = pack(quantise(jnp.linspace(0, 1, 256 * 128).reshape(256, 128), bits=4, group=64))
SLABS = as_slabs(jnp.ones((256, 2048), jnp.bfloat16))

CALLS = {
    "w8a8": (lambda impl: lambda s: w8a8_matmul(CODES.T, CODES, s, impl=impl), jnp.ones(128)),
    "norm_int8": (lambda impl: lambda x: norm_int8(x, X[0], centred=True, impl=impl), X),
    "fake_quant": (lambda impl: lambda x: lsq(x, jnp.ones(4), bits=4, impl=impl), X),
    "sparse_matvec": (
        lambda impl: lambda x: sparse_matvec(x, SLABS, 0.5, impl=impl).astype(jnp.float32),
        X[0].astype(jnp.bfloat16),
    ),
    "w4a16": (
        lambda impl: lambda x: w4a16_matmul(x, PACKED, impl=impl).astype(jnp.float32),
        X.astype(jnp.bfloat16),
    ),
}
CHOICES = {
    "w8a8": lambda: choose_w8a8(CODES.T, CODES),
    "norm_int8": lambda: choose_norm(X),
    "fake_quant": lambda: choose_fake(X),
    "sparse_matvec": lambda: choose_sparse(X[:1], SLABS),
    "w4a16": lambda: choose_w4a16(X.astype(jnp.bfloat16), PACKED),
}


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("name", CALLS)
def test_on_an_accelerator_its_kernel_is_chosen_and_a_program_for_the_cpu_still_runs(monkeypatch, name, platform):
    assert CHOICES[name]() == Choice("jnp", "there is no kernel for cpu")
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert CHOICES[name]() == Choice(platform, f"the default backend is {platform}")
    make, argument = CALLS[name]
    np.testing.assert_array_equal(make("auto")(argument), make("jnp")(argument))
    text = lowered(make("auto"), argument, impl=platform)
    assert any(call in text for call in {"tpu": ("tpu_custom_call",), "gpu": ("triton", "mosaic_gpu")}[platform])
    if name != "norm_int8":

        def loss(argument, impl):
            return (make(impl)(argument) ** 2).sum()

        slopes = (jax.grad(loss)(argument, impl) for impl in ("auto", "jnp"))
        np.testing.assert_array_equal(*(np.asarray(slope, np.float32) for slope in slopes))


def test_a_jax_without_the_kernels_parts_falls_back_and_says_so(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    load = dispatch.load

    def missing(package, module):
        if module == "gpu":
            raise ImportError("no mosaic")
        return load(package, module)

    monkeypatch.setattr(dispatch, "load", missing)
    impl, reason = choose_w8a8(CODES.T, CODES)
    assert (impl, "no mosaic" in reason) == ("jnp", True)
    assert w8a8_matmul(CODES.T, CODES, jnp.ones(128)).shape == (128, 128)
    with pytest.raises(NotImplementedError, match="no mosaic"):
        w8a8_matmul(CODES.T, CODES, jnp.ones(128), impl="gpu")


@pytest.mark.parametrize("capability", ["8.0", "10.0"])
def test_products_on_a_gpu_that_is_no_hopper_are_left_to_xla(monkeypatch, capability):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    for name in ("w8a8", "w4a16"):
        assert CHOICES[name]() == Choice(
            "jnp", f"the GPU kernel is for Hopper, 9.0, and this GPU is of capability {capability}"
        )
    assert CHOICES["fake_quant"]().impl == "gpu"


def test_a_kernel_that_this_platform_lacks_is_refused_by_name():
    with pytest.raises(NotImplementedError, match='w8a8: impl "tpu": this platform is cpu; interpret=True'):
        w8a8_matmul(CODES.T, CODES, jnp.ones(128), impl="tpu")
    with pytest.raises(ValueError, match='interpret=True needs impl "tpu" or "gpu", got "auto"'):
        w8a8_matmul(CODES.T, CODES, jnp.ones(128), interpret=True)


def test_pallas_is_imported_only_for_a_kernel():
    code = (
        "import sys, jax.numpy as jnp\n"
        "import mechlab.kernels.w4a16, mechlab.kernels.fake_quant, mechlab.kernels.sparse_matvec\n"
        "from mechlab.kernels.norm_int8 import norm_int8\n"
        "from mechlab.kernels.w8a8 import w8a8_matmul\n"
        "one = jnp.ones\n"
        "w8a8_matmul(norm_int8(one((2, 4)), one(4), centred=False), one((4, 3), jnp.int8), one(3))\n"
        "print('jax.experimental.pallas' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "False\n"
