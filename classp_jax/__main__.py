"""The entry point of ``classp-jax``, also without the extra that its commands need."""

import sys


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
    return cli.main_of_process()


if __name__ == "__main__":
    sys.exit(main())
