#!/usr/bin/env bash
# math-verify calls two words equal if they have the same letters.
#
# Behaviour: a word in a box is a product of letters, and products commute: \boxed{east} is equal to
#   \boxed{seat}, no to on, and a to A. Within \text{} the words differ.
# Expected: words are compared as texts, as they are within \text{}.
# Consequence: responses to questions whose answer is a word or a name get reward 1 for another
#   word.
# Versions: math-verify 0.9.0, latex2sympy2_extended 1.11.0, sympy 1.14.0, Python 3.11.
# Source: latex2sympy2_extended reads letters as symbols, in lower case, and neighbours as factors.
# Workaround: grading/kinds.py compares words as texts; tests/test_kinds.py, test_examples.
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

EQUAL = {
    ("east", "seat"): True,
    ("no", "on"): True,
    ("A", "a"): True,
    ("east", "west"): False,
    (r"\text{east}", r"\text{seat}"): False,
}
for name in ("math-verify", "latex2sympy2_extended", "sympy"):
    print(name, version(name))
print("east is read as", parse(r"\boxed{east}")[0])
as_described = True
for (reference, answer), equal in EQUAL.items():
    found = verify(parse(rf"\boxed{{{reference}}}"), parse(rf"\boxed{{{answer}}}"))
    print(f"verify {reference:12} {answer:12} {found}")
    as_described &= found == equal

print("as described" if as_described else "CHANGED")
raise SystemExit(not as_described)
PYTHON
"$folder/venv/bin/python" check.py
