"""Our side of speed.py: grpo.py in this process, as it is, and its work done bare."""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import files
import torch
from models import autocast
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import grpo
from verifier import Grader

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("sync", "rollout", "verify", "score", "update", "other")
QWEN = {  # hidden, layers, heads, key-value heads, intermediate
    "0.5B": (896, 24, 14, 2, 4864),
    "1.5B": (1536, 28, 12, 2, 8960),
}
VOCABULARY = 151936


@dataclass
class Shape:
    """A model and the work of one step."""

    model: str  # "tiny" or a key of QWEN
    prompts: int
    group: int
    new_tokens: int
    steps: int  # measured, after one that is not
    long_tail: bool = False  # lengths from a log-normal, rather than all equal


SHAPES = {
    "tiny": Shape("tiny", 16, 8, 27, steps=20),
    "0.5B": Shape("0.5B", 2, 4, 24, steps=2),
    "0.5B long tail": Shape("0.5B", 2, 4, 64, steps=2, long_tail=True),
    "1.5B": Shape("1.5B", 16, 8, 1024, steps=5),
    "1.5B long tail": Shape("1.5B", 16, 8, 1024, steps=5, long_tail=True),
    "64 rollouts": Shape("tiny", 8, 8, 27, steps=10),
    "128 rollouts": Shape("tiny", 16, 8, 27, steps=10),
    "256 rollouts": Shape("tiny", 32, 8, 27, steps=10),
    "512 rollouts": Shape("tiny", 64, 8, 27, steps=10),
    "64 x 8 x 1024": Shape("tiny", 64, 8, 1024, steps=0),
}
# ------------------------------------------------------------------------------- the work


def long_tailed(count: int, longest: int, seed: int = 0) -> list[int]:
    """Lengths as those of reasoning models: log-normal, median a quarter of the longest, σ = 0.8;
    what would be longer is cut off there. At least one is."""
    draw = random.Random(seed)
    lengths = [
        min(longest, int(draw.lognormvariate(0, 0.8) * longest / 4) + 1) for _ in range(count)
    ]
    return [longest, *lengths[1:]]


def lengths_of(shape: Shape) -> list[int]:
    count = shape.prompts * shape.group
    if shape.long_tail:
        return long_tailed(count, shape.new_tokens)
    return [shape.new_tokens] * count


def model_folder(name: str, folder: Path) -> Path:
    """The tiny model, or random weights in a shape of Qwen2.5 with the tiny tokenizer."""
    if name == "tiny":
        return ROOT / "tiny"
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    hidden, layers, heads, kv_heads, intermediate = QWEN[name]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny")
    config = Qwen2Config(
        vocab_size=VOCABULARY,
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
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def problem_file(shape: Shape, folder: Path) -> Path:
    """As many problems as a step takes: every step has the same ones."""
    lines = (ROOT / "tiny" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    path = folder / "problems.jsonl"
    path.write_text("\n".join(lines[: shape.prompts]) + "\n", encoding="utf-8")
    return path


def settings_of(shape: Shape, engine: str, folder: Path, device: str) -> grpo.Args:
    problems = str(problem_file(shape, folder))
    return grpo.Args(
        model=str(model_folder(shape.model, folder / "model")),
        dataset=problems,
        eval_dataset=problems,
        prompts_per_step=shape.prompts,
        group_size=shape.group,
        max_new_tokens=shape.new_tokens,
        engine=engine,
        device=device,
        steps=shape.steps + 2,
        eval_problems=1,
        eval_samples=1,
        eval_every=0,
        save_every=0,
        max_logp_gap=float("inf") if shape.model != "tiny" else None,
        run_dir=str(folder / "run"),
    )


def timed(work: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# ------------------------------------------------------------------------------- the steps


class Enough(Exception):
    """All steps are measured: nothing more is to be saved or evaluated."""


class Measured:
    """grpo.py in this process, as it is, with rollouts of given lengths and a look at each step.

    The verdicts alternate once the verifier has done its work: a random model is never right, and
    groups without variance have no gradient. after_step is called between steps, outside their
    clock, with the policy and the optimizer.
    """

    def __init__(self, args: grpo.Args, lengths: list[int], steps: int) -> None:
        self.args, self.lengths, self.count = args, lengths, steps + 1  # the first one warms up
        self.rows: list[dict[str, float]] = []
        self.ends: list[float] = []
        self.tokens = dict.fromkeys(("prompt", "generated", "trained"), 0)
        self.after_step: Callable[..., None] = lambda **_: None

    def run(self) -> None:
        engine, run, stack, grade = grpo.make_engine, grpo.Run, grpo.common.stack, Grader.grade
        outer = self

        class Run(run):
            def steps(self) -> Iterator[int]:
                outer.tokens = dict.fromkeys(outer.tokens, 0)  # the evaluation before is over
                return super().steps()

            def save(self, step: int, policy: nn.Module, tokenizer: Any, **state: Any) -> None:
                outer.ends.append(time.perf_counter())
                outer.rows.append(files.read_lines(self.metrics_file)[-1])
                outer.after_step(policy=policy, optimizer=state["optimizer"])
                if len(outer.rows) == outer.count:
                    raise Enough

        def stack_counted(*given: Any) -> Any:
            self.rollouts = stack(*given)
            self.tokens["trained"] += int(self.rollouts.mask.sum())
            return self.rollouts

        def alternate(grader: Grader, texts: list[str], golds: list[str]) -> list[bool]:
            return [bool(i % 2) for i, _ in enumerate(grade(grader, texts, golds))]

        grpo.make_engine = lambda *given: self.watch(engine(*given))
        grpo.Run, grpo.common.stack, Grader.grade = Run, stack_counted, alternate
        try:
            with contextlib.suppress(Enough):
                grpo.main(self.args)
        finally:
            grpo.make_engine, grpo.Run = engine, run
            grpo.common.stack, Grader.grade = stack, grade

    def watch(self, engine: Any) -> Any:
        """Count what the engine generates, and make each response as long as it is to be."""
        self.engine, generate = engine, engine.generate
        engine.stops = []

        def watched(prompts: list[list[int]], *rest: Any) -> Any:
            responses = generate(prompts, *rest)
            self.tokens["prompt"] += sum(map(len, prompts))
            self.tokens["generated"] += sum(len(ids) for ids, _ in responses)
            return responses

        engine.generate = watched
        if hasattr(engine, "llm"):
            bare = engine.llm.generate

            def of_length(prompts: Any, wanted: list[Any], **rest: Any) -> Any:
                for params, length in zip(wanted, self.lengths, strict=False):
                    params.max_tokens, params.ignore_eos = length, True
                self.bare_generate = lambda: bare(prompts, wanted, **rest)
                return bare(prompts, wanted, **rest)

            engine.llm.generate = of_length
        return engine


def peak_rss() -> int:
    """Most memory this process ever held (bytes)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


# ------------------------------------------------------------------------------- measures


def ours(shape: Shape, engine: str, folder: Path, device: str) -> dict[str, Any]:
    """Steps of grpo.py as they are: seconds from one step's end to the next, and peak memory."""
    measured = Measured(settings_of(shape, engine, folder, device), lengths_of(shape), shape.steps)
    measured.run()
    ends = measured.ends
    return {
        "seconds": [b - a for a, b in itertools.pairwise(ends)]
        or [measured.rows[0]["seconds/step"]],
        "parts": {
            p: statistics.median(row[f"seconds/{p}"] for row in measured.rows[-shape.steps :])
            for p in (*PARTS, "step")
        },
        "tokens_a_step": {name: n / measured.count for name, n in measured.tokens.items()},
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else peak_rss(),
    }


def parts(shape: Shape, engine: str, folder: Path, device: str) -> dict[str, Any]:
    """Steps of grpo.py, and after each the same work bare: the engine's own generate call with
    the very same requests, one forward pass of the same tokens, and one optimiser update."""
    args = settings_of(shape, engine, folder, device)
    measured = Measured(args, lengths_of(shape), shape.steps)
    bare: list[dict[str, float]] = []

    def after_step(policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        engine = measured.engine  # which still has the weights that made this step's rollouts
        if device == "cuda":
            engine.llm.wake_up()
        engine.llm.reset_prefix_cache()
        seconds = {"generate": timed(measured.bare_generate, device)}
        engine.sleep()
        batches = sorted_batches(measured.rollouts)
        policy.train(False)
        with torch.no_grad():
            seconds["score"] = timed(
                lambda: [bare_nll(policy, *batch, args) for batch in batches], device
            )
        policy.train(True)
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # the weights stay as they are: the run goes on as it would

        def update() -> None:
            for batch in batches:
                bare_nll(policy, *batch, args).backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds["update"] = timed(update, device)
        bare.append(seconds)

    measured.after_step = after_step
    measured.run()
    steps, bare = measured.rows[1:], bare[1:]
    names = ("generate", "score", "update")
    ratios = [
        step["seconds/step"] / sum(alone[n] for n in names)
        for step, alone in zip(steps, bare, strict=True)
    ]
    return {
        "seconds": {
            p: statistics.median(row[f"seconds/{p}"] for row in steps) for p in (*PARTS, "step")
        },
        "bare_seconds": {n: statistics.median(row[n] for row in bare) for n in names},
        "step_over_bare": statistics.median(ratios),
        "other_share": statistics.median(r["seconds/other"] / r["seconds/step"] for r in steps),
        "steps": len(steps),
    }


def sorted_batches(rollouts: Any) -> list[tuple[Tensor, Tensor]]:
    """All rollouts in the fewest equal shares that hold at most a tenth padding; each is its
    token ids and which positions predict a response token, [n, L] twice."""
    rows = []
    for p, g in rollouts.mask.any(-1).nonzero().tolist():
        prompt = torch.tensor(rollouts.problems[p].prompt, device=rollouts.tokens.device)
        ids = torch.cat([prompt, rollouts.tokens[p, g][rollouts.mask[p, g]]])
        place = torch.arange(len(ids), device=ids.device)
        rows.append((ids, (place >= len(prompt) - 1) & (place < len(ids) - 1)))
    rows.sort(key=lambda row: len(row[0]))
    real = sum(len(ids) for ids, _ in rows)
    for share in (len(rows) // 2**k for k in range(len(rows).bit_length())):
        cuts = [rows[i : i + share] for i in range(0, len(rows), share)]
        if sum(len(cut) * len(cut[-1][0]) for cut in cuts) <= 1.1 * real:
            break
    pad = nn.utils.rnn.pad_sequence
    return [
        tuple(pad(list(part), batch_first=True) for part in zip(*cut, strict=True)) for cut in cuts
    ]


def bare_nll(policy: nn.Module, ids: Tensor, predicts: Tensor, args: Any) -> Tensor:
    """Cross-entropy of the response tokens, with all their logits at once."""
    with autocast(args):
        hidden = policy.base_model(input_ids=ids[:, :-1], use_cache=False)[0]
        logits = policy.get_output_embeddings()(hidden[predicts[:, :-1]])
    return cross_entropy(logits.float(), ids[:, 1:][predicts[:, :-1]])
