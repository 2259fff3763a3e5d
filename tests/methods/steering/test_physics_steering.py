"""Physics steering: the authors' numbers, the identities of the relative patch, roll-outs, read-outs on known flows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechlab.core.edits import AddRelative
from mechlab.core.sites import Context
from mechlab.data.worlds import flows
from mechlab.methods.steering import physics_steering as ps
from mechlab.models.surrogate import SurrogateConfig, surrogate

PAPER = Context(("T", "B", "C", "X", "Y", "Z"))
MODEL = surrogate(SurrogateConfig(scales=(0.1, 0.2), grid=8, layers=2, width=6, modes=3))
PARAMS = MODEL.init(jax.random.key(0))
FRAMES = jax.random.normal(jax.random.key(1), (2, 3, 2, 8, 8))
MASK = jnp.asarray([[1.0, 1.0], [1.0, 0.0]])
SITES = MODEL.sites_for(FRAMES, MASK)
DELTA = jax.random.normal(jax.random.key(2), (1, 1, 6, 8, 8, 1))
roll = jax.jit(lambda edits: ps.rollout(MODEL, PARAMS, FRAMES, MASK, 3, edits))


def close(got, wanted, **tolerance):
    np.testing.assert_allclose(got, wanted, **({"rtol": 1e-5, "atol": 1e-5} | tolerance))


def test_directions_are_those_of_the_official_code(vectors):
    stored = vectors("physics_steering")
    close(ps.normalise_activation(stored["feature"][0]), stored["normalised_feature0"])
    close(ps.concept_delta(stored["feature"], stored["control"]), stored["delta"])


@pytest.mark.parametrize("target", ["same", "larger", "smaller", "tb1"])
@pytest.mark.parametrize("mode", ps.MODES)
@pytest.mark.parametrize(("sign", "alpha"), [("pos_0.4", 0.4), ("neg_0.25", -0.25)])
def test_patches_are_those_of_the_official_hook(vectors, target, mode, sign, alpha):
    stored = vectors("physics_steering")
    h, name = jnp.asarray(stored[f"h_{target}"]), f"out_{target}_{mode}_{sign}"
    delta = jnp.asarray(stored["delta"], jnp.float32)
    if name not in stored:
        assert mode == "none" and target in ("larger", "smaller")
        if target == "larger":
            with pytest.raises(ValueError, match="needs the spatial shape"):
                ps.fit_spatial(delta, h.shape, mode)
        return
    patched = AddRelative(ps.fit_spatial(delta, h.shape, mode), jnp.float32(alpha))(h, PAPER)
    close(patched, stored[name])
    axes = (2, 3, 4, 5)
    close(np.sqrt(np.square(patched - h).sum(axes)), abs(alpha) * np.sqrt(np.square(h).sum(axes)), rtol=1e-4)


def test_drop_keeps_space_where_all_sizes_agree_and_only_there():
    delta = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 2, 3, 3, 1)), jnp.float32)
    assert ps.fit_spatial(delta, (1, 1, 2, 3, 3, 1), "drop") is not None
    np.testing.assert_array_equal(ps.fit_spatial(delta, (1, 1, 2, 3, 3, 1), "drop"), delta)
    dropped = ps.fit_spatial(delta, (1, 2, 2, 3, 3, 1), "drop")
    close(dropped, np.broadcast_to(delta.mean((3, 4, 5), keepdims=True), delta.shape))


def test_cropping_is_centred_and_padding_is_at_the_high_end():
    delta = jnp.arange(5.0).reshape(1, 1, 1, 5, 1, 1)
    np.testing.assert_array_equal(ps.fit_spatial(delta, (1, 2, 1, 3, 1, 1), "none").ravel(), [1, 2, 3])
    np.testing.assert_array_equal(ps.fit_spatial(delta, (1, 2, 1, 7, 1, 1), "pad").ravel(), [0, 1, 2, 3, 4, 0, 0])


@given(seed=st.integers(0, 50), scale=st.floats(0.01, 100))
def test_swapping_the_sets_flips_delta_and_its_length_does_not_matter(seed, scale):
    rng = np.random.default_rng(seed)
    feature, control = (rng.normal(size=(n, 2, 1, 3, 2, 2, 1)).astype(np.float32) for n in (2, 3))
    delta = ps.concept_delta(feature, control)
    close(ps.concept_delta(control, feature), -delta)
    close(ps.concept_delta(scale * feature, control), delta, rtol=1e-3, atol=1e-4)
    h = rng.normal(size=(2, 1, 3, 2, 2, 1)).astype(np.float32)
    alpha = jnp.float32(0.3)
    close(AddRelative(scale * delta, alpha)(h, PAPER), AddRelative(delta, alpha)(h, PAPER), rtol=1e-3, atol=1e-4)


def test_drop_is_none_for_a_direction_without_space():
    flat = jnp.broadcast_to(DELTA.mean((3, 4, 5), keepdims=True), DELTA.shape)
    edits = [ps.relative_edits(SITES, flat, layer=1, alpha=0.2, mode=mode) for mode in ("drop", "none")]
    close(roll(edits[0]), roll(edits[1]))


def test_sites_have_the_papers_axes_and_back():
    h = jax.random.normal(jax.random.key(3), (2, 8, 8, 6))
    paper = ps.from_site(h)
    assert paper.shape == (1, 2, 6, 8, 8, 1)
    close(paper[0, 1, 3, 5, 2, 0], h[1, 5, 2, 3])
    np.testing.assert_array_equal(ps.to_site(paper, 4), h)
    timed = jax.random.normal(jax.random.key(3), (2, 3, 4, 5, 6))
    assert ps.from_site(timed).shape == (3, 2, 6, 4, 5, 1)
    np.testing.assert_array_equal(ps.to_site(ps.from_site(timed), 5), timed)


def test_an_edit_patches_one_layer_by_its_share():
    acts = ps.record(MODEL, PARAMS, FRAMES, MASK)
    edits = ps.relative_edits(SITES, DELTA, layer=0, alpha=-0.3)
    steered = MODEL.capture({"params": PARAMS, "edits": edits}, FRAMES, MASK, sites=("resid_post",))[1]["resid_post"]
    h, moved = acts[0, 0], ps.from_site(steered[0])[0]
    patch = (moved - h).reshape(2, -1)
    close(jnp.linalg.norm(patch, axis=1), 0.3 * jnp.linalg.norm(h.reshape(2, -1), axis=1), rtol=1e-4)
    assert float(patch[0] @ jnp.broadcast_to(DELTA.mean((3, 4, 5)).reshape(6, 1), (6, 64)).ravel()) < 0


def test_strength_zero_is_the_plain_rollout_to_the_bit_and_steering_is_not():
    plain = jax.jit(lambda: ps.rollout(MODEL, PARAMS, FRAMES, MASK, 3))()
    np.testing.assert_array_equal(roll(ps.relative_edits(SITES, DELTA, layer=0, alpha=0.0)), plain)
    assert float(jnp.abs(roll(ps.relative_edits(SITES, DELTA, layer=0, alpha=0.5)) - plain).max()) > 1e-4
    assert plain.shape == (3, 2, 2, 8, 8)
    np.testing.assert_array_equal(plain[:, 1, 1], np.broadcast_to(FRAMES[1, -1, 1], (3, 8, 8)))  # a masked field stays


def test_a_rollout_is_the_model_applied_again_and_again():
    window = FRAMES
    for _ in range(2):
        window = jnp.concatenate([window[:, 1:], MODEL.apply({"params": PARAMS}, window, MASK)[:, None]], 1)
    close(ps.rollout(MODEL, PARAMS, FRAMES, MASK, 2)[-1], window[:, -1])


def test_doses_and_layers_are_mapped():
    def one(alpha, layer):
        edits = ps.relative_edits(SITES, DELTA, layer=layer, alpha=alpha)
        return ps.rollout(MODEL, PARAMS, FRAMES, MASK, 3, edits)

    both = jax.jit(jax.vmap(one))(jnp.asarray([0.2, -0.4]), jnp.asarray([1, 0]))
    close(both[1], roll(ps.relative_edits(SITES, DELTA, layer=0, alpha=-0.4)), rtol=1e-4)


def test_without_leaves_what_is_orthogonal():
    others = jax.random.normal(jax.random.key(4), (2, 6))
    left = ps.channel_vector(ps.without(DELTA, others))
    close(others @ left, jnp.zeros(2), atol=1e-4)
    close(left @ left, left @ ps.channel_vector(DELTA), rtol=1e-3)
    with pytest.raises(ValueError, match="lies in the span"):
        ps.without(others[0].reshape(1, 1, 6, 1, 1, 1), others)


def test_shuffled_labels_of_equal_sets_give_nothing_and_signs_differ():
    acts = jax.random.normal(jax.random.key(5), (4, 1, 1, 3, 2, 2, 1))
    close(ps.shuffled_delta(jax.random.key(6), acts, acts), jnp.zeros((1, 1, 3, 2, 2, 1)))
    assert ps.random_deltas(jax.random.key(7), 3, 6).shape == (3, 1, 1, 6, 1, 1, 1)


def test_speed_and_diffusivity_are_recovered():
    velocity = jnp.asarray([[0.6, -0.8], [0.3, 1.0], [-1.2, 0.1]])
    d = jnp.asarray([0.01, 0.05, 0.002])
    shown = flows.simulate_advect(jax.random.key(8), 3, velocity=velocity, diffusivity=d, frames=3)
    s0, s1 = shown[:, 1, 2], shown[:, 2, 2]
    close(ps.effective_diffusivity(s0, s1, flows.INTERVAL), d, atol=1e-3)
    close(ps.effective_speed(s0, s1, velocity, flows.INTERVAL), jnp.linalg.norm(velocity, axis=1), atol=1e-3)
    across = jnp.stack([-velocity[:, 1], velocity[:, 0]], 1)
    close(ps.effective_speed(s0, s1, across, flows.INTERVAL), jnp.zeros(3), atol=1e-3)


def test_readouts_of_single_waves():
    x = jnp.arange(16) * 2 * jnp.pi / 16
    wave = jnp.broadcast_to(jnp.sin(3 * x)[:, None], (16, 16))
    close(ps.cross_stream_energy(wave), 0.5)
    close(ps.enstrophy(jnp.zeros((16, 16)), wave), 9 / 4, rtol=1e-4)
    close(ps.roughness(7 + wave), 9.0, rtol=1e-4)
    close(ps.roughness(wave.T + jnp.sin(x)[:, None]), 5.0, rtol=1e-4)


def test_bad_input_is_refused():
    acts = jnp.asarray(np.random.default_rng(1).normal(size=(2, 1, 1, 6, 8, 8, 1)), jnp.float32)
    for feature, control, message in (
        (acts[:0], acts, "feature must hold files of one shape, got none"),
        (acts, [acts[0], acts[0, ..., :4, :]], "control must hold files of one shape"),
        (acts[:, 0], acts, r"files of feature must be \[T, B, C, X, Y, Z\]"),
        (acts, acts[:, :, :, :3], "must agree in C, X, Y, Z"),
        (acts, jnp.ones_like(acts), "is constant"),
        (acts, acts * jnp.nan, "is not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            ps.concept_delta(feature, control)
    for change, message in (
        ({"mode": "dorp"}, 'unknown mode "dorp"; known: drop, pad'),
        ({"alpha": float("nan")}, "alpha must be finite"),
        ({"layer": 2}, "layer"),
        ({"delta": jnp.zeros_like(DELTA)}, "have a length"),
        ({"delta": DELTA[:, :, :5]}, "with one C"),
        ({"delta": DELTA[..., :4, :], "mode": "none"}, "needs the spatial shape"),
    ):
        arguments = {"delta": DELTA, "layer": 0, "alpha": 0.1} | change
        with pytest.raises(ValueError, match=message):
            ps.relative_edits(SITES, **arguments)
    with pytest.warns(UserWarning, match="often unstable"):
        ps.relative_edits(SITES, DELTA, layer=0, alpha=1.5)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        ps.rollout(MODEL, PARAMS, FRAMES, MASK, 0)
    with pytest.raises(ValueError, match="frames must be finite"):
        ps.rollout(MODEL, PARAMS, FRAMES * jnp.inf, MASK, 1)
