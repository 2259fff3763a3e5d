"""Two processes with four devices each, joined by ``jax.distributed``, give the result of one device."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.training.two_hosts import as_arrays, train

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_two_processes_equal_one_device(tmp_path: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "tests.training.two_hosts", address, "2"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "out.npz")],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    together = dict(np.load(tmp_path / "out.npz"))
    assert together.pop("devices") == 8
    assert together.pop("mesh").tolist() == [4, 2]
    alone = as_arrays(train())
    assert set(together) == set(alone)
    for path in alone:
        np.testing.assert_allclose(together[path], alone[path], rtol=1e-5, atol=1e-5, err_msg=path)
