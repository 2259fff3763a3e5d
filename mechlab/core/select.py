"""Selecting parameters by path: globs over the slash-separated paths of a pytree.

``blocks/attn/*`` matches one level, ``**`` any number of levels, ``[qkv]`` one of these letters, ``a|b`` either
pattern: ``**/kernel`` is every kernel. A pattern that matches nothing is an error, because a silent no-op on parameters
looks exactly like a method that does not work.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mechlab.core.errors import unknown


def paths(tree: Any) -> list[str]:
    """The path of every leaf, e.g. ``"blocks/attn/q/kernel"``, in the order of ``jax.tree.leaves``."""
    return [_path(keys) for keys, _ in jax.tree.leaves_with_path(tree)]


def get(tree: Any, pattern: str) -> dict[str, Any]:
    """The leaves whose path matches, by path.

    Args:
      tree: any pytree.
      pattern: a glob; several may be joined by ``|``.

    Raises:
      KeyError: if nothing matches, with the nearest path.

    >>> get({"a": {"kernel": 1, "bias": 2}}, "*/kernel")
    {'a/kernel': 1}
    """
    found = matching(tree, pattern)
    if not found:
        raise unknown("parameter path", pattern, paths(tree))
    return found


def matching(tree: Any, pattern: str) -> dict[str, Any]:
    """Like ``get``, but possibly empty."""
    return {_path(keys): leaf for keys, leaf in jax.tree.leaves_with_path(tree) if _matches(pattern, _path(keys))}


def map_at(tree: Any, pattern: str, function: Callable[[Any], Any]) -> Any:
    """A copy of the tree with ``function`` applied to the leaves whose path matches; the rest is shared.

    Raises:
      KeyError: if nothing matches.
    """
    get(tree, pattern)
    return jax.tree.map_with_path(lambda keys, leaf: function(leaf) if _matches(pattern, _path(keys)) else leaf, tree)


def put(tree: Any, values: dict[str, Any]) -> Any:
    """A copy of the tree with the leaves at the given exact paths replaced.

    Raises:
      KeyError: for a path that the tree does not have.
      ValueError: for a leaf of another shape.
    """
    leaves = dict(zip(paths(tree), jax.tree.leaves(tree), strict=True))
    for path, value in values.items():
        if path not in leaves:
            raise unknown("parameter path", path, leaves)
        if np.shape(value) != np.shape(leaves[path]):
            raise ValueError(f'"{path}" has shape {np.shape(leaves[path])}, got {np.shape(value)}.')
    return jax.tree.unflatten(jax.tree.structure(tree), list((leaves | values).values()))


def mask(tree: Any, pattern: str) -> Any:
    """A tree of booleans, true where the path matches: for ``optax.masked`` and friends."""
    get(tree, pattern)
    return jax.tree.map_with_path(lambda keys, _: _matches(pattern, _path(keys)), tree)


def count(tree: Any, pattern: str = "**") -> int:
    """How many numbers the matching leaves hold.

    >>> count({"kernel": np.zeros((3, 4)), "bias": np.zeros(4)})
    16
    """
    return sum(int(np.prod(np.shape(leaf))) for leaf in get(tree, pattern).values())


def as_matrix(kernel: jax.Array, *, inputs: int = 1) -> jax.Array:
    """A kernel as a matrix (in, out).

    Args:
      kernel: input axes first, then output axes: (D, H, K) for q, k, v; (H, K, D) for o.
      inputs: number of input axes: 1 for q, k, v and plain layers, 2 for o. Map over a layer axis with ``jax.vmap``.

    Returns:
      (in, out); ``matrix.reshape(kernel.shape)`` is the way back.
    """
    if not 0 < inputs < kernel.ndim:
        raise ValueError(f"inputs must be between 1 and {kernel.ndim - 1} for shape {kernel.shape}, got {inputs}.")
    return kernel.reshape(int(np.prod(kernel.shape[:inputs])), -1)


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _matches(pattern: str, path: str) -> bool:
    return any(_compiled(part).fullmatch(path) for part in pattern.split("|"))


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    # "**/" may also stand for no level at all, so that "**/kernel" matches a kernel at the top.
    tokens = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}
    parts = re.split(r"(\*\*/|\*\*|\*|\[\w+\])", pattern)
    return re.compile("".join(tokens.get(p, p if p.startswith("[") else re.escape(p)) for p in parts))
