"""Bounds against auto_LiRPA, live. Its releases ask for torch < 1.13; where it is not installed this skips.

The stored vectors of ``test_fast_ibp.py`` are from the same library and need none of it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechlab.methods.architectures.batch_norm import clean_pass
from mechlab.methods.architectures.crown import crown_margins
from mechlab.methods.architectures.interval import ball, margin_bounds, propagate, specification
from mechlab.methods.architectures.networks import perceptron
from mechlab.methods.architectures.piecewise import BatchNorm, Dense

pytestmark = pytest.mark.oracle


def in_torch(torch, net):
    """A perceptron of ours in PyTorch, in training mode."""
    layers = []
    for layer in net:
        if isinstance(layer, Dense):
            theirs = torch.nn.Linear(*layer.kernel.shape)
            weight, bias = np.asarray(layer.kernel).T, layer.bias
        elif isinstance(layer, BatchNorm):
            theirs = torch.nn.BatchNorm1d(len(layer.scale))
            weight, bias = layer.scale, layer.bias
        else:
            layers.append({"ReLU": torch.nn.ReLU, "Flatten": torch.nn.Flatten}[type(layer).__name__]())
            continue
        with torch.no_grad():
            theirs.weight.copy_(torch.tensor(np.array(weight)))
            theirs.bias.copy_(torch.tensor(np.array(bias)))
        layers.append(theirs)
    return torch.nn.Sequential(*layers).train()


def test_margins_equal_those_of_auto_lirpa():
    torch = pytest.importorskip("torch")
    lirpa = pytest.importorskip("auto_LiRPA", exc_type=ImportError)
    net = perceptron(jax.random.key(0), (12, 20, 16, 5), batch_norm=True)
    x, y, eps = jax.random.uniform(jax.random.key(1), (9, 12)), jnp.arange(9) % 5, 0.03

    fixed, box = clean_pass(net, x).fixed, ball(x, eps)
    bounded = propagate(fixed, box)
    ours = {
        "IBP": margin_bounds(fixed, bounded.entering, y).lower,
        "CROWN-IBP": crown_margins(fixed, bounded.entering, box, y),
    }

    clean = torch.tensor(np.array(x))
    model = lirpa.BoundedModule(in_torch(torch, net), clean)
    model.train()
    norm = lirpa.PerturbationLpNorm(
        norm=np.inf, eps=eps, x_L=torch.tensor(np.array(box.lower)), x_U=torch.tensor(np.array(box.upper))
    )
    model(lirpa.BoundedTensor(clean, norm))
    asked = torch.tensor(np.array(specification(y, 5)))
    theirs = {"IBP": model.compute_bounds(IBP=True, C=asked, method=None)[0]}
    theirs["CROWN-IBP"] = model.compute_bounds(IBP=False, C=asked, method="backward", bound_upper=False)[0]
    for name, margins in ours.items():
        np.testing.assert_allclose(margins, theirs[name].detach().numpy(), rtol=1e-4, atol=1e-4, err_msg=name)
