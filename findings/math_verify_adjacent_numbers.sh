#!/usr/bin/env bash
# math-verify adds numbers that stand next to each other, and drops what it does not read.
#
# Behaviour: parse reads 2(3) and 2\quad 3 as 5, and 12\,345, with LaTeX's thin space between
#   thousands, as 357. It reads 0.\overline{3} as 0, 101_2 as 101 and \langle 1,2\rangle as 1.2.
#   None of these raises. So verify calls 0 and 0.\overline{3} equal, and 101_2 and 101_3.
# Expected: a product, a grouped number, a repeating decimal, a number in its base and a vector, or
#   an empty list as for other texts that are not read.
# Consequence: a right answer gets reward 0, and a wrong one reward 1.
# Versions: math-verify 0.9.0, latex2sympy2_extended 1.11.0, sympy 1.14.0, Python 3.11.
# Source: latex2sympy2_extended/latex2sympy2.py, convert_postfix_list: an integer before any
#   positive rational is taken for a mixed number.
# Workaround: grading/kinds.py reads these kinds itself; tests/test_kinds.py, test_examples.
#
# Run without arguments: it installs the packages below into a temporary environment (about 70 MB).
# Exit code: 0 if math-verify behaves as described, else 1.
set -euo pipefail

PINNED="
    antlr4-python3-runtime==4.13.2 latex2sympy2_extended==1.11.0 math-verify==0.9.0
    mpmath==1.3.0 sympy==1.14.0
"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
pip() {
    "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$@"
}
# shellcheck disable=SC2086
pip $PINNED

cd "$folder"
cat > check.py <<'PYTHON'
from importlib.metadata import version

from math_verify import parse, verify

READ = {
    r"2(3)": 5,
    r"2\quad 3": 5,
    r"12\,345": 357,
    r"0.\overline{3}": 0,
    r"101_2": 101,
    r"\langle 1,2\rangle": 1.2,
}
EQUAL = {
    (r"0", r"0.\overline{3}"): True,
    (r"\frac13", r"0.\overline{3}"): False,
    (r"101_2", r"101_3"): True,
    (r"5", r"101_2"): False,
    (r"6", r"2(3)"): False,
    (r"12345", r"12\,345"): False,
}
for name in ("math-verify", "latex2sympy2_extended", "sympy"):
    print(name, version(name))
as_described = True
for text, value in READ.items():
    found = parse(f"${text}$")[0]
    print(f"parse {text:20} {found}")
    as_described &= abs(float(found) - value) < 1e-9
for (reference, answer), equal in EQUAL.items():
    found = verify(parse(f"${reference}$"), parse(f"${answer}$"))
    print(f"verify {reference:12} {answer:16} {found}")
    as_described &= found == equal

print("as described" if as_described else "CHANGED")
raise SystemExit(not as_described)
PYTHON
"$folder/venv/bin/python" check.py
