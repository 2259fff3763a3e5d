"""Set-up of the suite: CPU, eight forced host devices, key-reuse checking; vectors and real data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# These must be set before jax starts its backend. Most of the suite's time is compilation, of programs that run for
# milliseconds: without LLVM's optimisations it is a third shorter.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    )
)

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_debug_key_reuse", True)
# A compiled program left over from another version of the code must not decide a test.
jax.config.update("jax_enable_compilation_cache", False)

# The first example of a property compiles; a deadline per example would only time that. Derandomised, so that
# a red run can be run again.
hypothesis.settings.register_profile("mechlab", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("mechlab")

VECTORS = Path(__file__).parent / "vectors"


@pytest.fixture
def vectors() -> Callable[[str], dict[str, np.ndarray]]:
    """``vectors("dopamine")``: the arrays of ``tests/vectors/NN-dopamine.npz`` by name."""

    def load(slug: str) -> dict[str, np.ndarray]:
        found = sorted(VECTORS.glob(f"[0-9][0-9]-{slug}.npz"))
        if len(found) != 1:
            raise FileNotFoundError(f"vectors({slug!r}): wanted one {VECTORS}/NN-{slug}.npz, found {found}.")
        with np.load(found[0], allow_pickle=False) as stored:
            return dict(stored)

    return load


@pytest.fixture
def data_dir() -> Path:
    """The folder with the real data sets, ``$MECHLAB_DATA``; the test is skipped where it is not set."""
    folder = os.environ.get("MECHLAB_DATA")
    if not folder:
        pytest.skip("MECHLAB_DATA is not set: this test needs real data")
    return Path(folder)
