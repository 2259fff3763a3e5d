"""AdaDim: the direction of quantisation groups, chosen for every kernel (Heo et al. 2023, ICLR 2024, arXiv 2309.15531).

Activation outliers sit in input channels. With groups along the inputs of an output ("oc", the convention) the weights
of such a channel spoil the step of a group in every output; with groups along the outputs of an input ("ic") they have
steps of their own. But weights are sensitive for other reasons too, so for every kernel the direction is the one with
the smaller error of the inspected module F on calibration texts (``decoders.inspect``), all other kernels as they are::

    L_d = mean (F(x; W) - F(x; Q_d(W)))^2,    d in {oc, ic},    "oc" on ties                              (RTN-ada)

GPTQ-ada takes the direction found so and rounds by GPTQ: groups fixed beforehand and inputs in the order of falling
activity for "oc"; for "ic" the order is free, since a group is made when its input's turn comes.

Differs from the released code: the reference F is that of the unquantised block, and siblings are not quantised while
one is tried.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.kernel_forms import QTensor
from mechlab.core.model import Model
from mechlab.methods.compression.decoders import Place, calibrate, inspect, kernel_of, places, with_kernels
from mechlab.methods.compression.gptq import gptq, hessian
from mechlab.methods.compression.rounding import AXES, quantise, require_group
from mechlab.models.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Float, Int


class Choice(NamedTuple):
    """What was found for one kernel, over layers.

    Attributes:
      losses: (L, 2), of "oc" and "ic".
      axis: (L,) strings.
    """

    losses: np.ndarray
    axis: np.ndarray


def choose_dim(
    model: Model, params: Any, acts: dict[str, jax.Array], *, bits: int, group: int | None
) -> dict[str, Choice]:
    """The direction of every kernel and layer, by its name.

    Args:
      model, params: a decoder.
      acts: from ``decoders.calibrate``.
      bits, group: of the grid, plain asymmetric.

    Raises:
      ValueError: a group that does not divide both sides of a kernel, named.
    """
    config = model.module.config
    for place in places(config):
        _require_group(place, kernel_of(params, place), group, AXES)
    losses = {
        place.name: np.asarray(_losses(config, params["blocks"], place, acts[place.site], bits=bits, group=group))
        for place in places(config)
    }
    return {name: Choice(found, np.asarray(AXES)[found.argmin(1)]) for name, found in losses.items()}


def adadim(
    model: Model,
    params: Any,
    tokens: Int[ArrayLike, "B T"],
    *,
    bits: int,
    group: int | None,
    method: str = "rtn",
    axis: str | None = None,
) -> tuple[Any, dict[str, Choice]]:
    """A decoder whose blocks' kernels are quantised, each along its own direction.

    Args:
      model, params: a decoder.
      tokens: calibration texts (B, T), without padding.
      bits, group: of the grid.
      method: "rtn" or "gptq".
      axis: one direction for all kernels, "oc" or "ic", instead of the chosen ones: the baselines.

    Returns:
      Parameters with a dequantised kernel where layers differ in direction, since their scales have different shapes,
      and a ``QTensor`` where all layers of a kernel agree; and the choices, none where ``axis`` is given.

    Raises:
      ValueError: another method or axis; as ``choose_dim``, ``rounding.quantise`` and ``gptq``.
    """
    if method not in ("rtn", "gptq"):
        raise ValueError(f'adadim: method must be "rtn" or "gptq", got "{method}".')
    config = model.module.config
    acts = calibrate(model, params, tokens)
    chosen = choose_dim(model, params, acts, bits=bits, group=group) if axis is None else {}
    kernels = {}
    for place in places(config):
        kernel = kernel_of(params, place)
        if axis is not None:
            _require_group(place, kernel, group, (axis,))
        axes = chosen[place.name].axis if axis is None else np.repeat(axis, config.layers)
        layers = [
            _round(kernel[layer], acts[place.site][layer], str(axes[layer]), place.inputs, bits, group, method)
            for layer in range(config.layers)
        ]
        same = len(set(axes.tolist())) == 1
        kernels[place.name] = jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *(layers if same else [q.dequantise() for q in layers])
        )
    return with_kernels(params, kernels), chosen


def _round(kernel: Any, x: Any, axis: str, inputs: int, bits: int, group: int | None, method: str) -> QTensor:
    if method == "rtn":
        return quantise(kernel, bits=bits, group=group, axis=axis, inputs=inputs)
    h = hessian(x.reshape(-1, int(np.prod(x.shape[2:]))))
    options = {"static_groups": True} if axis == "oc" else {}
    return gptq(kernel, h, bits=bits, group=group, axis=axis, act_order=True, inputs=inputs, **options)


@functools.partial(jax.jit, static_argnames=("config", "place", "bits", "group"))
def _losses(config: TransformerConfig, blocks: Any, place: Place, x: Any, *, bits: int, group: int | None) -> jax.Array:
    of, part = place.name.split("/")

    def one(params: Any, x: jax.Array, layer: jax.Array) -> jax.Array:
        output = inspect(config, place.site, params, x, layer)
        kernel = params[part]["kernel"]
        wanted = output({part: kernel})

        def loss(axis: str) -> jax.Array:
            rounded = quantise(kernel, bits=bits, group=group, axis=axis, inputs=place.inputs).dequantise()
            return jnp.square(output({part: rounded}) - wanted).mean()

        return jnp.stack([loss(axis) for axis in AXES])

    return jax.lax.map(lambda args: one(*args), (blocks[of], x, jnp.arange(config.layers)))


def channel_sensitivity(
    kernel: Float[ArrayLike, "I O"], gradient: Float[ArrayLike, "I O"], *, bits: int, group: int | None, axis: str
) -> tuple[jax.Array, jax.Array]:
    """How much rounding the weights of each input (I,), and of each output (O,), costs: sum of (gradient x error)^2.

    Args:
      kernel, gradient: (in, out), and that of the loss.
      bits, group, axis: of the grid.
    """
    error = quantise(jnp.asarray(kernel), bits=bits, group=group, axis=axis).dequantise() - jnp.asarray(kernel)
    cost = jnp.square(jnp.asarray(gradient) * error)
    return cost.sum(1), cost.sum(0)


def _require_group(place: Place, kernel: Any, group: int | None, axes: tuple[str, ...]) -> None:
    shape = kernel.shape[1:]
    size = int(np.prod(shape[: place.inputs])), int(np.prod(shape[place.inputs :]))
    for axis in axes:
        try:
            require_group(size, group, axis)
        except ValueError as error:
            raise ValueError(f"{place.name}: {error}") from error
