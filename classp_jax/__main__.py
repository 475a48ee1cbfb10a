"""The entry point of ``classp-jax``, also without the extra that its commands need."""

import os
import signal
import sys
from typing import Any


def main() -> int:
    """Runs the command line, or says in one line what it lacks."""
    try:
        from classp_jax.continual import cli
    except ModuleNotFoundError as error:
        print(
            f"classp-jax: {error.name} is not installed; the command line needs the "
            'extra "continual": pip install "classp-jax[continual]"',
            file=sys.stderr,
        )
        return 1

    def terminate(*_: Any) -> None:
        raise cli.Terminated

    signal.signal(signal.SIGTERM, terminate)
    status = cli.main()
    if status != cli.OK:
        # Threads may still be training, or waiting for another process. An orderly exit
        # waits for some, and crashes others by taking their memory away.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
