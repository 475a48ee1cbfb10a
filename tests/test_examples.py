"""Every example runs as its README says, and what it prints is what it claims."""

import os
import pathlib
import re
import runpy
import subprocess
import sys

import jax
import pytest

from tests.continual import forks

pytestmark = pytest.mark.usefixtures("quick_compilation")

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def in_its_own_process(name, cwd, **environment):
    """Runs a script that sets JAX up, with warnings as errors."""
    # Without the eight devices that the tests ask for.
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{name}.py"],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


@pytest.fixture
def lines(tmp_path, monkeypatch, capsys):
    """Runs a script whole, as a newcomer would; what it prints, line by line."""

    def run(name):
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(EXAMPLES)
        with jax.numpy_dtype_promotion("standard"):
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        shown = capsys.readouterr()
        assert not shown.err
        return shown.out.splitlines()

    return run


def percents(line):
    return [float(number) for number in re.findall(r"([\d.]+)%", line)]


def test_plain_jax(lines):
    _, *printed = lines("plain_jax")
    adam, classp, (free,) = map(percents, printed)
    assert adam[0] < 70
    assert classp[0] > 80
    assert min(adam[2], classp[2]) > 90
    assert 0 < free < 20


def test_flax_nnx(lines):
    old, new, accumulator = lines("flax_nnx")
    assert min(percents(old) + percents(new)) > 85
    assert float(accumulator.split()[-1]) > 0


def test_flax_linen(lines):
    old, new, accumulator = lines("flax_linen")
    assert min(percents(old) + percents(new)) > 85
    assert float(accumulator.split()[-1]) > 0


def test_per_layer(lines):
    accuracies, *layers = lines("per_layer")
    assert min(percents(accuracies)) > 85
    (first,), (second,), (head,) = map(percents, layers)
    assert first > 1.5 * second
    assert second > head


def test_frozen_backbone(lines):
    *layers, accumulators, accuracies = lines("frozen_backbone")
    assert layers == ["first: unchanged", "second: unchanged", "head: trained"]
    assert accumulators == "accumulators: head/bias head/kernel"
    before, after = percents(accuracies)
    assert before < 80
    assert after > 88


def test_finetune(lines):
    pretrained, adamw, protected = map(percents, lines("finetune"))
    assert pretrained[0] > 95
    assert protected[0] > adamw[0] + 10
    assert protected[1] > adamw[1] > 75


def test_sparse_updates(lines):
    _, growing, by_growing, _, steady, by_density = lines("sparse_updates")
    shares = percents(growing)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 3 * shares[-1] > 0
    # The first fifth holds the steps in which the mask finds its threshold.
    assert all(8.5 < share < 11.5 for share in percents(steady)[1:])
    assert min(percents(by_growing) + percents(by_density)) > 93


def test_task_boundary(tmp_path):
    shown, log = in_its_own_process("task_boundary", tmp_path, JAX_LOG_COMPILES="1")
    before, same, slower, sparser = map(percents, shown)
    assert before[0] > 93
    for old, new in (slower, sparser):
        assert same[0] - 2 < old < before[0]
        assert 75 < new < same[1]
    assert log.count("Compiling jit(step)") == 1


def test_ewc(lines):
    _, *printed = lines("ewc")
    alone, with_ewc = map(percents, printed)
    assert with_ewc[0] > alone[0] + 1
    assert min(with_ewc) > 85


def test_data_parallel(tmp_path):
    quick = {"XLA_FLAGS": forks.QUICK}
    (first, jit, pmap), log = in_its_own_process("data_parallel", tmp_path, **quick)
    assert not log
    assert first.startswith("8 devices")
    assert percents(first)[0] > 85
    for line in (jit, pmap):
        # Rounding: the devices' parts are summed in another order.
        assert float(line.split()[-1]) < 1e-5


def test_orbax_checkpoint(lines):
    step, accumulator, bits = lines("orbax_checkpoint")
    assert step == "restored at step 500"
    assert float(accumulator.split()[-1]) > 0
    assert bits.endswith("True")


def test_from_pytorch(lines):
    accumulator, *differences = lines("from_pytorch")
    assert float(accumulator.split()[-1]) > 0
    assert len(differences) == 2
    for line in differences:
        assert float(line.split()[-1]) < 1e-5


def test_every_example_is_listed_and_tested():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"digits"}
    listed = re.findall(
        r"^\| `python examples/(\w+)\.py` \|",
        (EXAMPLES / "README.md").read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    assert sorted(listed) == sorted(scripts)
    assert {f"test_{name}" for name in scripts} <= globals().keys()
