"""Named random streams: one root key, one independent key per purpose.

``stream(key, "init")`` folds a stable hash of the name into the key, so adding a stream never changes another one,
and the same name gives the same numbers on every machine and in every Python process.
"""

from __future__ import annotations

import hashlib

import jax


def stream(key: jax.Array, *names: str | int) -> jax.Array:
    """The key of a named stream.

    Args:
      key: typed key (``jax.random.key``), scalar; use ``jax.vmap`` for a batch of keys.
      *names: strings or non-negative integers, folded in from left to right.

    Returns:
      A typed key, scalar.

    Raises:
      TypeError: for a legacy ``uint32`` key.

    >>> root = jax.random.key(0)
    >>> bool(stream(root, "init") == stream(root, "data"))
    False
    """
    require_typed(key)
    for name in names:
        key = jax.random.fold_in(key, _stable_hash(name) if isinstance(name, str) else name)
    return key


def streams(key: jax.Array, names: str) -> tuple[jax.Array, ...]:
    """One key per blank-separated name: ``init, data = streams(key, "init data")``.

    Args:
      key: typed key, scalar.
      names: blank-separated names, all different.

    Returns:
      The keys, in the order of the names.

    Raises:
      ValueError: if a name comes twice (the two streams would be the same numbers).
    """
    listed = names.split()
    if len(set(listed)) != len(listed):
        raise ValueError(f"streams: every name may come once, got {names!r}.")
    return tuple(stream(key, name) for name in listed)


def require_typed(key: jax.Array) -> None:
    """Refuse anything but a typed key from ``jax.random.key``.

    Raises:
      TypeError: for a legacy ``uint32`` key, a number, or anything else.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        given = f"an array of dtype {dtype}" if dtype is not None else repr(key)
        raise TypeError(f"expected a typed key from jax.random.key, got {given}.")


def _stable_hash(name: str) -> int:
    # Python's own hash() differs between processes.
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
