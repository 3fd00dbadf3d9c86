"""Imports point one way: a module imports only from lower levels, and never in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest
from helpers import ROOT

# From the lowest to the highest. A module imports only from lower levels and from its own package.
LEVELS = [
    {"utils"},
    {"options", "files", "image_files"},
    {"layers"},
    {"models", "datasets"},
    {"cpu", "gpu", "reference"},
    {"engine"},
    {"cli"},
    {"main", "prediction", "prepare"},
]
LEVEL = {package: level for level, names in enumerate(LEVELS) for package in names}


def project_files():
    """The project's .py files, {dotted name: path}, except tests and benchmarks."""
    files = {}
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] not in ("tests", "benchmarks"):
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = project_files()


def imported_modules(path):
    """The modules of the project that a file imports, in functions too, with their packages."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            # `from engine import sampling` imports engine.sampling, `from models import x` models.
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return (found | {package(name) for name in found}) & FILES.keys()


def package(name):
    return name.partition(".")[0]


IMPORTS = {name: imported_modules(path) for name, path in FILES.items()}


@pytest.mark.parametrize("name", FILES)
def test_a_module_imports_only_from_below_and_from_its_own_package(name):
    """Regression: utils.py imported the models, so that no module could be used without them."""
    assert package(name) in LEVEL, f"give {package(name)} a level"
    for imported in IMPORTS[name] - {name}:
        below = LEVEL[package(imported)] < LEVEL[package(name)]
        assert below or package(imported) == package(name), f"{name} imports {imported}"


def test_no_circular_imports():
    """Regression: an import inside a function hid a cycle."""
    graph = {name: imports - {name, package(name)} for name, imports in IMPORTS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))
