"""The wheel: what is in it, and that it works and shows its types outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

build = pytest.importorskip("build")
pytest.importorskip("hatchling")


def run(arguments: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    done = run(["-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)], cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = run(["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel)], target)
    assert done.returncode == 0, done.stderr
    return target


def test_the_only_top_level_name_is_brainfound(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    (about,) = top - {"brainfound"}
    assert about.startswith("brainfound-")
    assert about.endswith(".dist-info")


def test_recipes_cards_and_the_types_marker_are_inside(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"brainfound/{path.relative_to(ROOT / 'brainfound')}" for path in (ROOT / "brainfound").rglob("*.py")}
    for room, pattern in (("train", "*.yaml"), ("adapters", "*.yaml"), ("model_cards", "*.md")):
        files = list((ROOT / room).glob(pattern))
        assert files
        wanted |= {f"brainfound/_recipes/{room}/{file.name}" for file in files}
    assert wanted | {"brainfound/py.typed"} <= names


def test_the_installed_command_finds_its_recipes(installed, tmp_path):
    code = (
        "import sys, brainfound\n"
        "from brainfound.recipes import available, find\n"
        "print(brainfound.__file__)\n"
        "print(find('lora-r8', 'adapters'))\n"
        "assert (available('model_cards'), len(available('train')) > 3) == ({}, True)\n"
        "from brainfound.cli.main import main\n"
        "sys.argv = ['brainfound', 'list', 'recipes']\n"
        "main()\n"
    )
    done = run(["-c", code], tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    package, recipe, *listed = done.stdout.splitlines()
    assert Path(package).is_relative_to(installed)
    assert Path(recipe).is_relative_to(installed)
    assert any(line.startswith("pretrain-demo ") for line in listed)


def test_a_type_checker_sees_the_installed_types(installed, tmp_path):
    pytest.importorskip("mypy")
    script = tmp_path / "use.py"
    script.write_text(
        "import brainfound\n"
        "predictor = brainfound.load('runs/age')\n"
        "reveal_type(predictor)\n"
        "reveal_type(predictor.predict('a.nii.gz').contrasts)\n"
        "brainfound.pretrain()\n"
        "brainfound.prepare('source', 'store', workers='many')\n"
    )
    # Without the libraries: checking torch takes minutes, and the repository must not be found through them.
    options = ["--no-site-packages", "--ignore-missing-imports", "--follow-imports=silent", "--config-file", os.devnull]
    cache = ["--cache-dir", str(tmp_path / "cache")]
    done = run(["-m", "mypy", *options, *cache, str(script)], tmp_path, MYPYPATH=str(installed))
    lines = done.stdout.splitlines()
    assert done.returncode == 1, done.stdout + done.stderr
    assert 'Revealed type is "brainfound.inference.predictor.Predictor"' in lines[0]
    assert "tuple[" in lines[1]
    assert "str" in lines[1]
    assert 'use.py:5: error: Missing positional argument "recipe"' in lines[2]
    assert 'use.py:6: error: Argument "workers" to "prepare" has incompatible type "str"' in lines[3]
