"""Measures how CLASSP's hyperparameters matter: makes choosing.json and choosing.png.

Run ``python docs/choosing.py`` (extra ``continual``; some minutes on two cores).
Everything is measured on validation data, with seeds that no reported result uses.
"""

import itertools
import json
import pathlib

import numpy as np
from matplotlib.figure import Figure

from classp_jax import continual
from classp_jax.continual.results.metrics import average_accuracy, learning_accuracy
from classp_jax.continual.train import train
from classp_jax.continual.train.provenance import provenance
from classp_jax.continual.train.setup import set_up

FOLDER = pathlib.Path(__file__).parent
SEEDS = (1000, 1001)
RATES = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
EPSILONS = [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]
POWERS = [0.5, 1.0, 1.5, 2.0, 3.0]
THRESHOLDS = [0.0, 1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3]
STREAMS = {"permuted": continual.permuted, "split": continual.split}


def measure(stream: continual.StreamMaker) -> dict[str, list[dict[str, float]]]:
    """Accuracies over grids of power, rate and epsilon, then of threshold."""
    options = {"epochs": 5, "points": 1, "evaluate_on": "validation"}
    experiment = set_up(stream, "mlp", SEEDS, **options).experiment
    method = continual.method("classp")

    def evaluate(settings: list[dict[str, float]]) -> list[dict[str, float]]:
        return [
            setting
            | {
                "average": _mean(average_accuracy, runs),
                "learning": _mean(learning_accuracy, runs),
            }
            for setting, runs in zip(
                settings, train(experiment, method, settings), strict=True
            )
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
    """A row per stream: rate and epsilon at power 1, then powers, then thresholds."""
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


def _best(made: list[dict[str, float]], name: str, value: float) -> dict[str, float]:
    return max((s for s in made if s[name] == value), key=lambda s: s["average"])


def main() -> None:
    """Measures both streams and writes the files."""
    results = {name: measure(make("digits")) for name, make in STREAMS.items()}
    origin = provenance()
    about = {"date": origin.date[:10], "device": origin.device, "seeds": SEEDS}
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
