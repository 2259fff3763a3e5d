"""Splicing a sparse autoencoder into a model: read and change its features in the middle of a forward pass.

An autoencoder writes an activation x as a sparse sum of directions (Bricken et al. 2023, "Towards Monosemanticity";
Cunningham et al. 2023, arXiv 2309.08600)::

    f(x)  = ReLU((x - b_dec) W_enc + b_enc)            or the k largest of it (Gao et al. 2024, arXiv 2406.04093, eq. 1)
    x_hat = f(x) W_dec + b_dec

Spliced in, the model computes with x_hat. With the reconstruction error added back it computes with
``x_hat + (x - x_hat)``, and changes of features act alone (Marks et al. 2024, arXiv 2403.19647, section 3.1).

How autoencoders are trained is no matter of this module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct

from mechlab.core.edits import edit
from mechlab.core.sites import Context

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


@struct.dataclass
class SparseAutoencoder:
    """Parameters of an autoencoder; F is the number of features here.

    Attributes:
      encoder: (D, F), W_enc.
      encoder_bias: (F,), b_enc.
      decoder: (F, D), W_dec: row i is the direction that feature i writes.
      decoder_bias: (D,), b_dec.
      top_k: features that may be active at once, the largest; all that are positive where None.
    """

    encoder: Float[Array, "D F"]
    encoder_bias: Float[Array, " F"]
    decoder: Float[Array, "F D"]
    decoder_bias: Float[Array, " D"]
    top_k: int | None = struct.field(pytree_node=False, default=None)

    def encode(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        """Features, not negative. Of features that tie for the last of the k places, the first ones are taken."""
        f = jax.nn.relu((x - self.decoder_bias) @ self.encoder + self.encoder_bias)
        if self.top_k is None:
            return f
        values, index = jax.lax.top_k(f, self.top_k)
        return jnp.put_along_axis(jnp.zeros_like(f), index, values, axis=-1, inplace=False)

    def decode(self, f: Float[Array, "... F"]) -> Float[Array, "... D"]:
        """The activation that features stand for."""
        return f @ self.decoder + self.decoder_bias


def init_autoencoder(key: jax.Array, width: int, features: int, *, top_k: int | None = None) -> SparseAutoencoder:
    """A random autoencoder: decoder rows of length 1, the encoder their transpose, biases 0 (arXiv 2406.04093, app. A).

    Args:
      key: typed key.
      width: D.
      features: F.
      top_k: 1..F, or None for all positive features.

    Raises:
      ValueError: a size out of range.
    """
    if width < 1 or features < 1 or (top_k is not None and not 1 <= top_k <= features):
        raise ValueError(
            f"init_autoencoder: wanted width, features >= 1 and top_k in 1..{features} or None, got {width}, "
            f"{features} and {top_k}."
        )
    rows = jax.random.normal(key, (features, width))
    rows = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
    return SparseAutoencoder(rows.T, jnp.zeros(features), rows, jnp.zeros(width), top_k)


@edit
class Splice:
    """The autoencoder in place of the activation, for ``at(model.sites, "resid_post", splice(...), layer=3)``.

    Attributes:
      autoencoder: for the width of the site.
      clamped: (F,) weights: 1 where a feature is set, 0 where it is left; in between they blend.
      value: (F,) what clamped features are set to.
      keep_error: add the reconstruction error back: without clamped features the run is then exactly the original.
    """

    autoencoder: SparseAutoencoder
    clamped: jax.Array
    value: jax.Array
    keep_error: bool = struct.field(pytree_node=False, default=True)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        f = self.autoencoder.encode(x)
        changed = self.clamped * self.value + (1 - self.clamped) * f
        if not self.keep_error:
            return self.autoencoder.decode(changed)
        # x_hat + (x - x_hat) is x only up to rounding; the change of the features alone is exactly 0 without a clamp.
        return x + (changed - f) @ self.autoencoder.decoder


def splice(
    autoencoder: SparseAutoencoder,
    *,
    feature: int | Int[Array, " N"] | None = None,
    value: Any = 0.0,
    keep_error: bool = True,
) -> Splice:
    """The edit that puts an autoencoder at a site, and sets some of its features.

    Placed in a scanned model, its arrays are repeated for every layer: L times the autoencoder's memory.

    Args:
      autoencoder: for the width of the site.
      feature: feature or features to set; none by default. May be traced, so that a sweep over features is one program.
      value: what they are set to, one number or (N,): 0 ablates, a large number steers.
      keep_error: see ``Splice``.

    Raises:
      ValueError: a feature out of range, where it is known.

    >>> spliced = splice(init_autoencoder(jax.random.key(0), 4, 8), feature=3, value=5.0)
    >>> float(spliced.clamped.sum()), float(spliced.value[3])
    (1.0, 5.0)
    """
    count = autoencoder.encoder_bias.shape[-1]
    none = jnp.zeros(count)
    if feature is None:
        return Splice(autoencoder, none, none, keep_error)
    if not isinstance(feature, jax.core.Tracer):
        for index in jnp.atleast_1d(jnp.asarray(feature)).tolist():
            if not 0 <= index < count:
                raise ValueError(f"feature {index} is out of range: the autoencoder has {count} (0..{count - 1}).")
    return Splice(autoencoder, none.at[feature].set(1.0), none.at[feature].set(value), keep_error)
