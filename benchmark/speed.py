"""Measure a training step of grpo.py, the same step in TRL's GRPOTrainer, and in an older commit.

    python benchmark/speed.py                       # about two hours on 2 cores
    python benchmark/speed.py --only "tiny 2048: transformers" --rounds 1
    python benchmark/speed.py --before 3759d09      # also measure that commit
    python benchmark/speed.py --write               # writes the table of docs/speed.md

The sides of a shape run in turn, in several rounds. Each runs in its own process, so that its peak
memory is its own. A round's results are added to benchmark/results/speed.json when it ends. On a
GPU the memory with vLLM is written to gpu.json, from which docs/memory.py reads it. docs/speed.md
describes the comparison.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
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
from common import Grader, Run, make_engine
from infra.cli import parse_args
from infra.run import read_lines
from infra.vllm_engine import VLLMEngine

PAGE = ROOT / "docs" / "speed.md"
TRL = ROOT / ".venv-trl"  # TRL's own files; all other packages are this project's
PARTS = ("sync", "rollout", "verify", "score", "update", "other")
GPU_MOMENTS = ("sync", "sleep", "peak")  # when the memory in use is measured
CONFIGS = {  # vocabulary, hidden, layers, heads, key-value heads, intermediate
    "GSM8K": (49152, 576, 30, 9, 3, 1536),  # as SmolLM2-135M
    "0.5B": (151936, 896, 24, 14, 2, 4864),
    "1.5B": (151936, 1536, 28, 12, 2, 8960),
}


class Shape(NamedTuple):
    """The work of one step."""

    model: str  # "tiny" or a key of CONFIGS
    device: str
    prompts: int
    group: int
    new_tokens: int
    steps: int  # measured steps, after one warm-up step
    token_budget: int
    joined: int = 1  # problems of tiny/ joined into one prompt, of about 20 tokens each


SHAPES = {
    "tiny 16384": Shape("tiny", "cpu", 16, 8, 27, 20, 16384),
    "tiny 2048": Shape("tiny", "cpu", 16, 8, 27, 20, 2048),
    "tiny 1024": Shape("tiny", "cpu", 16, 8, 27, 20, 1024),
    "GSM8K 2048": Shape("GSM8K", "cpu", 2, 8, 224, 1, 2048, joined=7),
    "0.5B 16384": Shape("0.5B", "cpu", 2, 4, 24, 2, 16384),
    "1.5B 8192": Shape("1.5B", "cuda", 16, 8, 1024, 5, 8192),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ENGINES = ("transformers", "vllm")
SECTIONS = [
    f"{name}: {engine}"
    for name, engine in itertools.product(SHAPES, ENGINES)
    if SHAPES[name].device == DEVICE
]


@dataclass
class Args:
    only: str = ""  # sections to run, separated by commas; empty: all
    rounds: int = 5  # rounds of each section; those in the results file count
    before: str = ""  # commit to compare with
    refresh: bool = False  # measure again what was measured on other code
    write: bool = False  # only write docs/speed.md from the results
    measure: str = ""  # measure one side and print it: "ours: shape: engine", "trl: shape: at once"


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
    """Seconds and peak memory of the steps in this process. The first step is a warm-up."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.ends: list[float] = []  # when each step ended

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
        seconds = [end - start for start, end in itertools.pairwise(self.ends)]
        return {"seconds": seconds, "peak_bytes": peak}


class AlternatingGrader(Grader):
    """Runs the grader for its time and alternates the verdicts: a random model is never right, and
    groups of equal rewards have no gradient."""

    def grade(self, responses: list[str], references: list[str]) -> list[bool]:
        verdicts = super().grade(responses, references)
        return [i % 2 == 1 for i in range(len(verdicts))]


def endless_engine(*given: Any) -> Any:
    """The engine of a run, whose responses no token ends before they have the given length."""
    engine = make_engine(*given)
    engine.stop_tokens = []
    if hasattr(engine, "sampling_params"):  # vLLM's
        engine.sampling_params = functools.partial(engine.sampling_params, ignore_eos=True)
    return engine


def watch_gpu_memory() -> dict[str, float]:
    """GiB in use on the GPU: after vLLM's last sync, after its last sleep, and at most.

    The values are updated for as long as this process runs.
    """
    gib = dict.fromkeys((*GPU_MOMENTS, "now"), 0.0)

    def note(moment: str) -> None:
        free, total = torch.cuda.mem_get_info()
        gib[moment] = (total - free) / 2**30
        gib["peak"] = max(gib.values())

    def noting(name: str) -> Callable[..., None]:
        method = getattr(VLLMEngine, name)

        def call(*given: Any) -> None:
            method(*given)
            note(name)

        return call

    def watch() -> None:
        while True:
            note("now")
            time.sleep(0.02)

    VLLMEngine.sync, VLLMEngine.sleep = noting("sync"), noting("sleep")
    threading.Thread(target=watch, daemon=True).start()
    return gib


def ours(shape: Shape, engine: str, folder: Path) -> dict[str, Any]:
    """Measure grpo.py."""
    model, problems = model_folder(shape.model, folder / "model"), problem_file(shape, folder)
    flags = f"--model {model} --dataset {problems} --eval-dataset {problems}"
    flags += f" --prompts-per-step {shape.prompts} --group-size {shape.group}"
    flags += f" --max-new-tokens {shape.new_tokens} --token-budget {shape.token_budget}"
    flags += f" --engine {engine} --device {shape.device} --run-dir {folder / 'run'}"
    flags += f" --steps {shape.steps + 2} --eval-problems 1 --eval-samples 1 --eval-every 0"
    flags += " --save-every 0 --max-logp-gap 1e9"  # which random weights exceed

    found: dict[str, Any] = {}
    if (shape.device, engine) == ("cuda", "vllm"):
        found["gib"] = watch_gpu_memory()

    measurement, micro_batches = Measurement(shape), common.micro_batches
    at_once = 0  # most rollouts of a micro-batch

    def watched_micro_batches(*given: Any) -> Iterator[common.Index]:
        nonlocal at_once
        for index in micro_batches(*given):
            at_once = max(at_once, len(index[0]))
            yield index

    with (
        mock.patch.object(Run, "save", measurement.end_step),
        mock.patch.object(common, "micro_batches", watched_micro_batches),
        mock.patch.object(common, "make_engine", endless_engine),
        mock.patch.object(common, "Grader", AlternatingGrader),
        contextlib.suppress(MeasurementDone),
    ):
        grpo.main(parse_args(grpo.Args, flags.split()))

    rows = read_lines(folder / "run" / "metrics.jsonl")[-shape.steps :]
    assert all(row["length"] == shape.new_tokens for row in rows)
    parts = {}
    for part in (*PARTS, "step"):
        parts[part] = statistics.median(row[f"seconds/{part}"] for row in rows)
    return found | measurement.results() | {"parts": parts, "at_once": at_once}


def theirs(shape: Shape, folder: Path, at_once: int) -> dict[str, Any]:
    """Measure the same work in TRL's GRPOTrainer. at_once: rollouts of a micro-batch, at most."""
    sys.path.append(str(TRL))
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    while shape.prompts * shape.group % at_once:
        at_once -= 1
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=shape.device == "cpu",
        bf16=shape.device == "cuda",
        gradient_checkpointing=False,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=shape.prompts * shape.group // at_once,
        num_generations=shape.group,
        max_completion_length=shape.new_tokens,
        generation_kwargs={"min_new_tokens": shape.new_tokens},
        max_steps=shape.steps + 1,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        model_init_kwargs={"dtype": "float32"},
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )

    measurement, clock = Measurement(shape), TrainerCallback()
    clock.on_step_end = measurement.end_step

    def reward(
        completions: list[Any], completion_ids: list[list[int]], answer: list[str], **_: Any
    ) -> list[float]:
        assert all(len(ids) == shape.new_tokens for ids in completion_ids)
        texts = [completion[0]["content"] for completion in completions]
        return list(map(float, grader.grade(texts, answer)))

    rows = read_lines(problem_file(shape, folder))
    for row in rows:
        row["prompt"] = [{"role": "user", "content": row.pop("problem")}]
    model, data = model_folder(shape.model, folder / "model"), Dataset.from_list(rows)
    with AlternatingGrader() as grader, contextlib.suppress(MeasurementDone):
        GRPOTrainer(str(model), reward, config, train_dataset=data, callbacks=[clock]).train()
    return measurement.results() | {"trl": version("trl"), "optimizer": str(config.optim)}


def measure(name: str) -> dict[str, Any]:
    """Measure one side in this process."""
    side, shape, how = name.split(": ")
    with tempfile.TemporaryDirectory() as folder:
        if side == "trl":
            return theirs(SHAPES[shape], Path(folder), at_once=int(how))
        return ours(SHAPES[shape], how, Path(folder))


def measure_in_process(name: str, tree: Path = ROOT) -> dict[str, Any]:
    """Measure one side in a process of its own, with the scripts of a checkout."""
    command = [sys.executable, "benchmark/speed.py", "--measure", name]
    done = subprocess.run(command, cwd=tree, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def check_out(commit: str, tree: Path) -> None:
    """Write the files of a commit to a folder, with today's speed.py and shared.py."""
    archive = tree / "commit.tar"
    subprocess.run(["git", "archive", "--output", archive, commit], cwd=ROOT, check=True)
    shutil.unpack_archive(archive, tree)
    for name in ("speed.py", "shared.py"):
        shutil.copy(ROOT / "benchmark" / name, tree / "benchmark" / name)


def measure_round(section: str, before: Path | None) -> dict[str, Any]:
    """Each side once: this commit, the older one, TRL with as many rollouts at once as ours.

    With vLLM only this commit: TRL cannot sync weights to vLLM's CPU build.
    """
    shape, engine = section.split(": ")
    sides = {"ours": measure_in_process(f"ours: {section}")}
    if engine == "vllm":
        return sides
    if before:
        sides["before"] = measure_in_process(f"ours: {section}", before)
    sides["trl"] = measure_in_process(f"trl: {shape}: {sides['ours']['at_once']}")
    return sides


def step_seconds(side: dict[str, Any]) -> float:
    return statistics.median(side["seconds"])


def training_seconds(side: dict[str, Any]) -> float:
    return side["parts"]["score"] + side["parts"]["update"]


def peak_bytes(side: dict[str, Any]) -> float:
    return side["peak_bytes"]


RATIOS = {  # rows of the table: goal, numerator, denominator, what is compared
    "TRL's step / ours": ("at least 1.5; GSM8K 1.4", "trl", "ours", step_seconds),
    "our score + update / before": ("at most 0.62", "ours", "before", training_seconds),
    "our peak memory / TRL's": ("at most 0.9", "ours", "trl", peak_bytes),
    "our peak memory / before": ("at most 1", "ours", "before", peak_bytes),
}
MISSING = "not measured"


def median_ratio(rounds: list[dict[str, Any]], a: str, b: str, value: Callable) -> str:
    """The median over the rounds of value(side a) / value(side b), with the lowest and highest."""
    ratios = []
    for sides in rounds:
        if a in sides and b in sides:
            ratios.append(value(sides[a]) / value(sides[b]))
    if not ratios:
        return MISSING
    middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def median_seconds(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.3g}" if seconds else MISSING


def column(sections: dict[str, Any], name: str) -> dict[str, str]:
    """The cells of one shape."""
    rounds, shape = sections[f"{name}: transformers"], SHAPES[name]
    micro_batches = shape.prompts * shape.group / rounds[0]["ours"]["at_once"]
    cells = {"rounds": str(len(rounds)), "micro-batches": str(math.ceil(micro_batches))}
    for part in ("step", *PARTS):
        row = "step, s" if part == "step" else f"of it {part}, s"
        cells[row] = median_seconds([sides["ours"]["parts"][part] for sides in rounds])
    for row, (_, *ratio) in RATIOS.items():
        cells[row] = median_ratio(rounds, *ratio)
    with_vllm = [step_seconds(sides["ours"]) for sides in sections.get(f"{name}: vllm", [])]
    return cells | {"with vLLM: our step, s": median_seconds(with_vllm)}


def table(results: dict[str, Any]) -> str:
    """How the numbers were measured, and the table."""
    captions = []
    for part in results.values():
        captions.append(f"`{part['command']}`, {part['machine']}, {shared.versions_of(part)}")

    columns, missing = {}, []
    for name, shape in SHAPES.items():
        sections = results.get(shape.device, {}).get("sections", {})
        if f"{name}: transformers" in sections:
            columns[f"{name}, {shape.device}"] = column(sections, name)
        else:
            missing.append(f"*{name}* ({shape.device})")
    if missing:
        captions.append(f"Not measured: {', '.join(missing)}.")

    rows = []
    for row in next(iter(columns.values())):
        goal, *_ = RATIOS.get(row, ("",))
        rows.append([row, goal, *(cells[row] for cells in columns.values())])
    return "\n\n".join([*captions, markdown(["", "goal", *columns], rows, words=2)])


@functools.cache
def code() -> str:
    """Digest of the code that the results depend on."""
    return shared.code_digest("grpo.py", "infra/hf_engine.py", *shared.TRAINING)


def run_rounds(args: Args, names: list[str], before: Path | None) -> None:
    if not (TRL / "trl").exists():
        pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(TRL), "trl"]
        subprocess.run([sys.executable, *pip], check=True)

    path = RESULTS / "speed.json"
    results = read_json(path) if path.exists() else {}
    of_device = results.setdefault(DEVICE, {"sections": {}})
    of_device.update(shared.environment())
    of_device.setdefault("command", shared.own_command())
    if DEVICE == "cuda":
        of_device["machine"] += f", {torch.cuda.get_device_name()}"

    for number, name in itertools.product(range(args.rounds), names):
        rounds = of_device["sections"].setdefault(name, [])
        if args.refresh:
            rounds[:] = [sides for sides in rounds if sides.get("code") == code()]
        if len(rounds) > number:
            continue
        rounds.append(measure_round(name, before) | {"code": code()})
        print(f"{name}, round {number + 1}: {rounds[-1]}", flush=True)
        write_json(path, results)

        gib = rounds[-1]["ours"].get("gib")
        if gib:
            memory = {SHAPES[name.split(": ")[0]].model: [gib[when] for when in GPU_MOMENTS]}
            write_json(RESULTS / "gpu.json", {"memory": {"full": memory}})
    print(table(results))


def main(args: Args) -> None:
    names = shared.parse_names("--only", args.only, SECTIONS)
    shared.require_at_least(args, rounds=1)
    if args.measure:
        print(json.dumps(measure(args.measure)))
    elif args.write:
        shared.write_page(PAGE, {"speed": table(read_json(RESULTS / "speed.json"))})
    elif args.before:
        with tempfile.TemporaryDirectory() as folder:
            check_out(args.before, Path(folder))
            run_rounds(args, names, Path(folder))
    else:
        run_rounds(args, names, None)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
