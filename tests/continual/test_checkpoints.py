"""Saving and restoring: whole or not at all, and going on to the same bits."""

import dataclasses
import itertools
import json
import pathlib
import signal
import subprocess
import sys
from typing import Any

import faults_runs as faults
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from classp_jax import continual
from classp_jax.continual import checkpoints, leaves
from classp_jax.continual.train import keeper
from tests.continual import forks

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL: dict[str, Any] = {"seeds": [0, 1], "epochs": 2, "points": 2}


def _bits(leaf):
    if leaves.is_key(leaf):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def test_every_kind_of_leaf_comes_back_as_it_was(tmp_path):
    tree = {
        "negative zeros": (jnp.full((4, 5), -0.0), np.float32(3)),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
        "old key": jax.random.PRNGKey(0),
        "empty": jnp.zeros((0, 3)),
        "bfloat16": jnp.full((5, 3), 1.5, jnp.bfloat16),
        "float8": jnp.ones(3, jnp.float8_e4m3fn),
        "undefined": jnp.array([jnp.nan, -jnp.inf, 1e-45], jnp.float32),
        "numbers": [3, 2.5, True, 1 + 2j],
        "none": None,
        "numpy": np.arange(3),
    }
    note = {"position": [1, 2], "curve": [0.1 + 0.2, float("inf")]}
    saved = continual.save(tmp_path / "made", tree, step=7, note=note)
    assert saved.result() == tmp_path / "made" / "7"
    restored = continual.restore(tmp_path / "made", tree)
    assert (restored.step, restored.note) == (7, note)
    assert jax.tree.structure(restored.tree) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(restored.tree), strict=True):
        assert type(a) is type(b)
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
        assert _bits(a) == _bits(b)


def test_what_is_saved_is_what_was_there_at_the_call(tmp_path):
    # The step that follows gives the arrays up, and the caller's lists grow.
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x, curve = jnp.zeros((512, 512)), [0]
    for number in range(4):
        continual.save(tmp_path, x, step=number, keep=4, note={"curve": curve})
        curve.append(number + 1)
        x = step(x)
    for number in range(4):
        restored = continual.restore(tmp_path, jnp.zeros((512, 512)), step=number)
        assert np.unique(restored.tree) == [number]
        assert restored.note["curve"] == list(range(number + 1))


def test_old_checkpoints_and_those_gone_back_behind_are_removed(tmp_path):
    def kept():
        return sorted(int(path.name) for path in tmp_path.iterdir())

    for step in (10, 20, 30):
        continual.save(tmp_path, np.arange(3), step=step).result()
    assert kept() == [20, 30]
    # Those that a killed process was writing, before and after the last one's end.
    (tmp_path / "40.writing.classp_jax").mkdir()
    assert continual.restore(tmp_path, np.arange(3)).step == 30
    continual.save(tmp_path, np.arange(3) + 5, step=20).result()
    assert kept() == [20]
    np.testing.assert_array_equal(
        continual.restore(tmp_path, np.arange(3)).tree, [5, 6, 7]
    )


@pytest.mark.parametrize("number", [1, 2, 8])
def test_restored_onto_another_number_of_devices(number, tmp_path):
    def rows(count):
        mesh = Mesh(np.array(jax.devices()[:count]), ("d",))
        return NamedSharding(mesh, PartitionSpec("d"))

    values = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    continual.save(tmp_path, jax.device_put(values, rows(4)), step=1)
    like = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=rows(number))
    found = continual.restore(tmp_path, like).tree
    assert found.sharding == rows(number)
    assert np.asarray(found).tobytes() == values.tobytes()


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": jnp.zeros(3), "b": jnp.zeros(2)}, "'b' is float32[2,1], not float32[2]"),
        ({"a": jnp.zeros(3, jnp.int32)}, "'a' is float32[3], not int32[3]"),
        ({"a": jnp.zeros(3)}, "'b' is float32[2,1], which is not asked for"),
        ({"a": jnp.zeros(3), "aa": {"c": 1}}, "'aa/c' is missing, not int64[]"),
    ],
)
def test_the_first_leaf_that_differs_is_named(like, message, tmp_path):
    continual.save(tmp_path, {"a": jnp.zeros(3), "b": jnp.zeros((2, 1))}, step=1)
    with pytest.raises(continual.CheckpointError) as error:
        continual.restore(tmp_path, like)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fault",
    [
        faults.truncated,
        lambda folder: faults.flipped(folder, rounds=2),
        faults.all_damaged,
        faults.other_optimizer,
    ],
)
def test_what_the_page_says_of_damaged_and_other_trees(fault, tmp_path):
    times, _ = fault(tmp_path)
    assert times > 0


def test_what_cannot_be_saved_or_found_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    bad: Any = [1]
    cases = [
        (lambda: continual.save(tmp_path, 1, step=-1), "step must be a whole"),
        (lambda: continual.save(tmp_path, "text", step=1), "arrays and numbers"),
        (lambda: continual.save(tmp_path, 1, step=1, note={"a": {1}}), "JSON"),
        (lambda: continual.save(tmp_path / "file", 1, step=1), "Cannot write"),
        (lambda: continual.restore(tmp_path / "none", 1), "no checkpoint in"),
        (lambda: continual.save(tmp_path, (), step=1), "nothing to save"),
        (lambda: continual.save(tmp_path, np.zeros(0), step=1), "nothing to save"),
        (lambda: continual.save(tmp_path, 1.0, step=1, note=bad), "be a dictionary"),
        (lambda: continual.restore(tmp_path, 1, step=-3), "step must be a whole"),
        (lambda: continual.restore(tmp_path, 1, step=3), "no checkpoint of step 3"),
    ]
    for call, message in cases:
        with pytest.raises(continual.CheckpointError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    continual.save(tmp_path, np.arange(3), step=1).result()

    def full(*_):
        raise OSError(28, "No space left on device", "there")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "write_atomically", full)
        continual.save(tmp_path, np.arange(3), step=2)
        with pytest.raises(continual.CheckpointError, match="No space left"):
            continual.save(tmp_path, np.arange(3), step=3)
    # The one before is still there, and the next can be written.
    assert continual.restore(tmp_path, np.arange(3)).step == 1
    continual.save(tmp_path, np.arange(3), step=4)
    assert continual.restore(tmp_path, np.arange(3)).step == 4


def test_what_is_not_ours_is_never_removed(tmp_path):
    for name in ("2024", "notes.tmp", "7"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("all of it")
    for step in (1, 2, 3, 2):
        continual.save(tmp_path, np.arange(3), step=step).result()
    with pytest.raises(
        continual.CheckpointError, match=r"/7: Not a checkpoint of ours"
    ):
        continual.save(tmp_path, np.arange(3), step=7).result()
    assert continual.restore(tmp_path, np.arange(3)).step == 2
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["2", "2024", "7", "notes.tmp"]
    for name in ("2024", "notes.tmp", "7"):
        assert (tmp_path / name / "thesis.txt").read_text() == "all of it"


def test_a_checkpoint_without_its_manifest_is_named(tmp_path):
    for step in (1, 2):
        continual.save(tmp_path, np.arange(3), step=step).result()
    (tmp_path / "2" / checkpoints.MANIFEST).unlink()
    with pytest.warns(continual.CheckpointWarning, match=r"/2 is damaged .*manifest"):
        assert continual.restore(tmp_path, np.arange(3)).step == 1


class Killed(BaseException):
    """Comes where a process would end."""


@pytest.mark.parametrize("renames", [0, 1])
def test_killed_while_a_step_is_replaced_it_keeps_one_of_the_two(
    renames, tmp_path, monkeypatch
):
    continual.save(tmp_path, np.arange(3), step=0).result()
    left, rename = [renames], pathlib.Path.rename

    def dying(path, target):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(pathlib.Path, "rename", dying)
        with pytest.raises(Killed):
            continual.save(tmp_path, np.arange(3) + 1, step=0).result()
    for _ in range(2):
        found = continual.restore(tmp_path, np.arange(3))
        assert (found.step, found.tree.tolist()) == (0, [0, 1, 2])
    continual.save(tmp_path, np.arange(3) + 2, step=0).result()
    assert continual.restore(tmp_path, np.arange(3)).tree.tolist() == [2, 3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["0"]


FULL = """
import resource, sys
import numpy as np
from classp_jax import continual

tree = {str(k): np.random.default_rng(k).normal(size=(100, 100)) for k in range(20)}
continual.save(sys.argv[1], tree, step=1).result()
for attempt in range(5):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))
    try:
        continual.save(sys.argv[1], tree, step=2).result()
    except continual.CheckpointError as error:
        print(error)
    assert continual.restore(sys.argv[1], tree).step == 1
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
continual.save(sys.argv[1], tree, step=2).result()
assert continual.restore(sys.argv[1], tree).step == 2
"""


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(tmp_path):
    """Of many arrays that cannot be written none prints a traceback."""
    place = tmp_path / "made"
    child = forks.Fork(FULL, [str(place)], tmp_path / "printed")
    assert (child.wait(300), child.errors()) == (0, "")
    line = f"Cannot write the checkpoint {place}/2: File too large."
    assert child.output().splitlines() == [line] * 5


def test_what_could_not_be_written_is_told_once(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "there")

    continual.save(tmp_path, np.arange(3), step=1).result()
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "write_atomically", full)
        saved = continual.save(tmp_path, np.arange(3), step=2)
        with pytest.raises(continual.CheckpointError, match="No space left"):
            saved.result()
        continual.save(tmp_path, np.arange(3), step=3)
        with pytest.warns(continual.CheckpointWarning, match="An earlier one is used"):
            assert continual.restore(tmp_path, np.arange(3)).step == 1
    continual.save(tmp_path, np.arange(3), step=4).result()
    assert continual.restore(tmp_path, np.arange(3)).step == 4


class Interrupted(Exception):  # noqa: N818 - no error of ours
    """Comes from outside in the middle of training."""


def _linear():
    def init(key):
        return {"w": jax.random.normal(key, (64, 10)) * 0.1, "b": jnp.zeros(10)}

    def apply(params, x):
        return x.reshape(x.shape[0], -1) @ params["w"] + params["b"]

    return init, apply


def _train(methods, **options):
    stream = continual.permuted("digits", tasks=2, max_train=160)
    return continual.run(stream, _linear(), methods, **{**SMALL, **options})


def _plain(results):
    runs = [dataclasses.asdict(run) for run in results.runs]
    for run in runs:
        for name in ("seconds", "compile_seconds", "provenance"):
            del run[name]
        # A file does not tell 200 from 200.0.
        run["settings"] = {k: float(v) for k, v in run["settings"].items()}
    params = {
        key: [_bits(leaf) for leaf in jax.tree.leaves(trained)]
        for key, trained in results.params.items()
    }
    return json.dumps(runs), params


def _broken_off(after):
    """Calls that end with an exception."""
    count = 0

    def call(record):
        nonlocal count
        count += 1
        if count > after:
            raise Interrupted

    return call


def test_another_transformation_of_the_same_name_is_another_method(tmp_path):
    """Its numbers are in a closure, where no setting tells them."""
    found = {}
    for rate in (1e-3, 1e-1, 1e-3):
        results = _train({"mine": optax.sgd(rate)}, folder=tmp_path)
        found.setdefault(rate, len(results.runs))
    assert len(results.runs) == 2 * found[1e-3]
    texts = {run.settings["transformation"] for run in results.runs}
    assert len(texts) == 2
    place = tmp_path / "interrupted"
    with pytest.raises(Interrupted):
        _train(
            {"mine": optax.sgd(1e-3)},
            folder=place,
            checkpoint_every=3,
            on_metrics=_broken_off(2),
        )
    with pytest.raises(continual.ContinualError, match=r"settings\.transformation is"):
        _train({"mine": optax.sgd(1e-1)}, folder=place, resume=True)
    _train({"mine": optax.sgd(1e-3)}, folder=place, resume=True)


def test_another_function_of_the_same_name_and_settings_is_another_method(tmp_path):
    """An optimizer that was edited between two runs."""
    rate = {"learning_rate": continual.Setting(0.1, 0.01, 1.0)}
    before = continual.from_optax(optax.sgd, rate)
    after = continual.from_optax(lambda learning_rate: optax.sgd(-learning_rate), rate)
    first = _train({"mine": before}, folder=tmp_path).runs
    assert len(_train({"mine": before}, folder=tmp_path).runs) == len(first)
    both = _train({"mine": after}, folder=tmp_path).runs
    assert len(both) == 2 * len(first)
    assert both[-1].matrix != first[0].matrix
    # Another number makes the same transformation.
    settings = {"mine": {"learning_rate": 0.5}}
    *_, third = _train({"mine": before}, settings=settings, folder=tmp_path).runs
    texts = [run.settings["transformation"] for run in (first[0], both[-1], third)]
    assert texts[0] == texts[2] != texts[1]


def test_interrupted_again_and_again_it_ends_with_the_same_bits(tmp_path, monkeypatch):
    methods = ["replay+ewc+classp"]
    with monkeypatch.context() as patched:
        # Nobody who does not ask for checkpoints waits for Orbax.
        patched.delattr(checkpoints, "orbax")
        expected = _train(methods, save_weights=True, rounding_copies=1)
    options = {"folder": tmp_path, "checkpoint_every": 3, "resume": True}
    options |= {"save_weights": True, "rounding_copies": 1}
    # A run that began anew each time would never end.
    for _ in range(6):
        try:
            found = _train(methods, on_metrics=_broken_off(5), **options)
            break
        except Interrupted:
            continue
    else:
        pytest.fail("it does not go on")
    assert _plain(found)[0] == _plain(expected)[0]
    # The last attempt holds the weights of the methods that it trained itself.
    ours, theirs = _plain(found)[1], _plain(expected)[1]
    assert ours
    assert all(theirs[key] == value for key, value in ours.items())
    assert not (tmp_path / "checkpoints").exists()


def test_who_is_stopped_while_the_disk_is_full_is_not_told_that_all_is_saved(
    tmp_path, monkeypatch
):
    def stop(record):
        raise SystemExit(143)

    def full(*_):
        raise OSError(28, "No space left on device", "there")

    monkeypatch.setattr(checkpoints, "write_atomically", full)
    options = {"folder": tmp_path, "checkpoint_every": 3, "on_metrics": stop}
    with pytest.raises(continual.CheckpointError, match="No space left"):
        _train(["sgd"], **options)


def test_what_cannot_go_on_is_refused_before_training(tmp_path):
    with pytest.raises(continual.ContinualError, match="need a folder"):
        _train(["sgd"], checkpoint_every=3)
    with pytest.raises(continual.ContinualError, match="checkpoint_every must be"):
        _train(["sgd"], checkpoint_every=0, folder=tmp_path)
    with pytest.raises(Interrupted):
        _train(["sgd"], folder=tmp_path, checkpoint_every=3, on_metrics=_broken_off(2))
    options = {"folder": tmp_path, "on_metrics": _broken_off(0)}
    with pytest.raises(continual.CheckpointError, match="go on from them") as error:
        _train(["sgd"], checkpoint_every=3, **options)
    assert "\n" not in str(error.value)
    other = {"sgd": {"learning_rate": 0.5}}
    with pytest.raises(continual.CheckpointError, match=r"learning_rate is .* and 0.5"):
        _train(["sgd"], resume=True, settings=other, **options)
    folder = keeper.folder_of(tmp_path, "sgd")
    assert (folder / "seed-0").is_dir()
    for file in (folder / "seed-0").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(continual.CheckpointError, match="No checkpoint is whole"):
        _train(["classp", "sgd"], resume=True, **options)


@pytest.fixture
def _forks(monkeypatch, tmp_path):
    """The commands that faults happen to are forks."""
    numbers = itertools.count()

    def python(code, *arguments, within, **variables):
        assert not within
        code = f"import os\nos.environ |= {variables!r}\n{code}"
        folder = tmp_path / f"printed-{next(numbers)}"
        child = forks.Fork(code, arguments, folder)
        status = child.wait(300)
        assert status is not None, "it does not end"
        return subprocess.CompletedProcess(
            arguments, status, child.output(), child.errors()
        )

    monkeypatch.setattr(faults, "python", python)


@pytest.mark.usefixtures("_forks")
def test_killed_and_terminated_it_goes_on_to_the_same_bits(tmp_path):
    experiment = ("--tasks", "2", "--seeds", "0", "--epochs", "6", "--points", "1")
    options = {"methods": ("replay+classp",), "experiment": experiment}
    resume = ("--resume", "--checkpoint-every", str(faults.EVERY))
    fault = "kill-in-write 2 0.01"
    done = faults.run(tmp_path / "run", *resume, fault=fault, **options)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    done = faults.run(tmp_path / "run", *resume, fault="terminate 0 0", **options)
    assert done.returncode == 143
    (line,) = done.stderr.splitlines()
    assert line.endswith("every run is saved: go on with --resume")
    faults.finished(tmp_path / "run", faults.uninterrupted(**options), **options)


def test_orbax_is_not_imported_before_it_is_needed():
    code = """
import sys
from classp_jax import continual
continual.save, continual.restore, continual.run
assert not [name for name in sys.modules if name.startswith("orbax")]
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
