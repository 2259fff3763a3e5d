"""Edits on disk, and edits and training states in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mechlab.core.edits import (
    Add,
    Chain,
    Clamp,
    Gate,
    Mask,
    Noise,
    Placed,
    Project,
    Replace,
    Scale,
    at,
    combine,
    project_out,
)
from mechlab.training.checkpoints import Checkpoints, load_edits, save_edits
from tests.models.tiny import TOKENS, decoder

# After a refused checkpoint orbax may close its event loop before its last reader has answered.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")

EDITS: dict[str, Any] = {
    "add": Add(jnp.arange(6.0).reshape(2, 3)),
    "add bfloat16": Add(jnp.arange(6.0, dtype=jnp.bfloat16)),
    "scale by a number": Scale(2.5),
    "replace integers": Replace(jnp.arange(4)),
    "clamp": Clamp(-1.0, jnp.ones(3)),
    "mask": Mask(jnp.asarray([True, False]), 0.25),
    "project": Project(jnp.eye(4)[:, :2], 0.0, 1.0),
    "gate": Gate(jnp.ones(3), jnp.zeros(3), 7.0, hard=True),
    "gate through": Gate(jnp.ones(3), jnp.zeros(3), jnp.ones(3), straight_through=True),
    "noise": Noise(jax.random.key(3), 0.5),
    "noise of another generator": Noise(jax.random.key(3, impl="rbg"), 0.5),
    "noise per layer": Noise(jax.random.split(jax.random.key(3), 2), jnp.ones(2)),
    "chain": Chain((Add(jnp.ones(3)), Chain((Scale(2.0), Gate(jnp.ones(3), jnp.ones(3)))))),
    "empty chain": Chain(()),
    "placed": Placed(Add(jnp.ones((3, 2))), gate=jnp.eye(3)[1], start=jnp.ones((3, 1), int), head=jnp.ones((3, 4))),
}


@flax.struct.dataclass
class Own:
    strength: jax.Array
    label: str = flax.struct.field(pytree_node=False, default="none")

    def __call__(self, value: jax.Array, context: Any) -> jax.Array:
        return value * self.strength


def raw(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y)
        assert raw(x).dtype == raw(y).dtype and raw(x).shape == raw(y).shape
        np.testing.assert_array_equal(raw(x), raw(y))
        if isinstance(x, jax.Array):
            assert x.dtype == y.dtype


@pytest.mark.parametrize("name", EDITS)
def test_every_edit_comes_back_from_a_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "edits.safetensors"
    save_edits(path, {"resid_post": EDITS[name], "mlp_act.1": EDITS["add"]}, {"made by": "a test"})
    loaded, card = load_edits(path)
    assert list(loaded) == ["resid_post", "mlp_act.1"]
    assert card == {"made by": "a test"}
    assert_same(loaded["resid_post"], EDITS[name])
    assert_same(loaded["mlp_act.1"], EDITS["add"])
    assert [file.name for file in tmp_path.iterdir()] == ["edits.safetensors"]


@pytest.mark.parametrize("edit", [Add(jnp.float32(2)), Add(jnp.asarray(True)), project_out(jnp.ones(3))], ids=repr)
def test_a_scalar_array_comes_back_as_a_scalar_array(edit: Any, tmp_path: Path) -> None:
    save_edits(tmp_path / "edits", {"logits": edit})
    assert_same(load_edits(tmp_path / "edits")[0]["logits"], edit)


def test_a_numpy_scalar_can_be_saved(tmp_path: Path) -> None:
    save_edits(tmp_path / "edits", {"logits": Scale(np.float32(2))})
    assert load_edits(tmp_path / "edits")[0]["logits"].factor == 2


def test_a_loaded_edit_steers_as_the_saved_one(tmp_path: Path) -> None:
    model, params = decoder("gpt2")
    edits = combine(
        at(model.sites, "resid_post", Noise(jax.random.key(0), jnp.float32(1.0)), layer=1, position=2),
        at(model.sites, "mlp_act", Gate(jnp.zeros(24), jnp.ones(24), hard=True), layer=0),
    )
    save_edits(tmp_path / "edits", edits)
    run = jax.jit(lambda e: model.apply({"params": params, "edits": e}, TOKENS))
    np.testing.assert_array_equal(run(load_edits(tmp_path / "edits")[0]), run(edits))


def test_an_edit_class_of_ones_own_is_loaded_only_if_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "edits"
    save_edits(path, {"logits": Chain((Own(jnp.ones(2), label="mine"),))})
    with pytest.raises(KeyError, match=r"unknown edit class .*:Own"):
        load_edits(path)
    loaded = load_edits(path, Own)[0]["logits"].edits[0]
    assert isinstance(loaded, Own) and loaded.label == "mine"


def rewrite(path: Path, old: str, new: str) -> None:
    """Change the description in the header of a file of edits."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        header = {key: text.replace(old, new) for key, text in file.metadata().items()}
    save_file(load_file(path), path, metadata=header)


@pytest.mark.parametrize("name", ["os:system", "mechlab.core.edits:at", "mechlab.core.edits:Addd", "builtins:eval"])
def test_a_file_cannot_name_anything_but_an_edit(name: str, tmp_path: Path) -> None:
    save_edits(tmp_path / "edits", {"logits": Add(jnp.ones(2))})
    rewrite(tmp_path / "edits", "mechlab.core.edits:Add", name)
    with pytest.raises(KeyError, match="unknown edit class"):
        load_edits(tmp_path / "edits")


def test_a_class_of_an_unknown_mechlab_module_is_refused(tmp_path: Path) -> None:
    save_edits(tmp_path / "edits", {"logits": Add(jnp.ones(2))})
    rewrite(tmp_path / "edits", "mechlab.core.edits:Add", "mechlab.methods.gone:Add")
    with pytest.raises(KeyError, match="unknown edit class"):
        load_edits(tmp_path / "edits")


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "edits"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="exists; remove it"):
        save_edits(path, {"logits": Scale(2.0)})
    assert path.read_text() == "precious"


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "edits"
    save_edits(path, {"logits": Add(jnp.ones(100))})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_edits(path)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"weight": np.ones(3)}, tmp_path / "weights")
    with pytest.raises(ValueError, match='holds no edits: its format is None, expected "mechlab-edits-1"'):
        load_edits(tmp_path / "weights")
    with pytest.raises(FileNotFoundError):
        load_edits(tmp_path / "absent")


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r'"logits/value" is a dict'):
        save_edits(tmp_path / "edits", {"logits": Add({"a": jnp.ones(2)})})
    assert not list(tmp_path.iterdir())


def test_edits_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    model, _ = decoder("gpt2")
    edits = combine(
        at(model.sites, "resid_post", Add(jnp.linspace(0, 1, 16)), layer=1, span=(1, 3)),
        at(model.sites, "mlp_act", Gate(jnp.ones(24), jnp.ones(24), hard=True)),
        at(model.sites, "logits", Chain((Scale(jnp.float32(2.0)), Clamp(jnp.float32(-1), jnp.float32(1))))),
    )
    store = Checkpoints(tmp_path)
    store.save(3, edits)
    again = store.restore(3, jax.tree.map(jnp.zeros_like, edits))
    assert_same(again, edits)
    store.close()


def test_a_noise_key_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    edits = at(decoder("gpt2")[0].sites, "mlp_out", Noise(jax.random.key(5), jnp.float32(2.0)), layer=1)
    like = at(decoder("gpt2")[0].sites, "mlp_out", Noise(jax.random.key(0), jnp.float32(0.0)), layer=0)
    store = Checkpoints(tmp_path)
    store.save(0, edits)
    assert_same(store.restore(0, like), edits)
    store.close()


def test_the_last_two_checkpoints_are_kept_and_the_newest_is_found_again(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "deep" / "folder")
    assert store.latest() is None
    for step in (1, 5, 9):
        store.save(step, {"x": jnp.full(3, step)})
    store.save(9, {"x": jnp.zeros(3)})
    store.close()
    store = Checkpoints(tmp_path / "deep" / "folder")
    assert store.latest() == 9
    np.testing.assert_array_equal(store.restore(9, {"x": jnp.zeros(3, int)})["x"], [9, 9, 9])
    np.testing.assert_array_equal(store.restore(5, {"x": jnp.zeros(3, int)})["x"], [5, 5, 5])
    with pytest.raises(Exception, match="1"):
        store.restore(1, {"x": jnp.zeros(3, int)})
    store.close()


SAVED = {"a": jnp.zeros((2, 3)), "b": np.zeros(4)}
OTHERS: dict[str, Any] = {
    "missing": {"a": jnp.zeros((2, 3))},
    "additional": SAVED | {"c": jnp.zeros(1)},
    "renamed": {"a": jnp.zeros((2, 3)), "c": np.zeros(4)},
    "shape": SAVED | {"a": jnp.zeros((3, 3))},
    "smaller": SAVED | {"a": jnp.zeros((2, 2))},
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_structure_is_refused(other: str, tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.save(7, SAVED)
    with pytest.raises(ValueError, match=r"step 7 .* was made by another configuration"):
        store.restore(7, OTHERS[other])
    store.close()


@pytest.mark.parametrize("length", [3, 5])
def test_a_host_array_of_another_shape_is_refused(length: int, tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.save(7, SAVED)
    try:
        with pytest.raises(ValueError, match="another configuration"):
            store.restore(7, SAVED | {"b": np.zeros(length)})
    finally:
        store.close()


def test_a_state_comes_back_into_the_shardings_of_its_like(tmp_path: Path) -> None:
    from jax.sharding import NamedSharding, PartitionSpec

    from mechlab.core.sharding import make_mesh

    split = NamedSharding(make_mesh(), PartitionSpec("data"))
    store = Checkpoints(tmp_path)
    store.save(1, {"x": jnp.arange(16.0)})
    restored = store.restore(1, {"x": jax.device_put(jnp.zeros(16), split)})["x"]
    assert restored.sharding == split
    np.testing.assert_array_equal(restored, np.arange(16.0))
    store.close()
