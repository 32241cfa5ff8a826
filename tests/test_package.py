"""What is shipped: types for the package and for the compiled module, docstring examples that run."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
from importlib.resources import files
from pathlib import Path

import pytest

import miwv_fast
from miwv_fast import _core

MODULES = [
    module.name
    for module in pkgutil.walk_packages(miwv_fast.__path__, "miwv_fast.")
    if not module.name.endswith("._core")
]


def test_types_are_shipped_and_name_all_that_is_compiled():
    stub = ast.parse((files("miwv_fast") / "_core.pyi").read_text())
    assert (files("miwv_fast") / "py.typed").is_file()
    declared = {node.name: node for node in stub.body if isinstance(node, ast.FunctionDef)}
    variables = {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    compiled = {name for name in dir(_core) if not name.startswith("_")}
    if not _core.has_cuda:
        declared = {name: node for name, node in declared.items() if not name.startswith("cuda_")}
    assert declared.keys() | variables == compiled
    for name, node in declared.items():
        assert len(node.args.args) == getattr(_core, name).__doc__.partition("->")[0].count(": "), name


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert not result.failed


def test_every_module_has_its_place_and_imports_point_down():
    """CONTRIBUTING's table names all modules, so that whoever looks for something finds it, those they need below."""
    root = Path(__file__).parents[1]
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index("| `python/miwv_fast/`") : text.index("## Add an instruction set")]
    row = {name: number for number, line in enumerate(table.splitlines()) for name in re.findall(r"`(\w+)/?`", line)}
    for path in (root / "python" / "miwv_fast").glob("[!_]*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module.startswith("miwv_fast"):
                _, _, module = node.module.partition(".")
                for name in [module.partition(".")[0]] if module else [each.name for each in node.names]:
                    assert row[path.stem] <= row[name], f"{path.stem} imports {name}"
        assert path.stem in row
