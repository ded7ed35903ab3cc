#!/usr/bin/env bash
# torch's mean of equal values is not that value, and std of one row is not what it is of several.
#
# Behaviour: for 8 rewards of 1.2, mean() is off by 1.2e-7. std of the same values is 1.3e-7 for a
#   tensor [8] or [1, 8] and exactly 0 for [4, 8]. So (r - mean) / (std + 1e-8), which should be 0,
#   is 0.87 for one group and 11.9 for each of four; with 1e-4 in place of 1e-8 it is 0.0012. 0.5
#   and 1.0 are exact.
# Expected: 0 in each case, or at least the same value whatever the number of rows.
# Consequence: a group of equal rewards, such as all wrong with a format reward of 0.3, gets an
#   advantage as large as one of different rewards if the epsilon is small.
# Versions: torch 2.13.0 (CPU), numpy 2.3.5, Python 3.11.
# Source: the mean is a float32 sum divided by n; nothing in the documentation of torch.std says
#   that its rounding depends on the number of rows.
# Workaround: grpo_advantages in grpo.py sets groups of equal rewards to 0; tests/test_grpo.py,
#   test_equal_rewards_give_exact_zeros.
#
# Run without arguments: it installs the packages below into a temporary environment (about 1 GB).
# Exit code: 0 if torch behaves as described, else 1.
set -euo pipefail

PINNED="
    filelock==4.2.11 fsspec==2026.9.0 Jinja2==3.1.6 MarkupSafe==3.0.4 mpmath==1.3.0
    networkx==3.6.1 numpy==2.3.5 setuptools==78.1.1 sympy==1.14.0 typing_extensions==4.16.0
"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
pip() {
    "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$@"
}
pip torch==2.13.0+cpu 2>/dev/null ||
    pip torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu
# shellcheck disable=SC2086
pip $PINNED

cd "$folder"
cat > check.py <<'PYTHON'
import torch

print("torch", torch.__version__)


def advantages(reward, rows, eps):
    rewards = torch.full((rows, 8), reward)
    mean, std = rewards.mean(-1, keepdim=True), rewards.std(-1, keepdim=True)
    found = ((rewards - mean) / (std + eps)).abs().max().item()
    print(f"reward {reward} rows {rows} eps {eps:g}: std {std[0].item():.2g}, advantage {found:.3g}")
    return found


one, four = advantages(1.2, 1, 1e-8), advantages(1.2, 4, 1e-8)
larger, exact = advantages(1.2, 4, 1e-4), advantages(1.0, 4, 1e-8)
as_described = 0.5 < one < 1 and 11 < four < 13 and 0.001 < larger < 0.002 and exact == 0

print("as described" if as_described else "CHANGED")
raise SystemExit(not as_described)
PYTHON
"$folder/venv/bin/python" check.py
