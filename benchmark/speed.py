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
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import shared
import torch
import tyro
from shared import RESULTS, ROOT, markdown, read_json, write_json

import common
import grpo
from common import Grader, Run
from infra.cli import parse_args
from infra.run import read_lines

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
    pass


class Measurement:
    """Seconds, tokens and peak memory of the steps in this process. The first step is a warm-up."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.ends: list[float] = []  # when each step ended
        self.tokens = Counter(prompt=0, generated=0, trained=0)

    def end_step(self, *_: Any, **__: Any) -> None:
        """Raises MeasurementDone after the last step, so that nothing is saved or evaluated."""
        self.ends.append(time.perf_counter())
        if len(self.ends) > self.shape.steps:
            raise MeasurementDone

    def results(self) -> dict[str, Any]:
        status = Path("/proc/self/status").read_text()
        peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024
        if self.shape.device == "cuda":
            peak = torch.cuda.max_memory_allocated()
        return {
            "seconds": [end - start for start, end in itertools.pairwise(self.ends)],
            "tokens_a_step": {name: count / len(self.ends) for name, count in self.tokens.items()},
            "peak_bytes": peak,
        }


class AlternatingGrader(Grader):
    """Runs the grader for its time and alternates the verdicts: a random model is never right, and
    groups of equal rewards have no gradient."""

    def grade(self, responses: list[str], references: list[str]) -> list[bool]:
        verdicts = super().grade(responses, references)
        return [i % 2 == 1 for i in range(len(verdicts))]


def ours(model: str, shape: Shape, engine: str, folder: Path) -> dict[str, Any]:
    """Measure grpo.py."""
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
    measurement, log_rollouts = Measurement(shape), Run.log_rollouts

    def count(run: Run, step: int, rollouts: Any, *rest: Any, **more: Any) -> None:
        log_rollouts(run, step, rollouts, *rest, **more)
        prompt_tokens = sum(len(problem.prompt) for problem in rollouts.problems)
        measurement.tokens["prompt"] += prompt_tokens * shape.group
        generated = rollouts.engine_logp[rollouts.mask].isfinite()
        measurement.tokens["generated"] += int(generated.sum())
        measurement.tokens["trained"] += int(rollouts.mask.sum())

    with (
        mock.patch.object(Run, "log_rollouts", count),
        mock.patch.object(Run, "save", measurement.end_step),
        mock.patch.object(common, "Grader", AlternatingGrader),
        contextlib.suppress(MeasurementDone),
    ):
        grpo.main(parse_args(grpo.Args, flags))
    rows = read_lines(folder / "run" / "metrics.jsonl")[-shape.steps :]
    parts = {}
    for part in (*PARTS, "step"):
        parts[part] = statistics.median(row[f"seconds/{part}"] for row in rows)
    return measurement.results() | {"parts": parts}


def theirs(model: str, shape: Shape, engine: str, folder: Path) -> dict[str, Any]:
    """Measure the same work in TRL's GRPOTrainer."""
    sys.path.append(str(TRL))
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    rollouts = shape.prompts * shape.group
    context = 28 + 20 * shape.joined + shape.new_tokens  # enough for the longest prompt
    at_once = rollouts
    while rollouts % at_once or at_once * context > grpo.Args.token_budget:
        at_once -= 1
    # No token ends a response before it has the given length.
    endless = {"min_new_tokens": shape.new_tokens}
    if engine == "vllm":
        endless = {"ignore_eos": True}
    rows = []
    for row in read_lines(problem_file(shape, folder)):
        prompt = [{"role": "user", "content": row["problem"]}]
        rows.append({"prompt": prompt, "reference": row["answer"]})
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=shape.device == "cpu",
        bf16=shape.device == "cuda",
        gradient_checkpointing=False,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=rollouts // at_once,
        num_generations=shape.group,
        max_completion_length=shape.new_tokens,
        generation_kwargs=endless,
        max_steps=shape.steps + 1,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        use_vllm=engine == "vllm",
        vllm_max_model_length=context,
        model_init_kwargs={"dtype": "float32"},
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    measurement, clock = Measurement(shape), TrainerCallback()
    clock.on_step_end = measurement.end_step

    class CountingTrainer(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids: Any, *rest: Any, **more: Any) -> Any:
            completions, logp = super()._generate_single_turn(prompt_ids, *rest, **more)
            measurement.tokens["prompt"] += sum(map(len, prompt_ids))
            measurement.tokens["generated"] += sum(map(len, completions))
            return completions, logp

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
            measurement.tokens["trained"] += int(inputs["completion_mask"].sum())
            return super()._compute_loss(model, inputs)

    def reward(completions: list[Any], reference: list[str], **_: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        return list(map(float, grader.grade(texts, reference)))

    model_path, data = model_folder(model, folder / "model"), Dataset.from_list(rows)
    with AlternatingGrader() as grader, contextlib.suppress(MeasurementDone):
        trainer = CountingTrainer(
            str(model_path), reward, config, train_dataset=data, callbacks=[clock]
        )
        trainer.train()
    return measurement.results() | {"trl": version("trl"), "optimizer": str(config.optim)}


def measure_in_process(name: str) -> dict[str, Any]:
    """Measure one section in its own process. If TRL fails, the result is its error message."""
    side, model, engine = name.split(": ")
    if side == "trl" and not (TRL / "trl").exists():
        pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(TRL), "trl"]
        subprocess.run([sys.executable, *pip], check=True)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, spawn) as pool:
        work = ours if side == "ours" else theirs
        measured = pool.submit(work, model, SHAPES[model], engine, Path(folder))
        if side == "trl" and measured.exception():
            return {"failed": repr(measured.exception())}
        return measured.result()


GOALS = {  # of each row of the table
    "step, s": "",
    **{f"of it {part}, s": "" for part in PARTS},
    "other / step": "at most 5%",
    "transformers on both sides: TRL's step / ours": "at least 1.3",
    "vLLM on both sides: TRL's step / ours": "at least 1",
    "transformers on both sides: our peak memory / TRL's": "at most 0.8",
}
MISSING = "not measured"


def ratio(sections: dict[str, Any], model: str, engine: str, measure: str) -> str:
    """TRL's step over ours, or our peak memory over TRL's; (!) if the two sides did not process
    the same number of tokens."""
    ours = sections.get(f"ours: {model}: {engine}", {})
    theirs = sections.get(f"trl: {model}: {engine}", {})
    if "failed" in theirs:
        return "fails in TRL"
    if not ours or not theirs:
        return MISSING
    mark = "" if ours["tokens_a_step"] == theirs["tokens_a_step"] else " (!)"
    if measure == "peak_bytes":
        a, b = ours[measure] / 1e9, theirs[measure] / 1e9
        return f"{a:.2f} / {b:.2f} GB = {a / b:.2f}{mark}"
    a, b = statistics.median(theirs["seconds"]), statistics.median(ours["seconds"])
    return f"{a:.3g} / {b:.3g} s = {a / b:.2f}{mark}"


def column(sections: dict[str, Any], model: str) -> list[str]:
    """The cells of one shape, in the order of GOALS."""
    cells = [MISSING] * (len(PARTS) + 2)
    if f"ours: {model}: vllm" in sections:
        seconds = sections[f"ours: {model}: vllm"]["parts"]
        cells = [f"{seconds[part]:.3g}" for part in ("step", *PARTS)]
        cells.append(f"{seconds['other'] / seconds['step']:.1%}")
    cells.append(ratio(sections, model, "transformers", "seconds"))
    cells.append(ratio(sections, model, "vllm", "seconds"))
    cells.append(ratio(sections, model, "transformers", "peak_bytes"))
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
        of_device.update(shared.environment())
        if DEVICE == "cuda":
            of_device["machine"] += f", {torch.cuda.get_device_name()}"
        of_device["sections"][name] = measured
        write_json(path, results)
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
