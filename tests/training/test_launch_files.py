"""The launch files: Accelerate reads them, the shell parses them, and what they start is what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from brainfound.pretraining.pretrain import PretrainRecipe
from brainfound.recipes import available, load
from tests.ranks import free_port

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "train" / "launch"
NUM_PROCESSES = {"accelerate-1gpu": 1, "accelerate-8gpu": 8, "accelerate-64gpu": 64, "accelerate-cpu": 2}
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))

# Stands in for `accelerate` and `srun`: says how it was called, and ends politely when it is told to.
FAKE = """#!/bin/bash
printf '%s\\n' "$(basename "$0")" "$@" >> "$CALLS"
if [ -n "${WAITS:-}" ]; then
    trap 'echo told >> "$CALLS"; exit 1' TERM
    touch "$CALLS.started"
    for _ in $(seq 100); do sleep 0.1; done
fi
exit "${STATUS:-0}"
"""
FAKE_SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf '%s\\n' node1 node2 node3; else printf '%s\\n' scontrol "$@" >> "$CALLS"; fi
"""


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_a_configuration(file):
    config = load_config_from_file(str(file))
    assert config.num_processes == NUM_PROCESSES[file.stem]
    assert config.num_processes % config.num_machines == 0
    # The recipe decides about precision and sharding; a plugin of Accelerate's would do it a second time.
    assert config.mixed_precision == "no"
    assert "fsdp_config" not in yaml.safe_load(file.read_text())


def test_there_is_a_configuration_for_each_number_of_gpus():
    assert {file.stem for file in FOLDER.glob("*.yaml")} == NUM_PROCESSES.keys()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_parses_and_names_what_exists(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True).stderr == b""
    text = script.read_text()
    files = re.findall(r"train/launch/[\w.-]+", text)
    assert files
    assert all((ROOT / file).is_file() for file in files)
    recipe = re.search(r"^recipe=(\S+)$", text, re.MULTILINE)
    assert recipe
    assert recipe[1] in available("train")


def test_a_recipe_for_many_gpus_can_be_shared_by_64(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (FOLDER / "slurm-64gpu.sbatch").read_text()
    name = re.search(r"^recipe=(\S+)$", text, re.MULTILINE)[1]
    engine = load(PretrainRecipe, name, "train").engine
    assert engine.batch_size % (64 * engine.accumulation) == 0


def environment(folder: Path, **changes: str) -> dict[str, str]:
    tools = folder / "tools"
    tools.mkdir()
    for name in ("accelerate", "srun"):
        (tools / name).write_text(FAKE)
    (tools / "scontrol").write_text(FAKE_SCONTROL)
    for tool in tools.iterdir():
        tool.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "node[1-3]"}
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **slurm, "PATH": path, "CALLS": str(folder / "calls"), **changes}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_starts_training_and_gives_its_status(script, tmp_path):
    run = tmp_path / "run"
    command = ["bash", script, "my store", run, "pretrain-vits14-8gpu", "--set", "seed=1"]
    done = subprocess.run(command, cwd=ROOT, env=environment(tmp_path, STATUS="7"), timeout=60)
    assert done.returncode == 7
    called = (tmp_path / "calls").read_text().splitlines()
    end = ["-m", "brainfound", "pretrain", "pretrain-vits14-8gpu", "--data", "my store", "--out", str(run), "--quiet"]
    assert called[called.index("-m") :] == [*end, "--set", "seed=1"]
    if called[0] == "srun":
        assert called[called.index("--num_machines") + 1] == "3"
        assert called[called.index("--num_processes") + 1] == "24"
        assert called[called.index("--main_process_ip") + 1] == "node1"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_goes_on_with_a_run_and_is_queued_again_at_its_limit(script, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").touch()
    command = ["bash", script, "store", run]
    job = subprocess.Popen(command, cwd=ROOT, env=environment(tmp_path, WAITS="yes"))
    for _ in range(200):
        if (tmp_path / "calls.started").exists():
            break
        with pytest.raises(subprocess.TimeoutExpired):
            job.wait(0.1)
    job.terminate()
    assert job.wait(30) == 0
    called = (tmp_path / "calls").read_text().splitlines()
    assert "--resume" in called
    assert called[-4:] == ["told", "scontrol", "requeue", "41234"]


def test_two_machines_find_each_other(tmp_path):
    """The many-machine file with two launchers, one process each, as the script for SLURM calls it."""
    (tmp_path / "say.py").write_text(
        "import os, pathlib, sys\n"
        "facts = [os.environ[name] for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')]\n"
        "pathlib.Path(sys.argv[1], facts[0]).write_text(' '.join(facts))\n"
    )
    options = ["--config_file", str(FOLDER / "accelerate-64gpu.yaml"), "--num_machines", "2", "--num_processes", "2"]
    options += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options]
    jobs = [
        subprocess.Popen([*launcher, "--machine_rank", str(rank), str(tmp_path / "say.py"), str(tmp_path)])
        for rank in (0, 1)
    ]
    assert [job.wait(120) for job in jobs] == [0, 0]
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["0 0 2", "1 0 2"]
