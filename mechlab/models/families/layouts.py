"""How a checkpoint's tensor holds one or more of our parameters, in both directions.

PyTorch's linear maps store (out, in), GPT-2's (in, out); ours are kernels with input axes first and heads as an axis of
their own (``models/transformer.py``). Some checkpoints keep q, k and v, or gate and up, in one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """A pair of inverse functions.

    Attributes:
      split: ``split(tensor, shapes) -> arrays`` of these shapes, ours, in order.
      join: ``join(arrays) -> tensor``; traceable, so that the tensor's shape follows from ours.
    """

    split: Callable[[np.ndarray, Sequence[Shape]], list[np.ndarray]]
    join: Callable[[Sequence[Any]], Any]


def _matrix(*, inputs: int = 1, transposed: bool = True) -> Layout:
    """Kernels with ``inputs`` input axes side by side along the output, (out, in) if ``transposed``, else (in, out)."""

    def split(tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        matrix = tensor.T if transposed else tensor
        ends = np.cumsum([math.prod(shape[inputs:]) for shape in shapes])[:-1]
        return [part.reshape(shape) for part, shape in zip(np.split(matrix, ends, axis=1), shapes, strict=True)]

    def join(kernels: Sequence[Any]) -> Any:
        matrix = jnp.concatenate([k.reshape(math.prod(k.shape[:inputs]), -1) for k in kernels], axis=1)
        return matrix.T if transposed else matrix

    return Layout(split, join)


def _flat() -> Layout:
    """Arrays flattened and put behind each other: biases, norm scales."""

    def split(tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
        return [part.reshape(shape) for part, shape in zip(np.split(tensor, ends), shapes, strict=True)]

    return Layout(split, lambda arrays: jnp.concatenate([x.reshape(-1) for x in arrays]))


def _by_head(*, transposed: bool) -> Layout:
    """GPT-NeoX: for each head its q, k and v; kernels (D, H, K) in an (out, in) matrix, or biases (H, K)."""

    def split(tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        *front, width = shapes[0]
        parts = (tensor.T if transposed else tensor).reshape(*front, len(shapes), width)
        return [parts[..., i, :] for i in range(len(shapes))]

    def join(arrays: Sequence[Any]) -> Any:
        joined = jnp.stack(arrays, axis=-2)
        return joined.reshape(len(joined), -1).T if transposed else joined.reshape(-1)

    return Layout(split, join)


def _as_is(split: Callable[[np.ndarray], np.ndarray], join: Callable[[Any], Any]) -> Layout:
    return Layout(lambda tensor, shapes: [split(tensor)], lambda arrays: join(arrays[0]))


DENSE = _matrix()
DENSE_OUT = _matrix(inputs=2)
CONV1D = _matrix(transposed=False)
CONV1D_OUT = _matrix(inputs=2, transposed=False)
FLAT = _flat()
BY_HEAD = _by_head(transposed=True)
BY_HEAD_BIAS = _by_head(transposed=False)
SAME = _as_is(lambda x: x, lambda x: x)
# OPT's positions start at row 2. Row 1 is read at padding only, row 0 never: both are dropped, and zero when written.
FROM_ROW_2 = _as_is(lambda x: x[2:], lambda x: jnp.pad(x, ((2, 0), (0, 0))))
# A class token (1, 1, D), positions (1, T, D).
ONE_TOKEN = _as_is(lambda x: x[0, 0], lambda x: x[None, None])
ONE_IMAGE = _as_is(lambda x: x[0], lambda x: x[None])
# A convolution's (D, C, p, p) as a patch kernel (p, p, C, D).
PATCH = _as_is(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
