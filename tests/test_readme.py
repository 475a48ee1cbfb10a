"""README's example runs, and the commands it shows are those that CI runs."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_example_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(code.strip().splitlines()) <= 22
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loss, accumulator = map(float, done.stdout.split())
    assert loss < 1e-3
    assert accumulator > 0


def test_commands_are_single_lines_that_make_their_environment():
    commands = re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL)
    first, tests = commands[0].strip(), commands[-1].strip()
    for command in (first, tests):
        assert "\n" not in command
        assert command.startswith("python3 -m venv .venv && ")
    assert first.endswith("classp-jax run")
    assert "pytest" in tests


def test_every_public_name_is_in_the_readme():
    import classp_jax

    for name in classp_jax.__all__:
        if not name.endswith("State"):
            assert f"`{name}`" in README or f"{name}(" in README, name
