"""Processes that have imported everything when they start: forks of one that has."""

import atexit
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

_METHODS = multiprocessing.get_all_start_methods()
_CONTEXT: Any = multiprocessing.get_context(
    "forkserver" if "forkserver" in _METHODS else "spawn"
)
if "forkserver" in _METHODS:
    # None of these starts a backend of JAX.
    _CONTEXT.set_forkserver_preload(
        [
            "jax.experimental.multihost_utils",
            "orbax.checkpoint",
            "sklearn.datasets",
            "sklearn.model_selection",
            "classp_jax.continual.cli",
            "classp_jax.continual.train.hosts",
            "classp_jax.continual.train.run",
        ]
    )


# XLA makes slower code in half the time, as the fixture quick_compilation does.
QUICK = " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
_OUTPUT, _ERRORS = "output", "errors"


class Fork:
    """A process that runs code as ``python -c`` does, and prints into a folder."""

    def __init__(self, code: str, arguments: Sequence[str], folder: pathlib.Path):
        folder.mkdir()
        for name in (_OUTPUT, _ERRORS):
            (folder / name).touch()
        self._folder = folder
        self._process = _CONTEXT.Process(
            target=_run, args=(code, list(arguments), str(folder))
        )
        self._process.start()

    def poll(self) -> int | None:
        """Its status, once it has ended."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Sends it a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Ends it, if it has not ended."""
        self._process.kill()
        self._process.join()

    def wait(self, timeout: float) -> int | None:
        """Its status when it has ended; None if that takes too long."""
        self._process.join(timeout)
        return self._process.exitcode

    def output(self) -> str:
        """What it has printed."""
        return (self._folder / _OUTPUT).read_text(encoding="utf-8")

    def errors(self) -> str:
        """What it has printed as its errors."""
        return (self._folder / _ERRORS).read_text(encoding="utf-8")


def _run(code: str, arguments: list[str], folder: str) -> None:
    for number, name in ((1, _OUTPUT), (2, _ERRORS)):
        file = os.open(os.path.join(folder, name), os.O_WRONLY)
        os.dup2(file, number)
    sys.argv = ["-c", *arguments]
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + QUICK
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    finally:
        # A process of multiprocessing leaves them out.
        atexit._run_exitfuncs()
