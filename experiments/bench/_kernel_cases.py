"""What the benchmark of the kernels runs: for each operation its weights, layer after layer, and the alternatives.

An alternative is a function of the input and of one layer's weights, with a stack of those weights in the form that it
wants. Layers are distinct, so that no cache holds them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.rng import stream
from mechlab.kernels import fake_quant, norm_int8, sparse_matvec, w4a16, w8a8
from mechlab.kernels.cost import Cost
from mechlab.kernels.dispatch import Choice
from mechlab.kernels.fake_quant.cost import backward_cost, forward_cost
from mechlab.kernels.norm_int8.cost import cost as norm_cost
from mechlab.kernels.sparse_matvec.cost import cost as sparse_cost
from mechlab.kernels.w4a16.cost import cost as w4a16_cost
from mechlab.kernels.w8a8.cost import cost as w8a8_cost

KEY = jax.random.key(0)
OURS = "ours"
GROUP = 128
BITS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Attributes:
      name: such as "w8a8, 16 x 4096 x 4096".
      choice: the backend that ours takes here, and why.
      cost: of one layer.
      x: the input of all layers.
      ways: by name a function ``(x, layer)`` and the layers' weights, stacked; the first is ours.
      same: the alternatives that compute the same numbers as ours.
    """

    name: str
    choice: Choice
    cost: Cost
    x: jax.Array
    ways: dict[str, tuple[Callable[[jax.Array, Any], Any], Any]]
    same: tuple[str, ...]


def cases(size: Any) -> Iterator[Case]:
    """All operations, one case after another, so that only one holds memory at a time; size as in ``kernels.SIZES``."""
    for m in size.rows:
        yield _w8a8(size, m)
        yield _w4a16(size, m)
    yield _norm(size)
    yield from _fake_quant(size)
    for density in size.densities:
        yield _sparse(size, density)


def _w8a8(size: Any, m: int) -> Case:
    k, n, layers = size.inputs, size.outputs, size.layers
    x = _normal("x", (m, k), size.dtype)
    fixed = _codes("x", (m, k))
    scales = 0.01 + jax.random.uniform(stream(KEY, "scales"), (layers, n))
    # The tensor cores of a GPU read (N, K); other platforms, and XLA, the matrix as it is.
    turned = jax.default_backend() == "gpu"
    w = _codes("w", (layers, n, k) if turned else (layers, k, n))

    def product(x: jax.Array, layer: Any, codes: jax.Array = fixed, **how: Any) -> jax.Array:
        del x
        w, scale = layer
        return w8a8.w8a8_matmul(codes, w.T if turned else w, scale, out_dtype=size.dtype, **how)

    def per_token(x: jax.Array, layer: Any) -> jax.Array:
        step = jnp.abs(x).max(1).astype(jnp.float32) / 127
        codes = jnp.round(x.astype(jnp.float32) / step[:, None]).astype(jnp.int8)
        return product(x, layer, codes, x_scale=step)

    shape = jax.ShapeDtypeStruct((k, n), jnp.int8)
    return Case(
        f"w8a8, {m} x {k} x {n}",
        w8a8.choose(fixed, shape, out_dtype=size.dtype),
        w8a8_cost(m, k, n, out_bytes=jnp.dtype(size.dtype).itemsize),
        x,
        {
            OURS: (product, (w, scales)),
            "XLA, int8": (functools.partial(product, impl="jnp"), (w, scales)),
            f"XLA, {size.dtype}": (jnp.matmul, _normal("w", (layers, k, n), size.dtype)),
            "ours, steps per token found on the spot": (per_token, (w, scales)),
        },
        ("XLA, int8",),
    )


def _w4a16(size: Any, m: int) -> Case:
    k, n, layers = size.inputs, size.outputs, size.layers
    x = _normal("x", (m, k), size.dtype)
    groups = (layers, k // GROUP, n)
    kernel = w4a16.Packed4(
        jax.random.randint(stream(KEY, "bytes"), (layers, k // 2, n), 0, 256, jnp.int32).astype(jnp.uint8),
        (0.01 + jax.random.uniform(stream(KEY, "scales"), groups)).astype(size.dtype),
        jax.random.randint(stream(KEY, "zeros"), groups, 0, 16).astype(size.dtype),
        block=GROUP,
        shape=(k, n),
    )
    four = (w4a16.unpack_int4(kernel.bytes, GROUP).astype(jnp.int8) - 8).astype(jnp.int4)

    def inline(x: jax.Array, layer: Any) -> jax.Array:
        codes, scale, zero = layer
        scale, zero = scale.repeat(GROUP, 0), zero.repeat(GROUP, 0)
        return x @ ((codes.astype(x.dtype) + 8 - zero) * scale)

    return Case(
        f"w4a16, {m} x {k} x {n}",
        w4a16.choose(x, jax.tree.map(lambda leaf: leaf[0], kernel)),
        w4a16_cost(m, k, n, GROUP, itemsize=x.dtype.itemsize, scale_bytes=x.dtype.itemsize),
        x,
        {
            OURS: (w4a16.w4a16_matmul, kernel),
            "XLA, unpacked in the product": (functools.partial(w4a16.w4a16_matmul, impl="jnp"), kernel),
            "XLA, jnp.int4": (inline, (four, kernel.scales, kernel.zeros)),
            f"XLA, {size.dtype}": (jnp.matmul, _normal("w", (layers, k, n), size.dtype)),
        },
        ("XLA, unpacked in the product",),
    )


def _norm(size: Any) -> Case:
    rows, width = size.matrix
    stack = _normal("stream", (size.layers, rows, width), size.dtype)
    gain = 40 * jnp.ones(width)

    def codes(_: jax.Array, x: jax.Array, **how: Any) -> jax.Array:
        return norm_int8.norm_int8(x, gain, centred=True, **how)

    def plain(_: jax.Array, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide - wide.mean(-1, keepdims=True)
        return (wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * gain).astype(x.dtype)

    return Case(
        f"norm_int8, {rows} x {width}",
        norm_int8.choose(stack[0]),
        norm_cost(rows, width, stack.dtype.itemsize),
        gain,
        {
            OURS: (codes, stack),
            "XLA": (functools.partial(codes, impl="jnp"), stack),
            f"XLA, {size.dtype} and no codes": (plain, stack),
        },
        ("XLA",),
    )


def _fake_quant(size: Any) -> Iterator[Case]:
    rows, width = size.matrix
    stack = _normal("w", (size.layers, rows, width), size.dtype)
    scales, upstream = jnp.full(rows, 0.5), _normal("upstream", (rows, width), size.dtype)

    def statsq(_: jax.Array, w: jax.Array, **how: Any) -> jax.Array:
        return fake_quant.statsq(w, bits=BITS, allow_dead=True, **how)

    def groups(_: jax.Array, w: jax.Array, **how: Any) -> jax.Array:
        return fake_quant.round_groups(w, bits=BITS, group=GROUP, **how)

    def lsq(s: jax.Array, x: jax.Array, **how: Any) -> jax.Array:
        return fake_quant.lsq(x, s, bits=BITS, **how)

    def backward(s: jax.Array, x: jax.Array, **how: Any) -> Any:
        return jax.vjp(lambda s, x: lsq(s, x, **how), s, x)[1](upstream)

    one_way, both = (cost(stack[0].size, stack.dtype.itemsize, rows) for cost in (forward_cost, backward_cost))
    grouped = jax.ShapeDtypeStruct((rows * width // GROUP, GROUP), stack.dtype)
    for name, function, cost, like in (
        ("statsq", statsq, one_way, stack[0]),
        (f"groups of {GROUP}", groups, one_way, grouped),
        ("lsq", lsq, one_way, stack[0]),
        ("gradient of lsq", backward, both, stack[0]),
    ):
        yield Case(
            f"{name}, {rows} x {width}",
            fake_quant.choose(like),
            cost,
            scales,
            {OURS: (function, stack), "XLA": (functools.partial(function, impl="jnp"), stack)},
            ("XLA",),
        )


def _sparse(size: Any, density: float) -> Case:
    k, n = size.inputs, size.outputs
    x = _normal("x", (k,), size.dtype)
    threshold = float(np.quantile(np.abs(np.asarray(x, np.float32)), 1 - density))
    on = np.abs(np.asarray(x, np.float32)) > threshold
    index = jnp.asarray(np.flatnonzero(on))
    w = _normal("w", (size.layers, k, n), size.dtype)
    slabs = w.reshape(size.layers, k, -1, 128) if jax.default_backend() == "tpu" else w

    def sparse(x: jax.Array, w: jax.Array, **how: Any) -> jax.Array:
        return sparse_matvec.sparse_matvec(x, w, threshold, **how)

    return Case(
        f"sparse_matvec, {k} x {n}, density {density}",
        sparse_matvec.choose(x, slabs[0]),
        sparse_cost(int(on.sum()), k, n, itemsize=x.dtype.itemsize),
        x,
        {
            OURS: (sparse, slabs),
            "XLA, dense": (jnp.matmul, w),
            "XLA, masked": (functools.partial(sparse, impl="jnp"), w),
            "XLA, rows gathered (their indices given)": (lambda x, w: x[index] @ w[index], w),
        },
        ("XLA, masked",),
    )


def _normal(name: str, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(stream(KEY, name), shape, dtype)


def _codes(name: str, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.randint(stream(KEY, name), shape, -127, 128, jnp.int8)
