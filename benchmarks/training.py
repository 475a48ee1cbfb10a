"""Speed of training, beside a plain PyTorch loop that does the same work.

    python benchmarks/training.py

Batches of 32 images of 28x28, the MLP 784-256-256-10 and the CNN of the CLASSP paper,
CLASSP and SGD. The library trains one seed, and several side by side; PyTorch's rows
need PyTorch. Contestants take turns, so that each repetition has its own ratio, and
medians are shown. Compiling, reading and testing are not in the times.

The last column is the share of what the machine can do: multiplications and additions
of a step (forwards, and twice that for gradients, as if every product were carried out
in the plain way) per second, over those of a product of two 2048x2048 matrices.

    python benchmarks/training.py --checkpoints

prints instead what a checkpoint every 1,000 steps costs the MLP: the same training with
and without, in turns, from the first step until the last checkpoint is written.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import operator
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from classp_jax import continual
from classp_jax.continual.methods.registry import method, resolve_settings
from classp_jax.continual.train.experiment import Experiment
from classp_jax.continual.train.keeper import Keeper
from classp_jax.continual.train.loop import train
from classp_jax.continual.train.provenance import device_name
from classp_jax.continual.train.setup import set_up

BATCH, RATE, EPS = 32, 0.05, 0.1
SETTINGS = {
    "sgd": {"learning_rate": RATE},
    "classp": {"learning_rate": RATE, "eps": EPS, "power": 1.0, "threshold": 0.0},
}
# Products of one image on its way forwards: per layer, positions times weights.
PRODUCTS = {
    "mlp": 784 * 256 + 256 * 256 + 256 * 10,
    "cnn": 26**2 * 9 * 32 + 24**2 * 9 * 32 * 64 + 9216 * 128 + 128 * 10,
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    network: str
    method: str
    loop: str
    seconds: Callable[[], float]
    """Trains once: seconds per step and seed."""


class Times(NamedTuple):
    """Seconds of one training."""

    wall: float
    cpu: float


def random_images(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Images for so many batches: the speed does not depend on what they show."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (steps * BATCH, 28, 28, 1), dtype=np.uint8)
    return images, rng.integers(0, 10, len(images), dtype=np.int32)


def experiment_of(network: str, steps: int, seeds: int, epochs: int = 1) -> Experiment:
    """One task of random images."""
    x, y = random_images(steps)
    few = slice(BATCH)
    return set_up(
        continual.stream(
            [(x, y, x[few], y[few])], num_classes=10, validation_fraction=0.0
        ),
        network,
        range(seeds),
        model_options={"hidden": (256, 256)} if network == "mlp" else None,
        epochs=epochs,
        batch_size=BATCH,
        points=1,
    ).experiment


def library(network: str, name: str, steps: int, seeds: int) -> Callable[[], float]:
    """Training by the library, timed by its own clock."""
    experiment = experiment_of(network, steps, seeds)
    chosen = method(name)
    settings = resolve_settings(chosen, {name: SETTINGS[name]})

    def seconds() -> float:
        (runs,) = train(experiment, chosen, [settings])
        return sum(run.seconds for run in runs) / (steps * seeds)

    return seconds


def pytorch(network: str, name: str, steps: int) -> Callable[[], float]:
    """A plain loop over tensors that lie in memory."""
    import torch
    from torch import nn

    images, labels = random_images(steps)
    x = torch.from_numpy(images.astype(np.float32) / 255)
    y = torch.from_numpy(labels.astype(np.int64))
    if network == "mlp":
        layers = [nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256)]
        layers += [nn.ReLU(), nn.Linear(256, 10)]
    else:
        x = x.permute(0, 3, 1, 2).contiguous()
        layers = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()]
        layers += [nn.MaxPool2d(2), nn.Dropout2d(0.25), nn.Flatten()]
        layers += [nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)]
    modules = nn.Sequential(*layers)
    weights = list(modules.parameters())

    def seconds() -> float:
        sums = [torch.zeros_like(w) for w in weights]
        order = torch.randperm(len(y)).split(BATCH)
        began = time.perf_counter()
        for batch in order:
            loss = nn.functional.cross_entropy(modules(x[batch]), y[batch])
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for w, g, total in zip(weights, gradients, sums, strict=True):
                    if name == "sgd":
                        w -= RATE * g
                    else:
                        total += g.abs()
                        w -= RATE * g / (total + EPS)
        return (time.perf_counter() - began) / steps

    return seconds


def limit() -> float:
    """Multiplications and additions per second of a large product; the best of ten."""
    size = 2048
    matrix = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    best = np.inf
    for _ in range(10):
        began = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def rows_of(networks: list[str], steps: dict[str, int], seeds: int) -> list[Row]:
    """The contestants, PyTorch next to the library's rows that it is compared with."""
    rows = []
    for network in networks:
        for name in SETTINGS:
            count = steps[network]
            if importlib.util.find_spec("torch"):
                seconds = pytorch(network, name, count)
                rows.append(Row(network, name, "PyTorch", seconds))
            for together in (1, seeds):
                loop = "one seed" if together == 1 else f"{seeds} seeds side by side"
                seconds = library(network, name, count, together)
                rows.append(Row(network, name, loop, seconds))
    return rows


def print_cost_of_checkpoints(
    network: str, seeds: int, repetitions: int, thousands: int
) -> None:
    """Trains with and without checkpoints, and prints what they cost."""
    chosen = method("classp")
    settings = [resolve_settings(chosen, {"classp": SETTINGS["classp"]})]
    for together in (1, seeds):
        experiment = experiment_of(network, 1000, together, epochs=thousands)

        def seconds(every: int | None, experiment: Experiment = experiment) -> Times:
            with tempfile.TemporaryDirectory() as folder:
                began = Times(time.perf_counter(), time.process_time())
                if every is None:
                    train(experiment, chosen, settings)
                else:
                    place = pathlib.Path(folder)
                    with Keeper(place, {}, every=every, resume=False) as keeper:
                        train(experiment, chosen, settings, keeper=keeper)
                ended = Times(time.perf_counter(), time.process_time())
                return Times(*map(operator.sub, ended, began))

        seconds(1000)  # Compiles, and imports Orbax.
        pairs = [(seconds(None), seconds(1000)) for _ in range(repetitions)]
        costs = [statistics.median(b[k] / a[k] for a, b in pairs) - 1 for k in range(2)]
        name = "one seed" if together == 1 else f"{together} seeds side by side"
        print(
            f"| {network} | {name} | {thousands * together} "
            f"| {statistics.median(a.wall for a, _ in pairs):.2f} "
            f"| {statistics.median(b.wall for _, b in pairs):.2f} "
            f"| {costs[0]:.1%} | {costs[1]:.1%} |",
            flush=True,
        )


def main() -> None:
    """Measures and prints the table; asserts nothing."""
    parser = argparse.ArgumentParser(description="Speed of training.")
    parser.add_argument("--networks", nargs="+", default=list(PRODUCTS))
    parser.add_argument("--steps", type=int, default=600, help="the CNN takes a tenth")
    parser.add_argument("--seeds", type=int, help="those side by side")
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--checkpoints", action="store_true", help="what they cost")
    options = parser.parse_args()
    if options.checkpoints:
        seeds = options.seeds or 2
        columns = ("network", "loop", "checkpoints", "s without", "s with")
        print(f"| {' | '.join(columns)} | cost in time | in CPU time |")
        print("|---|---|---:|---:|---:|---:|---:|", flush=True)
        for network in options.networks:
            # Of the CNN, 1,000 steps take as long as 60,000 of the MLP.
            thousands, pairs = max(options.steps // 200, 2), 5
            if network == "cnn":
                thousands = pairs = 1
            repetitions = options.repetitions or pairs
            print_cost_of_checkpoints(network, seeds, repetitions, thousands)
        return
    seeds, repetitions = options.seeds or 4, options.repetitions or 7
    steps = {"mlp": options.steps, "cnn": max(options.steps // 10, 1)}
    rows = rows_of(options.networks, steps, seeds)
    for row in rows:
        row.seconds()  # Compiles.
    measured = {row: [] for row in rows}
    limits = []
    for _ in range(repetitions):
        limits.append(limit())
        for row in rows:
            measured[row].append(row.seconds())
    most = max(limits)
    packages = [p for p in ("jax", "torch") if importlib.util.find_spec(p)]
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)
    print(
        f"{device_name()}, {versions}, product of matrices {most / 1e9:.0f} GFLOP/s\n"
    )
    print(
        "| network | method | loop | ms per step and seed | PyTorch / this | of limit |"
    )
    print("|---|---|---|---:|---:|---:|")
    for row, seconds in measured.items():
        median = statistics.median(seconds)
        peers = [p for p in rows if p.loop == "PyTorch" and p.network == row.network]
        ratio = "-"
        for peer in peers:
            if peer.method == row.method:
                pairs = zip(measured[peer], seconds, strict=True)
                ratio = f"{statistics.median(p / s for p, s in pairs):.2f}"
        share = 6 * BATCH * PRODUCTS[row.network] / median / most
        print(
            f"| {row.network} | {row.method} | {row.loop} | {median * 1e3:.2f} "
            f"| {ratio} | {share:.0%} |"
        )


if __name__ == "__main__":
    main()
