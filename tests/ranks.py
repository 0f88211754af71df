"""Starting a script on several ranks, as a user does: through a launch file that ships."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

LAUNCH_FILE = Path(__file__).parents[1] / "train" / "launch" / "accelerate-cpu.yaml"
"""Two ranks on the processor."""


def free_port() -> int:
    """A port that no process listens on, also not one of another test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_command(*options: object) -> list[str]:
    """``accelerate launch`` on a port of its own; a script and its arguments follow."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", LAUNCH_FILE]
    return list(map(str, [*launcher, "--main_process_port", free_port(), *options]))


def launch(script: Path, *arguments: object, timeout_s: float = 240, **environment: str) -> None:
    """Run a script on two ranks; where it fails, the test fails with its last lines."""
    command = launch_command(script, *arguments)
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **environment}
    done = subprocess.run(command, env=variables, capture_output=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr.decode()[-6000:]
