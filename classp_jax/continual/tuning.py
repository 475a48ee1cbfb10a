"""Tuning: the same number of trials for every method, judged on validation data."""

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from classp_jax.continual.errors import ContinualError, check_count
from classp_jax.continual.methods.protocol import Method, Setting
from classp_jax.continual.methods.registry import (
    as_methods,
    check_owners,
    resolve_settings,
    settings_of,
)
from classp_jax.continual.results import Run
from classp_jax.continual.results.files import locked, write_atomically
from classp_jax.continual.results.metrics import average_accuracy
from classp_jax.continual.train import train
from classp_jax.continual.train.cost import estimate
from classp_jax.continual.train.job import Job
from classp_jax.continual.train.setup import set_up

FILE_NAME = "trials.json"

_HEAD = ("search", "spaces")

Ranges = Mapping[str, Mapping[str, tuple[float, float]]]
Evaluate = Callable[[Method, list[dict[str, float]]], list[list[Run]]]
"""``evaluate(method, settings)``: the runs of each setting, one per seed."""
Measure = Callable[[Sequence[Run]], Mapping[str, float]]
"""``measure(runs)``: numbers by name, of one setting's runs, one per seed."""
Progress = Callable[[str, int, int, float], None]
"""Called as ``progress(method, trials_done, trials, best_score)``."""


class TuningError(ContinualError):
    """A sweep is refused; the message is one line."""


class Trial(NamedTuple):
    """One choice of settings and how it did."""

    settings: dict[str, float]
    score: float
    """See :func:`score`."""
    measures: dict[str, float] = {}  # noqa: RUF012
    """What else was asked for, see ``measure`` of :func:`tune`."""


class Tuned(NamedTuple):
    """What tuning found."""

    settings: dict[str, dict[str, float]]
    """The best settings of each method, as ``run`` takes them."""
    trials: dict[str, list[Trial]]
    """All trials of each method, in the order in which they were made."""


class Space(NamedTuple):
    """What the trials of one method are drawn from."""

    method: Method
    settings: dict[str, Setting]
    """With the ranges that were asked for in place of the method's own."""
    fixed: dict[str, float]
    """Settings that are not drawn."""
    transformation: str = ""
    """What tells the method from another of its name, where there is such a thing."""

    def is_drawn(self, name: str) -> bool:
        """Whether trials differ in this setting."""
        setting = self.settings[name]
        varies = len(setting.choices) > 1 or setting.low < setting.high
        return name not in self.fixed and varies


def tune(
    stream: Any,
    model: Any,
    methods: Any,
    *,
    trials: int = 32,
    seeds: Sequence[int] = (1000, 1001),
    together: int = 8,
    ranges: Ranges | None = None,
    settings: Mapping[str, Mapping[str, float]] | None = None,
    model_options: Mapping[str, Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
    measure: Measure | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
    **options: Any,
) -> Tuned:
    """Finds the best settings of methods, each by the same number of trials.

    Settings are compared by :func:`score`, on validation data. Use other seeds than
    those that will be reported.

    Args:
      stream: as for :func:`~classp_jax.continual.run`; it must have validation data.
      model: as for ``run``.
      methods: as for ``run``.
      trials: how many settings of each method are evaluated.
      seeds: with how many, and which, seeds each trial trains.
      together: how many trials are drawn, and train side by side, at once.
      ranges: what to draw a setting from in place of the method's own range, by method
        or part and name: ``{"classp": {"eps": (1e-3, 1.0)}}``, log-uniformly.
      settings: settings that are not drawn: ``{"classp": {"power": 1.0}}``.
      model_options: as for ``run``.
      folder: where trials are stored as they finish. The same call goes on there after
        an interruption; another one is refused. None: nowhere.
      measure: ``measure(runs)``, numbers by name to keep with each trial, of its runs.
        The score decides all the same.
      progress: called after each batch of trials.
      announce: called once, before training, with a line about sizes and time.
      **options: how to train and on which devices, as for ``run``.

    Returns:
      The winners, as ``run`` takes them for ``settings``, and all trials.

    Raises:
      ContinualError: in one line, for anything that does not exist or does not fit.

    Example:
      >>> from classp_jax import continual
      >>> stream = continual.permuted("digits", tasks=2, max_train=64)
      >>> found = continual.tune(
      ...     stream, "mlp", ["sgd"], trials=2, seeds=[1000], epochs=1
      ... )
      >>> len(found.trials["sgd"]), list(found.settings["sgd"])
      (2, ['learning_rate'])
    """
    for name in ("points", "evaluate", "evaluate_on", "score_training"):
        if name in options:
            raise TuningError(f"tune has no option {name!r}: it looks at the end alone")
    check_count("trials", trials, 1)
    check_count("together", together, 1)
    if jax.process_count() > 1:
        raise TuningError("tune works in one process: give each one methods of its own")
    chosen = as_methods(methods)
    check_owners("settings", settings or {}, chosen.values())
    check_owners("ranges", ranges or {}, chosen.values())
    spaces = [
        _space(method, ranges or {}, settings or {}) for method in chosen.values()
    ]
    setup = set_up(
        stream,
        model,
        seeds,
        model_options=model_options,
        **options,
        evaluate_on="validation",
        points=1,
    )
    resolved = {
        name: resolve_settings(method, settings or {})
        for name, method in chosen.items()
    }
    jobs = [
        Job.from_method(name, method, resolved[name], setup.experiment)
        for name, method in chosen.items()
    ]
    spaces = [
        space._replace(transformation=job.known_by.get("transformation", ""))
        for space, job in zip(spaces, jobs, strict=True)
    ]
    cost = estimate(setup.experiment, jobs, trials)
    if announce is not None:
        announce(cost.describe())

    def evaluate(method: Method, batch: list[dict[str, float]]) -> list[list[Run]]:
        return train(setup.experiment, method, batch)

    found = search(
        spaces,
        evaluate,
        trials=trials,
        together=together,
        folder=folder,
        identity={"seeds": list(seeds), **setup.configuration},
        measure=measure,
        progress=progress,
    )
    return Tuned(
        {name: best(trials_of).settings for name, trials_of in found.items()}, found
    )


def _space(
    method: Method, ranges: Ranges, settings: Mapping[str, Mapping[str, float]]
) -> Space:
    fixed = settings_of(method, settings)
    resolve_settings(method, settings)  # Refuses what the method does not take.
    described = dict(method.settings)
    for name, bounds in settings_of(method, ranges).items():
        try:
            low, high = map(float, bounds)
        except (TypeError, ValueError):
            raise TuningError(
                f"range of {name} must be (low, high): {bounds}"
            ) from None
        if not 0 < low <= high < math.inf:
            raise TuningError(f"range of {name} needs 0 < low <= high: {low}, {high}")
        if name in fixed:
            raise TuningError(f"{method.name}.{name} is fixed and has a range")
        whole = described[name].integer
        described[name] = Setting(low, low, high, integer=whole)
    return Space(method, described, fixed)


def score(runs: Sequence[Run]) -> float:
    """The one number by which settings are compared.

    It is the mean over seeds of the average accuracy over all tasks at the stream's
    end, on validation data; 0 if any seed diverged.

    Example:
      >>> good = Run(method="sgd", seed=0, matrix=[[0.1, 0.1], [0.9, 0.1], [0.7, 0.9]])
      >>> round(score([good]), 6)
      0.8
      >>> score([good, Run(method="sgd", seed=1, matrix=good.matrix, diverged=True)])
      0.0
    """
    if any(run.diverged for run in runs):
        return 0.0
    return float(np.mean([average_accuracy(run.matrix) for run in runs]))


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest score, the first of equals."""
    return max(trials, key=lambda trial: trial.score)


def search(
    spaces: Sequence[Space],
    evaluate: Evaluate,
    *,
    trials: int,
    together: int = 8,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    identity: Mapping[str, Any] | None = None,
    measure: Measure | None = None,
    progress: Progress | None = None,
) -> dict[str, list[Trial]]:
    """Draws and evaluates trials of several methods, in batches.

    Each batch depends on the seed and on the trials before it alone. So a search that
    goes on in its folder after an interruption draws what it would have drawn.

    Args:
      spaces: what to draw from, one per method.
      evaluate: trains several settings of a method.
      trials: how many trials each method gets.
      together: how many are drawn, and evaluated, at once.
      seed: of the sampler.
      folder: where trials are stored after each batch, in ``trials.json``; made if
        need be, before anything is evaluated. None: nowhere.
      identity: what tells this search from another, of JSON's types.
      measure: as for :func:`tune`.
      progress: called after each batch.

    Returns:
      The trials of each method, by its name.

    Raises:
      TuningError: if the folder holds another search.
      ResultsError: if the folder cannot be written to, or another process does.
    """
    about = {"together": together, "seed": seed, **(identity or {})}
    if folder is None:
        store = _Store(None)
        return _search(spaces, evaluate, trials, about, store, measure, progress)
    path = pathlib.Path(folder)
    with locked(path, patience=1.0):
        store = _Store(path / FILE_NAME)
        return _search(spaces, evaluate, trials, about, store, measure, progress)


def _search(
    spaces: Sequence[Space],
    evaluate: Evaluate,
    trials: int,
    about: Mapping[str, Any],
    store: "_Store",
    measure: Measure | None,
    progress: Progress | None,
) -> dict[str, list[Trial]]:
    store.begin(about, spaces)
    for space in spaces:
        name = space.method.name
        wanted = trials if any(map(space.is_drawn, space.settings)) else 1
        while len(done := store.trials[name]) < wanted:
            size = min(about["together"], wanted - len(done))
            batch = draw(space, done, size, seed=about["seed"] + len(done))
            runs = evaluate(space.method, batch)
            measures = [dict(measure(own)) if measure else {} for own in runs]
            scored = zip(batch, map(score, runs), measures, strict=True)
            store.add(name, [Trial(*trial) for trial in scored])
            if progress is not None:
                progress(name, len(done) + size, wanted, best(store.trials[name]).score)
    return {space.method.name: store.trials[space.method.name] for space in spaces}


def draw(
    space: Space, done: Sequence[Trial], count: int, *, seed: int
) -> list[dict[str, float]]:
    """New settings to evaluate, by Optuna's tree-structured Parzen estimator.

    Numbers have three significant digits, so that a table can show what was evaluated.

    Args:
      space: what to draw from.
      done: what is known already.
      count: how many to draw.
      seed: of the sampler.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    drawn = {
        name: _distribution(space.settings[name])
        for name in space.settings
        if space.is_drawn(name)
    }
    for trial in done:
        params = {name: trial.settings[name] for name in drawn}
        study.add_trial(
            optuna.trial.create_trial(
                params=params, distributions=drawn, value=trial.score
            )
        )
    constant = {name: s.default for name, s in space.settings.items()} | space.fixed
    batch = []
    for _ in range(count):
        asked = study.ask(drawn).params
        batch.append(
            constant
            | {name: _rounded(v, space.settings[name]) for name, v in asked.items()}
        )
    return batch


def _distribution(setting: Setting) -> Any:
    from optuna import distributions

    if setting.choices:
        return distributions.CategoricalDistribution(setting.choices)
    if setting.integer:
        low, high = int(setting.low), int(setting.high)
        return distributions.IntDistribution(low, high, log=True)
    return distributions.FloatDistribution(setting.low, setting.high, log=True)


def _rounded(value: float, setting: Setting) -> float:
    if setting.choices or setting.integer:
        return value
    return min(max(float(f"{value:.3g}"), setting.low), setting.high)


class _Store:
    """The trials so far, and their file if there is one."""

    def __init__(self, path: pathlib.Path | None):
        self.path = path
        self.content: dict[str, Any] = {part: {} for part in _HEAD}
        if path is not None and path.exists():
            try:
                self.content = json.loads(path.read_bytes())
                self.trials = {
                    name: [Trial(**trial) for trial in trials]
                    for name, trials in self.content["trials"].items()
                }
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise TuningError(f"{path} is damaged: {error}") from error
        else:
            self.trials = {}

    def begin(self, about: Mapping[str, Any], spaces: Sequence[Space]) -> None:
        """Refuses to mix two searches; writes the file."""
        self._same("search", about)
        for space in spaces:
            drawn = {
                name: s.choices or [s.low, s.high]
                for name, s in space.settings.items()
                if space.is_drawn(name)
            }
            wanted: dict[str, Any] = {"drawn": drawn, "fixed": space.fixed}
            if space.transformation:
                wanted["transformation"] = space.transformation
            self._same("spaces", {space.method.name: wanted})
            self.trials.setdefault(space.method.name, [])
        self._write()

    def add(self, method: str, trials: list[Trial]) -> None:
        self.trials[method] = self.trials[method] + trials
        self._write()

    def _same(self, part: str, wanted: Mapping[str, Any]) -> None:
        stored = self.content[part]
        for name, value in json.loads(json.dumps(wanted)).items():
            if name in stored and stored[name] != value:
                raise TuningError(
                    f"{self.path} holds another search: {name} is "
                    f"{_short(stored[name])} there and {_short(value)} here; choose "
                    "another folder"
                )
            stored[name] = value

    def _write(self) -> None:
        if self.path is None:
            return
        lines = [
            f"{json.dumps(name)}: [\n"
            + ",\n".join(json.dumps(_recorded(trial)) for trial in trials)
            + "\n]"
            for name, trials in self.trials.items()
        ]
        head = [f'"{part}": {json.dumps(self.content[part])}' for part in _HEAD]
        trials = '"trials": {\n' + ",\n".join(lines) + "\n}"
        text = "{" + ",\n".join([*head, trials]) + "}\n"
        write_atomically(self.path, text.encode())


def _recorded(trial: Trial) -> dict[str, Any]:
    recorded = trial._asdict()
    if not trial.measures:
        del recorded["measures"]
    return recorded


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
