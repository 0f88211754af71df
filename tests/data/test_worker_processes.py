"""Worker processes: whatever starts them, the result is whole or one line, and nothing waits for ever."""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
import threading

import pytest

from brainfound.data.worker_processes import WorkerContext, loader_context, map_in_processes
from brainfound.errors import UsageError

SCRIPT = """
import brainfound
settings = brainfound.Preprocessing(contrasts=("T1w",), spacing_mm=(8, 8, 8), size=(16, 16))
print("sessions", len(brainfound.prepare("cohort", "store", settings, workers=2)))
"""
PHANTOM = """
from pathlib import Path
from brainfound.phantom.cohort import write_phantom_cohort
write_phantom_cohort(Path("heads"), 2, spacing_mm=8.0, contrasts=("T1w",), workers=2)
print("heads", len(list(Path("heads").glob("sub-*"))))
"""
THREAD = """
import threading
def work():
{indented}
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
POOL = """
from concurrent.futures import ThreadPoolExecutor
def work():
{indented}
with ThreadPoolExecutor(1) as pool:
    pool.submit(work).result()
"""


def from_file(script, folder):
    (folder / "script.py").write_text(script)
    return [sys.executable, "script.py"], None


def from_input(script, folder):
    return [sys.executable, "-"], script


def from_command(script, folder):
    return [sys.executable, "-c", script], None


def from_module(script, folder):
    (folder / "started_module.py").write_text(script)
    return [sys.executable, "-m", "started_module"], None


def from_notebook(script, folder):
    # As in a kernel: the main module has no file, and the cell is executed in its name space.
    return [sys.executable, "-c", f"import __main__; exec({script!r}, vars(__main__))"], None


def from_thread(script, folder):
    return from_file(THREAD.format(indented="\n".join(f"    {line}" for line in script.splitlines())), folder)


def from_executor(script, folder):
    return from_file(POOL.format(indented="\n".join(f"    {line}" for line in script.splitlines())), folder)


WAYS = (from_file, from_input, from_command, from_module, from_notebook, from_thread, from_executor)


def run(way, script, folder):
    command, text = way(script, folder)
    root = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, input=text, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_a_script_without_main_guard_prepares_a_whole_store(tmp_path, make_cohort):
    make_cohort(tmp_path / "cohort", num_subjects=10, contrasts=("T1w",))
    done = run(from_file, SCRIPT, tmp_path)
    assert done.stdout == "sessions 10\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_to_start_prepares_a_whole_store(tmp_path, make_cohort, way):
    make_cohort(tmp_path / "cohort", num_subjects=10, contrasts=("T1w",))
    done = run(way, SCRIPT + PHANTOM, tmp_path)
    assert done.stdout == "sessions 10\nheads 2\n", done.stderr


def test_a_foreign_pool_without_main_guard_gets_the_line_that_is_missing(tmp_path):
    script = """
import multiprocessing
from brainfound.data.worker_processes import map_in_processes
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
try:
    list(map_in_processes(abs, [-1, -2], 2))
except Exception as error:
    print(type(error).__name__, error, flush=True)
if __name__ == "__main__":
    child = multiprocessing.Process(target=abs, args=(1,))
    child.start()
    child.join()
"""
    done = run(from_file, script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("UsageError") == 1
    assert 'if __name__ == "__main__":' in done.stdout


def test_a_lock_is_not_waited_for_while_the_script_is_imported(tmp_path, monkeypatch):
    from brainfound.data.store.plan import writer_lock

    held, release = threading.Event(), threading.Event()

    def hold():
        with writer_lock(tmp_path / "store"):
            held.set()
            release.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(30)
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    try:
        with pytest.raises(UsageError, match="if __name__"), writer_lock(tmp_path / "store"):
            pass
    finally:
        release.set()
        holder.join()


def local(item):
    return -item


def test_results_come_with_their_items():
    assert sorted(map_in_processes(abs, [-3, -1], 2)) == [(-3, 3), (-1, 1)]


def test_objects_of_the_main_module_stay_in_this_process(monkeypatch):
    import __main__

    function = functools.partial(local)
    monkeypatch.setattr(local, "__module__", "__main__")
    monkeypatch.setattr(__main__, "local", local, raising=False)
    monkeypatch.setattr("brainfound.data.worker_processes.ProcessPoolExecutor", None)
    assert list(map_in_processes(function, [1, 2], 2)) == [(1, -1), (2, -2)]


def test_a_daemonic_process_works_alone(monkeypatch):
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    monkeypatch.setattr("brainfound.data.worker_processes.ProcessPoolExecutor", None)
    assert list(map_in_processes(abs, [-1, -2], 2)) == [(-1, 1), (-2, 2)]


def test_loader_workers_do_not_import_the_script_either(monkeypatch):
    monkeypatch.setattr("brainfound.data.worker_processes.get_start_method", lambda allow_none: "spawn")
    assert isinstance(loader_context(2), WorkerContext)
    assert loader_context(0) is None
    monkeypatch.setattr("brainfound.data.worker_processes.get_start_method", lambda allow_none: "fork")
    assert loader_context(2) is None
