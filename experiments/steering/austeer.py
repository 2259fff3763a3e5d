"""AUSteer (arXiv 2602.04428): does scaling a few single dimensions steer better than moving whole vectors?

    python -m experiments run austeer                   # 7 minutes of processor time
    python -m experiments run austeer --preset smoke    # a behaviour planted by hand, seconds

Items have two candidate answers. Units are scored on pairs of texts that end in the right and in the wrong one; site, k
and alpha are chosen on dev items; names, things and cues of train, dev and test are disjoint. CAA, ITI, SADI and whole
blocks get about as many dev evaluations; no steering, a constant added to one answer's logit, as strong random units,
the least consistent units and two other scores are controls. Every disturbance of a model moves its bias for one
answer, and so its plain accuracy, up or down: AUROC, which knows no bias, is reported beside it, and settings are
chosen by the mean of both. One task is also scanned unit by unit.

The paper's numbers are of models with billions of parameters; ours are on docs/papers/austeer.md.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments.measures import per_seed
from experiments.steering import _austeer_figures as draw
from experiments.steering import _austeer_lab as lab
from experiments.steering import _austeer_units as units
from experiments.steering._austeer_claims import CLAIMS
from experiments.steering._austeer_measures import Outcome, pooled, summarise
from experiments.steering._tales_tasks import STORIES, Items, stacked
from mechlab.analysis.margins import list_correct, tune_offsets
from mechlab.analysis.metrics import auroc
from mechlab.core.rng import stream
from mechlab.methods.steering import austeer
from mechlab.reporting.log import Log
from mechlab.reporting.results import Metric, Result, judge_claims

__all__ = ["CLAIMS", "PRESETS", "Config", "run"]

ALL_TASKS = ("planted", *lab.TALES, *STORIES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
      tasks: "planted" in a random model, always with 32 pairs and a small grid; recall, mood, agree, ioi in tales-L, at
        its usual difficulty; stories_mood, stories_recall in stories260K.
      seeds: draws of training, dev and test items.
      tales_seeds: the same for tales-L, whose forwards cost most.
      pairs: N, from which units are scored.
      dev, test: numbers of items.
      tales_dev, tales_test: the same for tales-L.
      ks, alphas: AUSteer's grid.
      tales_ks, tales_alphas: the same for tales-L.
      randoms: random choices of units.
      scan_task: the task whose units are steered one by one; empty for none.
      scan_alpha: strength of the scan.
      words: units whose tokens are listed.
    """

    tasks: tuple[str, ...] = ("planted", "recall", "mood", "agree", "stories_mood", "stories_recall")
    seeds: int = 2
    tales_seeds: int = 1
    pairs: int = 200
    dev: int = 80
    test: int = 240
    tales_dev: int = 40
    tales_test: int = 120
    ks: tuple[int, ...] = (1, 4, 16, 100)
    alphas: tuple[float, ...] = (1.0, 5.0, 20.0)
    tales_ks: tuple[int, ...] = (1, 16, 100)
    tales_alphas: tuple[float, ...] = (1.0, 5.0, 20.0)
    randoms: int = 10
    scan_task: str = "stories_mood"
    scan_alpha: float = 5.0
    words: int = 16

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in ALL_TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"tasks: unknown {unknown}; known: {', '.join(ALL_TASKS)}")
        if self.scan_task and self.scan_task not in self.tasks:
            raise ValueError(f'scan_task: "{self.scan_task}" is not one of the tasks {self.tasks}')
        if min(*self.ks, *self.tales_ks) < 1 or not np.isfinite([*self.alphas, *self.tales_alphas]).all():
            raise ValueError("ks must be at least 1, alphas finite")
        if min(*self.alphas, *self.tales_alphas) <= 0:
            raise ValueError("alphas must be positive: beta has the sign")
        if min(self.seeds, self.tales_seeds, self.randoms, self.words) < 1 or self.pairs < 10:
            raise ValueError("seeds, randoms and words must be at least 1, pairs at least 10")
        if min(self.dev, self.test, self.tales_dev, self.tales_test) < 4:
            raise ValueError("dev and test must have at least 4 items")

    def grid(self, task: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """AUSteer's k and alpha on this task."""
        if task == "planted":
            return (2, 8), (0.5, 2.0)
        return (self.tales_ks, self.tales_alphas) if task in lab.TALES else (self.ks, self.alphas)

    def sizes(self, task: str) -> tuple[int, int, int, int]:
        """Seeds, pairs, dev items and test items of this task."""
        if task == "planted":
            return self.seeds, 32, 40, 80
        if task in lab.TALES:
            return self.tales_seeds, self.pairs, self.tales_dev, self.tales_test
        return self.seeds, self.pairs, self.dev, self.test


_PAPER_KS, _PAPER_ALPHAS = (2, 4, 8, 16, 50, 64, 80, 100), (5.0, 8.0, 10.0, 15.0, 20.0, 50.0, 100.0)

PRESETS: dict[str, Config] = {
    "smoke": Config(
        tasks=("planted",),
        seeds=2,
        randoms=3,
        scan_task="planted",
        scan_alpha=2.0,
        words=8,
    ),
    "cpu": Config(),
    "accel": Config(
        tasks=ALL_TASKS,
        seeds=5,
        tales_seeds=5,
        pairs=1000,
        dev=500,
        test=2000,
        tales_dev=500,
        tales_test=2000,
        ks=_PAPER_KS,
        alphas=_PAPER_ALPHAS,
        tales_ks=_PAPER_KS,
        tales_alphas=_PAPER_ALPHAS,
        scan_task="recall",
    ),
    # The paper's grid on our subjects; its own models, of 7 to 9 billion parameters, are not wired up.
    "paper": Config(
        seeds=3,
        tales_seeds=3,
        pairs=1000,
        tales_dev=100,
        tales_test=500,
        ks=_PAPER_KS,
        alphas=_PAPER_ALPHAS,
        tales_ks=_PAPER_KS,
        tales_alphas=_PAPER_ALPHAS,
    ),
}


def run(key: jax.Array, config: Config, log: Log) -> Result:
    """Every task of every subject, then the units of one, claims and figures."""
    metrics: dict[str, Metric] = {}
    outcomes: dict[str, Outcome] = {}
    scanned, spelled = None, None
    for where, subject in lab.make_subjects(key, config, log).items():
        for name in subject.tasks:
            log.say(f"{where}: {name}")
            reading, dev, test, outcomes[name] = one_task(stream(key, name), subject, name, config, log)
            metrics |= summarise(stream(key, name, "bootstrap"), name, outcomes[name])
            seeds = jax.vmap(lambda seed, name=name: stream(key, name, "lots", seed))(jnp.arange(len(reading.caa)))
            for what, values in zip(("top", "by_lot"), lab.consistency(seeds, reading), strict=True):
                metrics[f"consistency/{name}/{what}"] = per_seed(values, "|beta|")
            if name == "planted":
                metrics |= units.planted_metrics(reading)
            if name == config.scan_task:
                one, of_dev, of_test = jax.tree.map(lambda x: x[:1], (reading, dev, test))
                scores = {site: beta[0] for site, beta in one.scores.items()}
                scanned = units.scan(stream(key, "scan"), subject, scores, of_dev, of_test, config.scan_alpha)
                metrics |= units.scan_metrics(scanned, name, dev.right.shape[1])
            if spelled is None or name in lab.TALES[:1]:
                site = lab.SITES[int(outcomes[name].choices["austeer"]["site"][0])]
                spelled = units.words(subject, reading.scores[site][0], site, config.words)
    if len(outcomes) > ("planted" in outcomes):
        metrics |= pooled(stream(key, "pooled"), {task: x for task, x in outcomes.items() if task != "planted"})
    assert spelled is not None
    for unit, tokens in zip(spelled.names, spelled.tokens, strict=True):
        log.say(f"  unit {unit} raises | lowers: {tokens}")
    above = spelled.divergence[np.triu_indices(len(spelled.names), 1)]
    metrics["divergence"] = Metric(value=float(above.mean()) if above.size else 0.0, n=len(spelled.names), unit="nats")
    grids = {task: config.grid(task) for task in outcomes}
    figures = draw.all_figures(
        outcomes,
        metrics,
        {task: ks for task, (ks, _) in grids.items()},
        {task: alphas for task, (_, alphas) in grids.items()},
        scanned,
        spelled,
    )
    return Result(metrics=metrics, claims=judge_claims(CLAIMS, metrics), figures=figures)


def one_task(
    key: jax.Array, subject: lab.Subject, name: str, config: Config, log: Log
) -> tuple[lab.Reading, Items, Items, Outcome]:
    """Score units, choose on dev, test: all seeds of a task at once."""
    draw_items, (ks, alphas) = subject.tasks[name], config.grid(name)
    seeds, pairs, n_dev, n_test = config.sizes(name)
    reading = lab.read(key, subject, draw_items, seeds, pairs)
    dev, test = (
        stacked([draw_items(stream(key, pool, seed), n, pool) for seed in range(seeds)])
        for pool, n in (("dev", n_dev), ("test", n_test))
    )
    tuned = lab.tuned_arms(subject.model, reading, ks, alphas)
    none = jax.tree.map(lambda x: np.zeros((seeds, 1, *x.shape)), lab.arms_of(subject.model))
    dev_logits = ask(subject, dev, lab.join(none, *(options.arms for options in tuned.values())))
    dev_areas, dev_hits = map(np.asarray, areas_and_hits(dev_logits, dev.right))
    worth = (dev_areas + dev_hits.mean(-1)) / 2

    # Arm 0 is no steering; the options of each method follow.
    starts = np.cumsum([1, *(len(options.settings["alpha"]) for options in tuned.values())])
    cells, places = {}, {"none": np.zeros(seeds, int)}
    for method, start, stop in zip(tuned, starts, starts[1:], strict=False):
        cells[method] = worth[:, start:stop].argmax(1)
        places[method] = start + cells[method]
    rows = np.arange(seeds)
    choices = {
        method: {
            name: values[rows, cells[method]] if name == "dims" else values[cells[method]]
            for name, values in options.settings.items()
        }
        for method, options in tuned.items()
    }
    controls, others = lab.control_arms(
        stream(key, "random"), subject.model, reading, choices["austeer"], config.randoms
    )
    chosen = [
        jax.tree.map(lambda x, m=m: np.asarray(x)[rows, cells[m]][:, None], options.arms)
        for m, options in tuned.items()
    ]
    arms = lab.join(none, *chosen, others)
    names = ["none", *tuned, *controls]
    logits = ask(subject, test, arms)
    areas, hits = map(np.asarray, areas_and_hits(logits, test.right))
    after_offset = {
        arm: np.stack([offset_hits(dev_logits[s, at[s]], dev.right[s], logits[s, i], test.right[s]) for s in rows])
        for i, (arm, at) in enumerate(places.items())
    }
    grid_shape = (seeds, len(lab.SITES), len(ks), len(alphas))
    ours_on_dev = slice(1, starts[1])
    scores = [reading.scores[lab.SITES[site]][s] for s, site in enumerate(choices["austeer"]["site"])]
    outcome = Outcome(
        arms=names,
        margins=logits[..., 0] - logits[..., 1],
        areas=areas,
        hits=hits,
        first=np.asarray(test.right) == 0,
        corrected=after_offset,
        choices=choices,
        ties=np.asarray(
            [austeer.tie_count(beta, int(k)) for beta, k in zip(scores, choices["austeer"]["k"], strict=True)]
        ),
        dev_auroc=dev_areas[:, ours_on_dev].reshape(grid_shape),
        dev_hits=dev_hits[:, ours_on_dev].mean(-1).reshape(grid_shape),
        ranks=[ranked_layers(beta) for beta in scores],
    )
    if name != "planted":
        say_text(subject, test, name, outcome, jax.tree.map(lambda x: x[0, names.index("austeer")], arms), log)
    return reading, dev, test, outcome


def ask(subject: lab.Subject, items: Items, arms: lab.Arm) -> np.ndarray:
    """Logits (S, A, N, 2) of each seed's arms (S, A, ...) on its own items."""
    seeds, n = arms.attn.shape[:2]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), arms)
    logits = lab.scores_of(subject, items, flat, np.repeat(np.arange(seeds), n))
    return logits.reshape(seeds, n, *logits.shape[1:])


@jax.jit
@jax.vmap
def areas_and_hits(logits: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """AUROC (S, A) of the margins, and hits (S, A, N), of logits (S, A, N, 2)."""
    return auroc(logits[..., 0] - logits[..., 1], right == 0), list_correct(logits, right)


@jax.jit
def offset_hits(dev: jax.Array, dev_right: jax.Array, test: jax.Array, test_right: jax.Array) -> jax.Array:
    """Hits on test items (N, 2) after the constants that are best on dev items."""
    return list_correct(test, test_right, tune_offsets(dev, dev_right))


def ranked_layers(scores: jax.Array) -> np.ndarray:
    """(100, 2) at most: layer and place of the first units."""
    layers, _, _ = austeer.select_aus(scores, min(100, scores.size))
    return np.stack([layers, np.arange(len(layers))], 1)


def say_text(subject: lab.Subject, test: Items, name: str, found: Outcome, arm: lab.Arm, log: Log) -> None:
    """Show a prompt whose answer was wrong and is now right, where there is one, with its greedy continuations."""
    none, ours = (found.hits[0, found.arms.index(which)] for which in ("none", "austeer"))
    mended, changed = np.flatnonzero(ours & ~none), np.flatnonzero(ours != none)
    row = int([*mended, *changed, 0][0])
    prompt, before, after = lab.continuations(subject, test, row, arm)
    sides = [subject.decode([int(token)]).strip() for token in test.answers[0, row, :2]]
    setting = {key: float(value[0]) for key, value in found.choices["austeer"].items()}
    log.say(
        f"  AUSteer of seed 0: {setting}\n  prompt: {prompt}\n  right: {sides[int(test.right[0, row])]}, of {sides}\n"
        f"  not steered: {before}\n  steered: {after}"
    )
