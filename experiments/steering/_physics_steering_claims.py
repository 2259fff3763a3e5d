"""The statements of Physics Steering and how each is judged. Written before any number was measured.

Metrics carry one value per draw of direction data in ``per_seed``. E_v is the geometric mean over test states of the
cross-stream energy at the end of a roll-out of 6 steps, edits are at layer 1, mode ``drop``. Names::

    gate/{one,six}/{shear,advect}           squared error over that of persistence
    base_states/{one,six}/{shear,advect}    the same of the states that steering starts from; reported
    ev/rank/{direction}                     Spearman correlation of alpha in +-0.4 with E_v
    ev/ratio/{direction}                    E_v(+0.2) / E_v(-0.2)
    ev/low/{direction}, ev/high/...         E_v(-0.2) / E_v(0), E_v(+0.2) / E_v(0)
    ev/ratio/random                         the same of every random direction, in per_seed
    speed/change/{direction}                c_eff(+0.2) - c_eff(-0.2) on advect; speed/change/random likewise
    odd/{direction on read-out}             |m(a) - m(-a)| - |m(a) + m(-a) - 2 m(0)| at a = 0.1, m a logarithm
    cosine/speed                            between the speed directions of shear and advect
    counterfactual/{shear,advect}           share of test states closer to the simulation at the other speed, %
    diffusion/rank, diffusion/change        D_eff on advect over alpha, speed directions projected out
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from experiments.measures import every_seed, of_seeds
from mechlab.reporting.results import Claim, Metric

Metrics = Mapping[str, Metric]
Verdict = tuple[bool | None, str]
ODD = ("shear_vorticity on ev", "shear_speed on ev", "advect_speed on ev", "shear_speed on c_eff")


def _gate(metrics: Metrics) -> Verdict:
    found = {name: metrics[f"gate/{name}"].value for name in ("one/shear", "one/advect", "six/shear", "six/advect")}
    holds = all(value <= (0.02 if name.startswith("one") else 0.1) for name, value in found.items())
    return holds, ", ".join(f"{name} {value:.4f}" for name, value in found.items())


def _gated(judge: Callable[[Metrics], Verdict]) -> Callable[[Metrics], Verdict]:
    """An undertrained surrogate answers to both signs alike: below the gate nothing is concluded."""

    def judged(metrics: Metrics) -> Verdict:
        competent, observed = _gate(metrics)
        return judge(metrics) if competent else (None, f"the surrogate is not competent: {observed}")

    return judged


def _in_domain(metrics: Metrics) -> Verdict:
    widest = max(abs(math.log(ratio)) for ratio in metrics["ev/ratio/random"].per_seed or ())
    outcomes, words = [], []
    for name in ("shear_vorticity", "shear_speed"):
        ratio = metrics[f"ev/ratio/{name}"]
        outcomes.append(
            every_seed(metrics[f"ev/rank/{name}"], lambda x: x >= 0.95)
            and every_seed(ratio, lambda x: x >= 1.8 and math.log(x) > widest)
            and every_seed(metrics[f"ev/low/{name}"], lambda x: x < 1)
            and every_seed(metrics[f"ev/high/{name}"], lambda x: x > 1)
        )
        words.append(f"{name}: ratio {of_seeds(ratio, '.3g')}, rank {of_seeds(metrics[f'ev/rank/{name}'], '.3g')}")
    return any(outcomes), "; ".join(words) + f"; random at most a factor of {math.exp(widest):.2f}"


def _transfer(metrics: Metrics) -> Verdict:
    ratio, change = metrics["ev/ratio/advect_speed"], metrics["speed/change/shear_speed"]
    holds = every_seed(ratio, lambda x: x >= 1.5) and every_seed(change, lambda x: x >= 0.5)
    random = of_seeds(metrics["speed/change/random"], ".3g")
    return holds, f"E_v ratio {of_seeds(ratio, '.3g')}; c_eff change {of_seeds(change, '.3g')}; random changes {random}"


def _shared(metrics: Metrics) -> Verdict:
    return every_seed(metrics["cosine/speed"], lambda x: x >= 0.6), f"cosine {of_seeds(metrics['cosine/speed'], '.3g')}"


def _odd(metrics: Metrics) -> Verdict:
    found = {name: metrics[f"odd/{name}"] for name in ODD}
    return all(every_seed(x, lambda v: v >= 0) for x in found.values()), "; ".join(
        f"{name}: {of_seeds(x, '.3g')}" for name, x in found.items()
    )


def _counterfactual(metrics: Metrics) -> Verdict:
    found = {name: metrics[f"counterfactual/{name}"].value for name in ("shear", "advect")}
    return all(x >= 60 for x in found.values()), ", ".join(f"{name} {x:.0f} %" for name, x in found.items())


def _diffusion(metrics: Metrics) -> Verdict:
    rank, change = metrics["diffusion/rank"], metrics["diffusion/change"]
    holds = every_seed(rank, lambda x: x >= 0.95) and every_seed(change, lambda x: x > 0)
    return holds, f"rank {of_seeds(rank, '.3g')}; D_eff(+0.2) - D_eff(-0.2) {of_seeds(change, '.3g')}"


CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="competence",
        statement="The surrogate predicts shear flow and advection well enough to be steered.",
        source="our gate",
        criterion="held-out squared error over persistence at most 0.02 after one step and 0.1 after six, both worlds",
        judge=_gate,
    ),
    Claim(
        id="in_domain",
        statement="A direction of shear flow controls its roll-up: + promotes vortices, - suppresses them.",
        source="vorticity and speed figures",
        criterion="vorticity or speed direction, on every draw: rank >= 0.95, E_v ratio >= 1.8 and above every random "
        "direction's in size, E_v(-0.2) < E_v(0) < E_v(+0.2)",
        judge=_gated(_in_domain),
    ),
    Claim(
        id="transfer",
        statement="A direction learned in one world acts in another.",
        source="cross-domain figure",
        criterion="on every draw: the speed direction of advect has an E_v ratio >= 1.5 on shear flow, and that of "
        "shear flow changes c_eff of advect by >= 0.5",
        judge=_gated(_transfer),
    ),
    Claim(
        id="shared",
        statement="Both worlds represent speed in the same direction.",
        source="abstract (cross-domain concepts)",
        criterion="cosine of the two speed directions >= 0.6 on every draw",
        judge=_gated(_shared),
    ),
    Claim(
        id="odd",
        statement="Opposite signs have opposite effects: control, not damage.",
        source="our control",
        criterion="at alpha = 0.1, on every draw, |m(a) - m(-a)| >= |m(a) + m(-a) - 2 m(0)| for all four effects above",
        judge=_gated(_odd),
    ),
    Claim(
        id="counterfactual",
        statement="Steering by the speed direction leads to what would happen at another speed.",
        source="our check of what the direction means",
        criterion="at the alpha chosen on dev states, at least 60 % of test states are closer to the simulation at the "
        "other speed, in both worlds",
        judge=_gated(_counterfactual),
    ),
    Claim(
        id="diffusion",
        statement="A direction of diffusion raises diffusion.",
        source="diffusion figure",
        criterion="advect, speed directions projected out, on every draw: rank of D_eff over alpha >= 0.95, and "
        "D_eff(+0.2) > D_eff(-0.2)",
        judge=_gated(_diffusion),
    ),
)
