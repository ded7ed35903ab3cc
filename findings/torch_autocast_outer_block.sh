#!/usr/bin/env bash
# A disabled autocast block around two updates makes autocast blocks inside it use old weights.
#
# Behaviour: autocast keeps the bfloat16 copies of weights until the outermost block ends. With
#   torch.autocast(enabled=False) around a loop, each inner enabled block computes with the weights
#   of the first pass, whatever optimizer.step() did since. The same loop without the outer block,
#   or with cache_enabled=False inside, uses the new weights.
# Expected: a disabled block changes nothing, and a cached copy of a weight that has changed is not
#   used.
# Consequence: a loop within `with autocast(enabled=args.bf16)` and a model that has blocks of its
#   own never sees an update, while the optimiser's weights move.
# Versions: torch 2.13.0 (CPU), numpy 2.3.5, Python 3.11.
# Source: torch/amp/autocast_mode.py, __exit__ clears the cache if autocast_decrement_nesting() is
#   0; disabled blocks are counted.
# Workaround: a script opens one block per forward pass and none around it (infra/models.py,
#   autocast).
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
import contextlib

import torch

print("torch", torch.__version__)


def outputs(outer, cache_enabled=True):
    """The output of a layer of ones before and after each of two updates; 1, 2, 3 is right."""
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(layer.weight)
    optimizer, found = torch.optim.SGD(layer.parameters(), lr=1.0), []
    with outer:
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache_enabled):
                output = layer(torch.ones(1, 1))
            found.append(output.item())
            (-output.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return found


disabled = torch.autocast("cpu", torch.bfloat16, enabled=False)
found = {
    "no outer block": outputs(contextlib.nullcontext()),
    "a disabled outer block": outputs(disabled),
    "and no cache": outputs(disabled, cache_enabled=False),
}
for name, values in found.items():
    print(f"{name:24}", *values)
as_described = list(found.values()) == [[1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]]

print("as described" if as_described else "CHANGED")
raise SystemExit(not as_described)
PYTHON
"$folder/venv/bin/python" check.py
