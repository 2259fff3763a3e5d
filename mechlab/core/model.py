"""A model as users see it: pure functions of parameters, inputs and edits::

    model = transformer(config)
    params = model.init(jax.random.key(0))
    logits = model.apply({"params": params}, tokens)
    edits = at(model.sites, "resid_post", Add(vector), layer=7)
    steered = model.apply({"params": params, "edits": edits}, tokens)
    logits, acts = model.capture({"params": params}, tokens, sites=("resid_post",))

The Flax module stays private behind this; everything that comes in or goes out is a plain pytree, so ``jax.jit``,
``jax.vmap`` and ``jax.grad`` apply to any argument, the edits included.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn

from mechlab.core.errors import unknown
from mechlab.core.sites import SiteTable, check_edits, flatten, list_sites, nest

Variables = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Model:
    """A Flax module with its sites.

    Attributes:
      module: the Flax module.
      example: abstract inputs (``jax.ShapeDtypeStruct``), as small as possible, that stand for any input.
    """

    module: nn.Module
    example: tuple[Any, ...]

    def init(self, key: jax.Array) -> Any:
        """Random parameters: a nested dictionary of arrays, stacked along a leading axis L where layers are scanned."""
        return _compiled_init(self)(key)

    @property
    def sites(self) -> SiteTable:
        """The model's sites; batch and position sizes are those of ``example``."""
        return list_sites(self.module, *self.example)

    def sites_for(self, *inputs: Any) -> SiteTable:
        """The model's sites with the shapes that they have for these inputs; nothing is computed."""
        return list_sites(self.module, *inputs)

    def apply(self, variables: Variables, *inputs: Any) -> Any:
        """Run the model.

        Args:
          variables: ``{"params": parameters}`` and optionally ``"edits": {site name: edit}``, see ``at``.
          *inputs: the model's inputs.

        Returns:
          The model's output.

        Raises:
          KeyError: an edit at a site that the model does not have, or a collection other than params and edits.
          TypeError, ValueError: an edit that does not fit its site.
        """
        return self.capture(variables, *inputs, sites=())[0]

    def capture(self, variables: Variables, *inputs: Any, sites: Sequence[str]) -> tuple[Any, dict[str, jax.Array]]:
        """Run the model and keep the activations of some sites, as they are after any edit.

        Args:
          variables: as in ``apply``.
          *inputs: the model's inputs.
          sites: names of the sites to keep. In an unscanned model ``"mlp_act"`` keeps that site of every layer.

        Returns:
          The output, and ``{site name: activation}``; scanned sites have a leading axis L. Sites that are not asked for
          are never stored, under ``jit`` or not.

        Raises:
          As ``apply``; KeyError also for an unknown site to capture.
        """
        if isinstance(sites, str):
            raise TypeError(f'sites must be a sequence of names, got the string "{sites}"; write ("{sites}",).')
        nested = self.nested(variables, *inputs)
        if not sites:
            return self.module.apply(nested, *inputs), {}
        table = self.sites_for(*inputs)
        names = [entry.name for name in sites for entry in table.named(name)]
        request = {"acts": nest(table, dict.fromkeys(names))}
        output, kept = self.module.apply(nested | request, *inputs, mutable=["acts"])
        return output, flatten(table, kept["acts"], names)

    def nested(self, variables: Variables, *inputs: Any) -> dict[str, Any]:
        """The variables as the Flax module wants them, edits checked against the sites and nested by module.

        Raises:
          As ``apply``.
        """
        for leaf in jax.tree.leaves(inputs):
            if not hasattr(leaf, "shape"):
                raise TypeError(f"inputs must be arrays, got a {type(leaf).__name__}; convert with jnp.asarray.")
        for collection in variables:
            if collection not in ("params", "edits"):
                raise unknown("collection", collection, ("params", "edits"))
        edits = variables.get("edits")
        if not edits:
            return {"params": variables["params"]}
        table = self.sites_for(*inputs)
        check_edits(table, edits)
        return {"params": variables["params"], "edits": nest(table, edits)}


@functools.lru_cache(maxsize=64)
def _compiled_init(model: Model) -> Callable[[jax.Array], Any]:
    @jax.jit
    def init(key: jax.Array) -> Any:
        # Made in here: outside, a caller's own trace would leak into the cached function.
        zeros = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), model.example)
        return model.module.init(key, *zeros)["params"]

    return init
