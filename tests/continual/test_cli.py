"""The command line as a user types it, right and wrong."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from classp_jax.continual import cli, report, results
from classp_jax.continual.train.provenance import device_name
from tests.continual import forks

pytestmark = pytest.mark.usefixtures("quick_compilation")

MINE = """
import optax
from flax import nnx
from classp_jax.continual import Setting

class Small(nnx.Module):
    def __init__(self, rngs, width=32):
        self.hidden = nnx.Linear(64, width, rngs=rngs)
        self.output = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        return self.output(nnx.relu(self.hidden(x.reshape(len(x), -1))))

def small(rngs, width=32):
    return Small(rngs, width)

def heavy(learning_rate=Setting(0.05, 1e-3, 1.0), momentum=0.9):
    return optax.sgd(learning_rate, momentum)

number = 3

def broken(learning_rate=0.1):
    return 3

def unready(learning_rate):
    return optax.sgd(learning_rate)
"""
SMALL = ["--tasks", "2", "--epochs", "1", "--points", "1"]


# Ctrl-C reaches it, also where the tests run with it ignored.
CHILD = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from classp_jax.__main__ import main
sys.exit(main())
"""
NO_PICTURES = """
from classp_jax.continual import report
report.write_report = lambda *_: None
"""


@pytest.fixture
def process(tmp_path):
    """Starts commands in an empty folder, and leaves none behind."""
    started = []

    def begin(*arguments, before=""):
        code = f"import os; os.chdir({str(tmp_path)!r}){before}{CHILD}"
        folder = tmp_path / f"printed-{len(started)}"
        started.append(forks.Fork(code, arguments, folder))
        return started[-1]

    yield begin
    for each in started:
        each.kill()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which a run of the user's own model and method has finished."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "mine.py").write_text(MINE)
    # It keeps compiled code where a user's would.
    inherited = {**os.environ, "XLA_FLAGS": forks.QUICK}
    inherited.pop("JAX_COMPILATION_CACHE_DIR", None)
    arguments = [
        "run",
        *SMALL,
        *("--methods", "sgd", "--method", "heavy=mine:heavy", "--model", "mine:small"),
        *("--set", "model.width=16", "heavy.momentum=0.5", "--seeds", "0"),
        *("--csv", "--save-weights", "--rounding-copies", "1", "--out", "out"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "classp_jax", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=inherited | {"XDG_CACHE_HOME": str(folder / "cache")},
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def content(folder):
    return json.loads((folder / "out" / "results.json").read_text())


def test_a_run_says_what_it_read_and_what_it_does(finished):
    _, output = finished
    lines = output.splitlines()
    assert lines[0] == "permuted digits: 2 methods, 1 seed"
    assert "1,797 images" in output
    assert "1,210 parameters" in output
    assert "heavy: task 2 of 2, accuracy" in output
    assert "not tuned for this stream: see classp-jax sweep" in output


def test_a_run_leaves_results_pictures_metrics_and_weights(finished):
    folder, _ = finished
    names = {path.name for path in (folder / "out").iterdir()}
    assert {"results.json", "results.csv", "report.md", "metrics.csv"} <= names
    assert {"accuracy.png", "matrix.svg", "tradeoff.pdf"} <= names
    runs = {run["method"]: run for run in content(folder)["runs"]}
    settings = runs["heavy"]["settings"]
    assert settings.pop("transformation")
    assert settings == {"learning_rate": 0.05, "momentum": 0.5}
    assert runs["heavy"]["ulp_spread"] is not None
    assert runs["sgd"]["provenance"]["command"].startswith("classp-jax run --tasks 2")
    assert "width=16" in content(folder)["configuration"]["network"]["name"]
    weights = list((folder / "out" / "weights").glob("heavy-*-0.npz"))
    with np.load(weights[0]) as arrays:
        assert (64, 16) in {array.shape for array in arrays.values()}


def test_compiled_code_is_kept_in_the_user_s_cache_folder(finished):
    folder, _ = finished
    assert list((folder / "cache" / "classp-jax" / "compiled").iterdir())


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    """The cache is JAX's for the whole process: other tests must not meet it."""
    monkeypatch.setattr(cli, "_keep_compiled_code", lambda: None)


def run_in(folder, monkeypatch, *arguments):
    """In this process, without the seconds that pictures take."""
    monkeypatch.setattr(report, "write_report", lambda *_: None)
    monkeypatch.chdir(folder)
    return cli.main(list(arguments))


@pytest.mark.usefixtures("capsys")
def test_what_is_stored_stays_when_a_run_is_gone_back_to(finished, monkeypatch):
    folder, _ = finished
    before = content(folder)["runs"]
    own = ("--model", "mine:small", "--set", "model.width=16", "sgd.learning_rate=0.5")
    more = ("--methods", "sgd", "--seeds", "0", "1", "--out", "out")
    assert run_in(folder, monkeypatch, "run", *SMALL, *own, *more) == 0
    after = content(folder)["runs"]
    assert after[: len(before)] == before
    assert [run["seed"] for run in after[len(before) :]] == [0, 1]


def test_another_experiment_is_refused_and_nothing_is_touched(
    finished, monkeypatch, capsys
):
    folder, _ = finished
    before = (folder / "out" / "results.json").read_bytes()
    arguments = ("run", "--tasks", "3", "--seeds", "0", "--out", "out")
    assert run_in(folder, monkeypatch, *arguments) == 1
    assert "out holds other results" in capsys.readouterr().err
    assert (folder / "out" / "results.json").read_bytes() == before


def test_report_of_several_folders_keeps_their_results(finished, monkeypatch, capsys):
    folder, _ = finished
    monkeypatch.chdir(folder)
    assert cli.main(["report", "out", "out", "--out", "both"]) == 0
    both = json.loads((folder / "both" / "results.json").read_text())
    assert both["runs"] == content(folder)["runs"]
    assert "heavy" in capsys.readouterr().out


def test_a_sweep_writes_what_a_run_takes(finished, monkeypatch, capsys):
    folder, _ = finished
    sweep = ["sweep", *SMALL[:4], "--methods", "sgd", "--method", "heavy=mine:heavy"]
    budget = ["--trials", "2", "--together", "2", "--out", "s"]
    budget += ["--tuning-seeds", "7", "--seeds", "0"]
    ranges = ["--range", "heavy.momentum=0.1:0.9"]
    assert run_in(folder, monkeypatch, *sweep, *budget, *ranges) == 0
    text = (folder / "s" / "config.toml").read_text()
    assert "# Each method's best of its trials in trials.json" in text
    assert "# Written by: classp-jax sweep --tasks 2" in text
    trials = json.loads((folder / "s" / "trials.json").read_text())["trials"]
    best = max(trials["heavy"], key=lambda trial: trial["score"])
    assert 0.1 <= best["settings"]["momentum"] <= 0.9
    # Another method, tuned in the same folder, stands beside them.
    more = [*sweep[:5], "--methods", "adagrad", *budget]
    assert run_in(folder, monkeypatch, *more) == 0
    run = ["run", "--config", "s/config.toml", "--out", "r"]
    assert run_in(folder, monkeypatch, *run) == 0
    runs = json.loads((folder / "r" / "results.json").read_text())["runs"]
    settings = {r["method"]: r["settings"] for r in runs}
    assert [*settings] == ["sgd", "adagrad", "heavy"]
    assert settings["heavy"].pop("transformation")
    assert settings["heavy"] == best["settings"]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("", 2, "name a command: run, sweep, report, list"),
        ("rnu", 2, "did you mean 'run'"),
        ("run --sedes 0", 2, "did you mean --seeds"),
        ("run --tasks many", 2, "--tasks takes INT"),
        ("run --config", 2, "--config needs a value"),
        ("run --stream permutted", 2, "did you mean 'permuted'"),
        ("run --config no.toml", 1, "cannot read no.toml"),
        ("run --preset nothing", 1, "unknown preset 'nothing'"),
        ("run --preset-size small", 2, "--preset-size goes with --preset"),
        ("run --tasks 0", 1, "--tasks = 0: expected int >= 1"),
        ("run --methods", 1, "--methods = []"),
        ("run --lr inf", 1, "--lr must be finite: inf"),
        ("run --normalisation nan 1", 1, "--normalisation must be finite: nan"),
        ("run --set classp.eps", 2, "METHOD.SETTING=NUMBER"),
        ("run --set clasp.eps=1", 1, "--set names 'clasp'; did you mean 'classp'"),
        ("run --methods clasp", 1, "did you mean 'classp'"),
        ("run --source digit", 1, "did you mean 'digits'"),
        ("run --source npz:no.npz", 1, "no.npz"),
        ("run --stream split --tasks 11", 1, "11"),
        ("run --model mpl", 1, "did you mean 'mlp'"),
        ("run --model transformer", 1, "reads text"),
        ("run --hidden 1000000000", 1, "hidden must be between"),
        ("run --batch-size 100000", 1, "above the 1295 training examples"),
        ("run --methods replay --set replay.replay_size=0", 1, "at least 1: 0"),
        ("run --methods replay --set replay.replay_size=-5", 1, "at least 1: -5"),
        ("run --methods replay --set replay.replay_size=1.5", 1, "a whole number"),
        ("run --methods replay --set replay.replay_size=1e12", 1, "this machine has"),
        ("run --out /dev/null/x", 1, "/dev/null/x"),
        ("run --model mine:nothing", 1, "no 'nothing' in it"),
        ("run --model nope.mine:x", 1, "there is no module nope"),
        ("run --model mine:small --set model.depth=3", 1, "no setting 'depth'"),
        ("run --method x=mine:number", 1, "must be or make an optax"),
        ("run --method x=mine:broken", 1, "must be or make an optax"),
        ("run --method x=mine:unready", 1, "needs a default"),
        ("sweep --points 3", 2, "sweep takes no '--points'"),
        ("sweep --tuning-seeds 0", 1, "also reported ones"),
        ("sweep --validation-fraction 0", 1, "needs validation data"),
        ("sweep --range classp.eps=1:0.1", 2, "0 < low <= high"),
        ("report", 2, "at least one folder"),
        ("report nowhere", 1, "nowhere"),
        ("report out out", 2, "needs --out"),
        ("list --all", 2, "list takes no '--all'"),
    ],
)
def test_one_line_and_no_traceback(
    arguments, status, message, finished, monkeypatch, capsys
):
    monkeypatch.chdir(finished[0])
    assert cli.main(arguments.split()) == status
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.strip().splitlines()) == 1, errors
    assert errors.startswith("classp-jax: ")


@pytest.mark.parametrize("table", ["settings.clasp]\neps = 1", "settings]\nclassp = 3"])
def test_a_wrong_file_is_one_line(table, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.toml").write_text(f"[{table}\n")
    assert run_in(tmp_path, monkeypatch, "run", "--config", "a.toml") == 1
    errors = capsys.readouterr().err
    assert "settings.clas" in errors
    assert errors.count("\n") == 1


def test_everything_is_checked_before_anything_trains(tmp_path, monkeypatch, capsys):
    wrong = ("--methods", "sgd", "adam", "classp", "--set", "classp.eps=-1")
    assert run_in(tmp_path, monkeypatch, "run", *wrong) == 1
    output = capsys.readouterr()
    assert "eps" in output.err
    assert "task 1" not in output.out
    assert not (tmp_path / "runs").exists()


def test_our_own_errors_keep_their_traceback(monkeypatch):
    def broken(_):
        raise ValueError("a bug")

    monkeypatch.setattr(cli, "_list", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["list"])


def test_list_and_version(capsys):
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    for name in ("permuted", "tfds:NAME", "cnn", "classp-published", "permuted-mnist"):
        assert name in shown
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("classp-jax ")


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        (signal.SIGINT, 130, "classp-jax: interrupted"),
        (signal.SIGTERM, 143, "classp-jax: terminated"),
    ],
)
def test_a_signal_ends_it_in_one_line(sent, status, said, process, tmp_path):
    child = process(
        *("run", "--tasks", "2", "--seeds", "0", "--methods", "sgd"),
        *("--epochs", "1", "3000", "--points", "1", "--out", "out"),
    )
    while child.poll() is None and "task 1 of 2" not in child.output():
        time.sleep(0.05)
    child.send_signal(sent)
    assert child.wait(120) == status
    errors = child.errors()
    assert errors.strip().splitlines()[-1].startswith(said)
    assert "Traceback" not in errors
    assert content(tmp_path)["runs"] == []


def test_two_runs_in_one_folder_both_keep_their_results(process, tmp_path):
    common = [*SMALL, "--seeds", "0", "--out", "out", "--methods"]
    both = [
        process("run", *common, name, before=NO_PICTURES) for name in ("sgd", "adam")
    ]
    for child in both:
        assert child.wait(300) == 0, child.errors()
    assert {run["method"] for run in content(tmp_path)["runs"]} == {"sgd", "adam"}


def test_something_is_shown_before_what_is_slow_and_the_extra_is_named():
    code = """
import sys
from classp_jax.continual import cli
slow = {"flax", "sklearn", "matplotlib", "optuna", "scipy"} & set(sys.modules)
assert not slow, slow
sys.modules["tyro"] = None
for name in [m for m in sys.modules if m.startswith("classp_jax.continual")]:
    del sys.modules[name]
from classp_jax.__main__ import main
sys.exit(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert 'pip install "classp-jax[continual]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_a_method_that_diverged_comes_with_a_hint(capsys):
    lost = results.Run(method="ewc", seed=0, matrix=[[0.1], [np.nan]], diverged=True)
    kept = results.Run(method="sgd", seed=0, matrix=[[0.1], [0.9]])
    cli._hint_at_divergence(results.Results({}, {}, (lost, kept)), cli._console())
    (hint,) = capsys.readouterr().out.splitlines()
    assert "--set ewc.learning_rate=NUMBER" in hint
    assert "classp-jax sweep --methods ewc" in hint


def test_the_number_of_cores_is_known_on_every_system(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert "7 cores" in device_name()
    monkeypatch.setattr(os, "process_cpu_count", lambda: 5, raising=False)
    assert "5 cores" in device_name()
