"""Every script equals grpo.py except for its docstring, its imports and its method's regions.

The training loop is written out in each script, so that a script can be read from top to bottom.
These tests keep the copies from drifting apart.
"""

import ast

import pytest
from conftest import ROOT, SCRIPTS

OPEN, CLOSE = "# <method>", "# </method>"


def shared_lines(source: str) -> list[str]:
    """The lines below the imports, without what lies inside the method regions."""
    head = 0
    for node in ast.parse(source).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not (is_docstring or isinstance(node, ast.Import | ast.ImportFrom)):
            break
        head = node.end_lineno
    lines, inside = [], False
    for number, line in enumerate(source.splitlines()[head:], head + 1):
        mark = line.strip()
        if mark in (OPEN, CLOSE):
            assert inside == (mark == CLOSE), f"line {number}: {mark} is not expected here"
            inside = mark == OPEN
        if mark == OPEN or not inside:
            lines.append(line)
    assert not inside, "the last region is not closed"
    return lines


def differences(source: str) -> list[str]:
    """The first shared lines of a script that differ from grpo.py's."""
    lines, template = shared_lines(source), shared_lines((ROOT / "grpo.py").read_text())
    pairs = zip(lines, template, strict=False)
    found = [f"{ours!r} is {theirs!r} in grpo.py" for ours, theirs in pairs if ours != theirs][:3]
    return found or ([] if len(lines) == len(template) else ["the files end at different places"])


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_the_loop_is_that_of_grpo(script):
    assert not differences((ROOT / f"{script}.py").read_text())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("loss.backward()", "loss.backward() if loss else None"),
        ("    engine.sync(policy)\n", ""),
        ("        engine.sleep()", "        groups = groups[:1]\n        engine.sleep()"),
        ("optimizer.zero_grad()\n", "optimizer.zero_grad(set_to_none=False)\n"),
        ("kl_to_old=kl", "kl=kl"),
        ("# </method>", "# </method>\n# <method>\n# </method>"),
        ("def clipped_loss(", "SCALE = 1\n\n\ndef clipped_loss("),
    ],
)
def test_what_counts_as_a_difference(before, after):
    source = (ROOT / "grpo.py").read_text()
    assert not differences(source)
    assert differences(source.replace(before, after, 1))


def test_a_region_left_open():
    source = (ROOT / "grpo.py").read_text()
    with pytest.raises(AssertionError, match="is not expected here"):
        differences(source.replace("    # </method>\n", "", 1))


def test_regions_docstring_and_imports_are_free():
    source = (ROOT / "grpo.py").read_text()
    source = source.replace("# <method>\n", "# <method>\n    anything: int = 0\n", 1)
    source = source.replace('"""GRPO', '"""Another method\n\nGRPO', 1)
    assert not differences(source.replace("import common\n", "import common\nimport math\n", 1))
