"""How methods look: the same colour, line and marker in every picture."""

import itertools
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from classp_jax.continual.results.records import Results
from classp_jax.continual.results.variants import variants


class Style(NamedTuple):
    """Colour, line and marker of a method."""

    color: str
    line: str
    marker: str


# Okabe & Ito's colour-blind safe palette without its yellow, which vanishes on white.
_BLACK, _ORANGE, _SKY, _GREEN, _BLUE, _VERMILLION, _PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)

# The bounds are black; a variant has its method's colour, with another line.
_STYLES = {
    "sgd": Style(_BLACK, "-", "o"),
    "joint": Style(_BLACK, "--", "p"),
    "adam": Style(_ORANGE, "-", "s"),
    "adagrad": Style(_GREEN, "-", "D"),
    "classp": Style(_VERMILLION, "-", "^"),
    "classp-published": Style(_VERMILLION, "--", "v"),
    "ewc": Style(_BLUE, "-", "P"),
    "online-ewc": Style(_BLUE, "--", "X"),
    "si": Style(_PURPLE, "-", "h"),
    "replay": Style(_SKY, "-", "<"),
    "ewc+classp": Style(_PURPLE, "--", ">"),
}
_SPARE_STYLES = tuple(
    Style(color, line, marker)
    for line, marker in (("--", "*"), ("-.", "d"), (":", "8"), ("-", "H"))
    for color in (_GREEN, _ORANGE, _SKY, _PURPLE, _BLUE, _VERMILLION, _BLACK)
)


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """Colour, line and marker by label.

    The methods of this package always look the same; others, and a method's further
    settings, take what is spare, in their order.

    Example:
      >>> styles(["classp", "mine"])["classp"].color
      '#D55E00'
    """
    chosen = {label: _STYLES[label] for label in labels if label in _STYLES}
    used = {(style.color, style.line) for style in chosen.values()}
    spare = itertools.cycle([s for s in _SPARE_STYLES if (s.color, s.line) not in used])
    return {m: chosen[m] if m in chosen else next(spare) for m in labels}


RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.usetex": False,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.edgecolor": "0.4",
    "axes.facecolor": "white",
    "axes.axisbelow": True,
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "savefig.dpi": 150,
    "svg.hashsalt": "classp-jax",
    "xtick.color": "0.4",
    "xtick.labelcolor": "0.15",
    "xtick.labelsize": 9,
    "ytick.color": "0.4",
    "ytick.labelcolor": "0.15",
    "ytick.labelsize": 9,
}
"""Settings of matplotlib; the user's own must not change what a report looks like."""

WIDTH = 10.0
"""The width of a picture, in inches."""

FONT_SIZE = 10
"""In points."""


def literal(text: str) -> str:
    """Text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def shortened(text: str, width: int) -> str:
    """At most so many characters, and no formula in them."""
    return literal(text if len(text) <= width else f"{text[: width - 1]}…")


def method_styles(results: Results) -> dict[str, Style]:
    """The style of every method, drawn or not, so that none depends on who diverged."""
    return styles([variant.label for variant in variants(results.runs)])


def with_left_out(label: str, results: Results) -> str:
    """An axis label, with a line below it on the methods that are not drawn."""
    left_out = [
        f"{variant.label} ({diverged} of {len(variant.runs)} seeds)"
        for variant in variants(results.runs)
        if (diverged := sum(run.diverged for run in variant.runs))
    ]
    if not left_out:
        return label
    note = textwrap.fill(f"Not drawn because diverged: {', '.join(left_out)}", 100)
    return f"{label}\n{literal(note)}"
