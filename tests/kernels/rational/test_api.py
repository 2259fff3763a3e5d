"""What the rational function refuses, which backend it picks, and that Pallas is not imported for nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.kernels.rational import Choice, api, choose, gpu, rational, tpu
from tests.kernels.devices import DEVICES

X, A, B = jnp.ones((3, 64)), jnp.ones((1, 6)), jnp.ones((2, 4))


def test_shapes_that_do_not_fit_are_all_reported():
    with pytest.raises(ValueError, match=r"last axis of x \(3, 64\), got 5; a must be .* got \(2, 6\); b must"):
        rational(X, jnp.ones((2, 6)), B, groups=5)
    for a, b, groups, word in (
        (jnp.ones((1, 5)), B, 2, r"a must be \(1, 6\) or \(2, 6\), got \(1, 5\)"),
        (A, jnp.ones((2, 5)), 2, r"b must be \(2, 4\), got \(2, 5\)"),
        (A, B, 0, "groups must be at least 1"),
    ):
        with pytest.raises(ValueError, match=word):
            rational(X, a, b, groups=groups)
    with pytest.raises(ValueError, match="divide the last axis"):
        rational(jnp.asarray(1.0), A, B, groups=2)


def test_integers_and_unknown_words_are_refused():
    with pytest.raises(TypeError, match="x must be floating, got int32"):
        rational(jnp.ones((3, 64), int), A, B, groups=2)
    with pytest.raises(TypeError, match="b must be floating"):
        rational(X, A, B.astype(int), groups=2)
    with pytest.raises(ValueError, match='form must be "A" or "B", got "C"'):
        rational(X, A, B, groups=2, form="C")
    with pytest.raises(ValueError, match="impl must be one of auto, jnp, tpu, gpu, got 'triton'"):
        rational(X, A, B, groups=2, impl="triton")
    with pytest.raises(ValueError, match='interpret=True needs impl "tpu" or "gpu", got "auto"'):
        rational(X, A, B, groups=2, interpret=True)


def test_a_kernel_that_this_platform_lacks_is_refused_by_name():
    with pytest.raises(NotImplementedError, match='impl "tpu": this platform is cpu; interpret=True'):
        rational(X, A, B, groups=2, impl="tpu")


@pytest.mark.parametrize(
    ("impl", "x", "groups", "form", "word"),
    [
        ("tpu", X, 2, "B", 'the kernels compute form "A"'),
        ("tpu", X[:0], 2, "A", "x is empty"),
        ("tpu", X.astype(jnp.float16), 2, "A", "takes float32 and bfloat16, not float16"),
        ("tpu", jnp.ones((1, 2**17)), 2, "A", "at most 21845 channels"),
        ("gpu", jnp.ones((3, 16)), 2, "A", "groups of 16 to 8192 channels, not 8"),
        ("gpu", jnp.ones((3, 2**15)), 2, "A", "groups of 16 to 8192 channels, not 16384"),
    ],
)
def test_kernels_say_what_they_do_not_take(impl, x, groups, form, word):
    with pytest.raises(NotImplementedError, match=word):
        rational(x, A, B, groups=groups, form=form, impl=impl, interpret=True)


def test_the_gpu_kernel_does_not_take_more_than_its_addresses():
    assert "2^31" in gpu.refusal((2**21, 1024), jnp.dtype("float32"), 8)
    assert gpu.refusal((2**20, 1024), jnp.dtype("float32"), 8) is None
    assert "float64" in gpu.refusal((3, 64), jnp.dtype("float64"), 1)
    assert tpu.refusal((3, 64), jnp.dtype("bfloat16"), 8) is None


def test_on_a_cpu_the_reference_is_chosen_and_it_says_why():
    assert choose(X, A, B, groups=2) == Choice("jnp", "there is no kernel for cpu")
    with pytest.raises(ValueError, match="b must be"):
        choose(X, A, B, groups=1)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_on_an_accelerator_its_kernel_is_chosen_and_a_program_for_the_cpu_still_runs(monkeypatch, platform):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert choose(X, A, B, groups=2) == Choice(platform, f"the default backend is {platform}")
    assert choose(X, A, B, groups=2, form="B") == Choice("jnp", 'the kernels compute form "A", not "B"')

    def loss(x, a, b, impl):
        return rational(x, a, b, groups=2, impl=impl).sum()

    for got, wanted in zip(*(jax.grad(loss, (0, 1, 2))(X, A, B, impl) for impl in ("auto", "jnp")), strict=True):
        np.testing.assert_array_equal(got, wanted)
    with jax.sharding.use_abstract_mesh(DEVICES[platform]):
        lowered = jax.jit(lambda *p: loss(*p, "auto")).trace(X, A, B).lower(lowering_platforms=(api.KERNELS[platform],))
    assert {"tpu": "tpu_custom_call", "gpu": "triton"}[platform] in lowered.as_text()


def test_a_jax_without_the_kernels_parts_falls_back_and_says_so(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def missing(kernel):
        raise ImportError("no triton")

    monkeypatch.setattr(api, "_backend", missing)
    impl, reason = choose(X, A, B, groups=2)
    assert (impl, "no triton" in reason) == ("jnp", True)


def test_an_empty_input_gives_an_empty_output():
    assert rational(X[:0], A, B, groups=2).shape == (0, 64)


def test_pallas_is_imported_only_for_a_kernel():
    code = (
        "import sys, mechlab, mechlab.kernels.rational, jax.numpy as jnp\n"
        "one = jnp.ones\n"
        "mechlab.kernels.rational.rational(one((2, 4)), one((1, 6)), one((2, 4)), groups=2)\n"
        "print([name for name in sys.modules if 'pallas' in name])"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "[]\n"
