"""Fine-tuning without forgetting: what each method keeps of the old for the new.

Run ``python docs/finetuning/study.py PROBLEM [--data-dir DIR]`` (extras ``continual``,
``finetune`` and ``tfds``). Every method gets the same number of trials on validation
data and a seed that is not reported, then the chosen settings run with the reported
seeds on test data. Each run is a line of ``results/PROBLEM.jsonl``; the same command
goes on from there.
"""

import argparse
import datetime
import functools
import hashlib
import json
import pathlib
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from curves import chosen_trials, read
from language import language
from methods import METHODS, Knowledge, low_rank_factors, trials, with_low_rank
from plan import OLD_EXAMPLES, PLANS, SOURCES, TUNING_SEED
from problems import Problem, images, picked, pretrained

import classp_jax
from classp_jax import finetune, regularizers

FOLDER = pathlib.Path(__file__).parent
MERGED = {method.trained_as for method in METHODS.values()}
"""Methods whose trained weights others merge."""
OLD_SIZES = (10, 100, 10_000)


def problem_of(name: str, data_dir: pathlib.Path, cache: pathlib.Path) -> Problem:
    """A problem by its name."""
    make = language if name == "language" else images
    return make(name, data_dir, cache)


# What is known of the old data


def measured(problem: Problem, params: Any, examples: Any, power: float = 1.0) -> Any:
    """The sum of the powers of single examples' gradients, scaled to the mean 1."""
    count = len(jax.tree.leaves(examples)[0])
    size = min(50, count)
    batches = (
        jax.tree.map(lambda a, k=k: a[k : k + size], examples)
        for k in range(0, count - size + 1, size)
    )
    tx = classp_jax.classp(0.0, power=power)
    old = finetune.gradients(problem.loss, params, batches, per_example=True)
    state = classp_jax.accumulate_importance(
        tx, tx.init(params), params, old, per_example=True
    )
    return of_mean_1(classp_jax.accumulators(state))


def of_mean_1(tree: Any) -> Any:
    """The tree divided by the mean of all its numbers."""
    leaves = jax.tree.leaves(tree)
    mean = sum(a.sum() for a in leaves) / sum(a.size for a in leaves)
    return jax.tree.map(lambda a: a / mean, tree)


def fisher(problem: Problem, params: Any, examples: Any, temperature: float) -> Any:
    """The diagonal of the Fisher information, scaled to the mean 1."""
    if problem.fisher_kind == "exact":
        x, _ = examples
        return of_mean_1(
            regularizers.fisher_diagonal(
                lambda p, x: problem.logits(p, (x, None)) / temperature, params, x
            )
        )
    return measured_fisher(problem, params, examples, temperature)


def measured_fisher(
    problem: Problem, params: Any, tokens: Any, temperature: Any
) -> Any:
    """An unbiased estimate for token sequences: the next tokens are drawn.

    Drawn independently at every position their scores are uncorrelated, so the square
    of a sequence's gradient is the sum over its positions.
    """

    def draw(params: Any, tokens: Any, key: Any) -> Any:
        return jax.random.categorical(key, problem.logits(params, tokens) / temperature)

    key = jax.random.key(0)
    drawn = np.concatenate(
        [
            np.asarray(jax.jit(draw)(params, part, jax.random.fold_in(key, k)))
            for k, part in enumerate(np.split(tokens, len(tokens) // 50))
        ]
    )

    def loss(params: Any, batch: Any) -> jax.Array:
        tokens, drawn = batch
        losses = optax.softmax_cross_entropy_with_integer_labels(
            problem.logits(params, tokens) / temperature, drawn
        )
        # What follows padding is not drawn from anything.
        return jnp.where(tokens[:, 1:] > 0, losses[:, :-1], 0.0).sum()

    return measured(problem._replace(loss=loss), params, (tokens, drawn), power=2.0)


def knowledge_of(problem: Problem, seed: int, cache: pathlib.Path) -> Knowledge:
    """Pretrained weights and what matters in them, kept as one file per seed."""
    params = pretrained(problem, seed, cache)
    number = problem.seeds[seed]
    file = cache / f"knowledge-{problem.network}-{number}.npz"
    leaves, tree = jax.tree.flatten(params)
    if not file.exists():
        examples = jax.tree.map(lambda a: a[:OLD_EXAMPLES], problem.old.train)
        kept, seconds = {}, {}
        for name, make in {
            "importance": lambda: measured(problem, params, examples),
            **{
                f"fisher {t:g}": functools.partial(fisher, problem, params, examples, t)
                for t in (1.0, 2.0, 4.0)
            },
        }.items():
            start = time.perf_counter()
            for k, a in enumerate(jax.tree.leaves(make())):
                kept[f"{name}/{k}"] = np.asarray(a)
            seconds[name] = round(time.perf_counter() - start, 2)
            print(f"{problem.name} {number}: {name} took {seconds[name]} s", flush=True)
        np.savez(file, allow_pickle=False, **kept)
        add(
            problem,
            {
                "part": "filling",
                "seed": seed,
                "seconds": seconds,
                "examples": OLD_EXAMPLES,
            },
        )
    found = np.load(file)

    def loaded(name: str) -> Any:
        return tree.unflatten(
            [jnp.asarray(found[f"{name}/{k}"]) for k in range(len(leaves))]
        )

    fishers = tuple(loaded(f"fisher {t}") for t in ("1", "2", "4"))
    return Knowledge(params, loaded("importance"), fishers)


# One run


@functools.cache
def compiled(problem_name: str, method_name: str) -> Any:
    """The functions that start and train, compiled once for all settings."""
    problem, method = PROBLEMS[problem_name], METHODS[method_name]

    def weights(trainable: Any, settings: Any, knowledge: Knowledge) -> Any:
        if method.low_rank:
            return with_low_rank(knowledge.params, trainable, settings["scale"])
        return trainable

    @jax.jit
    def begin(trainable: Any, settings: Any, knowledge: Knowledge) -> Any:
        state = method.optimizer(settings, knowledge).init(trainable)
        return method.fill(state, settings, knowledge) if method.fill else state

    @jax.jit
    def advance(
        trainable: Any, state: Any, start: Any, stop: Any,
        new: Any, old: Any, settings: Any, knowledge: Knowledge,
    ) -> Any:  # fmt: skip
        tx = method.optimizer(settings, knowledge)

        def loss(trainable: Any, k: Any) -> jax.Array:
            params = weights(trainable, settings, knowledge)
            value = problem.loss(params, jax.tree.map(lambda a: a[k], new))
            if method.replay:
                again = problem.loss(params, jax.tree.map(lambda a: a[k], old))
                value = value + settings["ratio"] * again
            return value

        def step(k: Any, carry: Any) -> Any:
            trainable, state = carry
            gradient = jax.grad(loss)(trainable, k)
            updates, state = tx.update(gradient, state, trainable)
            return optax.apply_updates(trainable, updates), state

        return jax.lax.fori_loop(start, stop, step, (trainable, state))

    return begin, advance, jax.jit(weights)


@functools.cache
def scorer(problem_name: str) -> Any:
    """The compiled score."""
    return jax.jit(PROBLEMS[problem_name].score)


def run(
    problem: Problem, method_name: str, settings: dict[str, float], seed: int,
    knowledge: Knowledge, part: str, cache: pathlib.Path,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tunes once; ``[[steps or share, old, new], ...]`` on a part of the data."""
    method = METHODS[method_name]
    trainer = method.trained_as or method_name
    begin, advance, weights = compiled(problem.name, trainer)
    score = scorer(problem.name)
    numbers = {name: jnp.float32(value) for name, value in settings.items()}
    rng = np.random.default_rng([seed, 3])
    steps = problem.checkpoints[-1]

    def batches(data: Any, size: int, of: int | None = None) -> Any:
        count = of or len(jax.tree.leaves(data)[0])
        order = np.concatenate(
            [rng.permutation(count) for _ in range(1 + steps * size // count)]
        )
        chosen = order[: steps * size].reshape(steps, size)
        return jax.tree.map(lambda a: jnp.asarray(a[chosen]), data)

    new = batches(problem.new.train, problem.batch)
    one_percent = len(jax.tree.leaves(problem.old.train)[0]) // 100
    old = (
        batches(problem.old.train, problem.batch // 2, one_percent)
        if method.replay
        else ()
    )
    trainable = (
        low_rank_factors(knowledge.params) if method.low_rank else knowledge.params
    )
    evaluated = [getattr(data, part) for data in (problem.old, problem.new)]

    def point(at: float, params: Any) -> list[float]:
        scores = [100 * float(score(params, data)) for data in evaluated]
        return [at, *(round(s, 3) for s in scores)]

    start = time.perf_counter()
    curve = [point(0, knowledge.params)]
    # What several methods merge is trained once.
    used = {s: v for s, v in settings.items() if s in METHODS[trainer].ranges}
    name = json.dumps([problem.name, trainer, used, seed, steps])
    file = cache / f"trained-{hashlib.sha256(name.encode()).hexdigest()[:16]}.npz"
    tree = jax.tree.structure(trainable)
    if method.merge and file.exists():
        found = np.load(file)
        trainable = tree.unflatten([jnp.asarray(found[k]) for k in found.files])
    else:
        state, last = begin(trainable, numbers, knowledge), 0
        for stop in [steps] if method.merge else problem.checkpoints:
            trainable, state = advance(
                trainable, state, last, stop, new, old, numbers, knowledge
            )
            last = stop
            if not method.merge:
                curve.append(point(stop, weights(trainable, numbers, knowledge)))
    if method.merge or method_name in MERGED:
        np.savez(file, *map(np.asarray, jax.tree.leaves(trainable)))
    if method.merge:
        merge = jax.jit(method.merge)
        for share in np.linspace(0, 1, len(problem.checkpoints) + 1)[1:]:
            mixed = merge(numbers, knowledge, trainable, jnp.float32(share))
            curve.append(point(round(float(share), 4), mixed))
    return {
        "method": method_name,
        "settings": settings,
        "seed": seed,
        "part": part,
        "curve": curve,
        "seconds": round(time.perf_counter() - start, 2),
    }


# The study


PROBLEMS: dict[str, Problem] = {}


def results_file(problem: Problem) -> pathlib.Path:
    """Where a problem's runs are."""
    return FOLDER / "results" / f"{problem.name}.jsonl"


def add(problem: Problem, line: dict[str, Any]) -> None:
    """Adds a line to the results."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ")
    line |= {
        "date": stamp,
        "device": f"{platform.machine()} CPU",
        "jax": jax.__version__,
    }
    with results_file(problem).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def ensure(problem: Problem, cache: pathlib.Path, name: str, settings: Any, seed: int,
           part: str) -> None:  # fmt: skip
    """Runs what has not been run yet."""
    key = (name, json.dumps(settings), seed, part)
    for line in read(results_file(problem)):
        if line.get("method") and "importance" not in line and key == (
            line["method"], json.dumps(line["settings"]), line["seed"], line["part"]
        ):  # fmt: skip
            return
    knowledge = cached_knowledge(problem.name, seed, cache)
    found = run(problem, name, settings, seed, knowledge, part, cache)
    add(problem, found)
    print(
        f"{problem.name} {part} {seed} {name} {settings}: {found['curve'][-1]} "
        f"{found['seconds']} s",
        flush=True,
    )


@functools.cache
def cached_knowledge(problem_name: str, seed: int, cache: pathlib.Path) -> Knowledge:
    """As :func:`knowledge_of`, kept in memory."""
    return knowledge_of(PROBLEMS[problem_name], seed, cache)


def study(problem: Problem, cache: pathlib.Path, names: list[str], part: str) -> None:
    """Tunes every method, then reports the chosen settings, then all the others.

    Args:
      problem: what is fine-tuned.
      cache: where pretrained networks are kept.
      names: the methods.
      part: where to end: ``tuned``, ``chosen`` or ``all``.
    """
    PROBLEMS[problem.name] = problem
    plan = PLANS[problem.name]
    for name in names:
        for settings in trials(METHODS[name], plan.trials):
            ensure(problem, cache, name, settings, TUNING_SEED, "validation")
    if part == "tuned":
        return
    for seed in plan.seeds:
        for name in names:
            chosen = chosen_trials(read(results_file(problem)), name, plan)
            for settings in {json.dumps(s): s for s in chosen.values()}.values():
                ensure(problem, cache, name, settings, seed, "test")
    if part == "chosen":
        return
    for seed in plan.seeds:
        for name in names:
            for settings in trials(METHODS[name], plan.trials):
                ensure(problem, cache, name, settings, seed, "test")


def sources(problem: Problem, cache: pathlib.Path) -> None:
    """Importance from less old data, from more, and from none."""
    PROBLEMS[problem.name] = problem
    name, plan = SOURCES[problem.name], PLANS[problem.name]
    chosen = chosen_trials(read(results_file(problem)), name, plan)
    settings = chosen[max(chosen)]
    done = {(r.get("importance"), r.get("seed")) for r in read(results_file(problem))}
    measured_once: dict[tuple[str, int], tuple[Any, float]] = {}
    for seed in plan.seeds:
        knowledge = cached_knowledge(problem.name, seed, cache)
        old = problem.old.train
        make: dict[str, Any] = {
            f"{n:,} old examples": functools.partial(picked, old, slice(n))
            for n in OLD_SIZES
        }
        make["proxy data"] = functools.partial(picked, problem.proxy, slice(1_000))
        make["the weights' magnitude"] = None
        for label, examples in make.items():
            if (label, seed) in done:
                continue
            # Seeds may begin with the same network.
            key = label, problem.seeds[seed]
            if key not in measured_once:
                start = time.perf_counter()
                importance = (
                    measured(problem, knowledge.params, examples())
                    if examples
                    else finetune.importance_from_magnitude(knowledge.params)
                )
                seconds = round(time.perf_counter() - start, 2)
                measured_once[key] = importance, seconds
            importance, seconds = measured_once[key]
            other = knowledge._replace(importance=importance)
            found = run(problem, name, settings, seed, other, "test", cache)
            add(problem, found | {"importance": label, "filling_seconds": seconds})
            print(problem.name, seed, label, found["curve"][-1], flush=True)


def main() -> None:
    """Runs what is not yet in the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problem", choices=PLANS)
    parser.add_argument("method", nargs="*")
    parser.add_argument("--data-dir", type=pathlib.Path)
    parser.add_argument(
        "--cache", type=pathlib.Path, default=pathlib.Path("runs/finetuning")
    )
    parser.add_argument(
        "--part",
        choices=("tuned", "chosen", "all"),
        default="chosen",
        help="where to end: trials on validation data, the settings chosen by them "
        "with the reported seeds (default), or all settings with these seeds",
    )
    parser.add_argument("--sources", action="store_true", help="of importance")
    arguments = parser.parse_args()
    # Started again, it compiles nothing that it has compiled before.
    jax.config.update("jax_compilation_cache_dir", str(arguments.cache / "compiled"))
    problem = problem_of(arguments.problem, arguments.data_dir, arguments.cache)
    names = arguments.method or list(METHODS)
    if arguments.sources:
        sources(problem, arguments.cache)
    else:
        study(problem, arguments.cache, names, arguments.part)


if __name__ == "__main__":
    main()
