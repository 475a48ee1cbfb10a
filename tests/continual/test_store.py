"""The file of results: round trips, adding, refusing, crashes and two processes."""

import contextlib
import dataclasses
import errno
import itertools
import json
import math
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from classp_jax.continual.results import ResultsError, find, load, save
from classp_jax.continual.results import files as files_module
from classp_jax.continual.results.files import write_atomically
from classp_jax.continual.results.metrics import run_metrics
from classp_jax.continual.results.variants import encode
from tests.continual.fakes import PROVENANCE, make_results, make_run

ROOT = pathlib.Path(__file__).parents[2]


def as_text(runs):
    """Where NaN equals NaN."""
    return [encode(dataclasses.asdict(run)) for run in runs]


# ---- what is stored --------------------------------------------------------------


def test_round_trip_to_the_last_bit(tmp_path):
    run = make_run(
        seed=2**63 - 1,
        level=1 / 3,
        ulp_spread=0.1 + 0.2,
        settings={"eps": 1e-300, "order": "shuffled", "replay_size": 200.0},
        training_accuracy=[0.1, 0.2, math.nan],
        diverged=True,
    )
    results = make_results(run, make_run("adam"))
    assert save(results, tmp_path).runs == results.runs
    loaded = load(tmp_path)
    assert as_text(loaded.runs) == as_text(results.runs)
    assert loaded.runs[0].settings == run.settings
    assert math.isnan(loaded.runs[0].matrix[0][0])
    assert loaded.configuration == results.configuration
    assert loaded.stream == results.stream
    assert as_text(load(tmp_path / "results.json").runs) == as_text(loaded.runs)


def test_the_file_can_be_read_by_others(tmp_path):
    run = make_run()
    save(make_results(run), tmp_path)
    content = json.loads(
        (tmp_path / "results.json").read_text(), parse_constant=pytest.fail
    )
    assert (content["file"], content["format"]) == ("classp-jax results", 2)
    (stored,) = content["runs"]
    assert stored["matrix"][0] == [None] * 3
    assert stored["metrics"]["average_accuracy"] == run_metrics(run)["average_accuracy"]
    assert stored["metrics"]["forward_transfer"] is None
    assert stored["provenance"]["command"] == "classp-jax run"
    fields = {field.name for field in dataclasses.fields(run)}
    assert stored.keys() == fields | {"metrics"}
    assert (tmp_path / "results.csv").read_text().count("\n") == 2


def test_every_field_is_documented():
    page = ROOT / "docs" / "experiments.md"
    if not page.exists():
        pytest.skip("the page is not part of this installation")
    text = page.read_text()
    for field in dataclasses.fields(make_run()):
        assert f"`{field.name}`" in text, field.name


# ---- adding to what is there -----------------------------------------------------


def test_going_on_leaves_every_stored_run_as_it_is(tmp_path):
    old = make_run("sgd")
    save(make_results(old), tmp_path)
    lines = (tmp_path / "results.json").read_text().splitlines()
    new = dataclasses.replace(
        PROVENANCE, date="2027-01-01T00:00:00+00:00", device="TPU", versions={}
    )
    again = dataclasses.replace(old, provenance=new, seconds=9.0)
    more = make_run("sgd", 1, provenance=new)
    changed = make_run("sgd", settings={"learning_rate": 0.5}, provenance=new)
    together = save(make_results(again, more, changed), tmp_path)
    assert [run.provenance for run in together.runs] == [PROVENANCE, new, new]
    assert as_text(together.runs[:1]) == as_text([old])
    # The line of the old run is in the new file, byte for byte.
    stored = (tmp_path / "results.json").read_text().splitlines()
    assert lines[lines.index('"runs": [') + 1] + "," in stored


def test_results_of_other_data_are_refused(tmp_path):
    save(make_results(make_run()), tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ResultsError) as error:
        save(make_results(data={"fingerprint": "ffff"}), tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path} holds other results: use another folder.")
    assert "data.fingerprint is '0123abcd' and 'ffff' (the data differ)" in message
    assert "\n" not in message
    assert (tmp_path / "results.json").read_bytes() == before


def test_find(tmp_path):
    assert find(tmp_path) is None
    assert find(tmp_path / "none") is None
    save(make_results(), tmp_path)
    assert find(tmp_path) == make_results()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"matrix": [[0.1] * 3] * 3},
            r"stored: run 1 \(adam, seed 0\): matrix must .*4, 3",
        ),
        ({"task_ends": [3, 3, 9]}, "task_ends must be ascending"),
        ({"curve": [[0.5] * 3]}, "curve must have the shape"),
        ({"task_ends": []}, "a curve needs task_ends"),
        ({"task_ends": [1, 2]}, "task_ends must have 3 entries or none"),
        ({"online_accuracy": [0.1, 0.2, 1.5]}, r"must be in \[0, 1\]"),
        ({"settings": {"eps": True}}, "Expected `float | str`, got `bool`"),
        ({"parameters": 1.5}, "Expected `int`"),
        ({"settings": {"eps": object()}}, "cannot be stored: object has no place"),
    ],
)
def test_what_cannot_be_loaded_is_not_saved(tmp_path, changes, message):
    save(make_results(make_run()), tmp_path)
    with pytest.raises(ResultsError, match=message) as error:
        save(make_results(make_run("adam", **changes)), tmp_path)
    assert "\n" not in str(error.value)
    assert len(load(tmp_path).runs) == 1


# ---- files that are damaged or not ours ------------------------------------------


def load_error(path):
    with pytest.raises(ResultsError) as error:
        load(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_missing(tmp_path):
    assert "No results" in load_error(tmp_path)
    assert "No results" in load_error(tmp_path / "nowhere")


def test_cut_off_anywhere(tmp_path):
    save(make_results(make_run()), tmp_path)
    path = tmp_path / "results.json"
    text = path.read_text().rstrip()
    for length in range(0, len(text), 97):
        path.write_text(text[:length])
        assert "damaged, cut off" in load_error(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "damaged, cut off"),
        (b"[1, 2]", "something else"),
        (b'{"format": 1}', "something else"),
        (b'{"file": "classp-jax results", "format": 3}', "format 3"),
        (b'{"file": "classp-jax results", "format": 2}', "missing required field"),
        (b"[" * 100_000, "damaged, cut off"),
    ],
)
def test_foreign(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    assert message in load_error(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda run: run.pop("matrix"),
        lambda run: run.update(matrix=[[0.1]]),
        lambda run: run["curve"].pop(),
        lambda run: run.update(method=None),
        lambda run: run.update(seconds="long"),
        lambda run: run.update(provenance={"date": "2026"}),
        lambda run: run.update(diverged=0),
    ],
)
def test_a_wrong_field(tmp_path, change):
    save(make_results(make_run()), tmp_path)
    path = tmp_path / "results.json"
    content = json.loads(path.read_text())
    change(content["runs"][0])
    path.write_text(json.dumps(content))
    assert "damaged" in load_error(path)


# ---- crashes ---------------------------------------------------------------------


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("fault", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ResultsError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_fault_while_saving_leaves_the_old_file(
    tmp_path, monkeypatch, function, fault, raised
):
    save(make_results(make_run()), tmp_path)
    before = (tmp_path / "results.json").read_bytes()

    def fail(*_):
        raise fault

    monkeypatch.setattr(files_module.os, function, fail)
    with pytest.raises(raised) as error:
        save(make_results(make_run(seed=1)), tmp_path)
    monkeypatch.undo()
    if raised is ResultsError:
        path = tmp_path / "results.json"
        assert str(error.value) == f"Cannot write {path}: No space left on device."
    assert (tmp_path / "results.json").read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))
    # And the lock is free.
    assert len(save(make_results(make_run(seed=1)), tmp_path).runs) == 2


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="Cannot write"):
        save(make_results(), tmp_path / "file" / "folder")


def test_a_disk_that_is_really_full():
    with pytest.raises(ResultsError, match="Cannot write /dev/full/x"):
        write_atomically(pathlib.Path("/dev/full/x"), b"")


PROLOGUE = """
import os, pathlib, signal, sys, time
from classp_jax.continual.results import files, find, save
from classp_jax.continual.results.files import locked
from tests.continual.fakes import make_results, make_run

def in_a_child(work):
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return child

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

folder = pathlib.Path(sys.argv[1])
"""


def run_script(script, folder):
    """Runs Python apart from this process, and ends whatever it started."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROLOGUE + script, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        # The group is gone where all of its processes have ended.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, output
    return output


def test_kill_at_any_point_of_a_save_loses_nothing(tmp_path):
    output = run_script(
        """
def killed_at(function, call):
    calls = iter(range(call))
    real = getattr(os, function)
    def kill(*arguments):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)
    setattr(files.os, function, kill)
    save(make_results(make_run("adam", 1)), here)

for function in ("fsync", "replace"):
    for call in (0, 1):
        here = folder / f"{function}-{call}"
        save(make_results(make_run("sgd", 0)), here)
        assert ended(in_a_child(lambda: killed_at(function, call))) == -signal.SIGKILL
        print(function, call, [run.method for run in find(here).runs])
        # The lock is free, and what lies about disturbs nobody.
        save(make_results(make_run("classp", 2)), here)
        assert "classp" in [run.method for run in find(here).runs]
        assert not list(here.glob(".*.tmp"))
""",
        tmp_path,
    )
    # Two files are replaced: until the first is, the old one stands; then the new.
    assert output.splitlines() == [
        "fsync 0 ['sgd']",
        "fsync 1 ['sgd', 'adam']",
        "replace 0 ['sgd']",
        "replace 1 ['sgd', 'adam']",
    ]


def test_processes_that_save_at_once_lose_nothing(tmp_path):
    run_script(
        """
def several(method):
    for seed in range(5):
        save(make_results(make_run(method, seed)), folder)

children = [in_a_child(lambda: several(method)) for method in ("a", "b", "c")]
assert [ended(child) for child in children] == [0, 0, 0]
""",
        tmp_path,
    )
    found = {(run.method, run.seed) for run in load(tmp_path).runs}
    assert found == set(itertools.product("abc", range(5)))


def test_a_folder_held_by_another_says_so_in_one_line(tmp_path):
    output = run_script(
        """
def hold():
    with locked(folder):
        (folder / "held").touch()
        time.sleep(600)

child = in_a_child(hold)
while not (folder / "held").exists():
    time.sleep(0.01)
try:
    with locked(folder, patience=0.1):
        print("not held")
except files.ResultsError as error:
    print(error)
os.kill(child, signal.SIGKILL)
ended(child)
with locked(folder, patience=60):
    print("free")
""",
        tmp_path,
    )
    assert output.splitlines() == [
        f"Another process has been writing to {tmp_path} for 0.1 seconds; try again "
        "when it has ended, or use another folder.",
        "free",
    ]
