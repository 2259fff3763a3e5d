"""Checkpoints of the hub: ``load`` a folder or an id into a model with its parameters, ``export`` them to a folder.

    model, params, tokenizer = load("openai-community/gpt2")
    logits = model.apply({"params": params}, jnp.asarray([tokenizer.encode("Hello")]))
    export("out", model, params)          # transformers opens it

A folder holds ``config.json``, ``model.safetensors`` (or shards with ``model.safetensors.index.json``) and possibly
``tokenizer.json``. Pickled checkpoints are refused: opening one can run any code. Ids need the extra ``hub``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mechlab.core import select
from mechlab.core.errors import unknown
from mechlab.core.model import Model
from mechlab.core.sharding import shardings
from mechlab.models import llama2c
from mechlab.models.clip import CLIP, CLIPConfig
from mechlab.models.families import FAMILIES, Family, Fields
from mechlab.models.families.tables import Row
from mechlab.models.transformer import LOGICAL_AXES
from mechlab.models.vit import ViTModule

QUANTISED = "quantised.safetensors"
"""The file of ``models.quantised_io``, which stands in a folder instead of model.safetensors."""

_FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json"]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to tokens and back.

    Attributes:
      inner: the ``tokenizers.Tokenizer`` of tokenizer.json, for all else it can do.
    """

    inner: Any

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with the special tokens that the file says to add."""
        return list(self.inner.encode(text).ids)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, without special tokens."""
        return str(self.inner.decode([int(token) for token in tokens]))


def load(source: str | Path, *, dtype: str = "float32", mesh: Mesh | None = None) -> tuple[Any, Any, Any]:
    """Open a checkpoint.

    Args:
      source: a folder, a hub id such as ``"openai-community/gpt2"``, or a llama2.c ``.bin`` file.
      dtype: of the parameters and of the model's computations; norms, softmax and logits are in float32 anyway.
      mesh: place every parameter by ``LOGICAL_AXES`` on this mesh as it is read.

    Returns:
      The model (``Model``, for CLIP ``CLIP``), its parameters, and a tokenizer with ``encode`` and ``decode``. The
      tokenizer is None for image models, and, with a warning that says why, where it cannot be had.

    Raises:
      FileNotFoundError: no such folder, file or hub id, or the hub cannot be reached.
      KeyError: a ``model_type`` that is not known.
      ValueError: a pickled, truncated or inconsistent checkpoint, or a setting that is not supported; all problems with
        the tensors are listed at once.
    """
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise ValueError(f'dtype must be a floating type such as "float32" or "bfloat16", got "{dtype}".')
    path = Path(source).expanduser()
    if path.is_file():
        return _load_file(path, dtype, mesh)
    folder = path if path.is_dir() else _download(str(source))
    model, params = load_model(folder, dtype=dtype, mesh=mesh)
    has_text = not isinstance(model, Model) or not isinstance(model.module, ViTModule)
    return model, params, load_tokenizer(folder) if has_text else None


def load_model(folder: Path, *, dtype: str = "float32", mesh: Mesh | None = None) -> tuple[Any, Any]:
    """The model and parameters of a checkpoint's folder, without a tokenizer; arguments and errors as in ``load``."""
    family, model = _described(folder, dtype)
    return model, _read_params(folder, family, model, dtype, mesh)


def load_config(folder: Path, *, dtype: str = "float32") -> Any:
    """The model that a folder's ``config.json`` describes, without parameters; arguments and errors as in ``load``."""
    return _described(folder, dtype)[1]


def _described(folder: Path, dtype: str) -> tuple[Family, Any]:
    raw = _read_json(folder / "config.json")
    if raw.get("model_type") not in FAMILIES:
        raise unknown(f"model_type in {folder / 'config.json'}", str(raw.get("model_type")), FAMILIES)
    family = FAMILIES[raw["model_type"]]
    config = family.read(Fields(raw, str(folder / "config.json")))
    return family, family.build(_with_dtype(config, dtype))


def export(folder: str | Path, model: Any, params: Any, *, family: str | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors`` so that ``transformers`` opens the model.

    Special tokens and the tokenizer are not written. A model with LongRoPE is written for its original context.

    Args:
      folder: made if it does not exist; these two files are replaced.
      model: from ``load``, or any model of a shape that a family has.
      params: its parameters, in the dtype to write.
      family: the ``model_type``; by default the first family that has this shape.

    Raises:
      KeyError: an unknown family.
      ValueError: no family, or not this one, has the model's shape; or parameters that are not the model's.
    """
    if family is not None and family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    name = _family_of(_config_of(model), [family] if family else list(FAMILIES))
    expected, given = _by_path(_shapes(model)), _by_path(params)
    _check_params(expected, given)

    from safetensors.numpy import save_file

    tensors = {}
    for row in _rows(FAMILIES[name], expected):
        leaves = [np.asarray(given[path]) for path in row.paths]
        for layer, tensor in _layers(row, expected):
            parts = leaves if layer is None else [leaf[layer] for leaf in leaves]
            tensors[tensor] = np.asarray(row.layout.join(parts), order="C")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    export_config(folder, model, dtype=str(next(iter(tensors.values())).dtype), family=name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def export_config(folder: Path, model: Any, *, dtype: str = "float32", family: str | None = None) -> None:
    """Write ``config.json`` alone into a folder that is there; arguments and errors as in ``export``.

    ``dtype`` is what the file says of the parameters.
    """
    name = _family_of(_config_of(model), [family] if family else list(FAMILIES))
    written = {"model_type": name, "torch_dtype": dtype, **FAMILIES[name].write(_config_of(model))}
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")


def _load_file(path: Path, dtype: str, mesh: Mesh | None) -> tuple[Any, Any, Any]:
    with path.open("rb") as file:
        start = file.read(2)
    # A zip archive, or a pickle of protocol 2 or later: what PyTorch writes.
    if start == b"PK" or start[:1] == b"\x80":
        raise _pickled(path)
    if path.suffix != ".bin":
        raise ValueError(f"{path}: pass the checkpoint's folder, or a llama2.c .bin file.")
    model, params, vocabulary = llama2c.load(path, dtype=dtype)
    if mesh is not None:
        params = jax.device_put(params, shardings(params, mesh, LOGICAL_AXES))
    return model, params, vocabulary


def _pickled(path: Path) -> ValueError:
    return ValueError(
        f"{path} is pickled, and opening it could run any code. Ask for safetensors, or convert it where you trust it: "
        "transformers.AutoModel.from_pretrained(...).save_pretrained(folder)."
    )


def _download(source: str) -> Path:
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise FileNotFoundError(f'there is no folder or file "{source}".')
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(f'"{source}" is no folder; hub ids need the extra "hub": pip install mechlab[hub]') from error
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=_FILES))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f'"{source}" is no local folder, and the hub did not give it ({_first_line(error)}). '
            "Check the id and the network, or download it elsewhere and pass the folder."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a checkpoint needs it.")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _with_dtype(config: Any, dtype: str) -> Any:
    if isinstance(config, CLIPConfig):
        towers = {name: _with_dtype(getattr(config, name), dtype) for name in ("text", "vision")}
        return dataclasses.replace(config, **towers)
    return dataclasses.replace(config, dtype=dtype)


def _config_of(model: Any) -> Any:
    return model.config if isinstance(model, CLIP) else model.module.config


def _shapes(model: Any) -> Any:
    return jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))


def _by_path(tree: Any) -> dict[str, Any]:
    return dict(zip(select.paths(tree), jax.tree.leaves(tree), strict=True))


def _rows(family: Family, expected: dict[str, Any]) -> list[Row]:
    """The rows whose parameters this model has."""
    return [row for row in family.tensors if set(row.paths) <= set(expected)]


def _layers(row: Row, expected: dict[str, Any]) -> list[tuple[int | None, str]]:
    """Layer and tensor name for every tensor of a row."""
    if "{}" not in row.tensor:
        return [(None, row.tensor)]
    return [(layer, row.tensor.format(layer)) for layer in range(expected[row.paths[0]].shape[0])]


def _read_params(folder: Path, family: Family, model: Any, dtype: str, mesh: Mesh | None) -> Any:
    shapes = _shapes(model)
    expected = _by_path(shapes)
    rows = _rows(family, expected)
    where: Any = dict.fromkeys(expected) if mesh is None else _by_path(shardings(shapes, mesh, LOGICAL_AXES))
    with contextlib.ExitStack() as stack:
        files = _open(folder, stack)
        names = _match(folder, family, rows, expected, files)
        leaves = {}
        for row in rows:
            parts = [np.empty(expected[path].shape, jnp.dtype(dtype)) for path in row.paths]
            for layer, tensor in _layers(row, expected):
                file, name = names[tensor]
                targets = parts if layer is None else [part[layer] for part in parts]
                split = row.layout.split(file.get_tensor(name), [target.shape for target in targets])
                for target, values in zip(targets, split, strict=True):
                    target[...] = values
            for path, part in zip(row.paths, parts, strict=True):
                leaves[path] = jax.device_put(part, where[path])
    return jax.tree.unflatten(jax.tree.structure(shapes), [leaves[path] for path in expected])


def _open(folder: Path, stack: contextlib.ExitStack) -> list[Any]:
    """All shards, memory-mapped."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if not (folder / shards[0]).is_file():
        if index.is_file():
            shards = sorted(set(_read_json(index)["weight_map"].values()))
        elif pickled := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
            raise _pickled(pickled[0])
        elif (folder / QUANTISED).is_file():
            raise ValueError(f"{folder} holds quantised kernels: open it with models.quantised_io.load_quantised.")
        else:
            raise FileNotFoundError(
                f"{folder} holds neither model.safetensors nor {index.name}; pickled weights cannot be opened."
            )
    files, problems = [], []
    for shard in shards:
        try:
            files.append(stack.enter_context(safe_open(folder / shard, framework="numpy")))
        except FileNotFoundError:
            problems.append(f"{shard} is missing")
        except SafetensorError as error:
            problems.append(f"{shard} is truncated or damaged ({error})")
    if problems:
        raise ValueError(f"{folder}: {'; '.join(problems)}.")
    return files


def _match(
    folder: Path, family: Family, rows: list[Row], expected: dict[str, Any], files: list[Any]
) -> dict[str, tuple[Any, str]]:
    """Where each tensor of the table is: (file, its name there), after checking that all are there and fit."""
    wanted: dict[str, tuple[int, ...]] = {}
    for row in rows:
        ours = [expected[path] for path in row.paths]
        for layer, tensor in _layers(row, expected):
            parts = ours if layer is None else [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in ours]
            if tensor not in wanted:
                shape = jax.eval_shape(row.layout.join, parts).shape
                wanted |= {name: shape for _, name in _layers(row, expected)}
    found: dict[str, tuple[Any, str]] = {}
    problems = []
    for file in files:
        for name in file.keys():
            known = _table_name(name, family.prefix, wanted)
            if known is not None:
                found[known] = file, name
                shape = tuple(file.get_slice(name).get_shape())
                if shape != wanted[known]:
                    problems.append(f"{name} has shape {shape} instead of {wanted[known]}")
            elif not re.search(rf"(^|\.)({family.ignored})$", name):
                problems.append(f"{name} is unexpected")
    problems += [f"{tensor} is missing" for tensor in wanted if tensor not in found]
    if problems:
        shown = "\n  ".join(problems[:40]) + (f"\n  and {len(problems) - 40} more" if len(problems) > 40 else "")
        raise ValueError(f"{folder} does not hold the tensors that its config.json describes:\n  {shown}")
    return found


def _table_name(name: str, prefix: str, wanted: Iterable[str]) -> str | None:
    # The first BERT checkpoints call a norm's parameters gamma and beta.
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
    return next((each for each in (name, prefix + name, name.removeprefix(prefix)) if each in wanted), None)


def _family_of(config: Any, names: list[str]) -> str:
    """The first of the families that can say everything this config says."""
    reasons: dict[str, list[str]] = {}
    for name in names:
        try:
            again = FAMILIES[name].read(Fields(FAMILIES[name].write(config), name))
        except (AttributeError, TypeError, ValueError):
            continue
        reasons[name] = _differences(config, again)
        if not reasons[name]:
            return name
    if not reasons:
        raise ValueError(f"a {type(config).__name__} of this shape cannot be written as {' or '.join(names)}.")
    nearest = min(reasons, key=lambda name: len(reasons[name]))
    raise ValueError(
        f"no checkpoint family has this shape; nearest is {nearest}, but for {'; '.join(reasons[nearest])}."
    )


def _differences(config: Any, again: Any) -> list[str]:
    if isinstance(config, CLIPConfig):
        return [*_differences(config.text, again.text), *_differences(config.vision, again.vision)] + [
            name for name in ("projection", "end") if getattr(config, name) != getattr(again, name)
        ]
    one, other = (each.explicit() if hasattr(each, "explicit") else each for each in (config, again))
    # Neither is a matter of the checkpoint.
    fields = [field.name for field in dataclasses.fields(one) if field.name not in ("dtype", "init_std")]
    return [
        f"{name}={getattr(one, name)} (there {getattr(other, name)})"
        for name in fields
        if getattr(one, name) != getattr(other, name)
    ]


def _check_params(expected: dict[str, Any], given: dict[str, Any]) -> None:
    wrong = [f"{path} is missing" for path in expected if path not in given]
    wrong += [f"{path} is unexpected" for path in given if path not in expected]
    for path in expected:
        shape, wanted = np.shape(given.get(path, expected[path])), expected[path].shape
        if shape != wanted:
            wrong.append(f"{path} has shape {shape} instead of {wanted}")
    if wrong:
        raise ValueError(f"these are not the model's parameters: {'; '.join(wrong)}.")


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint's folder; None, with a warning that says why, where it cannot be had."""
    path = folder / "tokenizer.json"
    reason = "" if path.is_file() else f"{folder} has no tokenizer.json"
    if not reason:
        try:
            import tokenizers

            return Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
        except ImportError:
            reason = 'reading tokenizer.json needs the extra "hub": pip install mechlab[hub]'
    warnings.warn(f"no tokenizer: {reason}.", stacklevel=3)
    return None
