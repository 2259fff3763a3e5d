"""Physics steering at smoke size: worlds, rows, measures; claims judged by their criteria on made-up numbers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.steering import _physics_steering_figures as draw
from experiments.steering import _physics_steering_lab as lab
from experiments.steering import _physics_steering_measures as measures
from experiments.steering import _physics_steering_worlds as worlds
from experiments.steering._physics_steering_claims import CLAIMS, ODD
from experiments.steering.physics_steering import PRESETS, Config, run
from mechlab.methods.steering import physics_steering as ps
from mechlab.models.surrogate import SurrogateConfig, surrogate
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, judge_claims


def metric(*per_seed):
    return Metric(value=float(np.mean(per_seed)), per_seed=per_seed)


GOOD = {
    **{f"gate/{name}": metric(0.01) for name in ("one/shear", "one/advect", "six/shear", "six/advect")},
    "ev/ratio/random": metric(0.64, 1.45),
    "ev/rank/shear_speed": metric(1.0, 0.96),
    "ev/ratio/shear_speed": metric(2.9, 2.0),
    "ev/low/shear_speed": metric(0.6, 0.7),
    "ev/high/shear_speed": metric(1.7, 1.4),
    "ev/rank/shear_vorticity": metric(0.2, 0.3),
    "ev/ratio/shear_vorticity": metric(1.0, 1.1),
    "ev/low/shear_vorticity": metric(1.0, 0.9),
    "ev/high/shear_vorticity": metric(1.0, 1.0),
    "ev/ratio/advect_speed": metric(2.1, 1.6),
    "speed/change/shear_speed": metric(1.0, 0.6),
    "speed/change/random": metric(-0.6, 0.6),
    "cosine/speed": metric(0.9, 0.7),
    **{f"odd/{name}": metric(0.1, 0.2) for name in ODD},
    "counterfactual/shear": metric(70.0),
    "counterfactual/advect": metric(61.0),
    "diffusion/rank": metric(1.0, 0.98),
    "diffusion/change": metric(0.08, 0.05),
}


def test_claims_hold_on_numbers_that_say_so():
    assert {claim.id: claim.status for claim in judge_claims(CLAIMS, GOOD)} == {claim.id: "holds" for claim in CLAIMS}


@pytest.mark.parametrize(
    ("claim", "name", "value"),
    [
        ("competence", "gate/one/shear", metric(0.03)),
        ("in_domain", "ev/rank/shear_speed", metric(1.0, 0.9)),
        ("in_domain", "ev/ratio/shear_speed", metric(2.9, 1.7)),
        ("in_domain", "ev/ratio/random", metric(0.4, 1.0)),
        ("in_domain", "ev/low/shear_speed", metric(0.6, 1.1)),
        ("transfer", "ev/ratio/advect_speed", metric(2.1, 1.4)),
        ("transfer", "speed/change/shear_speed", metric(1.0, -0.6)),
        ("shared", "cosine/speed", metric(0.9, 0.5)),
        ("odd", f"odd/{ODD[2]}", metric(0.1, -0.1)),
        ("counterfactual", "counterfactual/advect", metric(59.0)),
        ("diffusion", "diffusion/change", metric(0.1, -0.01)),
    ],
)
def test_claims_fail_on_numbers_that_say_so(claim, name, value):
    status = {one.id: one.status for one in judge_claims(CLAIMS, GOOD | {name: value})}
    assert status[claim] == "fails"


def test_nothing_is_concluded_of_a_surrogate_that_is_not_competent():
    status = {one.id: one.status for one in judge_claims(CLAIMS, GOOD | {"gate/six/advect": metric(0.2)})}
    assert status.pop("competence") == "fails"
    assert set(status.values()) == {"not_judged"}


@pytest.fixture(scope="module")
def result():
    return run(jax.random.key(0), PRESETS["smoke"], Log())


def test_smoke_run_measures_what_it_says(result):
    metrics = result.metrics
    for name in ("shear_speed", "random"):
        ratio, low, high = (metrics[f"ev/{what}/{name}"].value for what in ("ratio", "low", "high"))
        np.testing.assert_allclose(ratio, high / low, rtol=1e-5)
        np.testing.assert_allclose(metrics[f"ev/slope/{name}"].value, np.log(ratio) / 0.4, rtol=1e-5)
    assert metrics["gate/one/advect"].value > 0 and "cosine/speed" not in metrics
    assert set(result.figures) == {"dose_energy", "dose_speed"}
    assert {claim.id for claim in result.claims} == {claim.id for claim in CLAIMS}


def made_up(strengths, draws=2, families=("shear", "advect")):
    """Outcomes whose read-outs are exp(alpha) on shear flow and 1 + alpha on advection, times 1 and 2 by state."""
    family = np.repeat(families, 2)
    states = np.asarray([1.0, 2.0, 1.0, 2.0])

    def cell(alpha, draws):
        size = np.where(family == "shear", np.exp(alpha), 1 + alpha) * states
        return {what: np.tile(size, (draws, 1)) for what in ("ev", "enstrophy", "rough", "c_eff", "d_eff")}

    outcome = {"none": {0.0: cell(0.0, 1)}, "arm": {alpha: cell(alpha, draws) for alpha in strengths}}
    return measures.Outcomes(outcome, family)


def test_readouts_are_averaged_over_the_states_of_their_family():
    found = measures.summarise(made_up((-0.4, -0.2, -0.1, 0.1, 0.2, 0.4)))
    np.testing.assert_allclose(found["ev/ratio/arm"], np.exp([0.4, 0.4]))
    np.testing.assert_allclose(found["ev/slope/arm"], [1, 1])
    np.testing.assert_allclose(found["speed/change/arm"], [0.6, 0.6])
    np.testing.assert_allclose(found["c_eff/slope/arm"], [1, 1])
    np.testing.assert_allclose(found["ev/rank/arm"], [1, 1])
    np.testing.assert_allclose(found["odd/arm on ev"], [0.2, 0.2])
    few = measures.summarise(made_up((-0.2, 0.2)))
    assert "ev/rank/arm" not in few and "odd/arm on ev" not in few and "ev/ratio/arm" in few


def test_an_even_response_is_not_odd_and_a_negative_speed_has_no_logarithm():
    assert measures.oddness(np.asarray([2.0]), np.asarray([2.0]), np.asarray([1.0])) < 0
    assert np.isnan(measures.oddness(np.asarray([2.0]), np.asarray([-2.0]), np.asarray([1.0])))
    assert measures.as_metrics([{"odd/x": np.asarray([np.nan]), "y": np.asarray([1.0])}]).keys() == {"y"}


def test_the_strength_is_that_which_comes_closest_and_ties_do_not_count():
    others = np.stack([np.full((3, 2, 2), 2.0), np.full((3, 2, 2), -1.0)])
    outcome = {"arm": {a: {"tracer": np.full((1, 3, 2, 2), 10 * a)} for a in (-0.2, -0.1, 0.1, 0.2)}}
    chosen = measures.choose_strengths(outcome, "arm", others)
    np.testing.assert_array_equal(chosen, [[0.2, -0.1]])
    outcome["none"] = {0.0: {"tracer": np.zeros((1, 3, 2, 2))}}
    assert measures.closer(outcome, ["arm"], chosen, others).all()
    outcome["none"] = {0.0: {"tracer": np.full((1, 3, 2, 2), 2.0)}}
    hits = measures.closer(outcome, ["arm"], chosen, others)
    assert not hits[0, 0].any() and hits[0, 1].all()


@pytest.fixture(scope="module")
def tiny():
    """An untrained surrogate on two states; claims about rows and chunks need no training."""
    config = dataclasses.replace(PRESETS["smoke"], horizon=2, film_steps=3)
    model = surrogate(SurrogateConfig(scales=(0.1,) * 3, grid=16, layers=2, width=12, modes=5))
    params = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(1)))
    start = lab.joined(
        [worlds.states(jax.random.key(i), name, 1, 3, config) for i, name in enumerate(("shear", "advect"))]
    )
    return config, model, params, start


def test_a_row_is_the_rollout_of_its_state_under_its_patch(tiny):
    config, model, params, start = tiny
    delta = jax.random.normal(jax.random.key(2), (1, 1, 12, 16, 16, 1))
    patches = [lab.Patch("none", 0, delta, 0, (0.0,)), lab.Patch("arm", 0, delta, 1, (-0.3, 0.3), "pad")]
    outcome = lab.measure(model, params, patches, start, config, Log(), "rows")
    for name, alpha, mode in (("none", 0.0, "drop"), ("arm", -0.3, "none"), ("arm", 0.3, "none")):
        layer = 0 if name == "none" else 1
        sites = model.sites_for(start.frames, start.mask)
        edits = ps.relative_edits(sites, delta, layer=layer, alpha=alpha, mode=mode)
        out = ps.rollout(model, params, start.frames, start.mask, 2, edits)
        np.testing.assert_allclose(outcome[name][alpha]["tracer"][0], out[-1, :, 2], rtol=1e-3, atol=1e-4)
    moved = outcome["arm"][0.3]["tracer"] - outcome["none"][0.0]["tracer"]
    assert np.abs(moved).max() > 1e-4


def test_a_film_goes_on_where_a_rollout_ends(tiny):
    config, model, params, start = tiny
    delta = jax.random.normal(jax.random.key(2), (1, 1, 12, 16, 16, 1))
    made = lab.film(model, params, delta, 0, (0.0, 0.2), start, config)
    assert made.shape == (2, 2, 4, 3, 16, 16)
    np.testing.assert_array_equal(made[1, :, 0], start.frames[:, -1])
    plain = ps.rollout(model, params, start.frames, start.mask, 3)
    np.testing.assert_allclose(made[0, :, 1:], np.swapaxes(plain, 0, 1), rtol=1e-3, atol=1e-4)


def test_films_strips_and_energies_are_drawn():
    config = PRESETS["smoke"]
    rng = np.random.default_rng(0)

    def shown(family):
        x = rng.normal(size=(2, 3, 3, 16, 16)).astype(np.float32)
        truth = rng.normal(size=(2, 6, 3, 16, 16)).astype(np.float32)
        states = worlds.States(np.full(2, family), x, np.ones((2, 3)), np.ones((2, 2)), truth)
        return rng.normal(size=(3, 2, 7, 3, 16, 16)).astype(np.float32), states

    films = {f"shear_{name} on shear": shown("shear") for name in ("vorticity", "speed", "diffusion")}
    drawn = draw.moving(config, films | {"shear_speed on advect": shown("advect")})
    assert set(drawn) == {
        *(f"strip_shear_{name}" for name in ("vorticity_on_shear", "speed_on_shear", "speed_on_advect")),
        *("film_shear_vorticity_on_shear", "film_shear_speed_on_advect", "fields_diffusion"),
        *("energy_shear_speed_on_shear", "energy_shear_vorticity_on_shear"),
    }


def test_matched_pairs_differ_in_one_thing():
    config = dataclasses.replace(PRESETS["smoke"], pairs=2, directions=worlds.DIRECTIONS)
    pairs = worlds.matched_pairs(jax.random.key(0), "advect", config)
    fast, slow = pairs["advect_speed"]
    np.testing.assert_allclose(fast[:, :, 0, 2], slow[:, :, 0, 2], atol=1e-5)
    np.testing.assert_allclose(fast[:, :, :, :2] / slow[:, :, :, :2], worlds.FAST / worlds.SLOW, rtol=1e-3)
    thick, thin = pairs["advect_diffusion"]
    np.testing.assert_allclose(thick[:, :, 0], thin[:, :, 0], atol=1e-5)
    assert (thick[:, :, -1, 2].std((2, 3)) < thin[:, :, -1, 2].std((2, 3))).all()


def test_the_other_speed_starts_from_the_same_frame():
    config = dataclasses.replace(PRESETS["smoke"], controls=True, directions=worlds.DIRECTIONS)
    states = worlds.states(jax.random.key(3), "shear", 2, 1, config)
    last, fast, slow = states.frames[:, -1], states.other[0, :, 0], states.other[1, :, 0]
    moved = [float(jnp.abs(x[:, 2] - last[:, 2]).mean()) for x in (fast, states.truth[:, 0], slow)]
    assert moved[0] > moved[1] > moved[2] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"families": ("advect",)}, "families: wanted shear, advect"),
        ({"kinds": ("graph",)}, "kinds"),
        ({"directions": ("shear_heat",)}, "directions: wanted"),
        ({"directions": ("shear_speed",)}, "controls need"),
        ({"fits": ("pad",)}, "fits"),
        ({"alphas": (0.0, 0.2)}, "0.2 and -0.2"),
        ({"alphas": (0.2, 0.0, -0.2)}, "rising"),
        ({"layer": 4}, "layer, other_layers: wanted 0..3"),
        ({"frames": 6}, "history"),
        ({"models": 0, "pairs": 0}, "models, pairs: wanted at least 1"),
    ],
)
def test_bad_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)
