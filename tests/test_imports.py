"""`import react_fast` is light, and imports inside the package point one way."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import react_fast

ROOT = Path(react_fast.__file__).parent
# What each part may import of the others. `info` describes the core; `_core` is compiled.
OPS = {"_core", "ops", "kernels", "reference"}
ALLOWED = {
    "reference": set(),
    "kernels": set(),
    "envs": set(),
    "ops": OPS,
    "integrations": OPS | {"presets", "tracker", "trainer"},
    "presets": OPS,
    "info": OPS,
    "tracker": OPS,
    "trainer": OPS | {"tracker", "envs", "info"},
    "cli": OPS | {"tracker", "envs", "info", "trainer", "integrations"},
}
HEAVY = (
    "transformers",
    "triton",
    "matplotlib",
    "typer",
    "pydantic",
    "rich",
    "gymnasium",
    "scipy",
    "tensorboard",
)


def _modules():
    """Every file with its dotted place; the kernels lie in a folder of their own until they are installed."""
    kernels = Path(importlib.util.find_spec("react_fast.kernels").submodule_search_locations[0]).resolve()
    files = {path: path.relative_to(ROOT) for path in ROOT.rglob("*.py")}
    files |= {path: "kernels" / path.relative_to(kernels) for path in kernels.glob("*.py")}
    for path, place in sorted(files.items()):
        parts = place.with_suffix("").parts
        yield path, parts[:-1] if parts[-1] == "__init__" else parts


def _imported(path, module):
    """Names below react_fast that a file imports, relative imports resolved: ("ops", "backend"), ..."""
    package = module if path.name == "__init__.py" else module[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
            yield from (name[1:] for name in names if name[0] == "react_fast")
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + tuple(
                (node.module or "").split(".")[: bool(node.module)]
            )
            yield from [base] if base else [(alias.name,) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "react_fast":
            base = tuple(node.module.split(".")[1:])
            yield from [base] if base else [(alias.name,) for alias in node.names]


def test_imports_point_one_way():
    wrong = []
    for path, module in _modules():
        if not module:  # react_fast/__init__.py gathers the public names
            continue
        part = module[0]
        for target in _imported(path, module):
            if target[0] != part and target[0] not in ALLOWED[part]:
                wrong.append(f"{'.'.join(module)} imports {'.'.join(target)}")
    assert not wrong, "\n".join(wrong)


def test_every_part_is_covered_by_the_rule():
    assert {module[0] for _, module in _modules() if module} <= set(ALLOWED)


@pytest.mark.parametrize("statement", ["import react_fast", "import react_fast.info, react_fast.cli"])
def test_import_is_light(statement):
    code = f"import torch, sys; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "react_fast" in loaded
    assert not loaded & set(HEAVY)


def test_public_names_resolve():
    for name in react_fast.__all__:
        assert getattr(react_fast, name) is not None, name
