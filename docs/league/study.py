"""The league: CLASSP against methods that need no stored data, on several streams.

Run ``python docs/league/study.py STREAM [METHOD ...] [--data-dir DIR]`` (extras
``continual`` and ``tfds``). Every method gets the same number of trials on validation
data and on a seed that is not reported, then the reported seeds on test data with its
best trial. A method's trials have the same settings on every stream, so that the table
without tuning can be made of them. All of it is stored in the folder
``docs/league/STREAM``, and what the page needs of it is then added to
``docs/league/STREAM.json``. The same command goes on from both; to run a method anew,
remove it from there.
"""

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from samples import SAMPLES
from thresholds import THRESHOLDS

from classp_jax import continual
from classp_jax.continual.tuning import Trial

FOLDER = pathlib.Path(__file__).parent
TUNING_SEEDS = (1000,)


class Protocol(NamedTuple):
    """A stream, its network and training, and how much of it is affordable."""

    title: str
    make: Any
    """``make(data_dir)``: the stream."""
    network: dict[str, Any]
    training: dict[str, Any]
    model: str = "mlp"
    tuning: Any = None
    """``tuning(data_dir)``: a smaller stream to tune on; None: the same."""
    tuned_on: str = ""
    """What that smaller stream has, in words for the page."""
    trials: int = 40
    seeds: int = 10
    seconds: float = 0.0
    """What one run takes of one core: a rough estimate from its steps and sizes."""
    lowest_rate: float = 1e-4
    """Of those that trials draw from; a tenth of it where steps do not shrink."""
    first_look: str = ""
    """How methods with fewer trials than ``trials`` were tuned, in words for the page;
    they are not compared with the others."""
    criterion: str = "average"
    """What trials are judged by and the table shows: ``"average"`` over all tasks at
    the stream's end, ``"recent"``, see :func:`measures`, or ``"online"``."""


_FIRST_LOOK = "10 trials with 3,000 training examples per task instead of all"


def _split_mnist(scenario: str, first_look: str = _FIRST_LOOK) -> Protocol:
    """As Hsu et al. 2018 have it."""
    return Protocol(
        f"Split MNIST, {scenario}, as Hsu et al.",
        lambda data_dir: continual.split(
            "tfds:mnist", scenario=scenario, shuffle_classes=False, data_dir=data_dir
        ),
        {"hidden": (400, 400)},
        {"epochs": 4, "batch_size": 128},
        seconds=15,
        lowest_rate=1e-5,
        first_look=first_look,
    )


def _sentiment(data_dir: str | None) -> Any:
    """PhraseBank's file lies beside the folder of prepared data sets."""
    phrases = pathlib.Path(data_dir or ".").parent / "phrasebank_50agree.tsv"
    return continual.sequence(
        [f"tsv:{phrases}", "tfds:imdb_reviews"],
        max_train=4000,
        vocabulary_size=5000,
        data_dir=data_dir,
    )


def _permuted_mnist(tasks: int, max_train: int | None = None) -> Any:
    return lambda data_dir: continual.permuted(
        "tfds:mnist", tasks=tasks, max_train=max_train, data_dir=data_dir
    )


PROTOCOLS = {
    "permuted-digits": Protocol(
        "Permuted digits, 10 tasks",
        lambda _: continual.permuted("digits", tasks=10),
        {"hidden": (128, 128)},
        {"epochs": 5, "batch_size": 32},
    ),
    "split-digits-class": Protocol(
        "Split digits, class-incremental",
        lambda _: continual.split("digits", scenario="class-incremental"),
        {"hidden": (128, 128)},
        {"epochs": 5, "batch_size": 32},
    ),
    "split-digits-domain": Protocol(
        "Split digits, domain-incremental",
        lambda _: continual.split("digits", scenario="domain-incremental"),
        {"hidden": (128, 128)},
        {"epochs": 5, "batch_size": 32},
        seconds=0.2,
    ),
    "rotated-digits": Protocol(
        "Rotated digits, 10 tasks",
        lambda _: continual.rotated("digits", tasks=10),
        {"hidden": (128, 128)},
        {"epochs": 5, "batch_size": 32},
        seconds=0.2,
    ),
    "sentiment": Protocol(
        "Sentiment: sentences on finance, then movie reviews; a transformer",
        _sentiment,
        {"width": 32, "heads": 4, "feed_forward": 64},
        {"epochs": (5, 1), "batch_size": 32, "fisher": "sampled"},
        model="transformer",
        trials=20,
        seconds=5,
    ),
    "many-digits": Protocol(
        "Permuted digits, 200 tasks, one pass each",
        lambda _: continual.permuted("digits", tasks=200),
        {"hidden": (128, 128)},
        {"epochs": 1, "batch_size": 16, "max_test": 100},
        tuning=lambda _: continual.permuted("digits", tasks=60),
        tuned_on="60 tasks instead of 200",
        trials=20,
        seeds=5,
        seconds=3,
        criterion="recent",
    ),
    "streaming-digits": Protocol(
        "Permuted digits, 50 tasks of 400, batch 1, on-line, a fiftieth of UPGD's",
        lambda _: continual.permuted("digits", tasks=50, max_train=400),
        {"hidden": (128, 128)},
        {"epochs": 1, "batch_size": 1, "max_test": 20},
        trials=20,
        seconds=1,
        criterion="online",
    ),
    "split-mnist-class": _split_mnist("class-incremental", first_look=""),
    "split-mnist-domain": _split_mnist("domain-incremental"),
    "split-mnist-task": _split_mnist("task-incremental"),
    "permuted-mnist-hsu": Protocol(
        "Permuted MNIST, 10 tasks, as Hsu et al.",
        _permuted_mnist(10),
        {"hidden": (1000, 1000)},
        {"epochs": 10, "batch_size": 128},
        trials=10,
        seconds=1300,
    ),
    "a-gem": Protocol(
        "Permuted MNIST, 17 tasks, one pass, as A-GEM",
        _permuted_mnist(17),
        {"hidden": (256, 256)},
        {"epochs": 1, "batch_size": 10},
        trials=10,
        seconds=110,
    ),
    "input-permuted-mnist": Protocol(
        "Permuted MNIST, 200 tasks of 5,000, on-line, as UPGD",
        _permuted_mnist(200, 5000),
        {"hidden": (300, 150)},
        {"epochs": 1, "batch_size": 1, "max_test": 500},
        trials=10,
        seconds=250,
    ),
    "mesu": Protocol(
        "Permuted MNIST, 200 tasks of 60,000, on-line, as MESU",
        _permuted_mnist(200),
        {"hidden": (50,)},
        {"epochs": 1, "batch_size": 1, "max_test": 500},
        trials=10,
        seeds=5,
        seconds=650,
    ),
    "online-permuted-mnist": Protocol(
        "Permuted MNIST, 200 tasks of 60,000, on-line, width 100, as Dohare et al.",
        _permuted_mnist(200),
        {"hidden": (100, 100, 100)},
        {"epochs": 1, "batch_size": 1, "max_test": 500},
        trials=10,
        seeds=5,
        seconds=1100,
    ),
}

# By what they are told and what they keep; CLASSP's forms first.
FORMS = (
    "classp",
    "classp-prior",
    "classp-window",
    "classp-leaf",
    "classp-leaf-window",
    "classp-pull",
    "classp-root",
    "classp-mean",
    "protect-adam",
    "protect-rmsprop",
)
REMEDIES = ("classp-root", "classp-mean")
"""Forms that were tried when the others' results were known."""
BOUNDARY_FREE = (
    "sgd",
    "sgd-decay",
    "adam",
    "adamw",
    "adagrad",
    "stable-sgd",
    "upgd",
    "bgd",
    "mesu",
    "l2-init",
    "shrink-and-perturb",
    "streaming-ewc",
    "streaming-mas",
)
BOUNDARY = ("ewc", "online-ewc", "implicit-ewc", "si", "mas", "lwf")
STORED = ("replay", "joint")
METHODS = (*FORMS, *BOUNDARY_FREE, *BOUNDARY, *STORED)
COMBINED = (
    *(
        f"{penalty}+{optimizer}"
        for optimizer in ("adagrad", "adam")
        for penalty in ("ewc", "online-ewc", "si", "mas", "lwf")
    ),
    "ewc+classp",
)
"""Those that are told the boundary on another optimizer than plain SGD."""

SMALL_STEPS = ("adam", "adamw", "classp-mean")
"""Those whose steps do not shrink with the gradients or with time."""
DROPOUT = 0.25
"""Of stable SGD, which is dropout and a decaying rate."""
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "hard-ash": ({"activation": "hard-ash"}, {}),
    "running-moments": ({}, {"moments": "running"}),
}
"""What may stand in front of any method's name, beside the labels trick, with what it
changes of network and training. Each has a folder of its own."""


PLASTIC: dict[str, dict[str, tuple[float, float]]] = {
    "sgd": {"learning_rate": (0.003, 0.3)},
    "adam": {"learning_rate": (3e-5, 1e-2)},
    "adagrad": {"learning_rate": (3e-3, 0.3), "initial_accumulator": (1e-6, 10.0)},
    "upgd": {
        "learning_rate": (0.003, 0.3),
        "memory": (10, 1e5),
        "deviation": (1e-5, 1e-2),
        "weight_decay": (1e-6, 1e-2),
    },
    "l2-init": {"learning_rate": (0.003, 0.3), "pull": (1e-6, 1e-2)},
    "classp": {"learning_rate": (0.02, 1.0), "eps": (1e-5, 1.0)},
    "classp-window": {
        "learning_rate": (0.02, 1.0),
        "eps": (1e-5, 1.0),
        "window": (50, 3000),
    },
    "classp-leaf-window": {
        "learning_rate": (0.02, 1.0),
        "eps": (1e-2, 100.0),
        "window": (50, 3000),
    },
    "classp-root": {"learning_rate": (0.003, 0.3), "prior": (0.1, 1e3)},
    "classp-mean": {"learning_rate": (1e-4, 0.03), "prior": (0.1, 1e3)},
}
"""Narrower ranges, to look closer at settings that learn the newest task. They were
drawn up when the trials of ``sgd`` and ``classp-window`` from the wide ones were
known, of which one in three and one in twenty did."""


def method_of(name: str) -> continual.Method:
    """A method by its name, the library's or one that is defined beside this file."""
    own = THRESHOLDS | SAMPLES
    return own[name] if name in own else continual.method(name)


def ranges(name: str, lowest_rate: float) -> dict[str, tuple[float, float]]:
    """What a method's trials draw from in place of its own ranges.

    The same decades of rates for all methods of one kind; small ones for few classes a
    task.
    """
    small = name.split("+")[-1] in SMALL_STEPS
    rates = (lowest_rate / 10, 0.1) if small else (lowest_rate, 1.0)
    found = {"learning_rate": rates}
    known = method_of(name).settings
    return {key: value for key, value in found.items() if key in known}


def fixed(name: str) -> dict[str, float]:
    """A method's settings that are not tuned."""
    known = method_of(name).settings
    values = {"power": 1.0, "threshold": 0.0}
    return {key: value for key, value in values.items() if key in known}


def measures(matrix: Sequence[Sequence[float]]) -> dict[str, float]:
    """Accuracy on the newest task and on those 5 and 20 back, if the stream has them.

    ``recent`` is the mean of these. Each is a mean over the ends of the last ten tasks.
    """
    found = {
        f"{tasks} back": back(matrix, tasks)
        for tasks in (0, 5, 20)
        if len(matrix) > tasks + 10
    }
    return found | {"recent": float(np.mean(list(found.values())))} if found else {}


def measured(runs: Sequence[Any]) -> dict[str, float]:
    """The measures of a trial's runs, the mean over them; none if one diverged."""
    if any(run.diverged for run in runs):
        return {}
    each = [measures(r.matrix) | {"online": np.mean(r.online_accuracy)} for r in runs]
    return {key: round(float(np.mean([m[key] for m in each])), 5) for key in each[0]}


def scores(protocol: Protocol, trials: Sequence[Any]) -> list[float]:
    """What the trials of a method are judged by."""
    if protocol.criterion == "average":
        return [trial.score for trial in trials]
    return [trial.measures.get(protocol.criterion, 0.0) for trial in trials]


def study(
    name: str,
    methods: Sequence[str] = METHODS,
    data_dir: str | None = None,
    folder: pathlib.Path | None = None,
) -> None:
    """Tunes methods on one stream and runs the winners, where that is not done yet.

    Args:
      name: of a protocol.
      methods: what to compare.
      data_dir: the folder of prepared data sets.
      folder: where trials and results are stored; what is there is kept.
    """
    protocol = PROTOCOLS[name]
    stream = protocol.make(data_dir)
    smaller = protocol.tuning(data_dir) if protocol.tuning else stream
    there = stored(name)["methods"] if folder is None else {}
    for method in methods:
        if method in there:
            continue
        network, training = protocol.network, protocol.training
        place, inner = folder or FOLDER / name, method
        for option, (of_network, of_training) in OPTIONS.items():
            if inner.startswith(f"{option}+"):
                inner = inner.removeprefix(f"{option}+")
                network, training = network | of_network, training | of_training
                place = place / option
        if inner == "stable-sgd":
            # Another network is another comparison to the library.
            network, place = network | {"dropout": DROPOUT}, place / "dropout"
        if protocol.criterion != "average":
            # Results of many tasks are large; each method's have a file of their own.
            place = place / method
        tuned = continual.tune(
            smaller,
            protocol.model,
            {method: method_of(inner)},
            trials=protocol.trials,
            # All at once: no trial depends on how another one did on this stream.
            together=protocol.trials,
            seeds=TUNING_SEEDS,
            ranges={method: ranges(inner, protocol.lowest_rate)},
            settings={method: fixed(inner)},
            model_options=network,
            folder=place,
            measure=measured,
            **training,
        )
        found = scores(protocol, tuned.trials[method])
        best = tuned.trials[method][int(np.argmax(found))]
        print(f"{name} {method}: best trial {max(found):.1%}", flush=True)
        continual.run(
            stream,
            protocol.model,
            {method: method_of(inner)},
            seeds=range(protocol.seeds),
            settings={method: best.settings},
            model_options=network,
            folder=place,
            points=1,
            command=f"python docs/league/study.py {name}",
            **training,
        )


def plastic_trial(trials: Sequence[Mapping[str, float]], newest: float) -> int:
    """The trial that keeps most of what is 20 tasks old, of those that learn well.

    Args:
      trials: the measures of each.
      newest: the accuracy on the newest task that a trial must have. If none has it,
        the trial that comes nearest.
    """
    found = [(one.get("0 back", 0.0), one.get("20 back", 0.0)) for one in trials]
    keys = [(min(new, newest), old) for new, old in found]
    return max(range(len(keys)), key=keys.__getitem__)


def study_plastic(
    name: str, methods: Sequence[str], data_dir: str | None = None
) -> None:
    """Looks closer at settings that go on learning, and runs the best of them.

    Each method gets as many trials again, from :data:`PLASTIC`. It then takes the trial
    that is best 20 tasks back among those whose newest task is within 1 point of the
    best of SGD's trials, on validation data.
    """
    protocol = PROTOCOLS[name]
    assert protocol.tuning is not None
    newest = 0.0
    for method in ("sgd", *(m for m in methods if m != "sgd")):
        place = FOLDER / name / "plastic" / method
        tuned = continual.tune(
            protocol.tuning(data_dir),
            protocol.model,
            [method],
            trials=protocol.trials,
            together=protocol.trials,
            seeds=TUNING_SEEDS,
            ranges={method: PLASTIC[method]},
            settings={method: fixed(method)},
            model_options=protocol.network,
            folder=place,
            measure=measured,
            **protocol.training,
        )
        first = json.loads((FOLDER / name / method / "trials.json").read_text("utf-8"))
        trials = [
            *(Trial(**trial) for trial in first["trials"][method]),
            *tuned.trials[method],
        ]
        if method == "sgd":
            newest = max(t.measures.get("0 back", 0.0) for t in trials) - 0.01
            if "sgd" not in methods:
                continue
        chosen = trials[plastic_trial([t.measures for t in trials], newest)]
        print(f"{name} {method}: {chosen}", flush=True)
        continual.run(
            protocol.make(data_dir),
            protocol.model,
            [method],
            seeds=range(protocol.seeds),
            settings={method: chosen.settings},
            model_options=protocol.network,
            folder=place,
            points=1,
            command=f"python docs/league/study.py {name} --plastic",
            **protocol.training,
        )


def back(matrix: Sequence[Sequence[float]], tasks: int) -> float:
    """Mean accuracy on the task so many before the one just learned.

    The mean is over the ends of the last ten tasks.
    """
    ends = range(max(len(matrix) - 10, tasks + 1), len(matrix))
    return float(np.mean([matrix[k][k - 1 - tasks] for k in ends]))


def stored(name: str) -> dict[str, Any]:
    """What is known of a stream: its methods' numbers, and those of a closer look."""
    file = FOLDER / f"{name}.json"
    known = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return {"methods": {}, "plastic": {}} | known


def collect(name: str) -> None:
    """Adds what the page needs of a stream's results: a few numbers per run.

    They lie in the stream's folder and in those below it, each with its own trials.
    """
    protocol = PROTOCOLS[name]
    found: dict[str, Any] = {"title": protocol.title} | stored(name)
    methods, plastic = found.pop("methods"), found.pop("plastic")
    found_files = (FOLDER / name).rglob("results.json")
    for path in sorted(found_files, key=lambda path: (len(path.parts), path)):
        folder = path.parent
        results = continual.load(folder)
        found.setdefault("configuration", results.configuration)
        for method in dict.fromkeys(run.method for run in results.runs):
            runs = [run for run in results.runs if run.method == method]
            if len(runs) < protocol.seeds:
                continue
            tuned = json.loads((folder / "trials.json").read_text("utf-8"))
            trials = [Trial(**t) for t in tuned["trials"][method]]
            if "plastic" in folder.relative_to(FOLDER / name).parts:
                plastic[method] = _numbers(runs) | {
                    "measures": [trial.measures for trial in trials]
                }
                continue
            methods[method] = _numbers(runs) | {
                "candidates": [trial.settings for trial in trials],
                "scores": [round(score, 5) for score in scores(protocol, trials)],
            }
            if any(trial.measures for trial in trials):
                methods[method]["measures"] = [trial.measures for trial in trials]
    known = [m for m in (*METHODS, *COMBINED) if m in methods]
    order = [*known, *sorted(set(methods) - set(known))]
    parts = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()]
    for key, chosen in (("methods", methods), ("plastic", plastic)):
        lines = [
            f"{json.dumps(m)}: {json.dumps(chosen[m])}" for m in order if m in chosen
        ]
        if lines:
            parts.append(f'"{key}": {{\n' + ",\n".join(lines) + "\n}")
    (FOLDER / f"{name}.json").write_text("{" + ",\n".join(parts) + "}\n", "utf-8")


def _numbers(runs: Sequence[Any]) -> dict[str, Any]:
    """What the page needs of a method's runs, one per seed."""
    each = [measures(run.matrix) for run in runs]
    ends = {
        "average": [float(np.mean(run.matrix[-1])) for run in runs],
        **{key: [one[key] for one in each] for key in each[0]},
        "online": [float(np.mean(run.online_accuracy)) for run in runs],
    }
    return {
        "settings": runs[0].settings,
        "seeds": [run.seed for run in runs],
        "diverged": [run.seed for run in runs if run.diverged],
        **{key: [round(v, 5) for v in values] for key, values in ends.items()},
        "bytes": runs[0].state_bytes_per_parameter,
        "task_boundary_known": runs[0].task_boundary_known,
        "stored_data": runs[0].stored_data,
        "seconds": round(float(np.mean([run.seconds for run in runs])), 2),
        "date": runs[0].provenance.date[:10],
        "device": runs[0].provenance.device,
        "versions": runs[0].provenance.versions,
        "command": runs[0].provenance.command,
    }


def main() -> None:
    """Runs the methods that are not yet in the stream's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stream", choices=PROTOCOLS)
    parser.add_argument("method", nargs="*")
    parser.add_argument("--data-dir")
    parser.add_argument("--plastic", action="store_true", help="see study_plastic")
    arguments = parser.parse_intermixed_args()
    job = study_plastic if arguments.plastic else study
    job(arguments.stream, arguments.method or METHODS, arguments.data_dir)
    collect(arguments.stream)


if __name__ == "__main__":
    main()
