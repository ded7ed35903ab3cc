"""How the repository is built: who imports whom, and how dense the shared code may be."""

import ast
import dataclasses
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, read_metrics

import common

COMMON = ROOT / "common.py"
INFRA = sorted((ROOT / "infra").glob("*.py"))
GRADING = sorted((ROOT / "grading").glob("*.py"))
SHARED = [COMMON, *INFRA, *GRADING]
PHASES = [
    "Roll out and verify",
    "Score the rollouts",
    "Compute the advantages",
    "Update on",
    "Log metrics",
]


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text()))


def imports(path: Path) -> set[str]:
    """The top-level packages that a file imports, inside functions too."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_the_standard_library_torch_and_common(script):
    assert imports(ROOT / f"{script}.py") <= sys.stdlib_module_names | {"torch", "common"}


def test_packages_do_not_import_what_is_above_them():
    above = {"common", "tools", "benchmark", "tests", *SCRIPTS}
    for path in INFRA:
        assert imports(path).isdisjoint(above), path.name
    for path in GRADING:
        assert imports(path).isdisjoint(above | {"infra", "torch", "transformers"}), path.name


def words(path: Path) -> set[str]:
    """The identifiers of a file and the words in its texts, except docstrings and comments."""
    found = set()
    tree = ast.parse(path.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        names = [getattr(node, field, None) for field in ("id", "attr", "arg", "name")]
        found |= {name for name in names if isinstance(name, str)}
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            found |= set(re.findall(r"\w+", node.value.replace("-", "_")))
    return found


def test_shared_code_names_no_setting_of_a_method():
    own = set()
    for script in SCRIPTS:
        own |= {field.name for field in dataclasses.fields(importlib.import_module(script).Args)}
    own -= {field.name for field in dataclasses.fields(common.RunArgs)}
    others = {("data.py", "normalize"), ("vllm_engine.py", "level")}  # functions of libraries
    assert len(own) > 20
    assert not {(path.name, w) for path in [COMMON, *INFRA] for w in words(path) & own} - others


def test_common_stays_small():
    kinds = ast.FunctionDef | ast.ClassDef
    body = ast.parse(COMMON.read_text()).body
    public = [n.name for n in body if isinstance(n, kinds) and not n.name.startswith("_")]
    assert 10 < len(public) <= 40


@pytest.mark.parametrize("path", SHARED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_functions_are_short_and_lines_are_plain(path):
    source = path.read_text()
    docs = {n.value.lineno for n in nodes(path) if isinstance(n, ast.Expr)}
    kinds = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type in kinds]
    tokens = [t for t in tokens if t.type != tokenize.STRING or t.start[0] not in docs]
    lines = max(1, len({t.start[0] for t in tokens}))
    made = [type(n).__name__ for n in nodes(path)]
    comprehensions = sum(name.endswith("Comp") or name == "GeneratorExp" for name in made)
    assert len(tokens) / lines <= 11
    assert 100 * comprehensions / lines <= 6
    assert 100 * made.count("IfExp") / lines <= 3
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 45, node.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_main_has_five_phases_in_order(script):
    main = (ROOT / f"{script}.py").read_text().partition("\ndef main(")[2]
    found = re.findall(r"^        # (\d)\. (.*)$", main, re.MULTILINE)
    assert [number for number, _ in found] == list("12345")
    assert all(text.startswith(phase) for (_, text), phase in zip(found, PHASES, strict=True))


def test_a_script_and_the_shared_code_are_all_it_needs(tiny_model, tmp_path):
    """Copied into an empty folder, they train there with the defaults of the README."""
    for name in ("ep_grpo.py", "common.py", "infra", "grading", tiny_model.name):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    flags = "--engine transformers --device cpu --steps 2 --prompts-per-step 2 --group-size 2"
    flags += " --max-new-tokens 16 --eval-problems 2 --eval-samples 2 --run-dir run"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "ep_grpo.py", *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
