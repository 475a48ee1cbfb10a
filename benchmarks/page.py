"""Tables in a page of the documentation, written from stored results."""

import pathlib
import re
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A Markdown table; all columns but the first ``words`` are numbers."""
    line = [*["---"] * words, *["---:"] * (len(header) - words)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, line, *rows))


def filled(text: str, tables: dict[str, str]) -> str:
    """The page with each table between ``<!-- NAME -->`` and ``<!-- end -->``.

    Raises:
      ValueError: if the page has no such place.
    """
    for name, content in tables.items():
        place = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
        text, number = re.subn(
            place, lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text, flags=re.S
        )
        if number != 1:
            raise ValueError(f"The page has {number} places for {name!r}, not one.")
    return text


def write(path: pathlib.Path, tables: dict[str, str]) -> None:
    """Puts the tables into a page."""
    text = path.read_text(encoding="utf-8")
    path.write_text(filled(text, tables), encoding="utf-8")
