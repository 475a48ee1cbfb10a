"""The command line as a user types it, right and wrong, in processes of its own."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from classp_jax.continual.cli import main

SMALL = ["--tasks", "2", "--epochs", "1", "--seeds", "0", "--points", "1"]


def classp_jax(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "classp_jax", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"XLA_FLAGS": "", "COLUMNS": "120"},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which one small run has finished."""
    folder = tmp_path_factory.mktemp("cli")
    done = classp_jax("run", *SMALL, "--methods", "sgd", "classp", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "classp" in done.stdout
    return folder


def test_run_leaves_its_results_and_pictures(finished):
    out = finished / "runs" / "permuted-digits"
    assert {p.name for p in out.iterdir()} == {
        "results.json",
        "report.md",
        "accuracy.png",
        "matrix.png",
        "tradeoff.png",
    }
    content = json.loads((out / "results.json").read_text())
    assert content["configuration"]["tasks"] == 2
    assert [r["method"] for r in content["runs"]] == ["sgd", "classp"]
    assert "classp-jax run --tasks 2" in (out / "report.md").read_text()


def test_run_goes_on_where_it_stopped(finished):
    path = finished / "runs" / "permuted-digits" / "results.json"
    before = json.loads(path.read_text())["runs"]
    methods = ["--methods", "classp", "adam"]
    done = classp_jax("run", *SMALL, *methods, cwd=finished)
    assert done.returncode == 0, done.stderr
    after = {r["method"]: r for r in json.loads(path.read_text())["runs"]}
    assert list(after) == ["classp", "adam", "sgd"]
    # Not trained again: even the measured seconds are the same.
    assert after["classp"] == before[1]
    assert after["sgd"] == before[0]


def test_report_merges_folders(finished, tmp_path):
    other = tmp_path / "other"
    run = ["run", *SMALL, "--methods", "adagrad", "--out", str(other)]
    done = classp_jax(*run, cwd=finished)
    assert done.returncode == 0, done.stderr
    done = classp_jax(
        "report", "runs/permuted-digits", str(other), "--out", "both", cwd=finished
    )
    assert done.returncode == 0, done.stderr
    text = (finished / "both" / "report.md").read_text()
    assert "adagrad" in text
    assert "classp" in text


def test_list_names_everything(tmp_path):
    done = classp_jax("list", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("permuted", "digits", "tfds:NAME", "cnn", "classp-published", "si"):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["rnu"], 2, "did you mean 'run'"),
        (["run", "--sedes", "0"], 2, "--sedes"),
        (["run", "--tasks", "many"], 2, "--tasks"),
        (["run", "--config"], 2, "--config needs"),
        (["run", "--config", "no.toml"], 1, "cannot read no.toml"),
        (["run", "--methods", "clasp"], 1, "did you mean 'classp'"),
        (["run", "--stream", "permutted"], 1, "permuted"),
        (["run", "--source", "digit"], 1, "digits"),
        (["run", "--source", "npz:no.npz"], 1, "no.npz"),
        (["run", "--model", "mpl"], 1, "did you mean 'mlp'"),
        (["run", "--model", "transformer"], 1, "reads text"),
        (["run", "--stream", "split", "--tasks", "11"], 1, "11"),
        (["run", "--set", "classp.eps"], 1, "METHOD.SETTING=NUMBER"),
        (["run", "--lr", "-1"], 1, "lr must be >= 0"),
        (["run", "--out", "/dev/null/x"], 1, "/dev/null/x"),
        (["sweep", "--tuning-seeds", "0"], 1, "also reported"),
        (["report"], 2, "at least one folder"),
        (["report", "nowhere"], 1, "nowhere"),
        (["list", "--all"], 2, "takes no options"),
    ],
)
def test_one_line_and_no_traceback(
    arguments, status, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == status
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.strip().splitlines()) == 1, errors
    assert errors.startswith("classp-jax: ")


def test_another_run_s_results_are_left_alone(finished):
    path = finished / "runs" / "permuted-digits" / "results.json"
    before = path.read_bytes()
    done = classp_jax("run", *SMALL, "--batch-size", "16", cwd=finished)
    assert done.returncode == 1
    assert "another run" in done.stderr
    assert path.read_bytes() == before


def test_a_diverged_run_is_no_number(tmp_path):
    run = ["run", *SMALL, "--methods", "sgd", "--lr", "1e30"]
    done = classp_jax(*run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = tmp_path / "runs" / "permuted-digits" / "report.md"
    row = next(x for x in report.read_text().splitlines() if x.startswith("| sgd"))
    assert "diverged" in row
    assert "nan" not in row.lower()


def test_ctrl_c_keeps_what_is_finished(tmp_path):
    long = ["--epochs", "100000", "--seeds", "0", "--tasks", "2", "--points", "10000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "classp_jax", "run", *long, "--methods", "sgd"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    results = pathlib.Path(tmp_path, "runs", "permuted-digits", "results.json")
    deadline = time.monotonic() + 120
    while not results.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("classp-jax: interrupted")
    assert json.loads(results.read_text())["runs"] == []


def test_without_the_extra_it_names_the_extra(tmp_path):
    code = (
        "import sys; sys.modules['tyro'] = None\n"
        "from classp_jax.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert 'pip install "classp-jax[continual]"' in done.stderr
    assert "Traceback" not in done.stderr
