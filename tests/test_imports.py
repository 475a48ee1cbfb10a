"""What importing the package loads: jax and optax for the core, and nothing else."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

import classp_jax

ROOT = pathlib.Path(classp_jax.__file__).parent
# What a user without the extras has.
ALLOWED = sys.stdlib_module_names | {"classp_jax", "jax", "jaxlib", "numpy", "optax"}
HEAVY = {
    "flax",
    "matplotlib",
    "optuna",
    "orbax",
    "rich",
    "sklearn",
    "tensorflow",
    "tensorflow_datasets",
    "torch",
    "tyro",
}

# One step too: a module that is only loaded when it is used counts as loaded.
CORE = """
import classp_jax
import jax.numpy as jnp
tx = classp_jax.classp(0.1, threshold=1e-4)
g = {"w": jnp.ones(3)}
updates, state = tx.update(g, tx.init(g), g)
classp_jax.free_fraction(state), classp_jax.update_density(updates)
params = {"w": jnp.ones(3)}
classp_jax.regularizers.ewc(1.0).init(params)
classp_jax.regularizers.si(1.0).init(params)
"""


def modules_loaded_by(code: str) -> set[str]:
    """All modules that a fresh interpreter has loaded after running ``code``."""
    code += '\nimport sys\nprint("LOADED", *sys.modules)'
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("LOADED")[-1].split())


def test_the_core_loads_jax_and_optax_and_nothing_heavy():
    loaded = modules_loaded_by(CORE)
    assert {"jax", "optax", "classp_jax"} <= loaded
    assert loaded & HEAVY == set()
    ours = {name for name in loaded if name.startswith("classp_jax.")}
    assert not {n for n in ours if n.startswith("classp_jax.continual")}
    # At hand without an import of its own.
    assert "classp_jax.regularizers" in ours


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported_names(nodes: list[ast.stmt] | list[ast.AST]) -> set[str]:
    """Full names of what import statements name, such as ``jax.numpy``."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_module(name: str) -> str:
    """The module of this package that an imported name belongs to."""
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


ROOMS = ("_", "importance", "regularizers", "rivals")
CORE_AND_REGULARIZERS = [
    name
    for name in MODULES
    if name == "classp_jax"
    or name.startswith(tuple(f"classp_jax.{room}" for room in ROOMS))
    if name != "classp_jax.__main__"
]


@pytest.mark.parametrize("module", CORE_AND_REGULARIZERS)
def test_core_modules_name_no_other_dependency(module: str):
    tree = ast.parse(MODULES[module].read_text())
    # Imports inside functions count too.
    names = imported_names(list(ast.walk(tree)))
    assert {name.split(".")[0] for name in names} <= ALLOWED
    assert not {n for n in names if n.startswith("classp_jax.continual")}


def test_no_circular_imports():
    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        names = imported_names(ast.parse(path.read_text()).body)
        graph[module] = {
            own_module(name) for name in names if name.split(".")[0] == "classp_jax"
        }
    # The core is below everything: it does not import the package that exports it.
    assert "classp_jax._arrays" in graph["classp_jax._accumulate"]
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) == set(MODULES)
    assert order.index("classp_jax") > order.index("classp_jax._classp")
