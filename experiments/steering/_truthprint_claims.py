"""The statements of the TruthPrInt paper and how each is judged. Means are over seeds; intervals are over images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from experiments.measures import with_interval
from mechlab.reporting.results import Claim, Metric

Metrics = Mapping[str, Metric]
Verdict = tuple[bool | None, str]


def _judged_if_fit(claim: Claim) -> Claim:
    """The same claim, not judged where the captioner on dev does not err as it should: too rarely, or at random."""
    judge: Callable[[Metrics], Verdict] = claim.judge

    def gated(metrics: Metrics) -> Verdict:
        holds, observed = judge(metrics)
        recall, chair_i = metrics["gate/recall"].value, metrics["gate/chair_i"].value
        if recall >= 60 and 8 <= chair_i <= 35:
            return holds, observed
        return None, f"{observed}; but the captioner is not fit: recall {recall:.0f} %, CHAIR_i {chair_i:.0f} % on dev"

    return dataclasses.replace(claim, judge=gated)


def _sees_early(metrics: Metrics) -> Verdict:
    g, low = metrics["detector/auroc"].value, metrics["detector/tpr_5"].value
    confidence, prior = metrics["detector/auroc_confidence"].value, metrics["detector/auroc_word"].value
    holds = g >= 0.75 and low >= 0.2 and g > confidence and g > prior
    return holds, f"AUROC {g:.3f} (confidence {confidence:.3f}, word prior {prior:.3f}), TPR {low:.2f} at FPR 5 %"


def _lowers(metrics: Metrics) -> Verdict:
    drop, lost = metrics["drop/truthprint"], metrics["recall_lost/truthprint"]
    return drop.value >= 20 and lost.value <= 3, f"CHAIR_i {drop.value:.1f} % lower, recall -{lost.value:.1f} points"


def _beats(metrics: Metrics) -> Verdict:
    margins = {name: metrics[f"over/{name}"] for name in ("random", "confidence")}
    holds = all(margin.ci95 is not None and margin.ci95[0] > 0 for margin in margins.values())
    words = [
        f"{name} {m.value:.1f} [{(m.ci95 or (0, 0))[0]:.1f}, {(m.ci95 or (0, 0))[1]:.1f}]"
        for name, m in margins.items()
    ]
    return holds, "CHAIR_i above TruthPrInt's, points: " + ", ".join(words)


def _earlier(metrics: Metrics) -> Verdict:
    margin = metrics["over/immediate"]
    holds = margin.ci95 is not None and margin.ci95[0] > 0
    return holds, f"CHAIR_i of immediate minus min_conf, points: {with_interval(margin)}"


def _transfers(metrics: Metrics) -> Verdict:
    gain = metrics["transfer/gain"]
    low, high = gain.ci95 or (0.0, 0.0)
    unrelated = metrics["transfer/aligned/unrelated"].value
    return gain.value >= 0, f"AUROC {gain.value:+.3f} [{low:+.3f}, {high:+.3f}]; unrelated seeds {unrelated:.3f}"


def _low_before(metrics: Metrics) -> Verdict:
    false, true = metrics["pmc/hallucinated"].value, metrics["pmc/truthful"].value
    return false < true, f"least confidence before: hallucinated {false:.3f}, truthful {true:.3f}"


_CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="sees_early",
        statement="The state one token early tells whether the object word that follows is hallucinated.",
        source="hidden states as per-token hallucination indicators",
        criterion="mean test AUROC >= 0.75 and TPR >= 0.2 at FPR 5 %; better AUROC than confidence and the word prior",
        judge=_sees_early,
    ),
    Claim(
        id="lowers_hallucination",
        statement="Decoding with the detector and rollback names fewer absent objects.",
        source="TruthPrInt decoding, CHAIR tables",
        criterion="mean CHAIR_i at least 20 % below greedy's, with at most 3 points of recall lost",
        judge=_lowers,
    ),
    Claim(
        id="beats_controls",
        statement="It is the detector that helps, not going back as such.",
        source="our check, at the rollback rate of TruthPrInt on dev",
        criterion="CHAIR_i of the random and the confidence-only detector exceed TruthPrInt's: both intervals above 0",
        judge=_beats,
    ),
    Claim(
        id="early_beats_immediate",
        statement="Going back to the least confident token is better than replacing the flagged word.",
        source="abstract: pre-intervention",
        criterion="CHAIR_i of immediate rollback exceeds that of min_conf, interval above 0",
        judge=_earlier,
    ),
    Claim(
        id="comnhallu_transfers",
        statement="Aligned subspaces carry the detector to other data and to models of one lineage.",
        source="ComnHallu, transfer tables",
        criterion="mean AUROC over cross-data, cross-lineage and both at once at least that without alignment",
        judge=_transfers,
    ),
    Claim(
        id="low_confidence_before",
        statement="A low-confidence token precedes hallucinations (the paper's prose; its Table 7 has the opposite).",
        source="preceding minimum confidence",
        criterion="mean preceding minimum confidence lower before hallucinated than before truthful words",
        judge=_low_before,
    ),
)

CLAIMS = tuple(map(_judged_if_fit, _CLAIMS))
"""Judged only where the captioner recalls at least 60 % on dev, with CHAIR_i between 8 and 35 %."""
