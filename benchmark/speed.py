"""What a step of grpo.py costs, and what the same step costs in TRL's GRPOTrainer.

    python benchmark/speed.py                # twenty minutes on two cores; on a GPU, a larger shape
    python benchmark/speed.py --only "ours: tiny: vllm,trl: tiny: transformers"
    python benchmark/speed.py --write        # puts the numbers into docs/speed.md

Each section runs in a process of its own, so that its peak memory is its own, and is written to
benchmark/results/speed.json when it ends. docs/speed.md says what is compared with what.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import shared
import torch
import tyro
from shared import RESULTS, ROOT, markdown, read_json, write_json
from trl_side import peak_bytes

import grpo
from grading import Grader

PAGE = ROOT / "docs" / "speed.md"
TRL = ROOT / ".venv-trl"  # TRL's own files; all else is this project's
PARTS = ("sync", "rollout", "verify", "score", "update", "other")
QWEN = {  # vocabulary, hidden, layers, heads, key-value heads, intermediate
    "GSM8K": (49152, 576, 30, 9, 3, 1536),  # as SmolLM2-135M
    "0.5B": (151936, 896, 24, 14, 2, 4864),
    "1.5B": (151936, 1536, 28, 12, 2, 8960),
}


class Shape(NamedTuple):
    """The work of one step."""

    device: str
    prompts: int
    group: int
    new_tokens: int
    steps: int  # measured, after one that is not
    joined: int = 1  # problems of tiny/ that make one prompt, of about 20 tokens each


SHAPES = {  # by model: "tiny" or a key of QWEN
    "tiny": Shape("cpu", 16, 8, 27, steps=20),
    "GSM8K": Shape("cpu", 2, 8, 224, steps=1, joined=7),
    "0.5B": Shape("cpu", 2, 4, 24, steps=2),
    "1.5B": Shape("cuda", 16, 8, 1024, steps=5),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECTIONS = [
    f"{side}: {model}: {engine}"
    for model, shape in SHAPES.items()
    for side in ("ours", "trl")
    for engine in ("vllm", "transformers")
    if shape.device == DEVICE
]


@dataclass
class Args:
    only: str = ""
    """sections to run, separated by commas; empty: all"""
    write: bool = False
    """only write docs/speed.md from the results"""
    out: str = ""
    """run --only, one section of ours, in this process and write what it measured to this file"""


def model_folder(name: str, folder: Path) -> Path:
    """The tiny model, or random weights in a shape of Qwen2.5 with the tiny tokenizer."""
    if name == "tiny":
        return ROOT / "tiny"
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    vocabulary, hidden, layers, heads, kv_heads, intermediate = QWEN[name]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny")
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def problem_file(shape: Shape, folder: Path) -> Path:
    """As many problems as a step takes: every step has the same ones."""
    lines = (ROOT / "tiny" / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[: shape.prompts * shape.joined]]
    path = folder / "problems.jsonl"
    with path.open("w") as file:
        for first in range(0, len(rows), shape.joined):
            text = " ".join(row["problem"] for row in rows[first : first + shape.joined])
            file.write(json.dumps({"problem": text, "answer": rows[first]["answer"]}) + "\n")
    return path


class Enough(Exception):
    """All steps are measured: nothing more is to be saved or evaluated."""


def ours(model: str, shape: Shape, engine: str, folder: Path) -> dict[str, Any]:
    """Steps of grpo.py as it is: seconds from one step's end to the next, tokens, peak memory.

    Nothing ends a response before it has the shape's length. The verdicts alternate once the
    verifier has done its work: a random model is never right, and groups without variance have no
    gradient.
    """
    problems = str(problem_file(shape, folder))
    args = grpo.Args(
        model=str(model_folder(model, folder / "model")),
        dataset=problems,
        eval_dataset=problems,
        prompts_per_step=shape.prompts,
        group_size=shape.group,
        max_new_tokens=shape.new_tokens,
        engine=engine,
        device=shape.device,
        steps=shape.steps + 2,
        eval_problems=1,
        eval_samples=1,
        eval_every=0,
        save_every=0,
        max_logp_gap=1e9 if model in QWEN else 0.0,
        run_dir=str(folder / "run"),
    )
    tokens, ends = collections.Counter(), []
    make_engine, stack, grade = grpo.make_engine, grpo.common.stack, Grader.grade

    class Run(grpo.Run):
        def save(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())
            if len(ends) > shape.steps:  # the first one warms up
                raise Enough

    def make_endless(*given: Any) -> Any:
        engine = make_engine(*given)
        engine.stops = []
        if hasattr(engine, "llm"):
            generate = engine.llm.generate

            def on(prompts: Any, wanted: list[Any], **rest: Any) -> Any:
                for params in wanted:
                    params.ignore_eos = True
                return generate(prompts, wanted, **rest)

            engine.llm.generate = on
        return engine

    def counted_stack(*given: Any) -> Any:
        rollouts = stack(*given)
        tokens["prompt"] += sum(len(p.prompt) for p in rollouts.problems) * shape.group
        tokens["generated"] += int(rollouts.engine_logp.isfinite()[rollouts.mask].sum())
        tokens["trained"] += int(rollouts.mask.sum())
        return rollouts

    def alternate(grader: Grader, texts: list[str], golds: list[str]) -> list[bool]:
        return [bool(i % 2) for i, _ in enumerate(grade(grader, texts, golds))]

    with (
        mock.patch.multiple(grpo, make_engine=make_endless, Run=Run),
        mock.patch.object(grpo.common, "stack", counted_stack),
        mock.patch.object(Grader, "grade", alternate),
        contextlib.suppress(Enough),
    ):
        grpo.main(args)
    log = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in log[-shape.steps :]]
    parts = (*PARTS, "step")
    return {
        "seconds": [b - a for a, b in itertools.pairwise(ends)],
        "parts": {p: statistics.median(row[f"seconds/{p}"] for row in rows) for p in parts},
        "tokens_a_step": {name: count / len(ends) for name, count in tokens.items()},
        "peak_bytes": peak_bytes(shape.device),
    }


def trl_settings(model: str, shape: Shape, engine: str, folder: Path) -> dict[str, Any]:
    """What trl_side.py needs to know to do the same work."""
    rollouts = shape.prompts * shape.group
    context = 28 + 20 * shape.joined + shape.new_tokens  # the longest prompts fit in
    fitting = (n for n in range(rollouts, 0, -1) if rollouts % n == 0)
    return {
        "model": str(model_folder(model, folder / "model")),
        "dataset": str(problem_file(shape, folder)),
        "folder": str(folder / "trl"),
        "rollouts": rollouts,
        "new_tokens": shape.new_tokens,
        "steps": shape.steps + 1,
        "engine": engine,
        "device": shape.device,
        "context": context,
        "rollouts_at_once": next(n for n in fitting if n * context <= 16384),  # --token-budget
    }


def measure_apart(name: str) -> dict[str, Any]:
    """One section, in a process of its own; of TRL's, what it says where it fails."""
    side, model, engine = name.split(": ")
    with tempfile.TemporaryDirectory() as folder:
        answer, environment = Path(folder, "measured.json"), dict(os.environ)
        if side == "ours":
            command = [sys.executable, __file__, "--only", name, "--out", str(answer)]
        else:
            if not (TRL / "trl").exists():
                pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(TRL), "trl"]
                subprocess.run([sys.executable, *pip], check=True)
            asked = Path(folder, "settings.json")
            write_json(asked, trl_settings(model, SHAPES[model], engine, Path(folder)))
            beside = Path(__file__).with_name("trl_side.py")
            command = [sys.executable, str(beside), str(asked), str(answer)]
            environment["PYTHONPATH"] = str(TRL)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if not done.returncode:
            return read_json(answer)
        if side == "ours":
            sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
        return {"failed": done.stderr.strip().splitlines()[-1]}


# ------------------------------------------------------------------------------- the page

ROWS = {  # and their goals
    "step, s": "",
    **{f"of it {part}, s": "" for part in PARTS},
    "other / step": "5% at most",
    "transformers on both sides: TRL's step / ours": "1.3 at least",
    "vLLM on both sides: TRL's step / ours": "1 at least",
    "transformers on both sides: our peak memory / TRL's": "0.8 at most",
}
MISSING = "not measured"


def ratio(sections: dict[str, Any], model: str, engine: str) -> str:
    """TRL's step over ours; (!) where their work differs."""
    ours, theirs = (sections.get(f"{side}: {model}: {engine}", {}) for side in ("ours", "trl"))
    if not ("seconds" in ours and "seconds" in theirs):
        return "fails in TRL" if "failed" in theirs else MISSING
    a, b = statistics.median(ours["seconds"]), statistics.median(theirs["seconds"])
    alike = ours["tokens_a_step"] == theirs["tokens_a_step"]
    return f"{b:.3g} / {a:.3g} s = {b / a:.2f}" + ("" if alike else " (!)")


def column(sections: dict[str, Any], model: str) -> list[str]:
    """The figures of one shape, in the order of ROWS."""
    figures = [MISSING] * (len(PARTS) + 2)
    if step := sections.get(f"ours: {model}: vllm"):
        seconds = step["parts"]
        figures = [f"{seconds[part]:.3g}" for part in ("step", *PARTS)]
        figures.append(f"{seconds['other'] / seconds['step']:.1%}")
    figures += [ratio(sections, model, engine) for engine in ("transformers", "vllm")]
    same = [sections.get(f"{side}: {model}: transformers", {}) for side in ("ours", "trl")]
    if not all("peak_bytes" in side for side in same):
        return [*figures, MISSING]
    ours, theirs = (side["peak_bytes"] / 1e9 for side in same)
    return [*figures, f"{ours:.2f} / {theirs:.2f} GB = {ours / theirs:.2f}"]


def table(results: dict[str, Any]) -> str:
    """The figures, goals beside them, and what they were measured with."""
    columns = [
        column(results.get(shape.device, {}).get("sections", {}), model)
        for model, shape in SHAPES.items()
    ]
    rows = [[*row, *figures] for row, *figures in zip(ROWS.items(), *columns, strict=True)]
    said = [
        f"`{part['command']}`, {part['machine']}, "
        + ", ".join(f"{name} {number}" for name, number in part["versions"].items())
        for part in results.values()
    ]
    head = ["", "goal", *(f"{model}, {shape.device}" for model, shape in SHAPES.items())]
    return "\n\n".join([markdown(head, rows, words=2), *said])


def main(args: Args) -> None:
    names = shared.chosen("--only", args.only, SECTIONS)
    if args.out:
        _, model, engine = names[0].split(": ")
        with tempfile.TemporaryDirectory() as folder:
            return write_json(Path(args.out), ours(model, SHAPES[model], engine, Path(folder)))
    path = RESULTS / "speed.json"
    results = read_json(path) if path.exists() else {}
    for name in names if not args.write else ():
        measured = measure_apart(name)
        print(f"{name}: {measured}", flush=True)
        here = results.setdefault(DEVICE, {"sections": {}})
        here["command"] = "python benchmark/speed.py"
        here |= shared.surroundings("torch", "transformers", "vllm")
        if DEVICE == "cuda":
            here["machine"] += f", {torch.cuda.get_device_name()}"
        here["sections"][name] = measured
        write_json(path, results)
    if args.write:
        shared.write_page(PAGE, {"speed": table(results)})
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
