"""Places in a model, as the arrays that limit an edit to them: positions to intervals, indices to weights.

Concrete indices are checked; traced ones cannot be, and turn into NaN where they are out of range.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def intervals(position: Any, span: tuple[Any, Any] | None) -> dict[str, Any]:
    """Positions, or a span, as the half-open intervals ``start``, ``stop`` of ``edits.Placed``; {} for all."""
    if position is None and span is None:
        return {}
    if position is not None and span is not None:
        raise ValueError("give position= or span=, not both.")
    if span is not None:
        if not any(isinstance(bound, jax.core.Tracer) for bound in span):
            first, last = (whole(bound, "span") for bound in span)
            if (first < 0).any() or (first >= last).any():
                raise ValueError(f"span must be (start, stop) with 0 <= start < stop, got {span}.")
        start, stop = (jnp.asarray(bound)[..., None] for bound in span)
        return {"start": start, "stop": stop}
    if not isinstance(position, jax.core.Tracer) and (whole(position, "position") < 0).any():
        raise ValueError(f"position counts from the start of the text and cannot be negative, got {position}.")
    positions = jnp.atleast_1d(jnp.asarray(position))
    return {"start": positions, "stop": positions + 1}


def whole(index: Any, kind: str) -> np.ndarray:
    """Concrete indices as an array (n,), n >= 1; TypeError for anything but whole numbers."""
    numbers = np.atleast_1d(np.asarray(index))
    if numbers.size == 0:
        raise ValueError(f"{kind} must name at least one, got {index}.")
    if not np.issubdtype(numbers.dtype, np.integer):
        raise TypeError(f"{kind} must be whole numbers, got {index}.")
    return numbers


def indices(index: Any, size: int, kind: str, name: str) -> list[int]:
    """Concrete indices in 0..size-1, negative ones from the end; ``kind`` and ``name`` are for messages."""
    numbers = [int(i) for i in whole(index, kind)]
    for i in numbers:
        if not -size <= i < size:
            raise ValueError(f'{kind} {i} is out of range: site "{name}" has {size} {kind}s (0..{size - 1}).')
    return [i % size for i in numbers]


def hot(index: Any, size: int, kind: str, name: str) -> jax.Array:
    """(size,) float: 1 at the given indices, concrete or traced."""
    if not isinstance(index, jax.core.Tracer):
        index = np.asarray(indices(index, size, kind, name))
    index = jnp.atleast_1d(index)
    hot = (jnp.arange(size) == jnp.where(index < 0, index + size, index)[:, None]).any(0)
    # A traced index cannot be refused; out of range it must not look like an edit without effect.
    return jnp.where(((index >= -size) & (index < size)).all(), hot.astype(jnp.float32), jnp.nan)
