"""Tangent kernels against vectors of three papers (other autodiff systems, float64), closed forms and identities."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from mechlab.analysis.tangent import (
    eigenvector_localisation,
    empirical_ntk,
    kernel_alignment,
    kernel_flow,
    local_energy,
)
from mechlab.core.rng import stream


def tanh_network(params, x):
    h = jnp.tanh(x @ params["trunk"]["w0"] + params["trunk"]["b0"])
    h = jnp.tanh(h @ params["trunk"]["w1"] + params["trunk"]["b1"])
    return h @ params["head"]["w"] + params["head"]["b"]


def tanh_params(key, widths=(3, 5, 4, 2)):
    shapes = [shape for a, b in itertools.pairwise(widths) for shape in ((a, b), (b,))]
    w0, b0, w1, b1, w, b = (jax.random.normal(stream(key, i), shape) for i, shape in enumerate(shapes))
    return {"trunk": {"w0": w0, "b0": b0, "w1": w1, "b1": b1}, "head": {"w": w, "b": b}}


@pytest.mark.parametrize("block", [7, 1000])
def test_trunk_kernel_summed_over_outputs_equals_the_vectors(vectors, block):
    v = vectors("tangent_arithmetic")
    with jax.enable_x64(True):
        names = ("w0", "b0", "w1", "b1", "w", "b")
        leaves = {name: jnp.asarray(v[f"p{i}"]) for i, name in enumerate(names)}
        params = {"trunk": {n: leaves[n] for n in names[:4]}, "head": {n: leaves[n] for n in names[4:]}}
        x = jnp.concatenate([v["x1"], v["x2"]])
        kernel = empirical_ntk(tanh_network, params, x, select="trunk/*", contract=True, block=block)
        np.testing.assert_allclose(kernel, v["ntk"], rtol=1e-9, atol=1e-9)


def test_recurrent_kernel_of_every_step_and_output_equals_the_vectors(vectors):
    v = vectors("rich_lazy")
    with jax.enable_x64(True):
        alpha = float(v["alpha"])

        def outputs(params, x):  # (B, T, I) -> (B, T, O); the paper's matrices act from the left
            def step(h, u):
                h = jax.nn.relu((1 - alpha) * h + alpha * (u @ params["input"].T + h @ params["recurrent"].T))
                return h, h @ params["output"].T

            first = jnp.zeros((x.shape[0], params["recurrent"].shape[0]))
            return jax.lax.scan(step, first, x.swapaxes(0, 1))[1].swapaxes(0, 1)

        x = jnp.asarray(v["x"]).swapaxes(0, 1)
        for rank in np.ravel(v["ranks"]).astype(int):
            params = {"input": v["Win"], "output": v["Wout"], "recurrent": v[f"r{rank}_W"]}
            moved = params | {"recurrent": params["recurrent"] + v[f"r{rank}_dW"]}
            kernels = []
            for p in (params, moved):
                kernel = empirical_ntk(outputs, jax.tree.map(jnp.asarray, p), x, select="recurrent", block=2)
                side = v[f"r{rank}_ntk"].shape[0]
                kernels.append(kernel.transpose(1, 0, 2, 4, 3, 5).reshape(side, side))  # rows t, b, k
            np.testing.assert_allclose(kernels[0], v[f"r{rank}_ntk"], rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(kernel_alignment(kernels[1], kernels[0]), v[f"r{rank}_ka"], rtol=1e-9)


def test_jacobian_equals_finite_differences():
    with jax.enable_x64(True):
        params = tanh_params(jax.random.key(0))
        x = jax.random.normal(jax.random.key(1), (4, 3))
        flat, unravel = ravel_pytree(params)
        steps = 1e-6 * jnp.eye(flat.size)
        f = jax.vmap(lambda step: tanh_network(unravel(flat + step), x))
        jacobian = jnp.moveaxis(f(steps) - f(-steps), 0, -1) / 2e-6  # (N, C, P)
        expected = jnp.einsum("icp,jdp->icjd", jacobian, jacobian)
        np.testing.assert_allclose(empirical_ntk(tanh_network, params, x), expected, rtol=1e-6, atol=1e-8)
        traces = jnp.square(jacobian).sum()
        np.testing.assert_allclose(jnp.trace(empirical_ntk(tanh_network, params, x, contract=True)), traces, rtol=1e-6)


@pytest.mark.parametrize(("items", "block"), [(1, 3), (7, 3), (6, 2)])
@pytest.mark.parametrize("contract", [False, True])
def test_the_block_changes_nothing(items, block, contract):
    params = tanh_params(jax.random.key(2))
    x = jax.random.normal(jax.random.key(3), (items, 3))
    whole = empirical_ntk(tanh_network, params, x, contract=contract, block=items)
    parts = empirical_ntk(tanh_network, params, x, contract=contract, block=block)
    assert parts.shape == ((items, items) if contract else (items, 2, items, 2))
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5)


def test_kernel_is_symmetric_positive_and_survives_transformations():
    params = tanh_params(jax.random.key(4))
    x = jax.random.normal(jax.random.key(5), (6, 3))

    def kernel(params):
        return empirical_ntk(tanh_network, params, x, contract=True, block=4)

    k = kernel(params)
    np.testing.assert_allclose(k, k.T, rtol=1e-5)
    assert float(jnp.linalg.eigvalsh(k).min()) > -1e-4 * float(jnp.linalg.eigvalsh(k).max())
    np.testing.assert_allclose(jax.jit(kernel)(params), k, rtol=1e-5)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    np.testing.assert_allclose(jax.vmap(kernel)(stacked)[0], k, rtol=1e-4, atol=1e-4)
    gradient = jax.grad(lambda p: jnp.trace(kernel(p)))(params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))


def test_outputs_without_an_axis_give_a_plain_kernel():
    x = jnp.arange(6.0).reshape(3, 2)
    params = {"w": jnp.asarray([1.0, 2.0]), "b": jnp.zeros(())}
    kernel = empirical_ntk(lambda p, x: x @ p["w"] + p["b"], params, x)
    np.testing.assert_allclose(kernel, x @ x.T + 1)
    only = empirical_ntk(lambda p, x: x @ p["w"] + p["b"], params, x, select="w")
    np.testing.assert_allclose(only, x @ x.T)


def test_alignment_is_a_cosine():
    first, second = (jax.random.normal(jax.random.key(i), (5, 7)) for i in (6, 7))
    a, b = first @ first.T, second @ second.T
    by_hand = (a * b).sum() / (jnp.linalg.norm(a) * jnp.linalg.norm(b))
    np.testing.assert_allclose(kernel_alignment(a, b), by_hand, rtol=1e-5)
    assert 0 <= float(by_hand) <= 1
    np.testing.assert_allclose(kernel_alignment(1e-20 * a, 1e20 * a), 1, rtol=1e-5)
    order = jnp.asarray([3, 0, 4, 1, 2])
    moved = kernel_alignment(a[order][:, order], b[order][:, order])
    np.testing.assert_allclose(moved, by_hand, rtol=1e-5)
    np.testing.assert_allclose(kernel_alignment(jnp.stack([a, b]), jnp.stack([b, b])), [by_hand, 1], rtol=1e-5)


def test_centred_alignment_ignores_a_constant():
    features = jax.random.normal(jax.random.key(8), (5, 7))
    a = features @ features.T
    np.testing.assert_allclose(kernel_alignment(a, a + 100, center=True), 1, rtol=1e-4)
    assert float(kernel_alignment(a, a + 100)) < 0.9


def test_bad_input_is_refused_by_name():
    params, x = tanh_params(jax.random.key(9)), jnp.ones((3, 3))
    with pytest.raises(KeyError, match="trunks"):
        empirical_ntk(tanh_network, params, x, select="trunks/*")
    with pytest.raises(ValueError, match="block: wanted at least 1"):
        empirical_ntk(tanh_network, params, x, block=0)
    with pytest.raises(ValueError, match="x: wanted items"):
        empirical_ntk(tanh_network, params, jnp.ones((0, 3)))
    with pytest.raises(ValueError, match="outputs of 3 items"):
        empirical_ntk(lambda p, x: x.sum(0)[:2], params, x)
    with pytest.raises(ValueError, match="two square kernels"):
        kernel_alignment(jnp.ones((2, 3)), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="two square kernels"):
        kernel_alignment(jnp.eye(2), jnp.eye(3))
    with pytest.raises(ValueError, match="zero kernel"):
        kernel_alignment(jnp.eye(2), jnp.zeros((2, 2)))
    assert bool(jnp.isnan(jax.jit(kernel_alignment)(jnp.eye(2), jnp.zeros((2, 2)))))


def test_eigenvectors_and_their_energy_equal_the_vectors(vectors):
    v = vectors("tangent_arithmetic")
    with jax.enable_x64(True):
        # The stored groups have 20 and 15 items: localisation wants equal ones, the energies are those of any split.
        values, vecs = jnp.linalg.eigh(jnp.asarray(v["ntk"]))
        np.testing.assert_allclose(values[::-1], v["eigvals"], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(jnp.square(vecs[:20, ::-1]).sum(0), v["eigvecs_sq_task1_energy"], atol=1e-7)
        rows = np.r_[0:15, 20:35]
        found = eigenvector_localisation(jnp.asarray(v["ntk"][np.ix_(rows, rows)]), 15)
        own = np.linalg.eigh(v["ntk"][np.ix_(rows, rows)])
        np.testing.assert_allclose(found.eigenvalues, own[0][::-1], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(found.energy, np.square(own[1][:15, ::-1]).sum(0), atol=1e-7)
        np.testing.assert_allclose(found.energy.sum(), 15, atol=1e-9)  # Σ_ρ V_iρ² = 1 for each item


def test_a_block_kernel_is_local_and_a_shared_one_is_not():
    g = jax.random.normal(jax.random.key(0), (4, 9))
    block, nothing = g @ g.T, jnp.zeros((4, 4))
    local = jnp.block([[block, nothing], [nothing, 2 * block]])
    np.testing.assert_allclose(eigenvector_localisation(local, 4).localisation, 1, atol=1e-5)
    shared = jnp.block([[block, block], [block, block]]) + 1e-3 * jnp.eye(8)
    np.testing.assert_allclose(eigenvector_localisation(shared, 4).localisation[:4], 0, atol=1e-4)
    mask = jnp.arange(8) < 4
    residual = jax.random.normal(jax.random.key(1), (8, 3))
    energy = local_energy(local, residual, mask)
    np.testing.assert_allclose(energy[4:], 0, atol=1e-5)
    assert float(energy[:4].mean()) > 0.7
    spread = local_energy(shared, residual, mask, share=1.0)
    np.testing.assert_allclose(spread, 1, atol=1e-4)


def test_local_energy_takes_the_smallest_set_that_carries_the_share():
    kernel, mask = jnp.diag(jnp.asarray([4.0, 3.0, 2.0, 1.0])), jnp.asarray([True, True, True, False])
    residual = jnp.sqrt(jnp.asarray([[1.0], [6.0], [3.0], [100.0]]))  # the last item is not of this task
    np.testing.assert_allclose(local_energy(kernel, residual, mask, share=0.6), [0, 1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(local_energy(kernel, residual, mask, share=0.61), [0, 1, 1, 0], atol=1e-6)
    np.testing.assert_allclose(local_energy(kernel, residual, mask, share=0.95), [1, 1, 1, 0], atol=1e-6)


def test_kernel_flow_starts_at_zero_and_ends_in_kernel_regression():
    g = jax.random.normal(jax.random.key(0), (5, 7))
    kernel, cross, residual = g[:3] @ g[:3].T, g[3:] @ g[:3].T, jnp.asarray([1.0, -2.0, 0.5])
    np.testing.assert_allclose(kernel_flow(kernel, cross, residual, time=0.0), 0, atol=1e-6)
    np.testing.assert_allclose(kernel_flow(kernel, kernel, residual), residual, rtol=1e-4)
    regression = cross @ np.linalg.solve(kernel, residual)
    np.testing.assert_allclose(kernel_flow(kernel, cross, residual), regression, rtol=1e-4)
    np.testing.assert_allclose(kernel_flow(kernel, cross, residual, time=1e3), regression, rtol=1e-4)


def test_wrong_groups_shares_and_shapes_are_refused():
    with pytest.raises(ValueError, match="two groups of one size, got 1 of 4"):
        eigenvector_localisation(jnp.eye(4), 1)
    with pytest.raises(ValueError, match=r"square matrix, got shape \(2, 3\)"):
        eigenvector_localisation(jnp.ones((2, 3)), 1)
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        local_energy(jnp.eye(2), jnp.ones((2, 1)), jnp.ones(2, bool), share=0)
    with pytest.raises(ValueError, match=r"one number of items, got \(2, 3, 2\)"):
        local_energy(jnp.eye(2), jnp.ones((3, 1)), jnp.ones(2, bool))
    with pytest.raises(ValueError, match=r"wanted shapes \(M, M\)"):
        kernel_flow(jnp.eye(2), jnp.ones((1, 3)), jnp.ones(2))
