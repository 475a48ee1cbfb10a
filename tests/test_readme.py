"""README: its examples run, its commands are what CI runs, its links lead somewhere."""

import os
import pathlib
import re
import subprocess
import sys

from tests.continual import forks

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LOOP, FINETUNE, EXPERIMENT = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run(code, folder):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env={**os.environ, "XLA_FLAGS": forks.QUICK},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_loop_is_short_and_learns_and_fine_tuning_goes_on_from_it(tmp_path):
    assert len(LOOP.strip().splitlines()) <= 12
    filled = "print(classp_jax.accumulators(state)['w'].shape)"
    first, *_, last = run(f"{LOOP}{FINETUNE}{filled}", tmp_path).splitlines()
    assert float(first) < 1e-3
    assert last == "(2,)"


def test_the_experiment_runs(tmp_path):
    assert len(EXPERIMENT.strip().splitlines()) <= 22
    small = EXPERIMENT.replace("tasks=5", "tasks=2, max_train=64")
    small = small.replace("range(3),", "range(2), epochs=1,")
    assert small.count("epochs=1") == small.count("max_train") == 1
    shown = run(small, tmp_path)
    for method in ("adam", "classp", "both"):
        assert re.search(rf"^{method} .*±", shown, flags=re.MULTILINE)
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    assert (tmp_path / "runs/mine/results.csv").exists()


def test_commands_are_single_lines_that_make_their_environment():
    first, tests = re.findall(r"```console\n(.*?)\n```", README, flags=re.DOTALL)
    for command in (first, tests):
        assert "\n" not in command
        assert command.startswith("python3 -m venv .venv && ")
    assert first.endswith("&& .venv/bin/classp-jax run")
    assert "pytest" in tests


def test_it_is_one_screen_without_numbers_to_go_out_of_date():
    assert len(README.splitlines()) <= 100
    assert not re.search(r"\d ?%|±", re.sub(r"```.*?```", "", README, flags=re.DOTALL))


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_public_name_is_explained():
    import classp_jax

    algorithm = (ROOT / "docs/algorithm.md").read_text(encoding="utf-8")
    for name in classp_jax.__all__:
        if not name.endswith("State"):
            assert f"`{name}`" in algorithm or f"{name}(" in algorithm, name


def test_no_page_has_the_words_we_do_not_use():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    unwanted = r"gone on with|[Tt]old of boundary|shall move|\btries\b|\ba task, one\b"
    found = [
        (page.name, line)
        for page in pages
        for line in page.read_text(encoding="utf-8").splitlines()
        if re.search(unwanted, line) and page.name != "paper.md"
    ]
    assert not found
