"""Train with checkpoints in a folder and die after a given step: ``python -m ... FOLDER STEP``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import jax
import optax

from mechlab.training import loop
from tests.training import problem

if __name__ == "__main__":
    folder, last = Path(sys.argv[1]), int(sys.argv[2])

    def die(done: int) -> None:
        if done >= last:
            os.kill(os.getpid(), signal.SIGKILL)

    loop.CHECKPOINT_SECONDS = 0.0
    loop.fit(
        jax.random.key(problem.KEY_SEED),
        problem.loss,
        problem.params(),
        optax.adam(1e-2),
        problem.batches(),
        steps=problem.STEPS,
        segment=2,
        record=problem.record,
        log=problem.Log(folder, die),
    )
