"""Every script is grpo.py but for its docstring, its imports and what its method marks as its own.

The training loop is written out in each script, so that a script can be read from top to bottom.
What that risks, copies that drift apart, is ruled out here.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPEN, CLOSE = "# <method>", "# </method>"
NAMES = ("ep_grpo.py", "erpo.py", "gtpo.py", "holderpo.py", "arca.py", "reft.py", "vineppo.py")
SCRIPTS = [ROOT / name for name in NAMES if (ROOT / name).exists()]


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
            assert inside == (mark == CLOSE), f"line {number}: {mark} where none is due"
            inside = mark == OPEN
        if mark == OPEN or not inside:
            lines.append(line)
    assert not inside, "the last region is not closed"
    return lines


def differences(source: str) -> list[str]:
    """Where a script's shared lines leave grpo.py's."""
    lines, template = shared_lines(source), shared_lines((ROOT / "grpo.py").read_text())
    pairs = zip(lines, template, strict=False)
    found = [f"{ours!r} is {theirs!r} in grpo.py" for ours, theirs in pairs if ours != theirs][:3]
    return found or ([] if len(lines) == len(template) else ["the files end at different places"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_loop_is_that_of_grpo(script: Path):
    assert not differences(script.read_text())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("loss.backward()", "loss.backward() if loss else None"),
        ("    engine.sync(policy)\n", ""),
        ("# </method>", "# </method>\n# <method>\n# </method>"),
        ("def clipped_loss(", "SCALE = 1\n\n\ndef clipped_loss("),
    ],
)
def test_what_counts_as_a_difference(before: str, after: str):
    source = (ROOT / "grpo.py").read_text()
    assert not differences(source)
    assert differences(source.replace(before, after, 1))


def test_a_region_left_open():
    source = (ROOT / "grpo.py").read_text()
    with pytest.raises(AssertionError, match="where none is due"):
        differences(source.replace("    # </method>\n", "", 1))


def test_regions_docstring_and_imports_are_free():
    source = (ROOT / "grpo.py").read_text()
    source = source.replace("# <method>\n", "# <method>\n    anything: int = 0\n", 1)
    source = source.replace('"""GRPO', '"""Another method\n\nGRPO', 1)
    assert not differences(source.replace("import common\n", "import common\nimport math\n", 1))
