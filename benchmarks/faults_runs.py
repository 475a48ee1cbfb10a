"""What interrupts long runs, and what happens to their checkpoints, done on purpose.

Faults of ``faults.py``: functions of an empty folder that return how often it was tried
and what came out, and raise if that is not what the page promises.
"""

import contextlib
import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from faults_common import (
    Outcome,
    error_line,
    expect,
    free_address,
    one_line,
    python,
    started,
)

import classp_jax
from classp_jax import continual

METHODS = ("classp", "ewc+classp", "replay", "si")
EXPERIMENT = ("--tasks", "3", "--seeds", "0", "1", "--epochs", "20", "--points", "2")
SHORT = ("--tasks", "2", "--seeds", "0", "--epochs", "6", "--points", "1")
EVERY = 50
"""Steps between two checkpoints."""

# Of what is to happen, the child is told in words: what, how often before, how long.
CHILD = """
import os, pathlib, resource, shutil, signal, sys, threading, time
from classp_jax.__main__ import main
from classp_jax.continual import checkpoints, report
from classp_jax.continual.train.keeper import Keeper

what, count, seconds = os.environ.get("FAULT", "none 0 0").split()
left = [int(count)]

def after_a_while(*arguments):
    time.sleep(float(seconds))
    if what.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
    if what == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    if what == "full":
        free = shutil.disk_usage(arguments[0]).free
        pathlib.Path(os.environ["BALLAST"]).write_bytes(bytes(free - 40_000))

def watched(function):
    def call(*arguments):
        left[0] -= 1
        if left[0] == -1:
            happens = threading.Thread(None, after_a_while, None, arguments)
            happens.daemon = True
            happens.start()
            if what in ("limit", "full"):
                happens.join()
        return function(*arguments)
    return call

if what in ("kill", "terminate"):
    Keeper.stepped = watched(Keeper.stepped)
if what in ("kill-in-write", "limit", "full"):
    checkpoints._write = watched(checkpoints._write)
signal.signal(signal.SIGINT, signal.default_int_handler)
report.write_report = lambda *_: None  # Pictures take longer than the runs.
sys.exit(main())
"""


def run(
    folder: pathlib.Path,
    *arguments: str,
    methods: tuple[str, ...] = METHODS,
    experiment: tuple[str, ...] = EXPERIMENT,
    fault: str = "none 0 0",
    within: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, to which something happens.

    ``fault`` is ``kill 9 0.2``, 0.2 s after the tenth segment of steps, ``terminate``
    likewise, ``kill-in-write 3 0.02``, 0.02 s after the fourth write begins, or before
    a write a ``limit`` on the size of files or a disk that is ``full``. Counts are the
    same however fast the machine is.
    """
    options = _options(folder, methods, experiment, arguments)
    return python(CHILD, *options, within=within, **_variables(fault))


def _options(
    folder: pathlib.Path,
    methods: tuple[str, ...],
    experiment: tuple[str, ...],
    arguments: tuple[str, ...],
) -> list[str]:
    options = ["run", "--methods", *methods, *experiment, "--out", str(folder)]
    return [*options, "--save-weights", *arguments]


def _variables(fault: str) -> dict[str, str]:
    cache = pathlib.Path(tempfile.gettempdir(), f"classp-jax-faults-{os.getuid()}")
    return {"FAULT": fault, "XDG_CACHE_HOME": str(cache), "XLA_FLAGS": ""}


def run_in_two(
    folder: pathlib.Path,
    *arguments: str,
    methods: tuple[str, ...] = METHODS,
    experiment: tuple[str, ...] = EXPERIMENT,
    fault: str = "none 0 0",
    victim: int = 1,
) -> list[subprocess.CompletedProcess[str]]:
    """The same in two processes of two devices each; something happens to one of them.

    When one is killed, so is the other, as the machine that both were on would do.
    """
    options = _options(folder, methods, experiment, arguments)
    options += ["--distributed", "--coordinator", free_address(), "--processes", "2"]
    flags = "--xla_force_host_platform_device_count=2"
    with contextlib.ExitStack() as stack:
        processes = []
        for number in range(2):
            variables = _variables(fault if number == victim else "none 0 0")
            rank = ("--process-id", str(number))
            variables["XLA_FLAGS"] = flags
            process = started(CHILD, *options, *rank, within=(), **variables)
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        while None in (ended := [process.poll() for process in processes]):
            if -signal.SIGKILL in ended:
                for process in processes:
                    process.kill()
            time.sleep(0.01)
        return [
            subprocess.CompletedProcess(p.args, p.returncode, *p.communicate())
            for p in processes
        ]


def bits(folder: pathlib.Path) -> dict[str, Any]:
    """All that a run ends with: results but for time, weights and states."""
    results = json.loads((folder / "results.json").read_text())
    found = {
        f"{stored['method']} {stored['seed']}": {
            name: value
            for name, value in stored.items()
            if name not in ("seconds", "compile_seconds", "provenance")
        }
        for stored in results["runs"]
    }
    for file in sorted((folder / "weights").iterdir()):
        with np.load(file) as arrays:
            found |= {f"{file.name} {n}": arrays[n].tobytes() for n in arrays.files}
    return found


def finished(folder: pathlib.Path, reference: dict[str, Any], **options: Any) -> None:
    """Goes on to the end, and compares with a run that nothing happened to."""
    done = run(folder, "--resume", "--checkpoint-every", str(EVERY), **options)
    expect(done.returncode == 0, done.stderr)
    differing = [n for n, v in bits(folder).items() if reference.get(n) != v]
    expect(bits(folder).keys() == reference.keys() and not differing, differing)
    expect(not (folder / "checkpoints").exists(), "checkpoints are left")


@functools.cache
def uninterrupted(**options: Any) -> dict[str, Any]:
    """The bits of a run that nothing happens to; without checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        done = run(pathlib.Path(folder), **options)
        expect(done.returncode == 0, done.stderr)
        return bits(pathlib.Path(folder))


def killed(
    folder: pathlib.Path,
    times: int,
    moment: Callable[[random.Random], str],
    reference: dict[str, Any],
    **options: Any,
) -> int:
    """Kills a run and goes on, again and again; the number of resumed runs compared."""
    rng, kills, runs = random.Random(0), 0, 0
    while kills < times:
        place, ended = folder / f"run-{runs}", False
        while kills < times and not ended:
            arguments = ("--resume", "--checkpoint-every", str(EVERY))
            done = run(place, *arguments, fault=moment(rng), **options)
            expect(done.returncode in (0, -signal.SIGKILL), done.stderr)
            ended = done.returncode == 0
            kills += not ended
        finished(place, reference, **options)
        runs += 1
    return runs


def killed_at_random(folder: pathlib.Path) -> Outcome:
    """SIGKILL at any moment of training."""
    reference = uninterrupted()

    def moment(rng: random.Random) -> str:
        return f"kill {rng.randrange(40)} {rng.uniform(0, 0.3):.3f}"

    killed(folder, 12, moment, reference)
    return 12, "`--resume` goes on and ends with the bits of an uninterrupted run"


def killed_in_a_write(folder: pathlib.Path) -> Outcome:
    """SIGKILL while a checkpoint is written."""
    reference = uninterrupted()

    def moment(rng: random.Random) -> str:
        return f"kill-in-write {rng.randrange(2, 20)} {rng.uniform(0, 0.2):.3f}"

    killed(folder, 8, moment, reference)
    return 8, "the same, from the checkpoint before"


def terminated(folder: pathlib.Path, times: int = 3, **options: Any) -> Outcome:
    """SIGTERM."""
    reference = uninterrupted(**options)
    for number in range(times):
        done = run(
            folder / "run",
            *("--resume", "--checkpoint-every", str(EVERY)),
            fault=f"terminate {20 * number} 0.1",
            **options,
        )
        expect(done.returncode == 143, (done.returncode, done.stderr))
        line = error_line(done)
        expect(line.startswith("classp-jax: terminated; "), line)
    finished(folder / "run", reference, **options)
    return times, "status 143 and one line; saved, and the same bits in the end"


TWO = ("--tasks", "2", "--epochs", "20", "--points", "1")
SPREAD = ("--seeds", "0", "1", "2", "3")
SHARED = ("--seeds", "0", "1", "--devices-per-run", "4", "--shard-parameters")
SHARED += ("--max-train", "320")


def two_killed(folder: pathlib.Path) -> Outcome:
    """SIGKILL of two processes, at any moment: of spread runs, and of shared ones."""
    rng = random.Random(0)
    every = ("--resume", "--checkpoint-every", str(EVERY))
    options: dict[str, Any] = {"methods": ("classp",), "experiment": TWO}
    for more, segments in (SPREAD, 10), (SHARED, 5):
        plain = folder / f"plain-{segments}"
        done = run_in_two(plain, *more, **options)
        expect([d.returncode for d in done] == [0, 0], [d.stderr for d in done])
        kills = runs = 0
        while True:
            place, fault = folder / f"run-{segments}-{runs}", "none 0 0"
            if kills < 3:
                what = rng.choice(("kill", "kill-in-write"))
                fault = f"{what} {rng.randrange(segments)} {rng.uniform(0, 0.05):.3f}"
            victim = rng.randrange(2)
            done = run_in_two(
                place, *every, *more, fault=fault, victim=victim, **options
            )
            ended = {d.returncode for d in done}
            expect(ended in ({0}, {-signal.SIGKILL}), [d.stderr for d in done])
            if ended == {0}:
                expect(bits(place) == bits(plain), "other bits")
                expect(not (place / "checkpoints").exists(), "checkpoints are left")
                runs += 1
                if kills == 3:
                    break
            else:
                kills += 1
    return 6, "`--resume` of both goes on and ends with the same bits"


def full_for_one_of_two(folder: pathlib.Path) -> Outcome:
    """Files of one of two processes may not grow, while it saves runs that both share.

    Where one waited for the other, it would do so for minutes.
    """
    every = ("--resume", "--checkpoint-every", str(EVERY), *SHARED)
    options: dict[str, Any] = {"methods": ("classp",), "experiment": TWO}
    plain, place = folder / "plain", folder / "run"
    done = run_in_two(plain, *SHARED, **options)
    expect([d.returncode for d in done] == [0, 0], [d.stderr for d in done])
    moments = (0, 0), (1, 1), (0, 2), (1, 3)
    for victim, number in moments:
        began = time.monotonic()
        done = run_in_two(
            place, *every, fault=f"limit {number} 0", victim=victim, **options
        )
        expect(time.monotonic() - began < 200, "they wait for each other")
        expect([d.returncode for d in done] == [1, 1], [d.stderr for d in done])
        expect(
            error_line(done[victim]).endswith(": File too large."), done[victim].stderr
        )
        error_line(done[1 - victim])
    done = run_in_two(place, *every, **options)
    expect([d.returncode for d in done] == [0, 0], [d.stderr for d in done])
    expect(bits(place) == bits(plain), "other bits")
    return len(moments), (
        "one line and status 1 in both at the next checkpoint; those before are kept, "
        "and both go on to the same bits"
    )


# Mounts a small disk of its own on a folder, fills it, and goes on when it is emptied.
SMALL_DISK = """
mount -t tmpfs -o size=32m tmpfs "$0" || exit 99
BALLAST="$0/ballast" FAULT="full 3 0" "$@"
echo "status $?"
rm "$0/ballast"
"$@" && cp -r "$0/run" "$0.kept"
"""
READ_ONLY = 'mount -t tmpfs -o ro tmpfs "$0" && exec "$@"'


def _mounted(script: str, folder: pathlib.Path) -> tuple[str, ...]:
    """A command in whose eyes there is another disk at a folder (Linux)."""
    folder.mkdir()
    return ("unshare", "-rm", "sh", "-c", script, str(folder))


def disk_full(folder: pathlib.Path) -> Outcome:
    """No room in the middle of a checkpoint: files may not grow, or a disk is full."""
    options: dict[str, Any] = {"methods": ("classp",), "experiment": SHORT}
    reference = uninterrupted(**options)
    arguments = ("--resume", "--checkpoint-every", str(EVERY))
    for number in range(3):
        done = run(folder / "run", *arguments, fault=f"limit {number} 0", **options)
        expect(done.returncode == 1, (done.returncode, done.stderr))
        expect("seed-0/" in error_line(done), done.stderr)
        expect(error_line(done).endswith(": File too large."), done.stderr)
    finished(folder / "run", reference, **options)
    disk = folder / "disk"
    within = _mounted(SMALL_DISK, disk)
    done = run(disk / "run", *arguments, within=within, **options)
    expect(done.returncode == 0 and "status 1\n" in done.stdout, done.stderr)
    expect(error_line(done).endswith(": No space left on device."), done.stderr)
    expect(bits(folder / "disk.kept") == reference, "other bits")
    return 4, (
        "one line that says why, status 1, at the next checkpoint; those before are "
        "kept, and it goes on to the same bits"
    )


def other_configuration(folder: pathlib.Path) -> Outcome:
    """`--resume` with other settings."""
    options: dict[str, Any] = {"methods": ("classp",), "experiment": SHORT}
    arguments = ("--resume", "--checkpoint-every", str(EVERY))
    done = run(folder, *arguments, fault="kill-in-write 3 0", **options)
    expect(done.returncode == -signal.SIGKILL, done.stderr)
    done = run(folder, *arguments, "--set", "classp.eps=0.7", **options)
    line = error_line(done)
    expect(done.returncode == 1 and "settings.eps is" in line, line)
    return 1, "refused before training, in one line that says what differs"


def not_writable(folder: pathlib.Path) -> Outcome:
    """A folder that is a file, not there to be made, or on a read-only disk."""
    # Not by its permissions, which do not hold for root.
    (folder / "file").write_text("")
    read_only = _mounted(READ_ONLY, folder / "disk")
    places = {folder / "file" / "out": (), pathlib.Path("/proc/out"): ()}
    for place, within in {**places, folder / "disk" / "out": read_only}.items():
        done = run(place, "--checkpoint-every", "10", within=within)
        line = error_line(done)
        expect(done.returncode == 1 and "Cannot write" in line, line)
        expect("accuracy" not in done.stdout, done.stdout)
    return 3, "refused before training, in one line"


def _saved(folder: pathlib.Path) -> Any:
    """Two checkpoints of the state of an optimizer; the tree of the first."""
    params = {"w": jnp.arange(4096.0).reshape(64, 64), "key": jax.random.key(7)}
    weights = {"w": params["w"]}
    state = optax.adam(0.1).init(weights)
    for step in (1, 2):
        tree = {"params": {**params, "w": params["w"] * step}, "state": state}
        continual.save(folder, tree, step=step).result()
    return {"params": params, "state": state}


def _damaged(folder: pathlib.Path, change: Callable[[bytes], bytes]) -> int:
    """Changes each file of the newest checkpoint in turn; the one before is used."""
    tree = _saved(folder)
    files = [file for file in (folder / "2").rglob("*") if file.is_file()]
    for file in files:
        content = file.read_bytes()
        file.write_bytes(change(content))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            restored = continual.restore(folder, tree)
        file.write_bytes(content)
        expect(restored.step == 1, f"{file} was not recognised as damaged")
        np.testing.assert_array_equal(restored.tree["params"]["w"], tree["params"]["w"])
        named = [str(w.message) for w in caught if str(folder / "2") in str(w.message)]
        expect(len(named) == 1 and file.name in named[0], named)
    expect(continual.restore(folder, tree).step == 2, "put right, it is used again")
    return len(files)


def truncated(folder: pathlib.Path) -> Outcome:
    """A file of the newest checkpoint cut off: every file, at three places."""
    cuts = (lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b[:-1])
    count = sum(_damaged(folder / str(k), cut) for k, cut in enumerate(cuts))
    return count, "recognised and named; the checkpoint before is used"


def flipped(folder: pathlib.Path, rounds: int = 20) -> Outcome:
    """One bit of the newest checkpoint flipped: in every file, at random places."""
    rng = random.Random(0)

    def flip(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(changed)

    count = sum(_damaged(folder / str(k), flip) for k in range(rounds))
    return count, "recognised and named; the checkpoint before is used"


def all_damaged(folder: pathlib.Path) -> Outcome:
    """Every checkpoint damaged."""
    tree = _saved(folder)
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-1])
    line, _ = one_line(lambda: continual.restore(folder, tree))
    expect("No checkpoint is whole" in line, line)
    return 1, "an error in one line that names them"


def other_optimizer(folder: pathlib.Path) -> Outcome:
    """Restored into another optimizer."""
    params = {"w": jnp.arange(6.0)}
    first = {"params": params, "state": classp_jax.classp(0.1).init(params)}
    continual.save(folder, first, step=1)
    second = {
        "params": params,
        "state": classp_jax.classp(0.2, threshold=1e-3, window=100).init(params),
    }
    restored = continual.restore(folder, second).tree
    expect(jax.tree.structure(restored) == jax.tree.structure(second), restored)
    adam = {"params": params, "state": optax.adam(0.1).init(params)}
    line, _ = one_line(lambda: continual.restore(folder, adam))
    expect("state/0/count" in line, line)
    return (
        2,
        "restored where the trees agree; else the first leaf that differs is named",
    )


DEVICES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from classp_jax import continual

folder, count = sys.argv[1], int(sys.argv[2])
mesh = jax.make_mesh((count,), ("d",), devices=jax.devices()[:count])
rows = NamedSharding(mesh, PartitionSpec("d"))
values = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
tree = {"w": jax.device_put(values, rows), "key": jax.random.key(1)}
if "save" in sys.argv:
    continual.save(folder, tree, step=1).result()
found = continual.restore(folder, jax.tree.map(jnp.zeros_like, {"w": tree["w"]}) | {
    "key": jax.random.key(0)}).tree
assert found["w"].sharding == rows, found["w"].sharding
assert np.asarray(found["w"]).tobytes() == values.tobytes()
assert (jax.random.key_data(found["key"]) == jax.random.key_data(tree["key"])).all()
"""


def other_devices(folder: pathlib.Path) -> Outcome:
    """Restored onto another number of devices (virtual ones of a CPU)."""

    def child(count: int, name: str, *more: str) -> None:
        flags = f"--xla_force_host_platform_device_count={count}"
        arguments = (str(folder / name), str(count), *more)
        done = python(DEVICES, *arguments, XLA_FLAGS=flags)
        expect(done.returncode == 0 and not done.stderr, done.stderr)

    for saved, restored in ((8, (1, 2)), (1, (8,))):
        child(saved, str(saved), "save")
        for count in restored:
            child(count, str(saved))
    return 3, "8 to 1, 8 to 2, 1 to 8: the same bits, sharded as asked for"
