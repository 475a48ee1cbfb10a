"""Training steps a second, beside a plain PyTorch loop that does the same work."""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from classp_jax.continual.learner import Training
from classp_jax.continual.methods import parse_method, resolve_settings
from classp_jax.continual.models import make_model
from classp_jax.continual.run import device_name
from classp_jax.continual.streams import Split, Stream, Task
from classp_jax.continual.train import train

_BATCH = 32
_RATE, _EPS = 0.05, 0.1


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Steps a second of the training loop, beside a plain PyTorch loop."""

    steps: int = 600
    """Steps of the MLP 784-256-256-10 in each repetition; the CNN takes a tenth."""
    repetitions: int = 5
    """The contestants take turns this often; medians are shown."""
    seeds: int = 3
    """How many seeds train together in the row that shows it."""


def _stream(steps: int, seed: int) -> Stream:
    """Random pixels of MNIST's shape: the speed does not depend on what they show."""
    rng = np.random.default_rng(seed)
    n = steps * _BATCH
    data = Split(
        rng.integers(0, 256, (n, 28, 28, 1), dtype=np.uint8),
        rng.integers(0, 10, n, dtype=np.int32),
    )
    few = Split(data.x[:_BATCH], data.y[:_BATCH])
    task = Task("random", data, few, few, np.ones(10, bool))
    return Stream("random", "image", "domain-incremental", (task,), 10, 0)


def _ours(model_name: str, method_name: str, steps: int, seeds: int) -> float:
    """Seconds a step and seed, by the training loop's own clock."""
    method = parse_method(method_name)
    settings = resolve_settings(method) | {"learning_rate": _RATE}
    if method_name == "classp":
        settings |= {"eps": _EPS, "power": 1.0, "threshold": 0.0}
    (runs,) = train(
        method,
        [settings],
        make_model(model_name, (28, 28, 1), 10, hidden=(256, 256)),
        [_stream(steps, seed) for seed in range(seeds)],
        list(range(seeds)),
        Training(epochs=(1,), batch_size=_BATCH, points_per_task=1),
    )
    return sum(run.seconds for run in runs) / (steps * seeds)


def _torch(model_name: str, method_name: str, steps: int) -> float:
    """Seconds a step of a plain loop over a tensor that lies in memory."""
    import torch
    from torch import nn

    stream = _stream(steps, 0)
    x = torch.from_numpy(stream.tasks[0].train.x.astype(np.float32) / 255)
    y = torch.from_numpy(stream.tasks[0].train.y.astype(np.int64))
    layers: list[nn.Module]
    if model_name == "mlp":
        layers = [nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256)]
        layers += [nn.ReLU(), nn.Linear(256, 10)]
    else:
        x = x.permute(0, 3, 1, 2).contiguous()
        layers = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()]
        layers += [nn.MaxPool2d(2), nn.Dropout2d(0.25), nn.Flatten()]
        layers += [nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)]
    network = nn.Sequential(*layers)
    weights = list(network.parameters())
    sums = [torch.zeros_like(w) for w in weights]
    order = torch.randperm(len(y)).split(_BATCH)
    began = time.perf_counter()
    for batch in order:
        loss = nn.functional.cross_entropy(network(x[batch]), y[batch])
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for w, g, total in zip(weights, gradients, sums, strict=True):
                if method_name == "sgd":
                    w -= _RATE * g
                else:
                    total += g.abs()
                    w -= _RATE * g / (total + _EPS)
    return (time.perf_counter() - began) / len(order)


def benchmark(config: BenchmarkConfig, console: Console) -> None:
    """Prints the table; asserts nothing."""
    contestants: dict[tuple[str, str], Callable[[], float]] = {}

    def add(model: str, who: str, seconds: Callable[[], float]) -> None:
        contestants[model, who] = seconds

    try:
        import torch
    except ModuleNotFoundError:
        console.print("PyTorch is not installed: its rows are left out.")
        torch = None
    for model, steps in (("mlp", config.steps), ("cnn", max(config.steps // 10, 1))):
        for method in ("sgd", "classp"):
            add(
                model,
                f"classp-jax, {method}",
                lambda m=model, a=method, n=steps: _ours(m, a, n, 1),
            )
            if torch is not None:
                add(
                    model,
                    f"PyTorch loop, {method}",
                    lambda m=model, a=method, n=steps: _torch(m, a, n),
                )
    add(
        "mlp",
        f"classp-jax, classp, {config.seeds} seeds together",
        lambda: _ours("mlp", "classp", config.steps, config.seeds),
    )
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in contestants}
    for _ in range(config.repetitions):
        for key, measure in contestants.items():
            seconds[key].append(measure())

    table = Table(title=f"batch {_BATCH}, {device_name()}, jax {jax.__version__}")
    table.add_column("network")
    table.add_column("loop")
    table.add_column("ms a step", justify="right")
    table.add_column("steps a second", justify="right")
    table.add_column("speed / PyTorch's, same method", justify="right")
    for (model, who), measured in seconds.items():
        median = statistics.median(measured)
        peer = seconds.get((model, f"PyTorch loop, {who.split(', ')[1]}"))
        ratio = "-"
        if peer and not who.startswith("PyTorch"):
            ratios = [p / m for p, m in zip(peer, measured, strict=True)]
            ratio = f"{statistics.median(ratios):.1f}"
        table.add_row(model, who, f"{median * 1e3:.2f}", f"{1 / median:,.0f}", ratio)
    console.print(table)
