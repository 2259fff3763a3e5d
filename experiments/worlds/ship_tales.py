"""Put the weights of a finished run of tales into the package: ``python -m experiments.worlds.ship_tales RUN``.

RUN is the run's folder, such as ``runs/tales/cpu-0``. What ships must be below 8 MB.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from experiments.command_line.directories import CHECKPOINTS
from mechlab.models.shipped import SIZES, WEIGHTS

MOST_BYTES = 8_000_000


def ship(run: Path, to: Path = WEIGHTS) -> int:
    """Copy the folders of all sizes that ship; their size in bytes.

    Raises:
      FileNotFoundError: a size is not in the run.
      ValueError: they are too large.
    """
    folders = [run / CHECKPOINTS / "weights" / f"tales-{size}" for size in SIZES]
    for folder in folders:
        if not (folder / "card.json").is_file():
            raise FileNotFoundError(f"{folder} is not there; has the run finished?")
    total = sum(file.stat().st_size for folder in folders for file in folder.iterdir())
    if total >= MOST_BYTES:
        raise ValueError(f"the weights have {total} bytes; at most {MOST_BYTES} may ship.")
    for folder in folders:
        shutil.copytree(folder, to / folder.name, dirs_exist_ok=True)
    return total


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m experiments.worlds.ship_tales RUN")
    print(f"{ship(Path(sys.argv[1])):,} bytes in {WEIGHTS}")
