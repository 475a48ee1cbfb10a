"""What every fault of ``faults.py`` needs."""

import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import classp_jax
from classp_jax import continual

Outcome = tuple[int, str]
"""How often a fault was tried, and what came out."""


class Unexpected(Exception):  # noqa: N818 - no error of ours
    """A fault ended otherwise than the page says."""


def expect(condition: bool, what: Any) -> None:
    """Raises Unexpected unless the condition holds."""
    if not condition:
        raise Unexpected(str(what))


def one_line(function: Callable[[], Any]) -> tuple[str, float]:
    """The one-line error of ours that it ends in, and after how many seconds."""
    began = time.perf_counter()
    try:
        function()
    except continual.ContinualError as error:
        expect("\n" not in str(error), error)
        return str(error), time.perf_counter() - began
    raise Unexpected("it went well")


def python(
    code: str, *arguments: str, within: tuple[str, ...] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own, with this library.

    Args:
      code: what to run.
      *arguments: of the code.
      within: a command that runs the one after it.
      **variables: of its environment.
    """
    with started(code, *arguments, within=within, **variables) as process:
        output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def started(
    code: str, *arguments: str, within: tuple[str, ...] = (), **variables: str
) -> subprocess.Popen[str]:
    """The same, while it runs."""
    root = str(pathlib.Path(classp_jax.__file__).parents[1])
    return subprocess.Popen(
        [*within, sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": root} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_address() -> str:
    """An address on this machine that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """All that a process printed as its error, which must be one line."""
    lines = done.stderr.splitlines()
    expect(len(lines) == 1, done.stderr)
    return lines[0]
