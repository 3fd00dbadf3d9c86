"""The order of the modules: which may import which, and how long a function may be."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT

# From the lowest to the highest. A module imports only from lower levels and from its own package.
LEVELS = [
    {"utils"},
    {"layers"},
    {"models", "datasets"},
    {"cpu", "reference"},
    {"engine"},
    {"cli"},
    {"main", "prediction"},
]
LEVEL = {package: level for level, names in enumerate(LEVELS) for package in names}
LONGEST_FUNCTION = 40  # lines


def project_files():
    """The project's .py files, {dotted name: path}, except tests and benchmarks."""
    files, paths = {}, [*ROOT.glob("*.py"), *(p for r in LEVEL for p in ROOT.glob(f"{r}/**/*.py"))]
    for path in sorted(paths):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = project_files()


def imported_modules(path, known):
    """The `known` modules that a file imports, in functions too, with the packages they are in."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            # `from engine import sampling` imports engine.sampling, `from models import x` models.
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    with_packages = set()
    for name in found:
        parts = name.split(".")
        with_packages |= {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    return with_packages & set(known)


IMPORTS = {name: imported_modules(path, FILES) for name, path in FILES.items()}


def package(name):
    return name.partition(".")[0]


def test_only_the_scripts_and_three_modules_are_at_the_top_level():
    """A file without a place in LEVELS was checked by no rule."""
    names = {"main.py", "prediction.py", "models.py", "datasets.py", "utils.py"}
    assert {path.name for path in ROOT.glob("*.py")} == names
    for pattern in ("*.cpp", "*.cc", "*.c", "*.cu", "*.h", "*.hpp", "*.sh"):
        assert not list(ROOT.glob(pattern))


def test_every_package_has_a_level():
    """As above, for folders."""
    folders = {p.parent.relative_to(ROOT).parts[0] for p in ROOT.glob("[!.]*/*.py")}
    assert folders - {"tests", "benchmarks"} == {r for r in LEVEL if (ROOT / r).is_dir()}


@pytest.mark.parametrize("name", FILES)
def test_a_module_imports_only_from_below_and_from_its_own_package(name):
    """utils.py imported the models, so that no module could be read or used without them."""
    for imported in IMPORTS[name] - {name}:
        below = LEVEL[package(imported)] < LEVEL[package(name)]
        assert below or package(imported) == package(name), f"{name} imports {imported}"


def test_no_circular_imports():
    """An import inside a function hid a cycle; those count here too."""
    graph = {name: imports - {name, package(name)} for name, imports in IMPORTS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_utils_imports_nothing_of_the_project():
    """It imported models.py, and with it so did every other module."""
    assert IMPORTS["utils"] == set()


def test_distributed_does_not_import_the_models():
    """It imported the models indirectly, through utils.py."""
    code = "import sys, engine.distributed; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name for name in run.stdout.split() if package(name) in LEVEL}
    assert loaded == {"utils", "engine", "engine.distributed"}


def functions(path):
    """The functions of a file, those in classes and functions too."""
    kinds = ast.FunctionDef, ast.AsyncFunctionDef
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


@pytest.mark.parametrize("name", FILES)
def test_no_function_is_long(name):
    """The parser of the flags had 128 lines and the training loop 79. Lists, such as those of
    flags, are tables outside of functions."""
    for function in functions(FILES[name]):
        lines = function.end_lineno - function.lineno + 1
        assert lines <= LONGEST_FUNCTION, f"{name}.{function.name} has {lines} lines"
