"""Linear probes: logistic and ridge regression in closed steps, at every depth at once.

Everything is vectorised over leading axes: activations (L + 1, N, D) give L + 1 probes from one program. Intercepts are
never penalised, so the solutions are those of scikit-learn's ``LogisticRegression(C=C)`` and ``Ridge(alpha=penalty)``.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.analysis.metrics import accuracy
from mechlab.core import linalg

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Int


class Probe(NamedTuple):
    """A linear map, one per leading index.

    Attributes:
      weights: (..., D, C).
      bias: (..., C).
    """

    weights: Float[Array, "... D C"]
    bias: Float[Array, "... C"]

    def __call__(self, x: Float[Array, "... N D"]) -> Float[Array, "... N C"]:
        """``x @ weights + bias``: logits of the classes, or predicted values."""
        return jnp.einsum("...nd,...dc->...nc", x, self.weights) + self.bias[..., None, :]


def fit_logistic(
    x: Float[Array, "... N D"], labels: Int[ArrayLike, " N"], *, classes: int = 2, C: float = 1.0, steps: int = 20
) -> Probe:
    """Logistic regression by Newton's method.

        min over w, b of   ||w||² / (2 C) + sum over n of -log softmax(w x_n + b)[label_n]

    Two classes have one weight vector, for class 1 against 0 (column 0 of the probe is 0); more have one each. The loss
    is summed over items, as in scikit-learn; C = 1 is the prior w ~ N(0, 1).

    Args:
      x: (..., N, D); standardise it if its scale is not about 1, since the penalty does not know its unit.
      labels: (N,) integer classes, 0..classes - 1.
      classes: number of classes, at least 2.
      C: inverse strength of the penalty, positive.
      steps: Newton steps; each takes the best of eight lengths, none included, so that the loss never rises.

    Returns:
      The probe; its logits go to ``metrics.accuracy``.

    Raises:
      ValueError: shapes or labels that do not fit, C <= 0, fewer than two classes, or a class that does not occur.
    """
    if C <= 0 or classes < 2 or steps < 1:
        raise ValueError(f"fit_logistic: wanted C > 0, classes >= 2, steps >= 1, got {C}, {classes} and {steps}.")
    _require_rows(x, labels, "labels")
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise ValueError(f"labels: wanted integer classes, got dtype {jnp.result_type(labels)}.")
    if not isinstance(labels, jax.core.Tracer):
        found = np.unique(np.asarray(labels)).tolist()
        if found != list(range(classes)):
            raise ValueError(f"labels: wanted every class of 0..{classes - 1}, got {found}.")
    x = jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))
    fit = partial(_newton, labels=jnp.asarray(labels), classes=classes, penalty=1 / C, steps=steps)
    flat = jax.jit(jax.vmap(fit))(x.reshape(-1, *x.shape[-2:]))
    return jax.tree.map(lambda leaf: leaf.reshape(*x.shape[:-2], *leaf.shape[1:]), flat)


def fit_ridge(x: Float[Array, "... N D"], y: Float[Array, "... N C"], *, penalty: float = 1.0) -> Probe:
    """Ridge regression: min over w, b of  ||y - x w - b||² + penalty ||w||².

    Args:
      x: (..., N, D).
      y: (..., N, C) targets; leading axes may be left out.
      penalty: positive.

    Raises:
      ValueError: shapes that do not fit, or penalty <= 0.
    """
    if penalty <= 0:
        raise ValueError(f"fit_ridge: wanted a positive penalty, got {penalty}.")
    if np.ndim(y) < 2:
        raise ValueError(f"y: wanted shape (..., N, C), got {np.shape(y)}.")
    _require_rows(x, y[..., 0], "y")
    x = jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))
    x_mean, y_mean = x.mean(-2, keepdims=True), jnp.asarray(y, x.dtype).mean(-2, keepdims=True)
    centred = x - x_mean
    gram = jnp.einsum("...nd,...ne->...de", centred, centred) + penalty * jnp.eye(x.shape[-1], dtype=x.dtype)
    weights = linalg.solve(gram, jnp.einsum("...nd,...nc->...dc", centred, y - y_mean))
    return Probe(weights, (y_mean - x_mean @ weights)[..., 0, :])


def held_out_accuracy(
    x: Float[Array, "... N D"],
    labels: Int[ArrayLike, " N"],
    train: Int[ArrayLike, " M"],
    test: Int[ArrayLike, " M"],
    *,
    classes: int = 2,
    C: float = 1.0,
) -> Float[Array, "..."]:
    """Accuracy on some items of the logistic probe that was fitted to others, at every depth.

    The activations are standardised by the mean and standard deviation (ddof 0) of the training items.

    Args:
      x: (..., N, D).
      labels: (N,) integer classes.
      train, test: (M,) indices of items; ``data.splits`` makes them, by groups where items are related.
      classes, C: as in ``fit_logistic``.

    Returns:
      (...) in [0, 1].

    Raises:
      ValueError: an item that is in both, or as ``fit_logistic``.
    """
    shared = np.intersect1d(np.asarray(train), np.asarray(test))
    if shared.size:
        raise ValueError(f"train and test share {shared.size} items, such as {shared[0]}.")
    x, labels, train, test = (jnp.asarray(a) for a in (x, labels, train, test))
    seen = x[..., train, :]
    mean, deviation = seen.mean(-2, keepdims=True), seen.std(-2, keepdims=True)
    standard = (x - mean) / jnp.where(deviation == 0, 1, deviation)
    probe = fit_logistic(standard[..., train, :], labels[train], classes=classes, C=C)
    return accuracy(probe(standard[..., test, :]), labels[test])


def _newton(x: jax.Array, labels: jax.Array, classes: int, penalty: float, steps: int) -> Probe:
    """One probe, x (N, D). Unknowns are rows (w_c, b_c), of class 1 alone where there are two."""
    items, width = x.shape
    rows = 1 if classes == 2 else classes
    wide = jnp.concatenate([x, jnp.ones((items, 1), x.dtype)], 1)
    target = jax.nn.one_hot(labels, classes, dtype=x.dtype)[:, classes - rows :]
    penalised = penalty * jnp.ones(width + 1, x.dtype).at[-1].set(0)
    # A common shift of all intercepts changes nothing; this curvature along it makes the Hessian regular.
    shift = jnp.zeros((rows, width + 1, rows, width + 1), x.dtype).at[:, -1, :, -1].set(float(rows > 1))

    def log_p(unknown: jax.Array) -> jax.Array:
        scores = wide @ unknown.T
        return jax.nn.log_softmax(jnp.pad(scores, ((0, 0), (classes - rows, 0))), -1)

    def loss(unknown: jax.Array) -> jax.Array:
        fit = -jnp.take_along_axis(log_p(unknown), labels[:, None], -1).sum()
        return fit + 0.5 * (penalised * unknown**2).sum()

    def step(_: int, unknown: jax.Array) -> jax.Array:
        p = jnp.exp(log_p(unknown))[:, classes - rows :]
        gradient = (p - target).T @ wide + penalised * unknown
        spread = p[:, :, None] * jnp.eye(rows, dtype=x.dtype) - p[:, :, None] * p[:, None, :]
        hessian = jnp.einsum("ni,ncd,nj->cidj", wide, spread, wide) + shift
        size = rows * (width + 1)
        hessian = hessian.reshape(size, size) + jnp.diag(jnp.tile(penalised, rows))
        move = linalg.solve(hessian, gradient.reshape(-1, 1)).reshape(unknown.shape)
        tried = unknown - jnp.asarray([1, 0.5, 0.25, 0.1, 0.03, 0.01, 0.001, 0], x.dtype)[:, None, None] * move
        return tried[jax.vmap(loss)(tried).argmin()]

    unknown = jax.lax.fori_loop(0, steps, step, jnp.zeros((rows, width + 1), x.dtype))
    unknown = jnp.pad(unknown, ((classes - rows, 0), (0, 0)))
    return Probe(unknown[:, :-1].T, unknown[:, -1])


def _require_rows(x: ArrayLike, y: ArrayLike, name: str) -> None:
    if np.ndim(x) < 2 or 0 in np.shape(x) or np.shape(y)[-1:] != np.shape(x)[-2:-1] or np.ndim(y) == 0:
        raise ValueError(f"x, {name}: wanted N items in both, got shapes {np.shape(x)} and {np.shape(y)}.")
