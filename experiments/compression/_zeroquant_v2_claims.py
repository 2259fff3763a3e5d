"""The statements of ZeroQuant-V2 and how each is judged, in perplexity (PPL) and KL to the unquantised model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from experiments.measures import by_seed
from mechlab.reporting.results import Claim, Metric

Metrics = Mapping[str, Metric]
Verdict = tuple[bool | None, str]
METHODS = ("rtn", "gptq", "local", "global")
LADDER = ("tales-S", "tales-M", "tales-L")
CLASS_1 = 100 * 0.1 / 11.90
"""Largest increase of class 1 as a share of the paper's OPT-6.7B, in %."""


def _models(metrics: Metrics, planted: bool = False) -> list[str]:
    """The decoders of the sensitivity study; planted ones have a factor in their names."""
    names = [name.split("/", 1)[1] for name in metrics if name.startswith("perplexity/")]
    return [name for name in names if (" x" in name) == planted]


def _studied(metrics: Metrics) -> list[str]:
    return [name for name in _models(metrics) if f"kl/{name}/rtn/row/A16/r0" in metrics]


def finest(metrics: Metrics, model: str) -> str:
    """The grid with the smallest groups."""
    grids = {name.split("/")[3] for name in metrics if name.startswith(f"kl/{model}/rtn/")}
    return min((grid for grid in grids if grid.startswith("g")), key=lambda grid: int(grid[1:]))


def _eight_bits(metrics: Metrics) -> Verdict:
    worst = {}
    for model in _models(metrics):
        both = [by_seed(metrics[f"increase/{model}/W8A16 {kind}"]) for kind in ("sym", "asym")]
        worst[model] = float(np.max(both))
    return max(worst.values()) <= 0.1, "; ".join(f"{model} at most {value:+.4f} PPL" for model, value in worst.items())


def _asymmetric(metrics: Metrics) -> Verdict:
    means = {}
    for width in ("W16A8", "W4A16"):
        for kind in ("sym", "asym"):
            means[width, kind] = np.mean([metrics[f"increase/{m}/{width} {kind}"].value for m in _models(metrics)])
    holds = all(means[width, "asym"] <= means[width, "sym"] for width in ("W16A8", "W4A16"))
    return holds, "; ".join(
        f"{width}: sym {means[width, 'sym']:+.4f}, asym {means[width, 'asym']:+.4f} PPL" for width in ("W16A8", "W4A16")
    )


def _against(better: str, worse: str) -> Callable[[Metrics], Verdict]:
    """Whether the KL of one cell is below another's in every seed of every studied model."""

    def judge(metrics: Metrics) -> Verdict:
        holds, words = True, []
        for model in _studied(metrics):
            a, b = (metrics[f"kl/{model}/{cell}/r0"] for cell in (better, worse))
            holds = holds and bool((by_seed(a) < by_seed(b)).all())
            words.append(f"{model}: {a.value:.4f} against {b.value:.4f} nats")
        return (holds if words else None), "; ".join(words)

    return judge


def _finer_groups(metrics: Metrics) -> Verdict:
    holds, words = True, []
    for model in _studied(metrics):
        names = [name for name in metrics if name.startswith(f"kl/{model}/rtn/g") and name.endswith("/A16/r0")]
        groups = sorted((int(name.split("/")[3][1:]) for name in names), reverse=True)
        if len(groups) < 2:
            return None, "one group size only at this preset"
        for method in ("rtn", "gptq"):
            curve = [metrics[f"kl/{model}/{method}/g{group}/A16/r0"].value for group in groups]
            holds = holds and bool((np.diff(curve) < 0).all())
            steps = ", ".join(f"{group}: {kl:.4f}" for group, kl in zip(groups, curve, strict=True))
            words.append(f"{model} {method} {steps} nats")
    return (holds if words else None), "; ".join(words)


def _lorc_helps(metrics: Metrics) -> Verdict:
    gains = {name.removeprefix("gain/"): metrics[name] for name in metrics if name.startswith("gain/")}
    if not gains:
        return None, "not measured at this preset"
    low = min(gains, key=lambda name: gains[name].value)
    failing = [name for name, gain in gains.items() if gain.value <= 0]
    words = f"{len(gains) - len(failing)} of {len(gains)} cells; least {gains[low].value:+.5f} nats ({low})"
    return not failing, words


def _lorc_predicted(metrics: Metrics) -> Verdict:
    worst = [float(by_seed(metrics[name]).max()) for name in metrics if name.startswith("prediction/")]
    if not worst:
        return None, "not measured at this preset"
    return max(worst) <= 1e-3, f"at most {max(worst):.1e} of |E|^2 off, over {len(worst)} cells"


def _lorc_for_the_coarse(metrics: Metrics) -> Verdict:
    holds, words = True, []
    for model in _studied(metrics):
        coarse = metrics[f"gain/{model}/rtn/row/A16"].value
        fine = metrics[f"gain/{model}/gptq/{finest(metrics, model)}/A16"].value
        holds = holds and coarse > fine
        words.append(f"{model}: {coarse:.4f} on RTN per row, {fine:.4f} on GPTQ in groups, nats")
    return (holds if words else None), "; ".join(words)


def _activations_hurt(metrics: Metrics) -> Verdict:
    pairs = {
        model: tuple(metrics[f"increase/{model}/{cell} asym"].value for cell in ("W16A8", "W8A16"))
        for model in _models(metrics)
    }
    words = "; ".join(f"{model} {a:+.4f} against {w:+.4f} PPL" for model, (a, w) in pairs.items())
    return all(a > w for a, w in pairs.values()), words


def _planted_hurt(metrics: Metrics) -> Verdict:
    models = _models(metrics, planted=True)
    if not models:
        return None, "nothing planted at this preset"
    largest = max(float(model.split(" x")[1]) for model in models)
    pairs = {
        model: tuple(metrics[f"increase/{model}/{cell} asym"].value for cell in ("W16A8", "W4A16"))
        for model in models
        if float(model.split(" x")[1]) == largest
    }
    words = "; ".join(f"{model}: A8 {a:+.3f}, W4 {w:+.3f} PPL" for model, (a, w) in pairs.items())
    return all(a > w for a, w in pairs.values()), words


def _order(metrics: Metrics) -> Verdict:
    holds, words = True, []
    for model in _studied(metrics):
        for act in ("A16", "A8"):
            kl = {method: metrics[f"kl/{model}/{method}/row/{act}/r0"].value for method in METHODS}
            best = min(kl, key=lambda method: kl[method])
            holds = holds and (best == "gptq" if act == "A16" else best in ("local", "global"))
            words.append(f"{model} W4{act}: " + ", ".join(f"{method} {value:.4f}" for method, value in kl.items()))
    return (holds if words else None), "; ".join(words)


def _coarse_falls_short(metrics: Metrics) -> Verdict:
    holds, words = True, []
    for model in _studied(metrics):
        for act in ("A16", "A8"):
            least = min(metrics[f"relative/{model}/{method}/row/{act}/r0"].value for method in METHODS)
            holds = holds and least > CLASS_1
            words.append(f"{model} W4{act}: best method {least:+.2f} % PPL")
    return (holds if words else None), "; ".join(words)


def _fine_recovers(metrics: Metrics) -> Verdict:
    holds, words = True, []
    for model in _studied(metrics):
        grid, rank = finest(metrics, model), repaired_rank(metrics, model)
        for act in ("A16", "A8"):
            coarse = min(metrics[f"kl/{model}/{method}/row/{act}/r0"].value for method in METHODS)
            names = [f"kl/{model}/{method}/{grid}/{act}/r{rank}" for method in METHODS]
            fine = min(metrics[name].value for name in names if name in metrics)
            holds = holds and fine <= coarse / 2
            words.append(f"{model} W4{act}: {coarse:.4f} to {fine:.4f} nats")
    return (holds if words else None), "; ".join(words)


def repaired_rank(metrics: Metrics, model: str) -> int:
    """Of LoRC on every method: what ZQ-Global was repaired with."""
    names = [name for name in metrics if name.startswith(f"kl/{model}/global/row/A8/r")]
    return max(int(name.rsplit("/r", 1)[1]) for name in names)


def _small_suffer_less(metrics: Metrics) -> Verdict:
    sizes = [metrics[f"relative/{model}/W16A8 asym"].value for model in LADDER]
    words = ", ".join(f"{model} {value:+.3f} %" for model, value in zip(LADDER, sizes, strict=True))
    return bool((np.diff(sizes) > 0).all()), words


CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="eight_bit_weights",
        statement="INT8 weights alone cost next to nothing: class 1 on every model.",
        source="section 4, table 2",
        criterion="W8A16, symmetric and asymmetric: PPL rises by at most 0.1 on every model, in every seed",
        judge=_eight_bits,
    ),
    Claim(
        id="asymmetric_is_better",
        statement="Asymmetric grids are at least as good as symmetric ones.",
        source="section 4, table 2",
        criterion="mean PPL over models and seeds at W16A8, and at W4A16: asymmetric at most symmetric",
        judge=_asymmetric,
    ),
    Claim(
        id="activations_hurt_more",
        statement="Activations are more sensitive than weights.",
        source="section 4",
        criterion="on every model, in mean over seeds: PPL rises more at W16A8 than at W8A16, asymmetric",
        judge=_activations_hurt,
    ),
    Claim(
        id="planted_outliers",
        statement="With outlier channels, 8-bit activations cost more than 4-bit weights.",
        source="section 4, OPT-66B in table 2; outliers planted here",
        criterion="on every model with the largest planted factor, in mean: PPL rises more at W16A8 than at W4A16",
        judge=_planted_hurt,
    ),
    Claim(
        id="small_models_suffer_less",
        statement="Smaller models do better under activation quantisation.",
        source="section 4; needs the outliers of large models",
        criterion="PPL at W16A8, asymmetric, rises by a larger share from tales-S to -M to -L, in mean over seeds",
        judge=_small_suffer_less,
    ),
    Claim(
        id="gptq_beats_rtn",
        statement="GPTQ is better than rounding to nearest at W4A16 per row.",
        source="section 5, table 3",
        criterion="lower KL in every seed of every studied model",
        judge=_against("gptq/row/A16", "rtn/row/A16"),
    ),
    Claim(
        id="global_beats_rtn",
        statement="ZQ-Global is better than rounding to nearest at W4A8 per row.",
        source="section 5, table 3",
        criterion="lower KL in every seed of every studied model",
        judge=_against("global/row/A8", "rtn/row/A8"),
    ),
    Claim(
        id="order_of_methods",
        statement="GPTQ is best for weights alone, a ZeroQuant variant for weights and activations.",
        source="section 5, table 3",
        criterion="lowest mean KL of the four per row: GPTQ at W4A16, ZQ-Local or ZQ-Global at W4A8",
        judge=_order,
    ),
    Claim(
        id="coarse_grids_fall_short",
        statement="No method regains the unquantised quality at 4 bits per row.",
        source="section 5",
        criterion="at W4A16 and at W4A8 the best of four methods loses more than 0.84 % of PPL (relative class 1)",
        judge=_coarse_falls_short,
    ),
    Claim(
        id="finer_groups",
        statement="Finer groups are better.",
        source="section 5, table 4",
        criterion="mean KL of RTN and of GPTQ at W4A16 falls with every halving of the group",
        judge=_finer_groups,
    ),
    Claim(
        id="lorc_on_every_method",
        statement="LoRC improves every method.",
        source="section 6, table 5",
        criterion="rank 8 lowers the mean KL of each method, per row and with the smallest groups, at W4A16 and W4A8",
        judge=_lorc_helps,
    ),
    Claim(
        id="lorc_as_predicted",
        statement="LoRC takes from the error exactly its largest singular values.",
        source="section 6, Eckart and Young",
        criterion="|E - A B|^2 is the sum of the dropped squares to 0.1 % of |E|^2, for every kernel, rank and seed",
        judge=_lorc_predicted,
    ),
    Claim(
        id="lorc_for_the_coarse",
        statement="LoRC gives more where quantisation is coarse.",
        source="section 6, table 5",
        criterion="mean gain in KL on RTN per row above that on GPTQ with the smallest groups, at W4A16",
        judge=_lorc_for_the_coarse,
    ),
    Claim(
        id="fine_and_lorc_recover",
        statement="Fine groups and LoRC together recover most of what 4 bits cost.",
        source="abstract",
        criterion="best KL with the smallest groups and LoRC at most half of the best per row, at W4A16 and W4A8",
        judge=_fine_recovers,
    ),
)
