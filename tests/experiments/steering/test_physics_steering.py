"""The claims of physics steering are judged by their criteria, on numbers made up for the purpose."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.steering._physics_steering_claims import CLAIMS, ODD
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
