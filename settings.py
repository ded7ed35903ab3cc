"""Every setting that no method changes, and the command line made of a script's settings."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.util
import inspect
import itertools
import shlex
import sys
import textwrap
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NoReturn, get_type_hints

import torch
import tyro


@dataclass
class DataArgs:
    """data"""

    model: str = "tiny"
    """folder or hub name of a causal language model"""
    dataset: str = "tiny/train.jsonl"
    """training problems: a jsonl, parquet or csv file, a folder, or a hub name[:config][@split]"""
    eval_dataset: str = "tiny/test.jsonl"
    """held-out problems, named in the same way (split: test)"""
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
    today: str = ""
    """the date that a chat template may write (YYYY-MM-DD); empty: the run's first day"""
    max_prompt_tokens: int = 1024
    """longer prompts are dropped, with their count (tokens)"""
    refuse_unreadable: bool = False
    """stop on a gold answer that the verifier cannot read, rather than drop it"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""


@dataclass
class RolloutArgs:
    """rollouts"""

    prompts_per_step: int = 16
    """P: problems in a step"""
    group_size: int = 8
    """G: rollouts of each problem"""
    max_new_tokens: int = 1024
    """T: longest response (tokens)"""
    temperature: float = 1.0
    """of sampling and of every log-probability"""


@dataclass
class EngineArgs:
    """engine"""

    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """what generates; auto: vLLM where it is installed"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the policy lives"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the forward pass; auto: bfloat16 on CUDA, float32 on CPU; master weights are float32"""
    gpu_memory: float = 0.5
    """share of the GPU's memory that vLLM may hold while it generates"""
    token_budget: int = 16384
    """tokens in one micro-batch, padding included: lower it when memory runs out"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    adamw_8bit: bool = False
    """AdamW's moments in 8 bits, a quarter of their memory (needs `pip install torchao==0.18.0`)"""
    max_logp_gap: float | None = None
    """stop when the engine and the trainer disagree by more, mean over tokens (nats);
    None: 1e-4 in float32, 0.02 in bfloat16"""
    grader_workers: int = 1
    """math-verify processes"""
    grader_deadline: float = 5.0
    """an answer that takes longer is wrong (seconds)"""


@dataclass
class RunArgs(DataArgs, RolloutArgs, EngineArgs):
    """run"""

    steps: int = 150
    """training steps, each one round of rollouts"""
    seed: int = 1
    """of everything random"""
    run_dir: str = ""
    """the run's folder; empty: runs/<script>-<seed>-<date>"""
    resume: bool = False
    """go on from the last checkpoint in --run-dir"""
    eval_every: int = 50
    """steps between evaluations (0: only before and after)"""
    eval_problems: int = 200
    """held-out problems used, the first ones of the file"""
    eval_samples: int = 4
    """sampled answers per held-out problem, beside a greedy one"""
    save_every: int = 50
    """steps between checkpoints (0: only after the last)"""
    keep_checkpoints: int = 2
    """latest checkpoints kept, beside the one with the best held-out accuracy"""
    log_rollouts: int = 1
    """groups a step written to rollouts.jsonl"""
    wandb_project: str = ""
    """also log to this Weights & Biases project (needs `pip install wandb`)"""

    # These may differ when a run goes on: they change what is shown or kept, not what is learned.
    harmless: ClassVar[tuple[str, ...]] = (
        *("steps", "run_dir", "resume", "eval_every", "eval_problems", "eval_samples"),
        *("eval_dataset", "save_every", "keep_checkpoints", "log_rollouts", "wandb_project"),
        *("token_budget", "gpu_memory", "gradient_checkpointing", "max_logp_gap"),
        *("grader_workers", "grader_deadline", "refuse_unreadable"),
    )


def refuse(flag: str, value: Any, why: str) -> NoReturn:
    """One line that names the flag and the value, then exit code 2."""
    print(f"error: {flag} {value}: {why}", file=sys.stderr)
    raise SystemExit(2)


def first_line(error: Exception) -> str:
    """What went wrong, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class StopRun(Exception):
    """The run cannot go on as it is; the message says why.

    changes: the settings with which it can go on.
    """

    def __init__(self, why: str, **changes: Any) -> None:
        super().__init__(why)
        self.changes = changes


def field_help(section: type) -> dict[str, str]:
    """The docstring below each field of a settings class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0].body
    return {
        field.target.id: " ".join(doc.value.value.split())
        for field, doc in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr)
    }


def parse_args(settings: type, command: list[str] | None = None) -> Any:
    """The command line of a script's settings; each class they are built from heads a section."""
    types = get_type_hints(settings)
    sections = {}
    for part in settings.__mro__[:-1]:
        helps = field_help(part)
        own = [f for f in dataclasses.fields(settings) if f.name in part.__annotations__]
        fields = [
            (f.name, Annotated[types[f.name], tyro.conf.arg(help=helps[f.name])], f.default)
            for f in own
        ]
        title = part.__doc__.split("\n")[0].strip(".").replace(" ", "_")
        sections[title] = dataclasses.make_dataclass(
            part.__name__,
            [(n, t, dataclasses.field(default=d)) for n, t, d in fields],
            namespace={"__doc__": " "},
        )
    everything = dataclasses.make_dataclass(
        "Settings",
        [
            (title, tyro.conf.OmitArgPrefixes[part], dataclasses.field(default_factory=part))
            for title, part in sections.items()
        ],
    )
    script = sys.modules[settings.__module__]
    parsed = tyro.cli(everything, description=script.__doc__, args=command)
    values = {k: v for title in sections for k, v in vars(getattr(parsed, title)).items()}
    return settings(**values)


def resume_command(args: Any, **changes: Any) -> str:
    """The command that goes on with a run: the settings that differ from their defaults."""
    words = ["python", sys.argv[0]]
    for field in dataclasses.fields(args):
        value = (vars(args) | {"resume": True} | changes)[field.name]
        flag = field.name.replace("_", "-")
        if isinstance(value, bool) and value != field.default:
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value != field.default:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def device(args: RunArgs) -> torch.device:
    if args.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(args.device)


def precision(args: RunArgs) -> torch.dtype:
    if args.precision == "auto":
        return torch.bfloat16 if device(args).type == "cuda" else torch.float32
    return getattr(torch, args.precision)


def seed_for(*parts: int | str) -> int:
    """A 32-bit seed that is a pure function of its parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest())


def check(args: Any) -> None:
    """Refuse numbers that cannot work, before anything heavy is loaded."""
    least = {"prompts_per_step": 1, "group_size": 2, "max_new_tokens": 1, "steps": 1}
    least |= {"token_budget": 1, "eval_problems": 1, "eval_samples": 1, "grader_workers": 1}
    least |= {"updates_per_rollout": 1, "generation_rounds": 1, "keep_checkpoints": 1}
    least |= {"eval_every": 0, "save_every": 0, "lora_rank": 0, "warmup_steps": 0}
    least |= {"max_prompt_tokens": 1, "overlong_buffer": 0, "importance_cap": 0, "kl": 0}
    least |= {"buckets": 1, "probe_every": 0}  # of the scripts that have them
    for name, minimum in least.items():
        if getattr(args, name, minimum) < minimum:
            refuse(
                "--" + name.replace("_", "-"), getattr(args, name), f"must be at least {minimum}"
            )
    if args.prompts_per_step % args.updates_per_rollout:
        why = f"must divide --prompts-per-step {args.prompts_per_step}"
        refuse("--updates-per-rollout", args.updates_per_rollout, why)
    for name in ("temperature", "lr", "max_grad_norm", "grader_deadline"):
        if not getattr(args, name) > 0:
            refuse("--" + name.replace("_", "-"), getattr(args, name), "must be above 0")
    if args.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        refuse("--engine", "vllm", "vLLM is not installed; see README.md")
    if args.wandb_project and importlib.util.find_spec("wandb") is None:
        refuse("--wandb-project", args.wandb_project, "wandb is not installed")
    if args.device == "cuda" and not torch.cuda.is_available():
        refuse("--device", "cuda", "no CUDA device is there")
    if args.adamw_8bit and device(args).type == "cpu":
        refuse("--adamw-8bit", "on", "needs a CUDA device")
    if args.adamw_8bit and importlib.util.find_spec("torchao") is None:
        refuse("--adamw-8bit", "on", "torchao is not installed")


def check_unchanged(args: Any, now: dict[str, Any], before: dict[str, Any]) -> None:
    """Refuse to go on with other settings than the run began with, but for harmless ones."""
    harmless = set(args.harmless)
    if args.lr_schedule == "cosine":  # which ends at the last step
        harmless.discard("steps")
    if before["script"] != now["script"]:
        refuse("--run-dir", args.run_dir, f"holds a run of {before['script']}.py")
    for name in sorted(now.keys() - harmless):
        if now[name] != (first := before.get(name, now[name])):
            flag = "--" + name.replace("_", "-")
            refuse(flag, now[name], f"this run began with {first}; start a new one")
