"""Every kernel against the reference, forward and gradients, in interpret mode; and compiled for what is not here."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mechlab.kernels.rational import gpu, rational, reference, tpu
from tests.kernels.devices import DEVICES

KERNELS = {"tpu": tpu, "gpu": gpu}
SHAPES = {
    "ragged": (37, 96, 2, True),
    "no_power_of_two": (21, 5 * 24, 5, False),
    "one_row_and_group": (1, 100, 1, True),
    "several_blocks": (600, 256, 8, True),
}


def draw(n: int, width: int, groups: int, shared: bool = True, dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(n + width), 4)
    x, upstream = (jax.random.normal(key, (n, width)).astype(dtype) for key in keys[:2])
    a = jax.random.normal(keys[2], (1 if shared else groups, 6))
    # A denominator of zeros, as after initialisation with the identity, and an input of 0.
    b = jax.random.normal(keys[3], (groups, 4)).at[-1].set(0)
    return x.at[0, 0].set(0), a, b, upstream


@functools.partial(jax.jit, static_argnums=0)
def run(impl: str, x: jax.Array, a: jax.Array, b: jax.Array, upstream: jax.Array) -> tuple[jax.Array, ...]:
    call = functools.partial(rational, groups=b.shape[0], impl=impl, interpret=impl != "jnp")
    y, pull = jax.vjp(call, x, a, b)
    return (y, *pull(upstream))


def assert_close(got: tuple[jax.Array, ...], wanted: tuple[jax.Array, ...], forward: float, gradients: float) -> None:
    for name, one, other in zip(("y", "dx", "da", "db"), got, wanted, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype), name
        tolerance = forward if name == "y" else gradients
        one, other = (np.asarray(array, np.float64) for array in (one, other))
        scale = np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", KERNELS)
def test_kernels_equal_the_reference(impl, shape):
    arrays = draw(*SHAPES[shape])
    assert_close(run(impl, *arrays), run("jnp", *arrays), 1e-6, 1e-5)


@pytest.mark.parametrize("impl", KERNELS)
def test_bfloat16_is_computed_in_float32_and_rounded_once(impl):
    x, a, b, upstream = draw(37, 96, 4, dtype=jnp.bfloat16)
    got = run(impl, x, a, b, upstream)
    wide = run("jnp", x.astype(jnp.float32), a, b, upstream.astype(jnp.float32))
    # One rounding to bfloat16 at the end: half of 2^-7 of each value.
    for one, other in zip(got[:2], wide[:2], strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=2**-8 + 1e-5, atol=1e-6)
    assert_close(got[2:] * 2, wide[2:] * 2, 1e-5, 1e-5)


@pytest.mark.parametrize("impl", KERNELS)
def test_kernels_may_be_mapped(impl):
    x, a, b, upstream = draw(10, 64, 2)
    stacks = jnp.stack([x, 2 * x, -x]), jnp.stack([b, b + 1, b - 1])

    def mapped(impl):
        return jax.vmap(lambda x, b: run(impl, x, a, b, upstream))(*stacks)

    assert_close(mapped(impl), mapped("jnp"), 1e-6, 1e-5)


@pytest.mark.parametrize("impl", ["jnp", *KERNELS])
def test_gradients_are_summed_over_devices(impl):
    x, a, b, upstream = draw(16, 64, 2)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def loss(x, a, b, upstream):
        return jax.lax.psum((run_forward(x, a, b) * upstream).sum(), "data")

    run_forward = functools.partial(rational, groups=2, impl=impl, interpret=impl != "jnp")
    # jax's interpreter of Pallas does not track which values differ between devices; compiled kernels do.
    sharded = jax.shard_map(
        loss, mesh=mesh, in_specs=(P("data"), P(), P(), P("data")), out_specs=P(), check_vma=impl == "jnp"
    )
    got = jax.jit(jax.grad(sharded, (0, 1, 2)))(x, a, b, upstream)
    assert_close((x, *got), (x, *run("jnp", x, a, b, upstream)[1:]), 0, 1e-5)


@pytest.mark.parametrize("step", ["forward", "backward"])
@pytest.mark.parametrize(
    "sizes", [(64 * 197, 3072, 8, jnp.bfloat16), (148, 96, 4, jnp.float32), (5, 100, 1, jnp.bfloat16)]
)
@pytest.mark.parametrize(("impl", "platform", "call"), [("tpu", "tpu", "tpu_custom_call"), ("gpu", "cuda", "triton")])
def test_kernels_lower_for_their_platform_without_it(impl, platform, call, sizes, step):
    x, a, b, upstream = jax.eval_shape(lambda: draw(*sizes[:3], dtype=sizes[3]))
    arguments = (x, a, b) if step == "forward" else (x, a, b, upstream)
    with jax.sharding.use_abstract_mesh(DEVICES[impl]):
        lowered = jax.jit(getattr(KERNELS[impl], step)).trace(*arguments).lower(lowering_platforms=(platform,))
    assert call in lowered.as_text()


@pytest.mark.parametrize(("impl", "platform"), [("tpu", "tpu"), ("gpu", "cuda")])
def test_kernels_lower_inside_shard_map(impl, platform):
    x, a, b, _ = jax.eval_shape(lambda: draw(16, 64, 2))
    mesh = DEVICES[impl].update(axis_sizes=(4,), axis_names=("data",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(KERNELS[impl].forward, in_specs=(P("data"), P(), P()), out_specs=P("data"))
    with jax.sharding.use_abstract_mesh(mesh):
        assert jax.jit(sharded).trace(x, a, b).lower(lowering_platforms=(platform,)).as_text()


def test_blocks_fit_the_budget_whatever_the_width():
    for width in (1, 96, 768, 3072, 20_000):
        for itemsize in (2, 4):
            rows = tpu.block_rows(10**6, width, itemsize, 3)
            assert rows % tpu.STRIP == 0 < rows
            refused = tpu.refusal((10**6, width), jnp.dtype("bfloat16" if itemsize == 2 else "float32"), 1)
            assert refused or 2 * 3 * rows * width * itemsize <= tpu.VMEM
    assert tpu.block_rows(3, 768, 4, 2) == tpu.STRIP


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, which compiles without a TPU")
def test_the_tpu_kernels_compile_ahead_of_time():
    code = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from mechlab.kernels.rational import tpu

device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
for n, width, dtype in ((64 * 197, 3072, jnp.bfloat16), (148, 96, jnp.float32)):
    place = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))
    x, a, b = place((n, width), dtype), place((1, 6), jnp.float32), place((8, 4), jnp.float32)
    jax.jit(tpu.forward).lower(x, a, b).compile()
    jax.jit(tpu.backward).lower(x, a, b, x).compile()
print("compiled")
"""
    environment = os.environ | {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.endswith("compiled\n"), done.stderr[-2000:]


def test_what_is_kept_for_the_backward_pass_is_the_input():
    x, a, b, _ = draw(64, 96, 2)

    def kept(function: Any) -> int:
        pull = jax.eval_shape(lambda *arrays: jax.vjp(function, *arrays)[1], x, a, b)
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert kept(functools.partial(rational, groups=2)) == x.size + a.size + b.size
    assert kept(reference.forward) > 4 * x.size
