"""Two processes with two devices each do what one process does."""

import json
import re
import socket
import time

import numpy as np
import pytest

from classp_jax.continual import ContinualError, cli
from classp_jax.continual.train import hosts
from tests.continual import forks

CHILD = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    " --xla_cpu_use_fusion_emitters=false"
)
import jax
from jax.experimental import multihost_utils
from classp_jax import continual
from classp_jax.continual.train import hosts

coordinator, processes, process_id, folder, cache = sys.argv[1:]
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
if int(processes) > 1:
    hosts.join(coordinator, int(processes), int(process_id))
    assert jax.device_count() == 4 and jax.local_device_count() == 2
model = (
    lambda key: {"w": jax.random.normal(key, (64, 12)) / 8},
    lambda params, x: (x.reshape(x.shape[0], -1) @ params["w"])[:, :10],
)
stream = continual.permuted("digits", tasks=2, max_train=64)
shared = dict(epochs=1, batch_size=16, points=1, fisher_examples=16, seeds=[0, 1, 2])
shared |= dict(fisher="empirical", save_weights=True, normalisation=(0.3, 0.4))
methods = ["replay+ewc+classp"]
results = continual.run(stream, model, methods, folder=folder + "/runs", **shared)
spread = {"%s %d" % k: v.params["w"] for k, v in results.params.items()}
whole = dict(devices_per_run=4, shard_parameters=True) if int(processes) > 1 else {}
shared |= dict(seeds=[0], rounding_copies=1)
results = continual.run(
    stream, model, methods, folder=folder + "/batch", **shared, **whole
)
together = {"together %s %d" % k: v.params["w"] for k, v in results.params.items()}
import numpy as np

# Each of two processes reads its half of every batch.
been_read = []
def read(rng, share, shares):
    for _ in range(8):
        y = rng.integers(0, 10, 16)
        x = rng.normal(size=(16, 64)).astype("f4") + y[:, None]
        half = slice(share * 16 // shares, (share + 1) * 16 // shares)
        been_read.append(len(y[half]))
        yield x[half], y[half]
x = np.random.default_rng(0).normal(size=(20, 64)).astype("f4")
stream = continual.stream_of_batches(
    [(read, x, np.arange(20) % 10)] * 2, examples=128, num_classes=10, in_shares=True
)
# All of a task's examples, so that the halves do not matter.
shared |= dict(fisher_examples=128, rounding_copies=0)
results = continual.run(stream, model, methods, **shared, **whole)
together |= {"together read": v.params["w"] for v in results.params.values()}
assert sum(been_read) == 2 * 128 // int(processes)
np.savez("%s/%s.npz" % (folder, process_id), **spread, **together)

# Both save an array that lies across them, and restore their own parts.
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
values = np.arange(8.0, dtype=np.float32)
for step in range(2):
    array = jax.make_array_from_callback((8,), sharding, lambda i: values[i] + step)
    tree = {"array": array, "step": step}
    continual.save(folder + "/../saved-" + processes, tree, step=step).result()
multihost_utils.sync_global_devices("saved")
restored = continual.restore(folder + "/../saved-" + processes, tree)
assert restored.step == restored.tree["step"] == 1
for piece in restored.tree["array"].addressable_shards:
    np.testing.assert_array_equal(piece.data, values[piece.index] + 1)
print("finished")
"""


def _port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _start(tmp_path, processes, cache):
    address = f"127.0.0.1:{_port()}"
    for number in range(processes):
        folder = tmp_path / f"{processes}-{number}"
        folder.mkdir()
        arguments = address, str(processes), str(number), str(folder), str(cache)
        yield forks.Fork(CHILD, arguments, tmp_path / f"printed-{processes}-{number}")


def test_two_processes_train_what_one_trains(tmp_path):
    """Runs spread over four devices of two processes, and four that share each run."""
    children = [*_start(tmp_path, 2, tmp_path), *_start(tmp_path, 1, tmp_path)]
    try:
        for child in children:
            assert child.wait(300) == 0, child.errors()
            assert child.output().endswith("finished\n")
    finally:
        for child in children:
            child.kill()
    first, second, alone = (
        dict(np.load(tmp_path / name))
        for name in ("2-0/0.npz", "2-1/1.npz", "1-0/0.npz")
    )
    assert first.keys() == second.keys() == alone.keys()
    assert len(alone) == 3 + 1 + 1
    for name, weights in alone.items():
        np.testing.assert_array_equal(first[name], second[name])
        if name.startswith("together"):
            np.testing.assert_allclose(first[name], weights, rtol=2e-4, atol=2e-5)
        else:
            np.testing.assert_array_equal(first[name], weights)
    # Only the first writes, and it writes what one process would.
    written = sorted(
        str(p.relative_to(tmp_path / "1-0"))
        for p in (tmp_path / "1-0").rglob("*")
        if p.is_file() and p.suffix != ".npz"
    )
    assert "runs/results.json" in written
    for name in written:
        assert (tmp_path / "2-0" / name).exists()
    assert [p.name for p in (tmp_path / "2-1").iterdir()] == ["1.npz"]
    runs = [
        json.loads((tmp_path / place / "runs/results.json").read_text())["runs"]
        for place in ("1-0", "2-0")
    ]
    for key in ("method", "seed", "matrix", "curve", "online_accuracy"):
        assert [run[key] for run in runs[0]] == [run[key] for run in runs[1]]


def test_an_absent_coordinator_is_one_line_within_seconds():
    began = time.monotonic()
    with pytest.raises(ContinualError, match=r"no coordinator at 127.0.0.1:\d+ within"):
        hosts.join(f"127.0.0.1:{_port()}", 2, 1, patience=1)
    assert time.monotonic() - began < 30


JOIN = """
import os, signal, sys, time
from classp_jax.continual import ContinualError
from classp_jax.continual.train import hosts

coordinator, processes, process_id = sys.argv[1:]
signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
try:
    hosts.join(coordinator, int(processes), int(process_id), patience=2)
except ContinualError as error:
    print(error, file=sys.stderr, flush=True)
    os._exit(1)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(10)
"""


def test_those_who_wait_for_a_third_in_vain_say_so_in_one_line(tmp_path):
    """Where JAX would abort them, and take note of SIGTERM without ending."""
    address = f"127.0.0.1:{_port()}"
    joining = [(address, "3", "0"), (address, "3", "1")]
    joining.append((f"127.0.0.1:{_port()}", "1", "0"))
    children = [
        forks.Fork(JOIN, arguments, tmp_path / str(number))
        for number, arguments in enumerate(joining)
    ]
    assert [child.wait(300) for child in children] == [1, 1, 143]
    found = [child.errors() for child in children]
    assert found[0].startswith(f"waited 2 seconds at {address} for 3 processes")
    # It may have been faster than the first one by more than its patience.
    assert address in found[1]
    assert [errors.count("\n") for errors in found] == [1, 1, 0]


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ContinualError, match="cannot have port") as error:
            hosts.join(f"127.0.0.1:{port}", 2, 0)
    assert "(Address already in use)" in str(error.value)


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ("--coordinator 127.0.0.1:1", 2, "--coordinator goes with --distributed"),
        ("--distributed --processes 2", 1, "coordinator, processes and process_id"),
        (
            "--distributed --processes 2 --process-id 2 --coordinator a:1",
            1,
            "process_id 2 is not one of 2 processes",
        ),
        (
            "--distributed --processes 2 --process-id 0 --coordinator a",
            1,
            "coordinator must be HOST:PORT",
        ),
        (
            "--distributed --processes 2 --process-id 1 --coordinator a:65536",
            1,
            "coordinator must be HOST:PORT",
        ),
        ("--devices 0", 1, "--devices"),
        ("--devices 64", 1, "64 devices are asked for, JAX has 8"),
        ("--devices-per-run 3", 1, "batch_size 32 does not divide among the 3"),
    ],
)
def test_wrong_options_are_one_line(options, status, words, capsys, tmp_path):
    arguments = ["run", "--methods", "sgd", "--out", str(tmp_path), *options.split()]
    assert cli.main(arguments) == status
    error = capsys.readouterr().err
    assert re.fullmatch(r"classp-jax: [^\n]*\n", error)
    assert words in error
