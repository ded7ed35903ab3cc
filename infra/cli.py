"""Command line of a script: settings, checks, resume, and errors without a traceback."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import inspect
import json
import math
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import tyro
from tqdm import tqdm

from grading import WorkerError

# Settings that may differ when a run is resumed (--steps if training does not depend on it).
MAY_CHANGE = {
    "resume",
    "steps",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "log_rollouts",
    "wandb_project",
    "token_budget",
    "gradient_checkpointing",
    "gpu_memory",
    "max_logp_gap",
}

# A progress bar for work of more than 3 seconds. None is drawn if the output is not a terminal.
progress_bar = functools.partial(tqdm, delay=3, disable=None, leave=False, dynamic_ncols=True)


class StopRun(Exception):
    """The run cannot continue. The message gives the cause, and often a flag to change."""


def report(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr)


def reject(flag: str, value: Any, why: str) -> NoReturn:
    """Print one line that names the flag, its value and the cause, and exit with code 2."""
    report(f"error: {flag} {value}: {why}")
    raise SystemExit(2)


def require(condition: Any, flag: str, value: Any, why: str) -> None:
    """Reject the flag's value unless the condition holds."""
    if not condition:
        reject(flag, value, why)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


POSITIVE = {
    "prompts_per_step",
    "max_new_tokens",
    "max_prompt_tokens",
    "temperature",
    "steps",
    "generation_rounds",
    "updates_per_rollout",
    "lr",
    "max_grad_norm",
    "token_budget",
    "gpu_memory",
    "eval_problems",
    "eval_samples",
    "keep_checkpoints",
}
BELOW_ONE = {"warmup_ratio", "lora_dropout", "gpu_memory"}


def check_numbers(args: Any) -> None:
    """Reject numbers out of range. All must be at least 0 unless `args.signed` names them."""
    for name, value in vars(args).items():
        if isinstance(value, int | float):
            flag = flag_of(name)
            require(abs(value) < math.inf, flag, value, "must be finite")
            require(value >= 0 or name in args.signed, flag, value, "must be at least 0")
            require(value != 0 or name not in POSITIVE, flag, value, "must be above 0")
            require(value < 1 or name not in BELOW_ONE, flag, value, "must be below 1")


def check_temperature(args: Any) -> None:
    """If vLLM may be used, reject temperatures that it rejects or silently changes."""
    if args.engine != "transformers" and importlib.util.find_spec("vllm"):
        why = "vLLM takes 0.01 to 2; --engine transformers takes any"
        require(0.01 <= args.temperature <= 2, "--temperature", args.temperature, why)


def check_settings(args: Any) -> None:
    """Reject settings of common.RunArgs that cannot work, before anything heavy is loaded."""
    check_numbers(args)
    check_temperature(args)

    def check(condition: Any, name: str, why: str) -> None:
        require(condition, flag_of(name), getattr(args, name), why)

    check(args.group_size > 1, "group_size", "must be at least 2")
    divides = args.prompts_per_step % args.updates_per_rollout == 0
    check(divides, "updates_per_rollout", f"must divide --prompts-per-step {args.prompts_per_step}")
    fits = args.overlong_buffer <= args.max_new_tokens
    check(fits, "overlong_buffer", f"must be at most --max-new-tokens {args.max_new_tokens}")

    unused = "has no effect without "
    check(args.lora_rank or not args.lora_alpha, "lora_alpha", unused + "--lora-rank")
    check(args.lora_rank or not args.lora_dropout, "lora_dropout", unused + "--lora-rank")
    is_default = args.generation_rounds == type(args).generation_rounds
    check(args.dynamic_sampling or is_default, "generation_rounds", unused + "--dynamic-sampling")
    constant = args.lr_schedule == "constant"
    why = "has no effect with --lr-schedule constant: use constant_with_warmup"
    check(not (constant and args.warmup_ratio), "warmup_ratio", why)

    has_vllm = importlib.util.find_spec("vllm")
    check(has_vllm or args.engine != "vllm", "engine", "vLLM is not installed; see README.md")
    has_wandb = importlib.util.find_spec("wandb")
    check(has_wandb or not args.wandb_project, "wandb_project", "wandb is not installed")
    has_cuda = torch.cuda.is_available()
    check(has_cuda or args.device != "cuda", "device", "there is no CUDA GPU")


def parse_args(settings: type, command: list[str] | None = None) -> Any:
    """A script's settings. With --resume the saved ones are the defaults, and flags override them.

    settings: the script's `Args`. command: the words after the script's name, by default sys.argv.
    """
    script = inspect.getmodule(settings)
    only_resume = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_resume.add_argument("--resume")
    folder = only_resume.parse_known_args(command)[0].resume
    require(folder != "", "--resume", "''", "must name a folder")

    saved = load_settings(settings, Path(script.__file__).stem, folder) if folder else settings()
    args = tyro.cli(settings, description=script.__doc__, args=command, default=saved)
    if folder:
        for name in ("engine", "device", "precision"):
            if getattr(args, name) == "auto":  # given as a flag; args.json names what it chose then
                setattr(args, name, getattr(saved, name))
        check_resume(args, saved)
    return args


def load_settings(settings: type, script: str, folder: str) -> Any:
    """The settings in a run's args.json. Rejects a folder that holds no run of this script."""
    try:
        saved = json.loads((Path(folder) / "args.json").read_text())
        of_script = saved.pop("script")
        require(of_script == script, "--resume", folder, f"is a run of {of_script}.py")
        for name, value in saved.items():
            if isinstance(value, list):  # JSON has no tuples
                saved[name] = tuple(value)
        saved |= {"resume": folder, "run_dir": folder}
        return settings(**saved)
    except Exception as error:  # json and dataclasses raise many kinds
        reject("--resume", folder, f"is not the folder of a run: {first_line(error)}")


def check_resume(args: Any, saved: Any) -> None:
    """Reject a changed setting that would change what the resumed run trains."""
    for name, value in vars(args).items():
        before = getattr(saved, name)
        fixed = name not in MAY_CHANGE or (name == "steps" and saved.depends_on_steps())
        if fixed and value != before:
            reject(flag_of(name), value, f"the run started with {before}; start a new run")


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    phrases = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    phrases += ("Free memory on device", "Available memory on node")  # vLLM's
    return isinstance(error, MemoryError) or any(phrase in str(error) for phrase in phrases)


def memory_advice(error: BaseException, gpu_memory: float, lower: str) -> str:
    """What to change if memory ran out, else "". lower: the settings to lower."""
    if "Try increasing `gpu_memory_utilization`" in str(error):  # vLLM
        if not torch.cuda.is_available():
            name = "VLLM_CPU_KVCACHE_SPACE"
            return f"vLLM's cache is too small: set {name} above {os.environ.get(name)} (GiB)"
        return f"vLLM needs more memory: raise --gpu-memory {gpu_memory}"
    if out_of_memory(error):
        return f"out of memory in {place_of(error)}: lower {lower}"
    return ""


def place_of(error: BaseException) -> str:
    """The innermost function of this project in the error's traceback."""
    project = Path(__file__).parent.parent
    folders = project, project / "infra", project / "tools"
    frames = traceback.extract_tb(error.__traceback__)
    return [frame.name for frame in frames if Path(frame.filename).parent in folders][-1]


def launch(main: Callable[[Any], None], settings: type) -> None:
    """Parse the command line and run `main`. After an interrupt or known error print how to resume.

    Exits with 130 after an interrupt, with 1 after an error.
    """
    args = parse_args(settings)
    try:
        return main(args)
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except Exception as error:
        lower = (
            f"--token-budget {args.token_budget} or --gpu-memory {args.gpu_memory}, or add "
            "--gradient-checkpointing; a new run can use --lora-rank 32"
        )
        cause = memory_advice(error, args.gpu_memory, lower)
        if not cause and not isinstance(error, StopRun | OSError | WorkerError):
            raise
        message, code = f"stopped: {cause or error}", 1

    report(message)
    if Path(args.run_dir, "args.json").exists():
        command = shlex.join(["python", sys.argv[0], "--resume", args.run_dir])
        report(f"resume with: {command}")
    raise SystemExit(code)
