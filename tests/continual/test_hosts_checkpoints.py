"""Checkpoints of two processes with two devices each, which are killed and go on."""

import contextlib
import json
import pathlib
import signal
import sys
import tempfile
import time

import faults_common
import faults_runs as faults
import pytest

from classp_jax.continual import checkpoints
from tests.continual import forks

CHILD = """
import os, signal, sys
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    " --xla_cpu_use_fusion_emitters=false"
)
import jax
from classp_jax import continual
from classp_jax.continual import checkpoints
from classp_jax.continual.cli import Terminated
from classp_jax.continual.errors import Stopped
from classp_jax.continual.train import hosts
from classp_jax.continual.train.keeper import Keeper

coordinator, process_id, folder, cache, fault, count = sys.argv[1:]
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
# It happens to the second process.
left = [int(count) if process_id == "1" else -2]

def watched(function, signal_, counts=lambda *_: True):
    def call(*arguments):
        left[0] -= counts(*arguments)
        if left[0] == -1:
            os.kill(os.getpid(), signal_)
        return function(*arguments)
    return call

if fault == "kill":
    Keeper.stepped = watched(Keeper.stepped, signal.SIGKILL)
if fault == "kill in a write of both":
    both = lambda *arguments: len(arguments[-1]) == 2
    checkpoints._write = watched(checkpoints._write, signal.SIGKILL, both)
if fault == "terminate":
    Keeper.stepped = watched(Keeper.stepped, signal.SIGTERM)

def terminate(*_):
    raise Terminated

signal.signal(signal.SIGTERM, terminate)
hosts.join(coordinator, 2, int(process_id))
model = (
    lambda key: {"w": jax.random.normal(key, (64, 12)) / 8},
    lambda params, x: (x.reshape(x.shape[0], -1) @ params["w"])[:, :10],
)
options = dict(epochs=1, batch_size=16, points=1, fisher_examples=16)
options |= dict(fisher="empirical", normalisation=(0.3, 0.4), save_weights=True)
if fault != "none, and no checkpoints":
    options |= dict(checkpoint_every=3, resume=True)
shared = dict(seeds=[0], rounding_copies=1, devices_per_run=4, shard_parameters=True)
stream = continual.permuted("digits", tasks=2, max_train=128)

def train(where, **more):
    continual.run(
        stream, model, ["replay+ewc+classp"], folder=f"{folder}/{where}", **options,
        **more, **(shared if where == "shared" else dict(seeds=[0, 1, 2])),
    )

status = 0
try:
    if fault == "kill in a write of both":
        try:
            train("spread", settings={"classp": {"eps": 0.7}})
        except continual.ContinualError as error:
            print(error, file=sys.stderr)
    train("spread")
    train("shared")
except (Terminated, continual.ContinualError) as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    status = 143 if isinstance(error, (Terminated, Stopped)) else 1
    hosts.leave()
sys.stderr.flush()
os._exit(status)
"""


FULL = """
import os, resource, sys
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
import classp_jax
from classp_jax import continual, finetune
from classp_jax.continual.train import hosts

coordinator, process_id, folder = sys.argv[1:]
hosts.join(coordinator, 2, int(process_id))
cut = NamedSharding(jax.make_mesh((2,), ("x",)), PartitionSpec("x"))
values = np.random.default_rng(0).normal(size=(2, 5000)).astype(np.float32)

def tree(step):
    array = jax.make_array_from_callback((2, 5000), cut, lambda at: step * values[at])
    return {"cut": array, "whole": step * values}

for step, full in enumerate(["nobody", "1", "0", "nobody"], 1):
    if full == process_id:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))
    try:
        continual.save(folder, tree(step), step=step).result()
    except continual.CheckpointError as error:
        print(error, file=sys.stderr)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    found = continual.restore(folder, tree(0))
    cut_there, expected = found.tree["cut"].addressable_data(0), found.step * values
    np.testing.assert_array_equal(cut_there[0], expected[int(process_id)])
    np.testing.assert_array_equal(found.tree["whole"], expected)
    print(found.step, file=sys.stderr)
# Importance is a folder of all processes, too, that may be written again.
params = {"cut": tree(1)["cut"]}
tx = classp_jax.classp(0.1)
for factor in (2, 3):
    importance = {"cut": abs(tree(factor)["cut"])}
    finetune.save_importance(f"{folder}-importance", importance, params)
    loaded = finetune.load_importance(f"{folder}-importance", tx.init(params))
    found = classp_jax.accumulators(loaded)["cut"].addressable_data(0)
    np.testing.assert_array_equal(found[0], abs(factor * values[int(process_id)]))
    print(f"importance {factor}", file=sys.stderr)
sys.stderr.flush()
os._exit(0)
"""


@pytest.fixture
def start(tmp_path):
    """Starts two processes; returns their statuses and errors.

    When one is killed, so is the other.
    """

    def call(program, *arguments):
        address = faults_common.free_address()
        folder = pathlib.Path(tempfile.mkdtemp(prefix="printed-", dir=tmp_path.parent))
        with contextlib.ExitStack() as stack:
            children = []
            for number in range(2):
                told = [address, str(number), *map(str, arguments)]
                children.append(forks.Fork(program, told, folder / str(number)))
                stack.callback(children[-1].kill)
            deadline = time.monotonic() + 300
            while None in (ended := [child.poll() for child in children]):
                if time.monotonic() > deadline:
                    pytest.fail("they wait for each other")
                if -signal.SIGKILL in ended:
                    for child in children:
                        child.kill()
                time.sleep(0.05)
        return tuple(ended), tuple(child.errors() for child in children)

    return call


@pytest.fixture
def run(start, tmp_path):
    """Trains in two processes, the second of which meets with a fault."""

    def call(folder, fault="none", count=0):
        return start(CHILD, folder, tmp_path / "cache", fault, count)

    return call


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on files there")
def test_when_the_disk_is_full_for_one_no_other_waits(start, tmp_path):
    status, errors = start(FULL, tmp_path)
    assert status == (0, 0), errors
    lines = [error.splitlines() for error in errors]
    two, three = (f"Cannot write the checkpoint {tmp_path}/{k}: " for k in (2, 3))
    full = "File too large."
    unfinished = f"{two}process 1 could not write its part."
    unknown = f"{three}another process says why."
    rest = ["4", "importance 2", "importance 3"]
    assert lines[0] == ["1", unfinished, "1", f"{three}{full}", "1", *rest]
    assert lines[1] == ["1", f"{two}{full}", "1", unknown, "1", *rest]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "4"]


def test_killed_stopped_and_resumed_they_end_with_the_same_bits(run, tmp_path):
    """Runs that each process trains alone, and one that both share."""
    status, _ = run(tmp_path / "plain", "none, and no checkpoints")
    assert status == (0, 0)
    folder = tmp_path / "run"
    status, _ = run(folder, "kill", 3)
    assert status == (-signal.SIGKILL,) * 2
    # The second process saves its own run, too.
    assert _saved(folder / "spread", "seed-2")
    status, errors = run(folder, "kill in a write of both", 4)
    assert status == (-signal.SIGKILL,) * 2, errors
    for error in errors:
        (line,) = error.splitlines()
        assert "is a checkpoint of another run: settings.eps is" in line
    assert not (folder / "spread" / "checkpoints").exists()
    # What one process finds damaged, which looks at a part of the files, none uses.
    newest = _saved(folder / "shared", "seed-0")[-1]
    _, body = (newest / checkpoints.MANIFEST).read_text().splitlines()
    damaged = newest / [*json.loads(body)["files"]][1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    # One alone is told to stop, and both do.
    status, errors = run(folder, "terminate", 1)
    assert status == (143, 143), errors
    for error in errors:
        assert f"{newest} is damaged" in error
    assert "another process says how" in errors[0]
    assert f"{damaged.name} is not what was written" in errors[1]
    assert "Stopped: stopped with another process" in errors[0]
    status, errors = run(folder)
    assert (status, errors) == ((0, 0), ("", ""))
    for where in ("spread", "shared"):
        ours, theirs = (
            faults.bits(folder / where),
            faults.bits(tmp_path / "plain" / where),
        )
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if ours[name] != theirs[name]] == []
        assert not (folder / where / "checkpoints").exists()


def _saved(folder, run):
    (place,) = (folder / "checkpoints").glob(f"*/{run}")
    return sorted(
        (p for p in place.iterdir() if p.name.isdigit()), key=lambda p: int(p.name)
    )
