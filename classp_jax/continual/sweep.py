"""Tuning: the same number of tries for every method, judged on validation data."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import optuna
import tomli_w

from classp_jax.continual.config import (
    ConfigError,
    SweepConfig,
    check,
    check_owners,
    command_line_ranges,
    command_line_settings,
    make_network,
    make_streams,
    training,
)
from classp_jax.continual.methods import Method, Setting, parse_method, settings_of
from classp_jax.continual.metrics import average_accuracy
from classp_jax.continual.results import Run
from classp_jax.continual.train import train

Progress = Callable[[str, int, int, float], None]
"""Called as ``progress(method, tries_done, tries, best_accuracy)``."""


class Try(NamedTuple):
    """One setting and how it did."""

    settings: dict[str, float]
    accuracy: float
    """Mean over the tuning seeds of the average accuracy on validation data at the
    stream's end; 0 if a seed diverged."""


def _propose(
    study: optuna.Study, space: Mapping[str, Setting], fixed: Mapping[str, float]
) -> tuple[Any, dict[str, float]]:
    trial = study.ask()
    values: dict[str, float] = {}
    for name, setting in space.items():
        if name in fixed:
            values[name] = fixed[name]
        elif setting.choices:
            values[name] = trial.suggest_categorical(name, setting.choices)
        else:
            values[name] = trial.suggest_float(
                name, setting.low, setting.high, log=True
            )
    return trial, values


def _score(runs: list[Run]) -> float:
    scores = [0.0 if r.diverged else average_accuracy(r.matrix) for r in runs]
    return float(np.mean(scores))


def tune(
    method: Method,
    evaluate: Callable[[list[dict[str, float]]], list[float]],
    *,
    tries: int,
    together: int,
    fixed: Mapping[str, float] | None = None,
    ranges: Mapping[str, Setting] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Try]:
    """Tries settings of one method; Optuna's TPE sampler proposes them in batches.

    Args:
      method: whose settings to draw.
      evaluate: gives the accuracy of each of several settings.
      tries: how many settings to try.
      together: how many to propose at once.
      fixed: settings that are not drawn.
      ranges: what to draw some settings from, in place of the method's own.
      seed: of the sampler.
      progress: called after each batch.

    Returns:
      The tries, in the order in which they were made.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    space = {**method.settings, **(ranges or {})}
    made: list[Try] = []
    while len(made) < tries:
        batch = [
            _propose(study, space, fixed or {})
            for _ in range(min(together, tries - len(made)))
        ]
        # Settings with choices are compiled in, so those that share them go together.
        groups: dict[tuple[float, ...], list[int]] = {}
        for i, (_, values) in enumerate(batch):
            key = tuple(
                values[name] for name, s in method.settings.items() if s.choices
            )
            groups.setdefault(key, []).append(i)
        scores = np.zeros(len(batch))
        for members in groups.values():
            scores[members] = evaluate([batch[i][1] for i in members])
        for (trial, values), score in zip(batch, scores, strict=True):
            study.tell(trial, float(score))
            made.append(Try(values, float(score)))
        if progress is not None:
            best = max(t.accuracy for t in made)
            progress(method.name, len(made), tries, best)
    return made


def sweep(
    config: SweepConfig, command: str, *, progress: Progress | None = None
) -> tuple[dict[str, list[Try]], pathlib.Path]:
    """Tunes every method and writes the winners as a configuration for a run.

    Args:
      config: what to do.
      command: the command line, to stand in the file.
      progress: called after each batch of tries.

    Returns:
      The tries by method, and the folder with ``config.toml`` (the winners) and
      ``tries.json`` (every try).

    Raises:
      ValueError: if the configuration cannot be, or data is missing or unfit.
    """
    check(config)
    shared = set(config.seeds) & set(config.tuning_seeds)
    if shared:
        raise ConfigError(f"seeds to tune on are also reported ones: {shared}")
    methods = [parse_method(name) for name in config.methods]
    fixed, ranges = command_line_settings(config), command_line_ranges(config)
    check_owners("--set", fixed, methods)
    check_owners("--range", ranges, methods)
    out = pathlib.Path(
        config.out or f"runs/sweep-{config.stream}-{config.source[0].replace(':', '-')}"
    )
    streams = make_streams(config, config.tuning_seeds)
    model = make_network(config, streams)
    how = training(config, evaluate_on="validation")
    how = how._replace(points_per_task=1, score_training=False)
    out.mkdir(parents=True, exist_ok=True)
    tries: dict[str, list[Try]] = {}
    for method in methods:

        def evaluate(
            settings: list[dict[str, float]], method: Method = method
        ) -> list[float]:
            runs = train(method, settings, model, streams, config.tuning_seeds, how)
            return [_score(r) for r in runs]

        tries[method.name] = tune(
            method,
            evaluate,
            tries=config.tries,
            together=config.together,
            fixed=settings_of(method, fixed),
            ranges=settings_of(method, ranges),
            progress=progress,
        )
        _write(config, command, tries, out)
    return tries, out


def best(tries: list[Try]) -> Try:
    """The try with the highest accuracy, the first of equals."""
    return max(tries, key=lambda t: t.accuracy)


def _rounded(settings: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.3g}") for name, value in settings.items()}


def _write(
    config: SweepConfig, command: str, tries: dict[str, list[Try]], out: pathlib.Path
) -> None:
    options = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(config).items()
        if value is not None
        and name
        not in ("out", "set", "lr", "range", "tries", "together", "tuning_seeds")
    }
    options["methods"] = list(tries)
    options["settings"] = {
        name: _rounded(best(made).settings) for name, made in tries.items()
    }
    header = (
        f"# Best of {config.tries} tries for each method on validation data, seeds "
        f"{' '.join(map(str, config.tuning_seeds))}.\n# Written by: {command}\n\n"
    )
    (out / "config.toml").write_text(header + tomli_w.dumps(options), encoding="utf-8")
    table = {name: [t._asdict() for t in made] for name, made in tries.items()}
    (out / "tries.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
