"""Checkpoints of training (orbax) and edits on disk (safetensors with a JSON description).

orbax and safetensors are imported where they are used: ``import mechlab.training`` stays fast.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.errors import unknown

FORMAT = "mechlab-edits-1"


class Checkpoints:
    """The checkpoints of one training run in a folder; the last two are kept, a half-written one is never seen.

    Args:
      directory: created if absent.
    """

    def __init__(self, directory: Path) -> None:
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._args = ocp.args
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Write a pytree of arrays; keeps what is there if the step was saved before."""
        if step != self.latest():
            self._manager.save(step, args=self._args.StandardSave(state))

    def restore(self, step: int, like: Any) -> Any:
        """Read a checkpoint into the structure, dtypes and shardings of ``like``.

        Raises:
          ValueError: if what was saved has another structure or other shapes.
        """
        try:
            restored = self._manager.restore(step, args=self._args.StandardRestore(like))
            # orbax itself compares no shapes of NumPy arrays.
            for (path, x), wanted in zip(jax.tree.leaves_with_path(restored), jax.tree.leaves(like), strict=True):
                if np.shape(x) != np.shape(wanted):
                    name = jax.tree_util.keystr(path)
                    raise ValueError(f"{name} has shape {np.shape(x)}, expected {np.shape(wanted)}.")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"the checkpoint of step {step} in {self._manager.directory} was made by another configuration: "
                f"{str(error).splitlines()[0]} Use another folder, or remove that one."
            ) from error
        return restored

    def close(self) -> None:
        """Release the folder."""
        self._manager.close()


def save_edits(path: str | os.PathLike[str], edits: Mapping[str, Any], card: Mapping[str, str] | None = None) -> None:
    """Write edits to one safetensors file: arrays as tensors, the structure as JSON in the header.

    Args:
      path: the file; an existing one is refused.
      edits: site name to edit, as ``at`` returns them.
      card: what else a reader should know (model, layer, how it was made): text to text.

    Raises:
      FileExistsError: if the file is there.
    """
    from safetensors.numpy import save_file

    if Path(path).exists():
        raise FileExistsError(f"{path} exists; remove it or choose another name.")
    tensors: dict[str, np.ndarray] = {}
    structure = {name: _describe(edit, name, tensors) for name, edit in edits.items()}
    header = {"format": FORMAT, "structure": json.dumps(structure), "card": json.dumps(dict(card or {}))}
    part = Path(f"{path}.part")
    save_file(tensors, part, metadata=header)
    os.replace(part, path)


def load_edits(path: str | os.PathLike[str], *classes: type) -> tuple[dict[str, Any], dict[str, str]]:
    """Read what ``save_edits`` wrote.

    Args:
      path: the file.
      *classes: edit classes of your own that the file may contain. Those of mechlab are known; nothing else is ever
        imported because a file says so.

    Returns:
      Site name to edit, and the card.

    Raises:
      ValueError: not a file of edits, or truncated.
      KeyError: a class that is not known.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    if header.get("format") != FORMAT:
        raise ValueError(f'{path} holds no edits: its format is {header.get("format")!r}, expected "{FORMAT}".')
    known = {_class_name(cls): cls for cls in classes}
    structure = json.loads(header["structure"])
    return {name: _rebuild(node, tensors, known) for name, node in structure.items()}, json.loads(header["card"])


def _describe(node: Any, path: str, tensors: dict[str, np.ndarray]) -> Any:
    if isinstance(node, jax.Array) and jax.dtypes.issubdtype(node.dtype, jax.dtypes.prng_key):
        tensors[path] = np.asarray(jax.random.key_data(node))
        return {"key": path, "impl": str(jax.random.key_impl(node))}
    if isinstance(node, jax.Array | np.ndarray | np.generic):
        tensors[path] = np.asarray(node, order="C")
        return {"tensor": path}
    if isinstance(node, tuple | list):
        return {"tuple": [_describe(x, f"{path}/{i}", tensors) for i, x in enumerate(node)]}
    if hasattr(node, "__dataclass_fields__"):
        names = list(node.__dataclass_fields__)
        fields = {name: _describe(getattr(node, name), f"{path}/{name}", tensors) for name in names}
        return {"class": _class_name(type(node)), "fields": fields}
    if node is None or isinstance(node, bool | int | float | str):
        return {"value": node}
    raise TypeError(f'"{path}" is a {type(node).__name__}; edits hold arrays, numbers, text, tuples and dataclasses.')


def _rebuild(node: Any, tensors: dict[str, np.ndarray], known: Mapping[str, type]) -> Any:
    if "tensor" in node:
        return jnp.asarray(tensors[node["tensor"]])
    if "key" in node:
        return jax.random.wrap_key_data(jnp.asarray(tensors[node["key"]]), impl=node["impl"])
    if "tuple" in node:
        return tuple(_rebuild(x, tensors, known) for x in node["tuple"])
    if "value" in node:
        return node["value"]
    cls = _find_class(node["class"], known)
    return cls(**{name: _rebuild(x, tensors, known) for name, x in node["fields"].items()})


def _find_class(name: str, known: Mapping[str, type]) -> type:
    if name in known:
        return known[name]
    module, _, qualified = name.partition(":")
    if module.split(".")[0] == "mechlab":
        with contextlib.suppress(ModuleNotFoundError):
            found = getattr(importlib.import_module(module), qualified, None)
            if isinstance(found, type) and hasattr(found, "__dataclass_fields__"):
                return found
    raise unknown("edit class", name, [*known, "those of mechlab"])


def _class_name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"
