"""Adapters against peft: the same weights merged from the same factors, and the same starting points."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.core.transforms import AdapterState
from mechlab.methods.adaptation import bone
from mechlab.methods.adaptation.lora import dora, lora, olora, pissa

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.oracle

INPUTS, OUTPUTS, RANK = 12, 8, 2


def layer(config):
    """A linear layer in peft's hands, and its weight (out, in) before that."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(INPUTS, OUTPUTS, bias=False))
    weight = model[0].weight.detach().numpy().copy()
    return peft.get_peft_model(model, config).base_model.model[0], weight


def merged(wrapped):
    wrapped.merge()
    return wrapped.get_base_layer().weight.detach().numpy()


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def ours(adapter, weight, train, fixed=()):
    state = AdapterState({"kernel": jax.tree.map(jnp.asarray, train)}, fixed)
    return np.asarray(adapter.merge({"kernel": jnp.asarray(weight.T)}, state)["kernel"]).T


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_low_rank_changes_merge_alike(kind):
    wrapped, weight = layer(peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=["0"], use_dora=kind == "dora"))
    a, b = draw(1, RANK, INPUTS), draw(2, OUTPUTS, RANK)
    wrapped.lora_A["default"].weight.data = torch.tensor(a)
    wrapped.lora_B["default"].weight.data = torch.tensor(b)
    train = {"A": a.T, "B": b.T}
    if kind == "dora":
        train["m"] = draw(3, OUTPUTS) ** 2 + 1
        wrapped.lora_magnitude_vector["default"].weight.data = torch.tensor(train["m"])
    adapter = {"lora": lora, "dora": dora}[kind](RANK, alpha=6.0)
    np.testing.assert_allclose(ours(adapter, weight, train), merged(wrapped), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_informed_starts_and_the_steps_from_there_are_alike(kind):
    wrapped, weight = layer(peft.LoraConfig(r=RANK, lora_alpha=3, target_modules=["0"], init_lora_weights=kind))
    adapter = {"pissa": pissa, "olora": olora}[kind](RANK, alpha=3.0)
    start = adapter.init(jax.random.key(0), {"kernel": jnp.asarray(weight.T)})
    a, b = (np.asarray(start.train["kernel"][name]) for name in "AB")
    theirs_a, theirs_b = (w["default"].weight.detach().numpy() for w in (wrapped.lora_A, wrapped.lora_B))
    np.testing.assert_allclose(a @ b, (theirs_b @ theirs_a).T, rtol=1e-4, atol=1e-5)
    # From the same signs on, the same step gives the same weight.
    signs = np.sign((a * theirs_a.T).sum(0))
    step_a, step_b = draw(1, INPUTS, RANK), draw(2, RANK, OUTPUTS)
    wrapped.lora_A["default"].weight.data += torch.tensor((step_a * signs).T)
    wrapped.lora_B["default"].weight.data += torch.tensor((step_b * signs[:, None]).T)
    moved = ours(adapter, weight, {"A": a + step_a, "B": b + step_b}, start.fixed)
    np.testing.assert_allclose(moved, merged(wrapped), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["bat", True, "mini"])
def test_blocks_merge_alike(kind):
    if not hasattr(peft, "MissConfig"):
        pytest.skip("this peft has no MissConfig")
    block, width = 4, 2
    config = peft.MissConfig(r=block, mini_r=width, init_weights=kind, target_modules=["0"])
    wrapped, weight = layer(config)
    adapters = {"bat": bone.bone_col(block), True: bone.miss(block), "mini": bone.miss_mini(block, width)}
    shape = {"bat": (OUTPUTS // block, block, block), True: (block, OUTPUTS), "mini": (block, width)}[kind]
    M = draw(1, *shape)
    assert tuple(wrapped.miss_block["default"].shape) == shape
    wrapped.miss_block["default"].data = torch.tensor(M)
    np.testing.assert_allclose(ours(adapters[kind], weight, {"M": M}), merged(wrapped), rtol=1e-4, atol=1e-5)
