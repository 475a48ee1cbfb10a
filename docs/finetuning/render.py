"""Writes docs/finetuning.md from its template and the stored runs, and its pictures.

Run ``python docs/finetuning/render.py`` (extra ``dev``). No number of the page is
typed: ``page.template.md`` is a Jinja2 template that calls the functions below.
"""

import pathlib
import re
import textwrap
from typing import Any

import jinja2
import numpy as np
from curves import chosen_trials, frontier, kept_at, read
from matplotlib.figure import Figure
from methods import METHODS, OURS, trials
from picture import drawn
from plan import OLD_EXAMPLES, PLANS, SOURCES, TUNING_SEED

from classp_jax.continual.results.statistics import Difference, paired_difference

FOLDER = pathlib.Path(__file__).parent

PAGE = FOLDER.parent / "finetuning.md"

TEMPLATE = FOLDER / "page.template.md"

PAIRS = (
    ("EWC, merged by importance", "EWC"),
    ("EWC, merged by importance", "averaging"),
    ("EWC, merged by importance", "EWC, averaged"),
    ("EWC, merged by importance", "replay of 1 %"),
    ("AdamW, merged by importance", "AdamW"),
    ("AdamW, merged by importance", "averaging"),
    ("averaging", "AdamW"),
    ("averaging", "EWC"),
    ("protect(AdamW), frozen", "AdamW"),
    ("protect(AdamW), averaged", "averaging"),
    ("protect(EWC, AdamW)", "EWC"),
    ("protect(pull, AdamW)", "L2 to the start"),
    ("CLASSP, filled", "CLASSP, empty"),
    ("CLASSP, filled", "EWC"),
    ("CLASSP, filled", "averaging"),
    ("CLASSP, filled", "replay of 1 %"),
)
"""What is compared in words."""


def lines(problem: str) -> list[dict[str, Any]]:
    """The stored lines of a problem."""
    return read(FOLDER / "results" / f"{problem}.jsonl")


def trained(problem: str, part: str) -> list[dict[str, Any]]:
    """The runs of a part of the data, with the importance that all others have."""
    return [
        line
        for line in lines(problem)
        if line["part"] == part and "importance" not in line
    ]


def methods(problem: str) -> list[str]:
    """The methods whose trials and seeds have all been run."""
    return [name for name in METHODS if is_complete(problem, name)]


def trials_of(problem: str, method: str) -> list[dict[str, Any]]:
    """A method's trials."""
    allowed = trials(METHODS[method], PLANS[problem].trials)
    return [
        line
        for line in trained(problem, "validation")
        if line["method"] == method and line["settings"] in allowed
    ]


def of_seeds(problem: str, method: str, target: float) -> np.ndarray:
    """What is kept at a target, a number per seed; NaN where it is not reached."""
    chosen = chosen_trials(lines(problem), method, PLANS[problem]).get(target)
    found = {
        line["seed"]: kept_at(line["curve"], target)
        for line in trained(problem, "test")
        if line["method"] == method and line["settings"] == chosen
    }
    return np.array([found.get(seed, np.nan) for seed in PLANS[problem].seeds])


def at_start(problem: str) -> np.ndarray:
    """The old ability before fine-tuning, a number per seed."""
    found = {line["seed"]: line["curve"][0][1] for line in trained(problem, "test")}
    return np.array([found.get(seed, np.nan) for seed in PLANS[problem].seeds])


def new_at_start(problem: str) -> float:
    """The new ability before fine-tuning, the mean over the seeds."""
    found = [line["curve"][0][2] for line in trained(problem, "test")]
    return float(np.mean(found))


def lost(problem: str, method: str, target: float) -> np.ndarray:
    """What is lost of the old ability at a target, a number per seed."""
    return at_start(problem) - of_seeds(problem, method, target)


def spread(numbers: np.ndarray) -> str:
    """Mean and sample standard deviation, or how many seeds reached the target."""
    known = numbers[np.isfinite(numbers)]
    if len(known) < len(numbers):
        return f"reached by {len(known)} of {len(numbers)} seeds" + (
            f", these {known.mean():.1f}" if len(known) > 1 else ""
        )
    return f"{known.mean():.1f} ± {known.std(ddof=1):.1f}"


def difference(values: np.ndarray, reference: np.ndarray) -> Difference:
    """Paired over the seeds that have both; no interval for fewer than three."""
    both = np.isfinite(values) & np.isfinite(reference)
    if both.sum() < 3:
        return Difference(np.nan, np.nan, np.nan, 0)
    return paired_difference(values[both].tolist(), reference[both].tolist())


def interval(found: Difference) -> str:
    """A difference with its 95 % interval; a dash where there is none."""
    if not found.word:
        return "-"
    few = f", {found.seeds} seeds" if found.seeds < 5 else ""
    return f"{found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f}{few})"


def kept_table(problem: str, target: float) -> str:
    """What each method keeps at an equal new ability, against three others."""
    against = ("AdamW", "LoRA", "EWC")
    rows = [
        ["method", "kept", "lost", *(f"kept more than {name}" for name in against)],
        ["---", *["---:"] * (2 + len(against))],
    ]
    for method in methods(problem):
        kept = of_seeds(problem, method, target)
        reached = np.isfinite(kept).all()
        rows.append(
            [
                f"**{method}**" if method in OURS else method,
                spread(kept),
                spread(lost(problem, method, target)) if reached else "-",
                *(
                    ""
                    if method == name
                    else interval(difference(kept, of_seeds(problem, name, target)))
                    for name in against
                ),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def best_of_ours(problem: str, target: float) -> str:
    """The one of ours that keeps most on validation data and the tuning seed."""
    kept = {
        name: np.nanmax(
            [
                -np.inf,
                *(kept_at(line["curve"], target) for line in trials_of(problem, name)),
            ]
        )
        for name in methods(problem)
        if name in OURS
    }
    return max(kept, key=lambda name: kept[name])


def bars(problem: str, target: float) -> str:
    """The two bars, from intervals: half of AdamW's loss, and less than LoRA."""
    best = best_of_ours(problem, target)
    ours, adamw, lora = (
        lost(problem, name, target) for name in (best, "AdamW", "LoRA")
    )
    to_half, to_lora = difference(ours, adamw / 2), difference(ours, lora)
    if not (to_half.word and to_lora.word):
        return f"The bars cannot be judged: too few seeds of `{best}` got there."
    there = np.isfinite(ours) & np.isfinite(adamw)
    all_ours = np.isfinite(ours).all()
    ours, adamw = ours[there], adamw[there]
    share = 100 * ours.mean() / adamw.mean()
    whole = "" if there.all() else f" These are the {there.sum()} seeds with both."
    if not all_ours:
        whole += " With ours one seed or more did not get there: **missed** with those."
    words = {"behind": "holds", "level": "is open", "ahead": "is missed"}
    return (
        f"`{best}` (chosen on validation data) loses {ours.mean():.1f} points where "
        f"AdamW loses {adamw.mean():.1f}: {share:.0f} %. *At most half of AdamW's "
        f"loss* {words[to_half.word]}: its loss minus half of AdamW's is "
        f"{interval(to_half)}. *Less than LoRA* {words[to_lora.word]}: its loss minus "
        f"LoRA's is {interval(to_lora)}.{whole}"
    )


def against(problem: str, target: float, method: str, reference: str) -> str:
    """Where one method stands to another, in words."""
    found = difference(
        of_seeds(problem, method, target), of_seeds(problem, reference, target)
    )
    words = {
        "ahead": "keeps more than",
        "level": "is level with",
        "behind": "keeps less than",
    }
    if not found.word:
        return f"cannot be compared with {reference}: not all seeds got there"
    return f"{words[found.word]} {reference} ({interval(found)} points)"


def sources(problem: str, target: float) -> str:
    """What importance from other sources is worth."""
    usual = of_seeds(problem, SOURCES[problem], target)
    groups: dict[str, dict[int, float]] = {}
    for line in lines(problem):
        if "importance" in line:
            kept = kept_at(line["curve"], target)
            groups.setdefault(line["importance"], {})[line["seed"]] = kept
    rows = [
        ["importance from", "kept", f"kept more than with {OLD_EXAMPLES:,} examples"],
        ["---", "---:", "---:"],
        [f"{OLD_EXAMPLES:,} old examples", spread(usual), ""],
    ]
    for name, found in groups.items():
        kept = np.array([found.get(seed, np.nan) for seed in PLANS[problem].seeds])
        rows.append([name, spread(kept), interval(difference(kept, usual))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def filling(problem: str) -> str:
    """What it costs to fill, beside one run of fine-tuning."""
    found = [line["seconds"] for line in lines(problem) if line["part"] == "filling"]
    run = np.median([x["seconds"] for x in trials_of(problem, "AdamW")])
    importance = np.median([x["importance"] for x in found])
    fisher = np.median([x["fisher 1"] for x in found])
    return (
        f"{importance:.0f} s for importance and {fisher:.0f} s for one Fisher diagonal "
        f"(medians over pretrained networks: {len(found)}; compilation included), "
        f"beside {run:.0f} s for a run of fine-tuning with AdamW and its scores"
    )


def period(problem: str) -> str:
    """When, on what and with what a problem was run."""
    days = sorted({line["date"] for line in lines(problem)})
    devices = ", ".join(sorted({line["device"] for line in lines(problem)}))
    versions = ", ".join(sorted({line["jax"] for line in lines(problem)}))
    return f"{days[0]} to {days[-1]}, {devices}, jax {versions}"


def runs(problem: str) -> int:
    """How many times a network was fine-tuned."""
    return sum("curve" in line for line in lines(problem))


def of_settings(problem: str, method: str) -> list[np.ndarray]:
    """The curve of each setting on test data, the mean over the seeds; all, or none."""
    plan = PLANS[problem]
    settings = [str(s) for s in trials(METHODS[method], plan.trials)]
    found = {
        (str(line["settings"]), line["seed"]): line["curve"]
        for line in trained(problem, "test")
        if line["method"] == method
    }
    if {(s, k) for s in settings for k in plan.seeds} - {*found}:
        return []
    return [np.mean([found[s, k] for k in plan.seeds], axis=0) for s in settings]


def picture(problem: str) -> Figure:
    """The frontier of all settings, and what each seed keeps with the chosen ones."""
    target = PLANS[problem].targets[0]
    points = {name: of_settings(problem, name) for name in METHODS}
    frontiers = {
        name: frontier([p[1:] for curve in curves for p in curve])
        for name, curves in points.items()
        if curves
    }
    kept = {name: of_seeds(problem, name, target) for name in methods(problem)}
    return drawn(problem, frontiers, kept, target, len(PLANS[problem].seeds))


def is_complete(problem: str, method: str) -> bool:
    """Whether all trials of a method have run, and all seeds of what they chose."""
    plan = PLANS[problem]
    if len(trials_of(problem, method)) < plan.trials:
        return False
    chosen = chosen_trials(lines(problem), method, plan)
    found = {
        (str(line["settings"]), line["seed"])
        for line in trained(problem, "test")
        if line["method"] == method
    }
    return {(str(s), k) for s in chosen.values() for k in plan.seeds} <= found


def has(problem: str) -> bool:
    """Whether what the others are compared with has been run."""
    return {"AdamW", "LoRA"} <= {*methods(problem)}


def pairs(problem: str) -> list[tuple[str, str]]:
    """What there is of the comparisons in words."""
    return [pair for pair in PAIRS if {*pair} <= {*methods(problem)}]


def missing(problem: str) -> str:
    """The methods that have not been run, or not to the end."""
    found = methods(problem)
    return ", ".join(f"`{name}`" for name in METHODS if name not in found)


def has_sources(problem: str) -> bool:
    """Whether other sources of importance were run with all seeds."""
    found = {line["seed"] for line in lines(problem) if "importance" in line}
    return found == {*PLANS[problem].seeds}


def render(template: str) -> str:
    """The page: every call between double braces in its place, paragraphs filled."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    names = globals() | {"tuning_seed": TUNING_SEED}
    page = environment.from_string(template).render(names)
    # Blocks of code as they are, the rest block by block.
    parts = re.split(r"(^```.*?^```\n)", page, flags=re.DOTALL | re.MULTILINE)
    return "".join(
        part if part.startswith("```") else _paragraphs(part) for part in parts
    )


def _paragraphs(text: str) -> str:
    blocks = re.split(r"\n{2,}", text.strip("\n"))
    start = "\n" if text.startswith("\n") else ""
    end = "\n" if text.endswith("\n\n") else ""
    return start + "\n\n".join(map(_filled, blocks)) + "\n" + end


def _filled(block: str) -> str:
    if block.startswith(("|", "#", "!", "<!--")):
        return block
    parts = [block]
    if block.startswith("- "):
        parts = ["- " + part for part in block[2:].split("\n- ")]
    return "\n".join(
        textwrap.fill(
            " ".join(part.split()),
            88,
            subsequent_indent="  " if part.startswith("- ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for part in parts
    )


def main() -> None:
    """Writes the page and the pictures."""
    PAGE.write_text(render(TEMPLATE.read_text("utf-8")), encoding="utf-8")
    for problem in PLANS:
        if has(problem):
            picture(problem).savefig(
                FOLDER / f"{problem}.png", dpi=100, metadata={"Software": None}
            )


if __name__ == "__main__":
    main()
