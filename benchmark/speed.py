"""Measure a training step of grpo.py and the same step in TRL's GRPOTrainer.

    python benchmark/speed.py                # about 20 minutes on 2 cores; a larger shape on a GPU
    python benchmark/speed.py --only "ours: tiny: vllm,trl: tiny: transformers"
    python benchmark/speed.py --write        # writes the table of docs/speed.md

Each section runs in its own process, so that its peak memory is its own. Its result is written to
benchmark/results/speed.json when the section ends. docs/speed.md describes the comparison.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
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
from common import Grader, Run
from infra.cli import parse_args

PAGE = ROOT / "docs" / "speed.md"
TRL = ROOT / ".venv-trl"  # TRL's own files; all other packages are this project's
PARTS = ("sync", "rollout", "verify", "score", "update", "other")
CONFIGS = {  # vocabulary, hidden, layers, heads, key-value heads, intermediate
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
    steps: int  # measured steps, after one warm-up step
    joined: int = 1  # problems of tiny/ joined into one prompt, of about 20 tokens each


SHAPES = {  # by model: "tiny" or a key of CONFIGS
    "tiny": Shape("cpu", 16, 8, 27, steps=20),
    "GSM8K": Shape("cpu", 2, 8, 224, steps=1, joined=7),
    "0.5B": Shape("cpu", 2, 4, 24, steps=2),
    "1.5B": Shape("cuda", 16, 8, 1024, steps=5),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECTIONS = [
    f"{side}: {model}: {engine}"
    for model, side, engine in itertools.product(SHAPES, ("ours", "trl"), ("vllm", "transformers"))
    if SHAPES[model].device == DEVICE
]


@dataclass
class Args:
    only: str = ""  # sections to run, separated by commas; empty: all
    write: bool = False  # only write docs/speed.md from the results


def model_folder(name: str, folder: Path) -> Path:
    """A copy of the tiny model, or a Qwen2 model with random weights and the tiny tokenizer."""
    if name == "tiny":
        return shutil.copytree(ROOT / "tiny", folder)
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    vocabulary, hidden, layers, heads, kv_heads, intermediate = CONFIGS[name]
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


def remove_eos(folder: Path) -> None:
    """Remove the end-of-sequence token of a model, so that every response has the same length."""
    for file, name in (
        ("config.json", "eos_token_id"),
        ("generation_config.json", "eos_token_id"),
        ("tokenizer_config.json", "eos_token"),
    ):
        settings = read_json(folder / file)
        settings[name] = None
        write_json(folder / file, settings)


def problem_file(shape: Shape, folder: Path) -> Path:
    """As many problems as one step uses, so every step has the same problems."""
    lines = (ROOT / "tiny" / "train.jsonl").read_text().splitlines()
    path = folder / "problems.jsonl"
    with path.open("w") as file:
        for p in range(shape.prompts):
            joined = lines[p * shape.joined : (p + 1) * shape.joined]
            rows = [json.loads(line) for line in joined]
            text = " ".join(row["problem"] for row in rows)
            file.write(json.dumps({"problem": text, "answer": rows[0]["answer"]}) + "\n")
    return path


class MeasurementDone(Exception):
    """All steps are measured; nothing more is saved or evaluated."""


def ours(model: str, shape: Shape, engine: str, folder: Path) -> dict[str, Any]:
    """Seconds between the ends of steps, tokens and peak memory of grpo.py.

    The grader runs, but its verdicts are replaced by alternating ones, because a random model is
    never right, and groups of equal rewards have no gradient.
    """
    model_path = model_folder(model, folder / "model")
    remove_eos(model_path)
    problems = str(problem_file(shape, folder))
    flags = ["--model", str(model_path), "--dataset", problems, "--eval-dataset", problems]
    flags += ["--prompts-per-step", str(shape.prompts), "--group-size", str(shape.group)]
    flags += ["--max-new-tokens", str(shape.new_tokens), "--steps", str(shape.steps + 2)]
    flags += ["--engine", engine, "--device", shape.device, "--run-dir", str(folder / "run")]
    flags += ["--eval-problems", "1", "--eval-samples", "1", "--eval-every", "0"]
    flags += ["--save-every", "0"]
    if model in CONFIGS:  # with random weights
        flags += ["--max-logp-gap", "1e9"]
    ends = []
    tokens = {"prompt": 0, "generated": 0, "trained": 0}
    log_rollouts, grade = Run.log_rollouts, Grader.grade

    def count(run: Run, step: int, rollouts: Any, *rest: Any, **more: Any) -> None:
        log_rollouts(run, step, rollouts, *rest, **more)
        prompt_tokens = sum(len(problem.prompt) for problem in rollouts.problems)
        tokens["prompt"] += prompt_tokens * shape.group
        tokens["generated"] += int(rollouts.engine_logp[rollouts.mask].isfinite().sum())
        tokens["trained"] += int(rollouts.mask.sum())

    def stop_when_done(*_: Any, **__: Any) -> None:
        ends.append(time.perf_counter())
        if len(ends) > shape.steps:  # the first step is the warm-up
            raise MeasurementDone

    def alternate(grader: Grader, texts: list[str], references: list[str]) -> list[bool]:
        verdicts = grade(grader, texts, references)
        return [i % 2 == 1 for i in range(len(verdicts))]

    with (
        mock.patch.object(Run, "log_rollouts", count),
        mock.patch.object(Run, "save", stop_when_done),
        mock.patch.object(Grader, "grade", alternate),
        contextlib.suppress(MeasurementDone),
    ):
        grpo.main(parse_args(grpo.Args, flags))
    log = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in log[-shape.steps :]]
    parts = {}
    for part in (*PARTS, "step"):
        parts[part] = statistics.median(row[f"seconds/{part}"] for row in rows)
    return {
        "seconds": [end - start for start, end in itertools.pairwise(ends)],
        "parts": parts,
        "tokens_a_step": {name: count / len(ends) for name, count in tokens.items()},
        "peak_bytes": peak_bytes(shape.device),
    }


def trl_settings(model: str, shape: Shape, engine: str, folder: Path) -> dict[str, Any]:
    """The settings with which trl_side.py does the same work."""
    rollouts = shape.prompts * shape.group
    context = 28 + 20 * shape.joined + shape.new_tokens  # enough for the longest prompt
    at_once = rollouts
    while rollouts % at_once or at_once * context > 16384:  # --token-budget
        at_once -= 1
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
        "rollouts_at_once": at_once,
    }


def measure_in_process(name: str) -> dict[str, Any]:
    """Measure one section in its own process. If TRL fails, the result is its error message."""
    side, model, engine = name.split(": ")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if side == "ours":
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                return pool.submit(ours, model, SHAPES[model], engine, folder).result()
        if not (TRL / "trl").exists():
            pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(TRL), "trl"]
            subprocess.run([sys.executable, *pip], check=True)
        settings, output = folder / "settings.json", folder / "measured.json"
        write_json(settings, trl_settings(model, SHAPES[model], engine, folder))
        script = str(ROOT / "benchmark" / "trl_side.py")
        done = subprocess.run(
            [sys.executable, script, str(settings), str(output)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(TRL)},
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            return read_json(output)
        return {"failed": done.stderr.strip().splitlines()[-1]}


GOALS = {  # of each row of the table
    "step, s": "",
    **{f"of it {part}, s": "" for part in PARTS},
    "other / step": "at most 5%",
    "transformers on both sides: TRL's step / ours": "at least 1.3",
    "vLLM on both sides: TRL's step / ours": "at least 1",
    "transformers on both sides: our peak memory / TRL's": "at most 0.8",
}
MISSING = "not measured"


def step_ratio(sections: dict[str, Any], model: str, engine: str) -> str:
    """TRL's step over ours; (!) if the two sides did not process the same number of tokens."""
    ours = sections.get(f"ours: {model}: {engine}", {})
    theirs = sections.get(f"trl: {model}: {engine}", {})
    if "failed" in theirs:
        return "fails in TRL"
    if not ours or not theirs:
        return MISSING
    a, b = statistics.median(ours["seconds"]), statistics.median(theirs["seconds"])
    ratio = f"{b:.3g} / {a:.3g} s = {b / a:.2f}"
    if ours["tokens_a_step"] != theirs["tokens_a_step"]:
        ratio += " (!)"
    return ratio


def memory_ratio(sections: dict[str, Any], model: str) -> str:
    ours = sections.get(f"ours: {model}: transformers", {}).get("peak_bytes")
    theirs = sections.get(f"trl: {model}: transformers", {}).get("peak_bytes")
    if not ours or not theirs:
        return MISSING
    return f"{ours / 1e9:.2f} / {theirs / 1e9:.2f} GB = {ours / theirs:.2f}"


def column(sections: dict[str, Any], model: str) -> list[str]:
    """The cells of one shape, in the order of GOALS."""
    cells = [MISSING] * (len(PARTS) + 2)
    if f"ours: {model}: vllm" in sections:
        seconds = sections[f"ours: {model}: vllm"]["parts"]
        cells = [f"{seconds[part]:.3g}" for part in ("step", *PARTS)]
        cells.append(f"{seconds['other'] / seconds['step']:.1%}")
    cells.append(step_ratio(sections, model, "transformers"))
    cells.append(step_ratio(sections, model, "vllm"))
    cells.append(memory_ratio(sections, model))
    return cells


def table(results: dict[str, Any]) -> str:
    """How the numbers were measured, and the table."""
    captions = []
    for part in results.values():
        versions = ", ".join(f"{name} {number}" for name, number in part["versions"].items())
        captions.append(f"`{part['command']}`, {part['machine']}, {versions}")
    head, columns = ["", "goal"], []
    for model, shape in SHAPES.items():
        head.append(f"{model}, {shape.device}")
        columns.append(column(results.get(shape.device, {}).get("sections", {}), model))
    rows = zip(GOALS, GOALS.values(), *columns, strict=True)
    return "\n\n".join([*captions, markdown(head, rows, words=2)])


def main(args: Args) -> None:
    names = shared.parse_names("--only", args.only, SECTIONS)
    path = RESULTS / "speed.json"
    results = read_json(path) if path.exists() else {}
    if args.write:
        shared.write_page(PAGE, {"speed": table(results)})
        names = []
    for name in names:
        measured = measure_in_process(name)
        print(f"{name}: {measured}", flush=True)
        of_device = results.setdefault(DEVICE, {"sections": {}})
        of_device["command"] = "python benchmark/speed.py"
        of_device.update(shared.environment("torch", "transformers", "vllm"))
        if DEVICE == "cuda":
            of_device["machine"] += f", {torch.cuda.get_device_name()}"
        of_device["sections"][name] = measured
        write_json(path, results)
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
