"""Weight-space methods: transforms of parameters, and adapters that train a small state instead of the parameters.

A transform is any function ``params -> params``. An adapter is a pair in the style of optax::

    lora = lora_adapter(rank=4)
    state = lora.init(key, params)
    adapted = lora.merge(params, state)          # plain parameters again, for any model
    gradient = jax.grad(on_state(lora, params, loss))(state.train, state.fixed)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from mechlab.core import select

Params = Any
Transform = Callable[[Params], Params]


class AdapterState(NamedTuple):
    """What an adapter owns.

    Attributes:
      train: pytree of arrays that are trained.
      fixed: pytree of arrays that the merge needs and nobody trains (initial factors, scales); ``()`` if none.
    """

    train: Any
    fixed: Any = ()


class Adapter(NamedTuple):
    """A parameter-efficient method as two pure functions.

    Attributes:
      init: ``init(key, params) -> AdapterState``.
      merge: ``merge(params, state) -> params``, same structure, shapes and dtypes; the input is not changed.
    """

    init: Callable[[jax.Array, Params], AdapterState]
    merge: Callable[[Params, AdapterState], Params]


def compose(*transforms: Transform) -> Transform:
    """The transforms one after the other: ``compose(f, g)(params) == g(f(params))``.

    >>> compose(lambda p: p + 1, lambda p: p * 10)(2)
    30
    """
    return lambda params: functools.reduce(lambda p, transform: transform(p), transforms, params)


def on_state(adapter: Adapter, params: Params, loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss as a function of the adapter's state alone: ``(train, fixed, *args) -> loss(merged, *args)``.

    The parameters are constants of the returned function: they get no gradient and no optimiser state.
    """

    def of_state(train: Any, fixed: Any, *args: Any) -> Any:
        return loss(adapter.merge(params, AdapterState(train, fixed)), *args)

    return of_state


def tune(pattern: str) -> Adapter:
    """The adapter that trains the parameters whose path matches, each through its change from the given value.

    ``tune("**")`` is full fine-tuning, ``tune("**/bias")`` is bias tuning (BitFit). The state holds
    the change of each parameter, initially 0.

    Args:
      pattern: glob over parameter paths, see ``core/select.py``.
    """

    def init(key: jax.Array, params: Params) -> AdapterState:
        return AdapterState({path: jax.numpy.zeros_like(leaf) for path, leaf in select.get(params, pattern).items()})

    def merge(params: Params, state: AdapterState) -> Params:
        chosen = select.get(params, pattern)
        return select.put(params, {path: chosen[path] + change for path, change in state.train.items()})

    return Adapter(init, merge)
