"""Measures how CLASSP's hyperparameters matter: makes choosing.json and choosing.png.

Run ``python docs/choosing.py`` (extra ``continual``; some minutes on two cores).
Everything is measured on validation data, with seeds that no reported result uses.
"""

import datetime
import itertools
import json
import pathlib

import numpy as np
from matplotlib.figure import Figure

from classp_jax.continual.config import (
    RunConfig,
    make_network,
    make_streams,
    training,
)
from classp_jax.continual.methods import parse_method
from classp_jax.continual.metrics import average_accuracy, learning_accuracy
from classp_jax.continual.run import device_name
from classp_jax.continual.train import train

FOLDER = pathlib.Path(__file__).parent
SEEDS = (1000, 1001)
RATES = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
EPSILONS = [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]
POWERS = [0.5, 1.0, 1.5, 2.0, 3.0]
THRESHOLDS = [0.0, 1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3]
STREAMS = {
    "permuted": RunConfig(stream="permuted", epochs=(5,)),
    "split": RunConfig(stream="split", epochs=(5,)),
}


def measure(config: RunConfig) -> dict[str, list[dict[str, float]]]:
    """Accuracies over grids of power, rate and epsilon, then of threshold."""
    streams = make_streams(config, SEEDS)
    model = make_network(config, streams)
    how = training(config, evaluate_on="validation")._replace(points_per_task=1)

    def evaluate(settings: list[dict[str, float]]) -> list[dict[str, float]]:
        method = parse_method("classp")
        runs = train(method, settings, model, streams, SEEDS, how)
        return [
            setting
            | {
                "average": _mean(average_accuracy, of_setting),
                "learning": _mean(learning_accuracy, of_setting),
            }
            for setting, of_setting in zip(settings, runs, strict=True)
        ]

    scaling = []
    for power in POWERS:
        settings = [
            {"learning_rate": rate, "eps": eps, "threshold": 0.0, "power": power}
            for rate, eps in itertools.product(RATES, EPSILONS)
        ]
        scaling += evaluate(settings)
    best = max((s for s in scaling if s["power"] == 1.0), key=lambda s: s["average"])
    settings = [
        {"learning_rate": rate, "eps": best["eps"], "threshold": tau, "power": 1.0}
        for rate, tau in itertools.product(RATES, THRESHOLDS)
    ]
    return {"scaling": scaling, "threshold": evaluate(settings)}


def _mean(metric, runs) -> float:
    """The mean over seeds; 0 if one diverged."""
    if any(run.diverged for run in runs):
        return 0.0
    return round(float(np.mean([metric(run.matrix) for run in runs])), 4)


def draw(results: dict[str, dict[str, list[dict[str, float]]]]) -> Figure:
    """A row a stream: rate and epsilon at power 1, then powers, then thresholds."""
    figure = Figure(figsize=(12, 3.6 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 3, squeeze=False)
    image = None
    for row, (stream, parts) in zip(axes, results.items(), strict=True):
        one = [s for s in parts["scaling"] if s["power"] == 1.0]
        grid = np.array([s["average"] for s in one]).reshape(len(RATES), -1) * 100
        image = row[0].imshow(grid, vmin=20, vmax=100, cmap="cividis", aspect="auto")
        for (i, j), value in np.ndenumerate(grid):
            color = "black" if value > 65 else "white"
            row[0].text(j, i, f"{value:.0f}", ha="center", va="center", color=color)
        row[0].set_xticks(range(len(EPSILONS)), _labels(EPSILONS), rotation=45)
        row[0].set_yticks(range(len(RATES)), _labels(RATES))
        row[0].set(xlabel="eps", ylabel="learning rate", title=f"{stream}: power 1")

        best = [_best(parts["scaling"], "power", power) for power in POWERS]
        for key, mark, label in (
            ("average", "o-", "at the end"),
            ("learning", "s--", "just learned"),
        ):
            values = [100 * s[key] for s in best]
            color = "#D55E00" if key == "average" else "#0072B2"
            row[1].plot(POWERS, values, mark, color=color, label=label)
            taus = [
                100 * _best(parts["threshold"], "threshold", t)[key] for t in THRESHOLDS
            ]
            row[2].plot(range(len(THRESHOLDS)), taus, mark, color=color, label=label)
        row[1].set(xlabel="power (best rate and eps)", title=f"{stream}: power")
        row[2].set_xticks(range(len(THRESHOLDS)), _labels(THRESHOLDS), rotation=45)
        row[2].set(xlabel="threshold (best rate)", title=f"{stream}: threshold")
        for axis in row[1:]:
            axis.set(ylabel="mean accuracy over tasks (%)", ylim=(40, 100))
            axis.grid(color="0.9")
            axis.legend(loc="lower left", frameon=False)
    if image is not None:
        figure.colorbar(image, ax=axes[:, 0], label="mean accuracy at the end (%)")
    return figure


def _labels(values: list[float]) -> list[str]:
    return [f"{value:g}" for value in values]


def _best(tries: list[dict[str, float]], name: str, value: float) -> dict[str, float]:
    return max((s for s in tries if s[name] == value), key=lambda s: s["average"])


def main() -> None:
    """Measures both streams and writes the files."""
    results = {name: measure(config) for name, config in STREAMS.items()}
    about = {
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "seeds": SEEDS,
    }
    text = json.dumps({"about": about, "results": results}, indent=1)
    (FOLDER / "choosing.json").write_text(text, encoding="utf-8")
    draw(results).savefig(FOLDER / "choosing.png", dpi=120)
    for stream, parts in results.items():
        for power in POWERS:
            print(stream, _best(parts["scaling"], "power", power))
        for tau in THRESHOLDS:
            print(stream, _best(parts["threshold"], "threshold", tau))


if __name__ == "__main__":
    main()
