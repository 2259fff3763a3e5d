"""Dopamine: Brain Modes, Not Brains (Ghasemlou 2026, arXiv 2602.11726): TauGate, threshold-and-gain tuning.

A frozen network is moved to a new mode by learning two numbers per hidden unit, a threshold tau (does the unit take
part?) and a gain gamma (how strongly?). With pre-activation z, activation phi and a fixed sharpness s::

    soft  g = sigmoid(s (z - tau))        in training
    hard  g = 1[z > tau]                  at inference; a unit at z = tau is closed
    h = gamma * g * phi(z)

This is the edit ``core.edits.Gate`` at the sites ``mlp_act`` of a perceptron (or ``conv_act``, one gate per channel).
At ``mlp_pre`` the same edit computes phi(gamma g z) instead, which for ReLU and gamma >= 0 is the same number.

Baselines from the same code: thresholds fixed at -inf leave only gains (IA3, arXiv 2205.05638); gains fixed at 1 leave
only thresholds. Bias tuning and full fine-tuning are ``core.transforms.tune``, LoRA is ``lora.py``.

Not in the paper, and our choice: initial tau = 0, gamma = 1, s = 10; the gate reads its own unit's pre-activation; the
penalty is averaged per layer, then summed, so that wide layers do not count more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from mechlab.core.edits import Gate
from mechlab.core.sites import SiteTable
from mechlab.core.transforms import AdapterState

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

Gates = Mapping[str, Gate]
PARTS = ("threshold", "gain")


def taugate_init(
    sites: SiteTable,
    *,
    site: str = "mlp_act",
    train: tuple[str, ...] = PARTS,
    threshold: float = 0.0,
    gain: float = 1.0,
) -> AdapterState:
    """Thresholds and gains of every unit at a site.

    Args:
      sites: ``model.sites``.
      site: where the gates sit, in every layer that has it; the last axis is the unit (or channel).
      train: which of "threshold" and "gain" are trained: ("gain",) with ``threshold=-inf`` is IA3.
      threshold, gain: initial values. Exact identity needs threshold -> -inf; 0 perturbs only 0 < z < 3/s under ReLU.

    Returns:
      ``AdapterState``; train and fixed are ``{site name: {"threshold": (F,), "gain": (F,)}}`` with each part in one of
      them: 2 F trained numbers per layer by default.

    Raises:
      KeyError: unknown site.
      ValueError: nothing to train, an unknown part, or a NaN initial value.
    """
    if not train or not set(train) <= set(PARTS):
        raise ValueError(f"taugate_init: train must name parts of {PARTS}, got {train}.")
    start = {"threshold": threshold, "gain": gain}
    if any(math.isnan(value) for value in start.values()):
        raise ValueError(f"taugate_init: initial values must not be NaN, got {start}.")

    def parts(names: tuple[str, ...]) -> dict[str, dict[str, jax.Array]]:
        widths = {entry.name: entry.value.shape[-1] for entry in sites.named(site)}
        return {at: {name: jnp.full(width, start[name]) for name in names} for at, width in widths.items()}

    return AdapterState(parts(train), parts(tuple(name for name in PARTS if name not in train)))


def taugate_edits(
    state: AdapterState,
    *,
    sharpness: float | jax.Array = 10.0,
    hard: bool = False,
    straight_through: bool = False,
    positive_gain: bool = False,
) -> dict[str, Gate]:
    """The state as edits for ``model.apply({"params": ..., "edits": ...}, x)``.

    Args:
      state: from ``taugate_init``, possibly trained.
      sharpness: s > 0, finite; may be traced (annealing, or a ``vmap`` over values).
      hard: use 1[z > tau]. Its gradient with respect to tau is zero, so differentiating tau is refused.
      straight_through: hard forward, soft backward.
      positive_gain: use softplus(gain), for a gain that cannot turn negative.

    Returns:
      ``{site name: Gate}``.

    Raises:
      ValueError: sharpness not positive and finite, or NaN thresholds (under ``jit``: only inside ``checkify``).
    """
    _check(sharpness, lambda xp, s: xp.isfinite(s) & (s > 0), "sharpness must be positive and finite")
    gates = {}
    for name in state.train:
        both = state.train[name] | dict(state.fixed).get(name, {})
        _check(both["threshold"], lambda xp, t: ~xp.isnan(t), f'the thresholds at "{name}" must not be NaN')
        gain = jax.nn.softplus(both["gain"]) if positive_gain else both["gain"]
        gates[name] = Gate(both["threshold"], gain, jnp.asarray(sharpness), hard, straight_through)
    return gates


def taugate_apply(
    z: Float[Array, "... F"], activation: Float[Array, "... F"], gate: Gate
) -> tuple[Float[Array, "... F"], Float[Array, "... F"]]:
    """One gated layer on its own: h = gamma g phi(z), and g.

    Args:
      z: pre-activation.
      activation: phi(z).
      gate: thresholds and gains (F,).

    Returns:
      h and g, shaped like z.
    """
    if z.shape != activation.shape or z.shape[-1:] != jnp.shape(gate.threshold):
        raise ValueError(
            f"taugate_apply: z {z.shape}, activation {activation.shape} and thresholds {jnp.shape(gate.threshold)} "
            "must agree in their last axis."
        )
    g = gate.open(z)
    return gate.gain * g * activation, g


def taugate_harden(gates: Gates) -> dict[str, Gate]:
    """The same thresholds and gains with the hard gate of inference."""
    return {name: dataclasses.replace(gate, hard=True, straight_through=False) for name, gate in gates.items()}


def taugate_to_mask(gates: Gates, pre: Mapping[str, Array]) -> dict[str, Bool[Array, "... F"]]:
    """Which units are open: z > tau, by gate.

    Args:
      gates: from ``taugate_edits``.
      pre: pre-activations by gate, see ``pre_activations``.
    """
    return {name: pre[name] > gate.threshold for name, gate in gates.items()}


def pre_activations(gates: Gates, acts: Mapping[str, Array]) -> dict[str, Array]:
    """The pre-activation that each gate reads, from captured sites.

    Args:
      gates: from ``taugate_edits``.
      acts: what ``model.capture(..., sites=("mlp_pre",))`` returned.
    """
    return {name: acts[name.replace("_act", "_pre")] for name in gates}


def gate_penalty(gates: Gates, pre: Mapping[str, Array]) -> Float[Array, ""]:
    """Sum over layers of the mean openness; times lambda_g it is the sparsity term of the loss."""
    return sum((gate.open(pre[name]).mean() for name, gate in gates.items()), start=jnp.zeros(()))


def annealed_sharpness(step: jax.Array | int, steps: int, start: float = 10.0, end: float = 50.0) -> jax.Array:
    """Sharpness rising geometrically from ``start`` at step 0 to ``end`` at the last step."""
    return start * (end / start) ** (jnp.asarray(step) / max(steps - 1, 1))


def activity(gates: Gates, pre: Mapping[str, Array]) -> dict[str, Array]:
    """How much of the network takes part: the three readings of "strongly active", and the ReLU alone.

    Args:
      gates: soft gates.
      pre: pre-activations (B, F) by gate.

    Returns:
      Shares in [0, 1] over all layers: ``pairs_half`` and ``pairs_strong``, (sample, unit) pairs with g > 0.5 and
      g > 0.9; ``units_strong``, units whose mean g over samples is above 0.9; ``units_often``, units open (z > tau) in
      more than half of the samples; ``relu``, pairs with z > 0.
    """
    opened = [gate.open(pre[name]) for name, gate in gates.items()]
    takes_part = taugate_to_mask(gates, pre).values()
    pairs = jnp.concatenate([g.reshape(-1) for g in opened])
    return {
        "pairs_half": (pairs > 0.5).mean(),
        "pairs_strong": (pairs > 0.9).mean(),
        "units_strong": (jnp.concatenate([g.mean(0) for g in opened]) > 0.9).mean(),
        "units_often": (jnp.concatenate([g.mean(0) for g in takes_part]) > 0.5).mean(),
        "relu": (jnp.concatenate([pre[name].reshape(-1) for name in gates]) > 0).mean(),
    }


def skipped(gates: Gates, pre: Mapping[str, Array]) -> dict[str, Float[Array, ""]]:
    """Per gate, the share of (sample, unit) pairs that the hard gate closes.

    A closed unit's row of the next kernel need not be read: that share of the next layer's multiply-adds is saved.
    Computing z still costs the gated layer's own product in full.
    """
    return {name: 1 - opened.mean() for name, opened in taugate_to_mask(gates, pre).items()}


def gathered_product(
    h: Float[Array, " F"], opened: Bool[Array, " F"], kernel: Float[Array, "F C"], capacity: int
) -> Float[Array, " C"]:
    """h @ kernel of one sample, reading only the rows of open units: conditional computation, as a demonstration.

    Args:
      h: gated activations, 0 where ``opened`` is false.
      opened: hard gate.
      kernel: of the next layer.
      capacity: rows to read; with more open units than this, the surplus is dropped.
    """
    rows = jnp.nonzero(opened, size=capacity, fill_value=h.shape[0])[0]
    return h.at[rows].get(mode="fill", fill_value=0) @ kernel.at[rows].get(mode="fill", fill_value=0)


def firing(gate: Gate, z: Float[Array, "B F"]) -> Float[Array, " F"]:
    """Firing frequency p_i = mean over samples of 1[z_i > tau_i]."""
    return (z > gate.threshold).mean(0)


def class_contribution(h: Float[Array, "B F"], kernel: Float[Array, "F C"]) -> Float[Array, "F C"]:
    """C_ic = mean over samples of h_i W[i, c]: what unit i of the last hidden layer adds to the logit of class c."""
    return h.mean(0)[:, None] * kernel


def rank_units(h: Float[Array, "B F"], kernel: Float[Array, "F C"], logits: Float[Array, "B C"]) -> Int[Array, "B F"]:
    """Per sample, the units of the last hidden layer sorted by ``|h_i W[i, predicted class]|``, strongest first."""
    predicted = logits.argmax(-1)
    return jnp.argsort(-jnp.abs(h * kernel.T[predicted]), axis=-1, stable=True)


def keep_without(ranked: Int[Array, "B F"], closed: int) -> Bool[Array, "B F"]:
    """A mask for ``core.edits.Mask`` that closes the first ``closed`` units of each sample's ranking."""
    return jax.vmap(lambda units: jnp.ones(units.shape, bool).at[units[:closed]].set(False))(ranked)


def _check(value: Any, holds: Callable[[Any, Any], Any], message: str) -> None:
    if isinstance(value, jax.core.Tracer):
        # A no-op unless the caller runs under checkify.
        checkify.debug_check(jnp.all(holds(jnp, value)), f"taugate: {message}.")
    elif not np.all(holds(np, np.asarray(value))):
        raise ValueError(f"taugate: {message}, got {value}.")
