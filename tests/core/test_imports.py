"""Importing the package loads nothing heavy and starts no backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def loaded_by(statement: str) -> list[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    # A plugin that pytest's own environment loads (coverage, debuggers) must not count.
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=ROOT
    )
    return out.stdout.split()


@pytest.mark.parametrize("statement", ["import mechlab", "import mechlab.core.errors", "import mechlab.models"])
def test_import_loads_no_jax(statement: str) -> None:
    modules = loaded_by(statement)
    assert "mechlab" in modules
    assert not {"jax", "jaxlib", "flax", "numpy", "optax", "orbax"} & set(modules)


def test_importing_the_core_and_the_models_starts_no_backend_and_loads_no_checkpoint_library() -> None:
    everything = "import mechlab.core.sweeps, mechlab.core.transforms, mechlab.core.sharding, mechlab.core.rng, "
    everything += "mechlab.models.transformer, mechlab.models.mlp, mechlab.training.loop"
    started = "from jax._src import xla_bridge; assert not xla_bridge._backends, xla_bridge._backends"
    modules = loaded_by(f"{everything}; {started}")
    assert "jax" in modules
    assert not {"orbax", "orbax.checkpoint", "safetensors", "matplotlib", "sklearn"} & set(modules)


@pytest.mark.parametrize("module", ["sites", "edits", "model", "select", "transforms", "sweeps", "sharding", "rng"])
def test_every_module_of_the_core_imports_alone(module: str) -> None:
    if module == "sweeps":  # uses jax.extend, which jax itself does not load
        use = "mechlab.core.sweeps.peak_bytes(lambda x: x + 1, 1.0)"
    else:
        use = "pass"
    assert f"mechlab.core.{module}" in loaded_by(f"import mechlab.core.{module}; {use}")


def test_the_core_imports_nothing_of_the_packages_above_it() -> None:
    for path in (ROOT / "mechlab" / "core").glob("*.py"):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]) and words[1].startswith("mechlab"):
                assert words[1].startswith("mechlab.core"), f"{path.name}: {line}"
