"""Writes docs/results.md from its template and the stored results of the league.

Run ``python docs/league/render.py`` (extra ``dev``). No number of the page is typed:
``results.template.md`` is a Jinja2 template that calls the functions below and those of
``runs`` and ``without_tuning``.
"""

from collections.abc import Mapping

import jinja2
import numpy as np
import stored_runs as runs
import without_tuning
from claims import few_seeds
from study import FORMS, METHODS, PROTOCOLS, REMEDIES
from thresholds import THRESHOLDS

from classp_jax.continual.report.frontier import frontier_picture
from classp_jax.continual.results.statistics import Difference, paired_difference

FOLDER = runs.FOLDER
PAGE = FOLDER.parent / "results.md"
TEMPLATE = FOLDER / "results.template.md"


def league(stream: str) -> str:
    """The league table of a stream."""
    found, free = runs.methods(stream), runs.ranked(stream, free=True)
    extra = [
        (key, title)
        for key, title in (
            ("0 back", "newest"),
            ("5 back", "five back"),
            ("20 back", "twenty back"),
        )
        if "20 back" in next(iter(found.values())) and key in next(iter(found.values()))
    ]
    rows, ranked = [], runs.ranked(stream)
    first_look = [m for m in found if not runs.compared(stream, m)]
    for name in (*ranked, *runs.by_accuracy(stream, first_look)):
        one = found[name]
        mark = "" if name in ranked else " †"
        own_rank = str(free.index(name) + 1) if name in free else ""
        against = (
            "-"
            if not {name, runs.named()} <= set(ranked)
            else "reference"
            if name == runs.named()
            else runs.interval(runs.difference(stream, name, runs.named()))
        )
        rows.append(
            [
                (f"**`{name}`**" if name in FORMS else f"`{name}`") + mark,
                runs.mean(runs.percent(stream, name)),
                *(
                    "-"
                    if name == "joint"
                    else runs.mean(runs.percent(stream, name, key))
                    for key, _ in extra
                ),
                str(ranked.index(name) + 1) if name in ranked else "",
                own_rank,
                against,
                f"{one['bytes']:.0f}",
                "yes" if one["task_boundary_known"] else "",
                "yes" if one["stored_data"] else "",
            ]
        )
    header = [
        "Method",
        f"{PROTOCOLS[stream].criterion}, %",
        *(title for _, title in extra),
        "rank",
        "rank among free",
        f"against `{runs.named()}`",
        "bytes per parameter",
        "boundary",
        "stored data",
    ]
    return runs.table(header, rows)


def provenance(stream: str) -> str:
    """When, on what and with which command a stream was run."""
    found = list(runs.methods(stream).values())
    days = sorted({one["date"] for one in found})
    period = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    (command,) = {one["command"] for one in found}
    devices = ", ".join(sorted({one["device"] for one in found}))
    versions = found[0]["versions"]
    seeds = ", ".join(map(str, sorted({len(o["seeds"]) for o in found})))
    protocol = PROTOCOLS[stream]
    trials, smaller = protocol.trials, protocol.tuned_on
    first_look = ""
    if not all(runs.compared(stream, m) for m in runs.methods(stream)):
        first_look = (
            f" †: {protocol.first_look}; a first look, which is not compared with the "
            "other rows."
        )
    return (
        f"*Made:* {period}, `{command}`, {devices}, classp-jax "
        f"{versions['classp-jax']}, jax {versions['jax']}; {trials} trials per method "
        f"on seed 1000{smaller and f' with {smaller}'}, {seeds} reported seeds."
        f"{first_look}"
    )


def first_free(stream: str) -> str:
    """Who leads without boundary and stored data, and by how much over the named form.

    Or, if the named form leads, over the best that is no form of CLASSP.
    """
    rivals = [name for name in runs.ranked(stream, free=True) if name not in FORMS]
    if not runs.compared(stream, runs.named()):
        return f"`{runs.named()}` is not compared on this stream"
    best = rivals[0]
    found = runs.difference(stream, runs.named(), best)
    return f"`{runs.named()}` against the best rival, `{best}`: {runs.interval(found)}"


def best(stream: str, kind: str) -> str:
    """The best method of a kind: a rival that is free, told a boundary, or storing."""
    found = runs.methods(stream)
    chosen = {
        "free": lambda m: runs.is_free(stream, m) and m not in FORMS,
        "told": lambda m: (
            found[m]["task_boundary_known"]
            and not found[m]["stored_data"]
            and m.split("+")[-1] not in FORMS
        ),
        "storing": lambda m: found[m]["stored_data"] and m != "joint",
    }[kind]
    return next(filter(chosen, runs.ranked(stream)), "")


def grouped(found: Mapping[str, Difference]) -> str:
    """Where differences are ahead, level and behind, for a sentence."""
    words = {"ahead": [], "level": [], "behind": [], "": []}
    for stream, one in found.items():
        words[one.word].append(f"`{stream}`")
    return "; ".join(
        f"{word or 'not compared, as a seed diverged,'} on {', '.join(streams)}"
        for word, streams in words.items()
        if streams
    )


def differences(method: str, other: str) -> dict[str, Difference]:
    """The paired differences of two methods on every stream that has both."""
    return {
        stream: runs.difference(stream, method, other)
        for stream in runs.streams()
        if runs.compared(stream, method) and runs.compared(stream, other)
    }


def against(kind: str) -> str:
    """Where the named form stands to the best method of a kind, in words."""
    return grouped(
        {
            stream: runs.difference(stream, runs.named(), other)
            for stream in runs.streams()
            if (other := best(stream, kind)) and runs.compared(stream, runs.named())
        }
    )


def form(name: str) -> str:
    """Where another method stands to the named form, in words."""
    if name == runs.named():
        return "that is the named form"
    return grouped(differences(name, runs.named()))


def best_rivals() -> str:
    """The named form against the best method of each kind, a line per stream."""
    kinds = {
        "free": "no boundary, no data",
        "told": "told the boundary",
        "storing": "stored data",
    }
    body = []
    for stream in runs.streams():
        cells = []
        for kind in kinds:
            other = best(stream, kind)
            if not other or not runs.compared(stream, runs.named()):
                cells.append("")
                continue
            found = runs.interval(runs.difference(stream, runs.named(), other))
            cells.append(f"`{other}`: {found}")
        body.append([f"`{stream}`", *cells])
    return runs.table(["Stream", *kinds.values()], body)


def forms() -> str:
    """Every other form against the named one, a column per stream."""
    streams = [s for s in runs.streams() if runs.compared(s, runs.named())]
    body = []
    for name in (name for name in FORMS if name != runs.named()):
        found = differences(name, runs.named())
        cells = [runs.interval(found[s]) if s in found else "" for s in streams]
        body.append([f"`{name}`", *cells])
    return runs.table(["Form", *(f"`{s}`" for s in streams)], body)


def missing(stream: str) -> str:
    """The methods that a stream has not been run with, for a sentence."""
    names = [f"`{m}`" for m in METHODS if not runs.has(stream, m)]
    if len(names) > len(METHODS) / 2:
        return "The other methods were not run on this stream."
    return f"Not run on this stream: {', '.join(names)}." if names else ""


def three_seeds() -> str:
    """How wrong claims from three seeds are, a line per stream."""
    body = []
    for stream in runs.wide():
        own = runs.percent(stream, runs.named())
        others = [
            runs.percent(stream, m) for m in runs.ranked(stream) if m != runs.named()
        ]
        found = few_seeds([o - own for o in others if np.isfinite(o - own).all()])
        shares = (found.wrong, found.missed, found.reversed_order)
        body.append(
            [
                runs.stored(stream)["title"],
                str(len(own)),
                str(found.comparisons),
                *(f"{100 * share:.0f} %" for share in shares),
            ]
        )
    header = [
        "Stream",
        "all seeds",
        f"comparisons with `{runs.named()}`",
        "wrongly ahead or behind",
        "wrongly level",
        "means in another order",
    ]
    return runs.table(header, body)


def options(stream: str, option: str) -> str:
    """Methods with an option in front of them against the same ones without."""
    body = []
    for name in runs.methods(stream):
        if not name.startswith(f"{option}+"):
            continue
        plain = name.removeprefix(f"{option}+")
        found = runs.difference(stream, name, plain)
        cells = [
            runs.mean(runs.percent(stream, plain)),
            runs.mean(runs.percent(stream, name)),
        ]
        body.append([f"`{plain}`", *cells, runs.interval(found)])
    return runs.table(["Method", "without, %", "with, %", "difference"], body)


def thresholds(stream: str) -> str:
    """CLASSP with each kind of threshold against the same without one."""
    body = []
    for name, method in THRESHOLDS.items():
        if not runs.has(stream, name):
            continue
        kind, plain = name.split("+")
        (own,) = method.settings.keys() - {"learning_rate", "eps", "window"}
        body.append(
            [
                f"`{plain}`, {kind.replace('-', ' ')}",
                f"{runs.methods(stream)[name]['settings'][own]:.2g}",
                runs.mean(runs.percent(stream, plain)),
                runs.mean(runs.percent(stream, name)),
                runs.interval(runs.difference(stream, name, plain)),
            ]
        )
    return runs.table(["Form", "tuned to", "without, %", "with, %", "difference"], body)


def has_option(stream: str, option: str) -> bool:
    """Whether methods were run with an option in front of them."""
    return any(name.startswith(f"{option}+") for name in runs.methods(stream))


def brake_on_adam() -> str:
    """The brake on Adam against Adam, and Adam against SGD, a line per stream."""
    pairs = [("protect-adam", "adam"), ("adam", "sgd")]
    found = [differences(*pair) for pair in pairs]
    body = [
        [f"`{stream}`", *(runs.interval(one[stream]) for one in found)]
        for stream in found[0]
    ]
    return runs.table(["Stream", *(f"`{a}` against `{b}`" for a, b in pairs)], body)


def remedies() -> str:
    """What one setting reaches everywhere, and a setting for each stream, by method."""
    among = [s for s in runs.alike() if all(runs.has(s, r) for r in REMEDIES)]
    body = []
    for method in (*REMEDIES, runs.named(), "protect-adam", "adam"):
        own = [100 * runs.best_scores(stream)[method] for stream in among]
        _, shared = without_tuning.shared_setting(method, among)
        cells = [f"{a:.1f} ({b:.1f})" for a, b in zip(shared, own, strict=True)]
        body.append([f"`{method}`", *cells])
    return runs.table(["Method", *(f"`{s}`" for s in among)], body)


def start_without_tuning() -> str:
    """Code with the setting of CLASSP that does best for all streams."""
    form = without_tuning.best_shared_form()
    found, _ = without_tuning.shared_setting(form, runs.alike())
    rate = f"{found['learning_rate']:.1g}"
    if form in REMEDIES:
        power = "" if form == "classp-mean" else " ** 0.5"
        rate = f"lambda step: {rate} * (1.0 + step){power}"
    words = [f"{k}={found[k]:.1g}" for k in ("eps", "prior") if k in found]
    if "eps" not in found:
        words.append("eps=0.0")
    if "window" in found:
        words.append(f"window={float(format(found['window'], '.1g')):.0f}")
    if "leaf" in form:
        words.append('eps_unit="leaf"')
    call = f"classp({', '.join([rate, *words])})"
    lines = ["import classp_jax", "", f"optimizer = classp_jax.{call}"]
    return "\n".join(["```python", *lines, "```"])


def after_many_tasks(method: str, other: str) -> str:
    """Two methods on the long stream, on new and old tasks, in words."""
    names = {
        "0 back": "the newest task",
        "5 back": "five back",
        "20 back": "twenty back",
        "average": "the average over all tasks",
    }
    return ", ".join(
        f"{title} {runs.interval(runs.difference('many-digits', method, other, key))}"
        for key, title in names.items()
    )


def newest_in_trial(method: str) -> str:
    """The newest task after 60 tasks, in the trial whose settings a method ran with."""
    found = runs.methods("many-digits")[method]
    return f"{100 * found['measures'][int(np.argmax(found['scores']))]['0 back']:.1f}"


def newest_in_runs(method: str) -> str:
    """The same after 200 tasks, on test data."""
    return runs.mean(runs.percent("many-digits", method, "0 back"))


def looked_closer() -> list[str]:
    """The methods that have trials from narrower ranges on the long stream."""
    return list(runs.stored("many-digits").get("plastic", {}))


def frontier_points(stream: str) -> dict[str, list[tuple[float, float]]]:
    """Of each method's trials, accuracy on the newest task and on that 20 back.

    Those from narrower ranges are among them.
    """
    closer = runs.stored(stream).get("plastic", {})
    measured = {
        name: [*found.get("measures", []), *closer.get(name, {}).get("measures", [])]
        for name, found in runs.methods(stream).items()
    }
    points = {
        name: [(one["0 back"], one["20 back"]) for one in trials if "20 back" in one]
        for name, trials in measured.items()
    }
    return {name: found for name, found in points.items() if found}


def at_equal_plasticity(stream: str) -> str:
    """What is left 20 tasks back with settings that learn as SGD does: test data."""
    found = runs.stored(stream).get("plastic", {})
    body = []
    for name in sorted(found, key=lambda m: -np.nan_to_num(found[m]["20 back"]).mean()):
        cells = []
        for key in ("0 back", "5 back", "20 back"):
            cells.append(runs.mean(runs.numbers(found[name], key)))
        for key in ("0 back", "20 back"):
            against = paired_difference(
                runs.numbers(found[name], key).tolist(),
                runs.numbers(found["sgd"], key).tolist(),
            )
            cells.append("reference" if name == "sgd" else runs.interval(against))
        body.append([f"**`{name}`**" if name in FORMS else f"`{name}`", *cells])
    header = ["Method", "newest, %", "five back", "twenty back"]
    return runs.table(
        [*header, "newest against `sgd`", "twenty back against `sgd`"], body
    )


def draw() -> None:
    """Draws the frontier of every stream whose trials were judged by it."""
    for stream in runs.streams():
        points = frontier_points(stream)
        if points and PROTOCOLS[stream].criterion == "recent":
            picture = frontier_picture(points, "newest task", "twenty tasks back")
            path = FOLDER / f"{stream}-frontier.png"
            picture.savefig(path, metadata={"Software": None})


def bars() -> str:
    """The bars, each with its outcome."""
    measured = runs.wide()
    firsts = [s for s in measured if leads(s)]
    adagrad = differences(runs.named(), "adagrad")
    worse = [s for s, found in adagrad.items() if found.word == "behind"]
    lines = [
        "First among methods without boundary and stored data, ahead of every rival "
        "(that did not diverge) by an interval that excludes 0: on "
        f"{len(firsts)} of the {len(measured)} protocols that all of them were run on"
        + (f" ({', '.join(firsts)})" if firsts else "")
        + "; three were wanted.",
        "Nowhere worse than AdaGrad: "
        + ("holds" if not worse else f"fails on {', '.join(worse)}")
        + f" ({'; '.join(f'{s} {runs.interval(f)}' for s, f in adagrad.items())}).",
    ]
    plastic = (
        runs.stored("many-digits").get("plastic", {})
        if "many-digits" in runs.streams()
        else {}
    )
    if "sgd" in plastic:
        newest = {
            m: runs.interval(
                paired_difference(
                    runs.numbers(plastic[m], "0 back").tolist(),
                    runs.numbers(plastic["sgd"], "0 back").tolist(),
                )
            )
            for m in plastic
            if m in FORMS
        }
        lines.append(
            "Newest task within 1 point of SGD's after 200 tasks, with settings chosen "
            f"for it: {'; '.join(f'`{m}` {text}' for m, text in newest.items())}."
        )
    elif "many-digits" in runs.streams() and runs.has("many-digits", "classp-window"):
        found = runs.difference("many-digits", "classp-window", "sgd", "0 back")
        lines.append(
            "Newest task within 1 point of SGD's after 200 tasks: not met by "
            f"`classp-window` as it was tuned ({runs.interval(found)}); with settings "
            "chosen for that, not measured."
        )
    else:
        lines.append(
            "Newest task within 1 point of SGD's after 200 tasks: not measured."
        )
    return "\n".join(f"- {line}" for line in lines)


def leads(stream: str) -> bool:
    """Whether the named form is ahead of every free rival that is no form of it."""
    rivals = [m for m in runs.ranked(stream, free=True) if m not in FORMS]
    return all(
        runs.difference(stream, runs.named(), m).word == "ahead"
        or np.isnan(runs.percent(stream, m)).any()
        for m in rivals
    )


# Hsu et al. 2018, tables 2 and 3: accuracy in %, ten runs.
PUBLISHED = {
    "sgd": (98.0, 63.2, 19.5),
    "adam": (93.5, 55.2, 19.7),
    "adagrad": (98.1, 58.1, 19.8),
    "ewc": (97.7, 58.9, 19.8),
    "online-ewc": (98.0, 57.3, 19.8),
    "si": (98.6, 64.8, 19.7),
    "mas": (99.2, 68.6, 19.5),
    "lwf": (99.6, 71.0, 24.2),
}
SCENARIOS = ("task", "domain", "class")


def beside_published() -> str:
    """The published accuracies on split MNIST, and those of the tables here."""
    body = []
    for method, theirs in PUBLISHED.items():
        cells = [f"`{method}`"]
        for scenario, accuracy in zip(SCENARIOS, theirs, strict=True):
            stream = f"split-mnist-{scenario}"
            there = stream in runs.streams() and runs.has(stream, method)
            ours = runs.mean(runs.percent(stream, method)) if there else ""
            if there and not runs.compared(stream, method):
                ours += " †"
            cells += [f"{accuracy}", ours]
        body.append(cells)
    header = [part for name in SCENARIOS for part in (f"{name}, published", "here")]
    return runs.table(["Method", *header], body)


def setting(stream: str, method: str, name: str) -> str:
    """The value of a setting with which a method ran."""
    return f"{runs.methods(stream)[method]['settings'][name]:g}"


def rule_scores() -> str:
    """What the rule that names a form compares, best first."""
    found = runs.form_scores(runs.alike())
    return ", ".join(
        f"`{form}` {100 * found[form]:.1f} %"
        for form in sorted(found, key=lambda form: -found[form])
    )


def diverging(*names: str) -> str:
    """The share of methods' trials that diverged, which score 0."""
    found = {
        name: np.concatenate([runs.methods(s)[name]["scores"] for s in runs.wide()])
        for name in names
    }
    return ", ".join(
        f"`{name}` {100 * np.mean(scores == 0):.0f} %" for name, scores in found.items()
    )


def not_run() -> str:
    """The protocols that have not been run, with their cost and command."""
    rows = []
    for name, protocol in PROTOCOLS.items():
        if name in runs.streams():
            continue
        count = protocol.trials + protocol.seeds
        hours = len(METHODS) * count * protocol.seconds / 3600
        rows.append(
            [
                protocol.title,
                f"{protocol.seconds:,g} s",
                f"{count} x {len(METHODS)}",
                f"{hours:,.1f} h",
                f"`python docs/league/study.py {name}`",
            ]
        )
    header = ["Protocol", "a run", "runs x methods", "one core", "command"]
    return runs.table(header, rows)


def render(template: str) -> str:
    """The page; a misspelt name is an error."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    every = vars(runs) | vars(without_tuning) | globals()
    names = {name: value for name, value in every.items() if callable(value)}
    return environment.from_string(template).render(names)


if __name__ == "__main__":
    PAGE.write_text(render(TEMPLATE.read_text("utf-8")), "utf-8")
    draw()
