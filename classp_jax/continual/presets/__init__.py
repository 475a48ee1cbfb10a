"""Experiments ready to run: NAME.SIZE.toml, each with settings tuned for it."""

import pathlib

from classp_jax.continual._names import nearest
from classp_jax.continual.config import ConfigError, Experiment, read

FOLDER = pathlib.Path(__file__).parent


def sizes() -> dict[str, tuple[str, ...]]:
    """The names of the presets, each with its sizes.

    Example:
      >>> sizes()["phrasebank-imdb"]
      ('paper', 'small')
    """
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted(FOLDER.glob("*.toml")):
        name, size = path.stem.rsplit(".", 1)
        found[name] = (*found.get(name, ()), size)
    return found


def load(name: str, size: str | None = None) -> Experiment:
    """An experiment that comes with the package.

    Args:
      name: one of :func:`sizes`.
      size: one of its sizes; by default ``"small"``, or the only one.

    Raises:
      ConfigError: for an unknown name or size.
    """
    known = sizes()
    if name not in known:
        raise ConfigError(f"unknown preset {name!r}{nearest(name, known)}")
    if size is None:
        size = "small" if "small" in known[name] else known[name][0]
    if size not in known[name]:
        raise ConfigError(
            f"preset {name!r} has no size {size!r}; it has {', '.join(known[name])}"
        )
    return read(FOLDER / f"{name}.{size}.toml")
