"""Numbers, tables and lists as docs/paper.md shows them."""

from collections.abc import Iterable, Sequence

import numpy as np

from classp_jax.continual.results.statistics import Difference


def spread(numbers: Sequence[float] | np.ndarray) -> str:
    """Mean and sample standard deviation; of a seed that diverged, that it did."""
    numbers = np.asarray(numbers, float)
    known = numbers[~np.isnan(numbers)]
    if not len(known):
        return "diverged"
    text = f"{known.mean():.1f}"
    if len(known) > 1:
        text += f" ± {known.std(ddof=1):.1f}"
    if len(known) < len(numbers):
        text += f" ({len(numbers) - len(known)} of {len(numbers)} seeds diverged)"
    return text


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns but the first are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(found: Difference) -> str:
    """A difference with its interval and its word; a dash where there is none."""
    if not found.word:
        return "-"
    half = (found.high - found.low) / 2
    return f"{found.mean:+.1f} ± {half:.1f}, {found.word}"


def period(days: Iterable[str]) -> str:
    """The first and the last day, or the only one."""
    found = sorted(set(days))
    return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"


def joined(texts: Sequence[str]) -> str:
    """A list in words."""
    return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))
