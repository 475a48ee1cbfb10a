"""What is built and shipped: the wheel holds all it needs, and nothing else."""

import ast
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tests.continual import forks

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_holds_the_package_whole(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {n for n in names if n.startswith("classp_jax/")}
    tracked = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "classp_jax").rglob("*")
        if p.suffix in (".py", ".toml") or p.name == "py.typed"
    }
    assert shipped == tracked
    others = {n.split("/")[0] for n in names - shipped}
    assert others == {wheel.name[: wheel.name.index("-py3")] + ".dist-info"}


def test_no_shipped_module_imports_torch_when_it_is_imported(built):
    """Torch is what tests and benchmarks compare with; users need not have it."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        sources = {n: archive.read(n) for n in archive.namelist() if n.endswith(".py")}
    assert "classp_jax/_classp.py" in sources
    importers = [
        name
        for name, source in sources.items()
        if "torch" in imported_at_module_level(ast.parse(source))
    ]
    assert importers == []


def imported_at_module_level(node: ast.AST) -> set[str]:
    """The packages that importing a module imports: not those inside functions."""
    found: set[str] = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in child.names}
        elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
            found.add(child.module.partition(".")[0])
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            found |= imported_at_module_level(child)
    return found


@pytest.mark.parametrize(
    ("source", "imports"),
    [
        ("import torch.nn as nn", True),
        ("from torch import nn", True),
        ("try:\n  import torch\nexcept ImportError:\n  torch = None", True),
        ("class A:\n  import torch", True),
        ("def f():\n  import torch", False),
        ("from .torch import x", False),
        ("import torchless", False),
    ],
)
def test_an_import_at_module_level_is_seen(source, imports):
    assert ("torch" in imported_at_module_level(ast.parse(source))) == imports


def test_the_sdist_holds_tests_and_licence_and_no_data(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [n.partition("/")[2] for n in archive.getnames()]
    for wanted in ("LICENSE", "README.md", "tests/test_golden.py", "pyproject.toml"):
        assert wanted in names
    assert not [n for n in names if n.startswith(("runs/", ".venv/"))]


def test_installed_from_the_wheel_it_works_from_another_folder(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = ["pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run(
        [sys.executable, "-m", *install, "--target", str(site), str(wheel)],
        check=True,
        capture_output=True,
    )

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=elsewhere,
            env=os.environ | {"PYTHONPATH": str(site), "XLA_FLAGS": forks.QUICK},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    in_a_loop, *_ = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    shown = run("-W", "error", "-c", f"{in_a_loop}\nprint(classp_jax.__file__)")
    assert shown.splitlines()[-1].startswith(str(site))
    small = ["--tasks", "1", "--epochs", "1", "--seeds", "0", "--points", "1"]
    run("-m", "classp_jax", "run", *small, "--methods", "classp", "--out", "found")
    assert (elsewhere / "found/report.md").exists()


def test_the_version_stands_in_one_more_place_only():
    import classp_jax

    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {classp_jax.__version__}\n" in citation
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {classp_jax.__version__}" in changelog
