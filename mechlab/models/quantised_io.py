"""Quantised decoders on disk: a folder with ``config.json``, ``quantised.safetensors`` and, if it has one, a tokenizer.

    save_quantised("llama-4bit", model, params, tokenizer=tokenizer, card={"method": "awq, 4 bits, groups of 128"})
    model, params, tokenizer, card = load_quantised("llama-4bit")
    texts = generate(model, {"params": params}, tokens, steps=50)      # kernels stay packed

The safetensors file holds plain parameters under their paths, and the arrays of a quantised kernel below its own:
``blocks/attn/q/kernel/bytes``, ``.../scales``, ``.../zeros``. Its header says in JSON which kernels these are and what
else they need to know (shape, block), and keeps the card. ``config.json`` is the checkpoint's, as ``models.hub`` writes
it. Nothing but the classes of ``FORMS`` is ever made because a file says so.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mechlab.core.errors import unknown
from mechlab.core.kernel_forms import QTensor, Quantised
from mechlab.kernels.w4a16 import Packed4
from mechlab.models import hub

FORMAT = "mechlab-quantised-1"

FORMS: dict[str, Any] = {"QTensor": QTensor, "Packed4": Packed4}


def save_quantised(
    folder: str | Path,
    model: Any,
    params: Any,
    *,
    tokenizer: hub.Tokenizer | None = None,
    card: Mapping[str, str] | None = None,
) -> None:
    """Write a decoder whose kernels are quantised, all of them or some.

    Args:
      folder: to be made; an existing one is refused, so that nothing is overwritten.
      model: of a shape that a family of ``models.hub`` has.
      params: its parameters, with quantised kernels.
      tokenizer: from ``hub.load``, to be written beside it.
      card: what else a reader should know: text to text.

    Raises:
      FileExistsError: the folder is there.
      ValueError: parameters that are not the model's, all problems at once; no family has its shape.
    """
    from safetensors.numpy import save_file

    folder = Path(folder).expanduser()
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it or choose another name.")
    given = _by_path(params)
    _require_fit(str(folder), model, given)
    folder.mkdir(parents=True)
    try:
        hub.export_config(folder, model, dtype=str(jnp.result_type(params["embed"]["tokens"])))
    except ValueError:
        folder.rmdir()
        raise
    if tokenizer is not None:
        tokenizer.inner.save(str(folder / "tokenizer.json"))
    tensors: dict[str, np.ndarray] = {}
    forms: dict[str, dict[str, Any]] = {}
    for path, leaf in given.items():
        if isinstance(leaf, Quantised):
            name = next(name for name, form in FORMS.items() if isinstance(leaf, form))
            arrays, rest = _fields(FORMS[name])
            held = {field: getattr(leaf, field) for field in arrays if getattr(leaf, field) is not None}
            tensors |= {f"{path}/{field}": np.asarray(array, order="C") for field, array in held.items()}
            forms[path] = {"form": name, "arrays": list(held), **{field: getattr(leaf, field) for field in rest}}
        else:
            tensors[path] = np.asarray(leaf, order="C")
    header = {"format": FORMAT, "forms": json.dumps(forms), "card": json.dumps(dict(card or {}))}
    # The file comes last and whole: a folder without it was not finished.
    part = folder / f"{hub.QUANTISED}.part"
    save_file(tensors, part, metadata=header)
    os.replace(part, folder / hub.QUANTISED)


def load_quantised(
    folder: str | Path, *, dtype: str = "float32"
) -> tuple[Any, Any, hub.Tokenizer | None, dict[str, str]]:
    """Read what ``save_quantised`` wrote.

    Args:
      folder: the folder.
      dtype: of the model's computations and of the parameters that are not quantised.

    Returns:
      The model, its parameters, its tokenizer (None where none was written), and the card.

    Raises:
      FileNotFoundError: a folder without such a file: no folder, a plain checkpoint, or one that was not finished.
      ValueError: a file that is truncated, of another format, or does not fit ``config.json``, all problems at once.
      KeyError: a kind of kernel that is not known.
    """
    folder = Path(folder).expanduser()
    if not (folder / hub.QUANTISED).is_file():
        raise FileNotFoundError(f"{folder} holds no {hub.QUANTISED}; a plain checkpoint is opened by models.hub.load.")
    model = hub.load_config(folder, dtype=dtype)
    header, tensors = _read(folder / hub.QUANTISED)
    given: dict[str, Any] = {}
    for path, about in json.loads(header["forms"]).items():
        if about["form"] not in FORMS:
            raise unknown("kind of kernel", about["form"], FORMS)
        form = FORMS[about["form"]]
        held = {field: tensors.pop(f"{path}/{field}", None) for field in about["arrays"]}
        rest = {field: _hashable(about[field]) for field in _fields(form)[1]}
        given[path] = jax.tree.map(jnp.asarray, form(**held, **rest))
    given |= {path: jnp.asarray(array, dtype) for path, array in tensors.items()}
    expected = _require_fit(str(folder), model, given)
    params = jax.tree.unflatten(jax.tree.structure(expected), [given[path] for path in _by_path(expected)])
    tokenizer = hub.load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    return model, params, tokenizer, json.loads(header["card"])


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    if header.get("format") != FORMAT:
        raise ValueError(f'{path}: wanted the format "{FORMAT}", got {header.get("format")!r}.')
    return header, tensors


def _fields(form: Any) -> tuple[list[str], list[str]]:
    """The fields of a kernel that are arrays, and those that are not."""
    fields = dataclasses.fields(form)
    is_array = {field.name: field.metadata.get("pytree_node", True) for field in fields}
    return [name for name in is_array if is_array[name]], [name for name in is_array if not is_array[name]]


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _by_path(params: Any) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(params, is_leaf=lambda x: isinstance(x, Quantised))
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def _require_fit(where: str, model: Any, given: Mapping[str, Any]) -> Any:
    """The shapes of the model's parameters, which those that are given have, quantised or not."""
    shapes = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))
    expected = _by_path(shapes)
    problems = [f"{path} is missing" for path in expected if path not in given]
    problems += [f"{path} is unexpected" for path in given if path not in expected]
    for path in expected.keys() & given.keys():
        shape = _whole_shape(given[path])
        if shape != expected[path].shape:
            problems.append(f"{path} is {shape} instead of {expected[path].shape}")
    if problems:
        shown = "; ".join(sorted(problems)[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"{where}: these are not the parameters of the model: {shown}.")
    return shapes


def _whole_shape(leaf: Any) -> Any:
    """The shape of a leaf, of a quantised kernel that of the kernel, or in words why it has none."""
    if not isinstance(leaf, Quantised):
        return np.shape(leaf)
    try:
        return jax.eval_shape(lambda kernel: kernel.dequantise(), leaf).shape
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        return f"broken ({str(error).splitlines()[0]})"
