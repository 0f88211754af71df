"""Hooks: tools run per scan, here small Python scripts in the place of a skull-stripper or a registration."""

from __future__ import annotations

import gzip
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfound.data.hooks import BUILTIN_HOOKS, Hook, anonymised_copy, describe_hooks, load_hooks, run_hook, run_hooks
from brainfound.data.reading.scan import load_scan
from brainfound.errors import RecipeError, ScanError, UsageError
from brainfound.phantom.cohort import write_phantom_cohort
from brainfound.recipes import validate

STRIP = """
import sys, nibabel as nib, numpy as np
image = nib.load(sys.argv[1])
data = np.asarray(image.dataobj).astype(np.float32)
middle = [n / 2 for n in data.shape]
away = sum(((g - m) / (0.3 * n)) ** 2 for g, m, n in zip(np.indices(data.shape), middle, data.shape))
data[away > 1] = 0
nib.save(nib.Nifti1Image(data, image.affine), sys.argv[2])
"""
COPY = "import sys, shutil; shutil.copy(sys.argv[1], sys.argv[2])"
REFERENCE = """
import sys, nibabel as nib
moving, reference = nib.load(sys.argv[1]), nib.load(sys.argv[2])
nib.save(nib.Nifti1Image(moving.get_fdata() + reference.get_fdata(), reference.affine), sys.argv[3])
"""


def _scan(path: Path, value: float = 50.0, kind: type = nib.Nifti1Image, affine: np.ndarray | None = None) -> Path:
    rng = np.random.default_rng(0)
    data = (value + rng.normal(size=(12, 14, 10))).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(kind(data, np.diag([2.0, 2, 2, 1]) if affine is None else affine), path)
    return path


def _hook(tmp_path: Path, script: str, arguments: str = "{input} {output}", **settings) -> Hook:
    file = tmp_path / f"tool {len(list(tmp_path.glob('tool*')))}.py"  # a space in the tool's own path
    file.write_text(script, encoding="utf-8")
    settings = {"name": "tool", **settings}
    return Hook(command=f"{sys.executable} '{file}' {arguments}", **settings)


def test_a_stripper_masks_and_the_name_of_the_scan_stays(tmp_path):
    scan = _scan(tmp_path / "sub-01_T1w.nii.gz")
    before = scan.read_bytes()
    made = run_hook(scan, _hook(tmp_path, STRIP, step="skull_strip"), tmp_path / "work")
    stripped, whole = load_scan(made), load_scan(scan)
    assert made.name == "sub-01_T1w.nii.gz"
    inside = stripped.data != 0
    assert 0.05 < inside.mean() < 0.2
    np.testing.assert_array_equal(stripped.data[inside], whole.data[inside])
    np.testing.assert_array_equal(stripped.affine, whole.affine)
    assert scan.read_bytes() == before


@pytest.mark.parametrize(
    "name", ["a b.nii.gz", "x; touch PWNED.nii.gz", "$(touch PWNED).nii.gz", "-o.nii.gz", "it's.nii"]
)
def test_no_name_of_a_file_is_read_by_a_shell_or_reaches_the_tool(tmp_path, name):
    scan = _scan(tmp_path / "my data; touch PWNED" / name)
    script = f"import sys, json; open({str(tmp_path / 'seen.txt')!r}, 'w').write(' '.join(sys.argv[1:]));" + COPY
    made = run_hook(scan, _hook(tmp_path, script), tmp_path / "work")
    seen = (tmp_path / "seen.txt").read_text()
    assert "PWNED" not in seen
    assert seen.split()[0].endswith("input.nii.gz")
    assert not list(tmp_path.rglob("PWNED"))
    np.testing.assert_array_equal(load_scan(made).data, load_scan(scan).data)


def test_words_of_the_command_are_not_expanded(tmp_path):
    scan = _scan(tmp_path / "t1.nii.gz")
    script = "import sys; assert sys.argv[3:] == ['$HOME', '*', '`id`'], sys.argv[3:];" + COPY
    run_hook(scan, _hook(tmp_path, script, "{input} {output} $HOME * `id`"), tmp_path / "work")


def test_a_work_folder_with_spaces_stays_one_word(tmp_path):
    scan = _scan(tmp_path / "t1.nii.gz")
    made = run_hook(scan, _hook(tmp_path, "import sys; assert len(sys.argv) == 3;" + COPY), tmp_path / "w o r k;")
    assert made.is_file()


def test_a_failing_tool_is_named_with_its_last_words(tmp_path):
    scan = _scan(tmp_path / "t1.nii.gz")
    script = (
        "import sys; print('first', file=sys.stderr); print(f'no brain in {sys.argv[1]}', file=sys.stderr); sys.exit(3)"
    )
    with pytest.raises(ScanError, match=r"t1\.nii\.gz: the hook tool failed: no brain in input\.nii\.gz .*exit code 3"):
        run_hook(scan, _hook(tmp_path, script), tmp_path / "work")


def test_an_exit_code_counts_even_if_there_is_an_output(tmp_path):
    scan = _scan(tmp_path / "t1.nii.gz")
    with pytest.raises(ScanError, match="exit code 1"):
        run_hook(scan, _hook(tmp_path, COPY + "; sys.exit(1)"), tmp_path / "work")


CHILD = "import os, sys, time; os.write(os.open(sys.argv[1], os.O_WRONLY), b'started'); time.sleep(60)"


def _hanging(tmp_path: Path, **settings) -> tuple[Hook, int]:
    """A tool whose child writes "started" into a pipe and holds it open; the pipe ends when the child does."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = shlex.join([sys.executable, "-c", CHILD, str(pipe)])
    (tmp_path / "tool.sh").write_text(f"{command} &\nsleep 60\n")
    hook = Hook(name="tool", command=f"sh '{tmp_path}/tool.sh' {{input}} {{output}}", **settings)
    return hook, os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)


def _wait_until(holds: Callable[[], bool], seconds: float = 50) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def _has_ended(pipe: int) -> bool:
    try:
        return os.read(pipe, 1) == b""
    except BlockingIOError:  # held open, and empty
        return False


def _has_started(pipe: int) -> bool:
    try:
        return os.read(pipe, 7) == b"started"
    except BlockingIOError:
        return False


def test_a_hanging_tool_is_ended_with_its_children(tmp_path):
    scan = _scan(tmp_path / "t1.nii.gz")
    hook, pipe = _hanging(tmp_path, timeout_s=4)
    with pytest.raises(ScanError, match=r"took too long .*more than 4 s"):
        run_hook(scan, hook, tmp_path / "work")
    assert _has_started(pipe)
    _wait_until(lambda: _has_ended(pipe))
    os.close(pipe)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_a_tool_ends_with_the_process_that_runs_it(tmp_path, kind):
    scan = _scan(tmp_path / "t1.nii.gz")
    hook, pipe = _hanging(tmp_path)
    worker = (
        "import sys; from pathlib import Path; from brainfound.data.hooks import Hook; "
        "from brainfound.data.hooks import run_hook; "
        "run_hook(Path(sys.argv[1]), Hook.model_validate_json(sys.argv[2]), Path(sys.argv[3]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", worker, str(scan), hook.model_dump_json(), str(tmp_path / "work")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    _wait_until(lambda: _has_started(pipe))
    process.send_signal(kind)
    process.wait(20)
    _wait_until(lambda: _has_ended(pipe))
    os.close(pipe)


def test_a_tool_that_cannot_be_started_or_is_ended_by_a_signal(tmp_path):
    scan = _scan(tmp_path / "t1.nii.gz")
    with pytest.raises(ScanError, match="it cannot be started: No such file or directory"):
        run_hook(scan, Hook(name="h", command="/gone/tool {input} {output}"), tmp_path / "a")
    hook = _hook(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(ScanError, match="exit code 139"):
        run_hook(scan, hook, tmp_path / "b")


def test_no_output_and_garbage_are_refused(tmp_path):
    scan = _scan(tmp_path / "t1.nii.gz")
    with pytest.raises(ScanError, match=r"t1\.nii\.gz: the hook tool wrote no output"):
        run_hook(scan, _hook(tmp_path, "pass"), tmp_path / "a")
    garbage = "import sys; open(sys.argv[2], 'wb').write(b'not an image')"
    with pytest.raises(ScanError, match=r"t1\.nii\.gz: what the hook tool wrote cannot be used"):
        run_hook(scan, _hook(tmp_path, garbage), tmp_path / "b")
    empty = STRIP.replace("away > 1", "away > -1")
    with pytest.raises(ScanError, match="all voxels are zero"):
        run_hook(scan, _hook(tmp_path, empty), tmp_path / "c")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mgz"])
def test_every_format_reaches_the_tool_as_nifti_on_its_own_grid(tmp_path, suffix):
    # Axes stored left → right are turned, so that a copy that reorders them is seen.
    affine = np.array([[0.0, 0, -2, 30], [-2, 0, 0, 20], [0, 2, 0, -10], [0, 0, 0, 1]])
    scan = _scan(tmp_path / f"t1{suffix}", kind=nib.MGHImage if suffix == ".mgz" else nib.Nifti1Image, affine=affine)
    copied, original = nib.load(anonymised_copy(scan, tmp_path / "input.nii.gz")), nib.load(scan)
    np.testing.assert_allclose(copied.affine, original.affine, atol=1e-5)
    np.testing.assert_array_equal(copied.get_fdata(), original.get_fdata())


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".NII.GZ"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
def test_no_text_of_the_file_reaches_the_tool(tmp_path, suffix, kind, order):
    values = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    image = kind(values, np.diag([2.0, 3, 4, 1]), header=kind.header_class(endianness=order))
    image.header.set_slope_inter(0.5, 3)
    texts = [
        name for name in kind.header_class.template_dtype.names if kind.header_class.template_dtype[name].kind == "S"
    ]
    for name in set(texts) - {"magic", "regular"}:
        image.header[name] = b"MUSTER ANNA"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"MUSTER ANNA, born 1961"))
    packed = gzip.compress if suffix.lower().endswith("gz") else bytes
    scan = tmp_path / f"muster{suffix}"
    scan.write_bytes(packed(image.to_bytes() + b"MUSTER ANNA"))
    copy = anonymised_copy(scan, tmp_path / "input.nii.gz")
    content = gzip.decompress(copy.read_bytes())
    assert b"MUSTER" not in content
    assert b"muster" not in copy.read_bytes()[:40], "the name of the file in the header of gzip"
    original, copied = load_scan(scan), load_scan(copy)
    np.testing.assert_array_equal(copied.data, original.data)
    np.testing.assert_array_equal(copied.native_affine, original.native_affine)
    assert nib.load(copy).get_data_dtype() == image.get_data_dtype()


def test_a_truncated_scan_does_not_reach_the_tool(tmp_path):
    scan = _scan(tmp_path / "t1.nii.gz")
    whole = gzip.decompress(scan.read_bytes())
    scan.write_bytes(gzip.compress(whole[: len(whole) // 2]))
    with pytest.raises(ScanError, match=r"t1\.nii\.gz: cannot be read as an image: .*within its voxels"):
        run_hook(scan, _hook(tmp_path, COPY), tmp_path / "work")


def test_a_missing_scan_is_refused(tmp_path):
    with pytest.raises(ScanError, match=r"gone\.nii\.gz: no such file"):
        run_hook(tmp_path / "gone.nii.gz", _hook(tmp_path, COPY), tmp_path / "work")


def test_a_scan_in_a_zip_is_written_out_for_the_tool(tmp_path):
    scan = _scan(tmp_path / "t1.nii.gz")
    archive = shutil.make_archive(str(tmp_path / "ses"), "zip", tmp_path, "t1.nii.gz")
    made = run_hook(Path(archive) / "t1.nii.gz", _hook(tmp_path, STRIP), tmp_path / "work")
    assert made.name == "t1.nii.gz"
    assert load_scan(made).data.shape == load_scan(scan).data.shape


def test_hooks_follow_each_other_and_only_further_scans_are_registered(tmp_path):
    scan = _scan(tmp_path / "t1.nii.gz", 50)
    reference = _scan(tmp_path / "t2.nii.gz", 100)
    double = _hook(tmp_path, STRIP.replace("data[away > 1] = 0", "data = 2 * data"), name="double")
    register = _hook(tmp_path, REFERENCE, "{input} {reference} {output}", name="register", step="register")
    both = run_hooks(scan, (double, register), contrast="T1w", reference=reference, folder=tmp_path)
    assert load_scan(both).data.mean() == pytest.approx(200, rel=0.01), "doubled, and the reference is added"
    alone = run_hooks(reference, (double, register), contrast="T2w", folder=tmp_path)
    assert load_scan(alone).data.mean() == pytest.approx(200, rel=0.01), "doubled, and not registered to itself"


def test_a_hook_is_run_on_its_contrasts_only(tmp_path):
    scan = _scan(tmp_path / "t1.nii.gz")
    fails = _hook(tmp_path, "import sys; sys.exit('no')", contrasts=["FLAIR"])
    assert run_hooks(scan, (fails,), contrast="T1w", folder=tmp_path) == scan
    with pytest.raises(ScanError, match="the hook tool failed: no"):
        run_hooks(scan, (fails,), contrast="FLAIR", folder=tmp_path)


def test_registrations_come_last(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name, path=None: name)
    assert [hook.step for hook in load_hooks(["synthstrip", "flirt-rigid"])] == ["skull_strip", "register"]
    with pytest.raises(UsageError, match="registrations come after the other hooks"):
        load_hooks([BUILTIN_HOOKS["flirt-rigid"], "synthstrip"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"command": "tool {input}"}, r"must hold \{output\}"),
        ({"command": "tool {input} {output} {folder}"}, r"unknown placeholder \{folder\}"),
        ({"command": "tool {input} {reference} {output}"}, "set step: register"),
        ({"command": "tool {input} {output}", "step": "register"}, r"must hold \{reference\}"),
        ({"command": "tool {input} | other > {output}"}, "no shell reads the command"),
        ({"command": "tool '{input} {output}"}, "cannot be split"),
        ({"command": ""}, "empty"),
        ({"command": "./tool {input} {output}"}, "absolute path"),
        ({"command": "tool {input} {output}", "contrasts": ["T9w"]}, "unknown contrast"),
        ({"command": "tool {input} {output}", "timeout_s": 0}, "expected more than 0"),
        ({"command": "tool {input} {output}", "shell": True}, "unknown key"),
    ],
)
def test_a_malformed_hook_is_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        validate(Hook, {"name": "tool", **settings}, where="hook")


def test_hooks_are_loaded_by_name_file_and_command(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/usr/bin/{name}")
    file = tmp_path / "mine.yaml"
    file.write_text("step: skull_strip\ncommand: 'mytool --in {input} --out {output}'\ncontrasts: [t1, flair]\n")
    ready, mine, inline = load_hooks(["synthstrip", file, "reg {input} {reference} {output}"])
    assert ready is BUILTIN_HOOKS["synthstrip"]
    assert (mine.name, mine.contrasts, mine.executable) == ("mine", ("T1w", "FLAIR"), "mytool")
    assert (inline.name, inline.step) == ("reg", "register")


@pytest.mark.parametrize(
    ("item", "message"),
    [("syntstrip", "Did you mean synthstrip"), ("gone.yaml", "no such hook file"), ("list.yaml", "must be a mapping")],
)
def test_unknown_hooks_are_refused(tmp_path, monkeypatch, item, message):
    monkeypatch.chdir(tmp_path)
    Path("list.yaml").write_text("- a\n")
    with pytest.raises(UsageError, match=message):
        load_hooks([item])


def test_a_tool_that_is_not_installed_stops_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(UsageError, match="synthstrip is not installed .*mri_synthstrip on the PATH"):
        load_hooks(["synthstrip"])
    with pytest.raises(UsageError, match="expected fsl on the PATH"):
        load_hooks([Hook(name="h", command="tool {input} {output}", needs="/opt/me/fsl")])
    with pytest.raises(UsageError, match="given twice"):
        load_hooks(["synthstrip", "synthstrip"])


def test_the_description_has_the_version_and_no_folders(tmp_path):
    hook = Hook(
        name="strip",
        step="skull_strip",
        command="/home/ann/bin/strip --model=/home/ann/w.pt {input} {output}",
        version_command=f"{sys.executable} -c \"print(); print('strip 1.2')\"",
    )
    (said,) = describe_hooks([hook])
    assert said["command"] == "strip --model=w.pt {input} {output}"
    assert said["version"] == "strip 1.2"
    assert (said["name"], said["step"]) == ("strip", "skull_strip")
    other = hook.model_copy(update={"command": "/home/bob/bin/strip --model=/home/ann/w.pt {input} {output}"})
    assert describe_hooks([other])[0]["sha256"] != said["sha256"]
    assert describe_hooks([hook.model_copy(update={"version_command": "no-such-tool --version"})])[0]["version"] is None


def test_the_ready_hooks_run_the_documented_command_lines():
    words = {
        name: hook.words(input=Path("i"), output=Path("o"), reference=Path("r")) for name, hook in BUILTIN_HOOKS.items()
    }
    assert words["synthstrip"] == ["mri_synthstrip", "-i", "i", "-o", "o"]
    assert words["deepbet"] == ["deepbet-cli", "-i", "i", "-o", "o", "--no_gpu"]
    assert words["hd-bet"] == ["hd-bet", "-i", "i", "-o", "o"]
    assert words["hd-bet-cpu"] == ["hd-bet", "-i", "i", "-o", "o", "-device", "cpu", "--disable_tta"]
    assert words["flirt-rigid"][:7] == ["flirt", "-in", "i", "-ref", "r", "-out", "o"]
    assert BUILTIN_HOOKS["flirt-rigid"].step == "register"


def test_the_version_is_that_of_the_tool_that_runs(tmp_path, monkeypatch):
    for folder, version in (("own", "1"), ("modules", "2")):
        program = tmp_path / folder / "own-strip"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\necho own-strip {version} $OWN_MODE\n")
        program.chmod(0o755)
    hook = Hook(name="own", command="own-strip {input} {output}", version_command="own-strip --version")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "own" / "python"))
    assert describe_hooks([hook])[0]["version"] == "own-strip 1"
    path = os.pathsep.join([str(tmp_path / "modules"), os.defpath])
    other = hook.model_copy(update={"environment": {"PATH": path, "OWN_MODE": "fast"}})
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert load_hooks([other]) == (other,)
    assert describe_hooks([other])[0]["version"] == "own-strip 2 fast"


def test_a_folder_in_place_of_a_hook_file_is_one_line(tmp_path):
    (tmp_path / "strip.yaml").mkdir()
    with pytest.raises(UsageError, match=r"strip\.yaml: cannot be read: Is a directory"):
        load_hooks([tmp_path / "strip.yaml"])


def test_programs_of_this_python_need_no_activated_environment(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "own-strip"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    hook = Hook(name="own", command="own-strip {input} {output}")
    with pytest.raises(UsageError, match="not installed"):
        load_hooks([hook])
    monkeypatch.setattr(sys, "executable", str(program.parent / "python"))
    assert load_hooks([hook]) == (hook,)


def test_a_skull_stripper_that_is_not_installed_names_its_extra(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(UsageError, match=r'pip install "brainfound\[strip\]"'):
        load_hooks(["deepbet"])


@pytest.mark.skipif(importlib.util.find_spec("deepbet") is None, reason="deepbet is not installed")
def test_a_simulated_head_is_stripped_by_the_extra(tmp_path):
    root = write_phantom_cohort(tmp_path / "heads", 1, spacing_mm=2.0, contrasts=("T1w",))
    (scan,) = root.rglob("*_T1w.nii.gz")
    stripped = run_hook(scan, load_hooks(["deepbet"])[0], tmp_path / "work")
    head, brain = (np.asarray(nib.load(file).dataobj) for file in (scan, stripped))
    assert head.shape == brain.shape
    assert 0.05 < (brain != 0).mean() < 0.6 * (head > head.mean() / 4).mean()
