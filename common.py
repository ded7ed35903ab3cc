"""What a step does that no method changes, in the order in which it happens:

problems → rollouts → verdicts → scores under a model → micro-batches → evaluation.

Shapes: P problems, G rollouts of each (the group), T response tokens, D hidden width.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import csv
import dataclasses
import io
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from models import Engine, autocast, base_model, is_recurrent, prompt_cache
from settings import RunArgs, first_line, precision, refuse, seed_for
from verifier import Grader, last_boxed

# ------------------------------------------------------------------------------- problems


@dataclass
class Problem:
    """A question as prompt tokens, and its gold answer."""

    text: str
    answer: str
    prompt: list[int]


class Problems(list[Problem]):
    """Problems in a shuffled order that depends on the seed and the epoch alone."""

    position = 0  # how many have been taken; a checkpoint holds it

    def take(self, count: int, seed: int) -> list[Problem]:
        """The next `count` problems; each epoch has its own order."""
        taken = []
        for place in range(self.position, self.position + count):
            epoch, offset = divmod(place, len(self))
            order = np.random.default_rng(seed_for(seed, "epoch", epoch)).permutation(len(self))
            taken.append(self[order[offset]])
        self.position += count
        return taken


COLUMNS = {
    "question": ["problem", "question", "prompt", "messages"],
    "answer": [
        *("answer", "final_answer", "expected_answer", "ground_truth"),
        *("reward_model.ground_truth", "solution"),
    ],
}
NO_ANSWER = {"", "none", "null", "nan", "n/a", "notfound", "not found", "unknown"}
FILES = {"jsonl", "json", "ndjson", "parquet", "csv", "tsv"}
LOCAL = FILES | {"gz", "bz2", "xz", "zst", "zip", "tar", "txt", "arrow", "xlsx"}


def load_problems(args: RunArgs, flag: str, tokenizer: Any, grader: Grader) -> Problems:
    """Read the data set that --dataset or --eval-dataset names, as docs/data.md describes: what is
    dropped is counted, what cannot be used refused."""
    name = getattr(args, flag.strip("-").replace("-", "_"))

    def note(count: int, of: list[Any], what: str, *, stop: bool = False) -> None:
        if count and (stop or count == len(of)):
            refuse(flag, name, f"{count} of {len(of)} {what}")
        if count:
            print(f"{flag} {name}: {count} of {len(of)} {what}", file=sys.stderr)

    arguments = template_arguments(args)
    rows = read_rows(flag, name, split="train" if flag == "--dataset" else "test")
    if not (rows := [flatten(row) for row in rows if row]):
        refuse(flag, name, "holds no problems")
    question, answer = (find_column(rows, args, flag, what) for what in COLUMNS)
    asked = [(chat, row.get(answer)) for row in rows if (chat := as_chat(row.get(question)))]
    note(len(rows) - len(asked), rows, f"problems have no text in {question!r} and are dropped")

    golds = [gold_answer(value) for _, value in asked]
    readable = grader.readable(golds)
    unread = [repr(asked[i][1])[:40] for i, fine in enumerate(readable) if not fine]
    what = "gold answers cannot be read and are dropped: " + ", ".join([*dict.fromkeys(unread)][:5])
    note(len(unread), asked, what, stop=args.refuse_unreadable)

    problems = []
    for (chat, _), gold in itertools.compress(zip(asked, golds, strict=True), readable):
        text = chat[-1]["content"]
        if args.instruction:
            chat[-1]["content"] += f"\n{args.instruction}"
        if args.system_prompt and chat[0]["role"] != "system":
            chat.insert(0, {"role": "system", "content": args.system_prompt})
        try:
            problems.append(Problem(text, gold, prompt_tokens(tokenizer, chat, **arguments)))
        except ValueError as error:
            model = "--models" if flag == "--datasets" else "--model"
            given = {"--system-prompt": args.system_prompt, "--template-args": args.template_args}
            used = "".join(f", given {option} {value}" for option, value in given.items() if value)
            refuse(model, tokenizer.name_or_path, f"its chat template{used}: {error}")
    short = [problem for problem in problems if len(problem.prompt) <= args.max_prompt_tokens]
    what = f"prompts exceed --max-prompt-tokens {args.max_prompt_tokens} and are dropped"
    note(len(problems) - len(short), problems, what)
    different = {tuple(problem.prompt) for problem in short}
    note(len(short) - len(different), short, "problems repeat another and are kept")
    return Problems(short)


def read_rows(flag: str, name: str, split: str) -> list[dict[str, Any]]:
    """Rows of a local file or folder, or of a data set on the hub: name[:config][@split]."""
    repository, _, wanted = name.partition("@")
    repository, _, config = repository.partition(":")
    if Path(name).exists():
        repository, config, wanted = name, "", ""
    path, split = Path(repository), wanted or split
    try:
        if path.is_file():
            return read_file(path, split)
        local = LOCAL.intersection(path.name.lower().split(".")[1:])
        hub = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", repository) and not local
        if not name or not (hub or path.is_dir()):
            refuse(flag, name, "no such file or folder")
        import datasets  # slow to import, and a file needs none of it

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said below
        if not any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(repository, config or None, split=split).to_list()
        saved = datasets.load_from_disk(repository)
        if isinstance(saved, dict) and split not in saved:
            refuse(flag, name, f"its splits are {', '.join(saved)}, and none is {split}")
        return (saved[split] if isinstance(saved, dict) else saved).to_list()
    except Exception as error:  # datasets raises a dozen kinds for what is one mistake here
        error = error.__cause__ or error
        refuse(flag, name, f"{type(error).__name__}: {first_line(error)[:200]}")


def read_file(path: Path, split: str) -> list[dict[str, Any]]:
    """Rows of one file, packed or not. (`datasets` takes some texts for dates or numbers.)"""
    if not (kind := FILES.intersection(path.name.lower().split("."))):
        raise ValueError(f"its name ends in none of {', '.join(sorted(FILES))}")
    with fsspec.filesystem("file").open(str(path), compression="infer") as file:
        data = file.read()
    if data.startswith(b"version https://git-lfs"):
        raise ValueError("a Git LFS pointer: what it stands for was not downloaded")
    if kind == {"parquet"}:
        import pyarrow.parquet

        return pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    try:
        text = data.decode(json.detect_encoding(data))
    except UnicodeDecodeError:
        if not kind & {"csv", "tsv"}:
            raise
        text = data.decode("cp1252")  # as spreadsheets write it
    if kind & {"csv", "tsv"}:
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
        if longer := [number for number, row in enumerate(rows, 1) if None in row]:
            raise ValueError(f"row {longer[0]} has more fields than there are columns")
        return rows
    rows, place, space = [], 0, re.compile(r"\s*")
    while (place := space.match(text, place).end()) < len(text):  # one JSON value after another
        row, place = json.JSONDecoder().raw_decode(text, place)
        rows.append(row)
    if len(rows) == 1 and isinstance(rows[0], list):
        rows = rows[0]
    elif len(rows) == 1 and isinstance(rows[0], dict):  # it may hold the rows, or each split's
        lists = {key: rows for key, rows in rows[0].items() if isinstance(rows, list) and rows}
        lists = {k: v for k, v in lists.items() if isinstance(v[0], dict) and "role" not in v[0]}
        rows = lists.get(split) or (next(iter(lists.values())) if len(lists) == 1 else rows)
    if wrong := [number for number, row in enumerate(rows, 1) if not isinstance(row, dict)]:
        raise ValueError(f"row {wrong[0]} is not a JSON object")
    return rows


def flatten(row: dict[str, Any], outer: str = "") -> dict[str, Any]:
    """Columns by their names in lower case, and nested ones with dots. Bytes become text, and a
    text that is a whole list or object of texts, in JSON or Python, becomes that."""
    columns = {}
    for name, value in row.items():
        name = outer + str(name).strip().lower()
        value = value.decode(errors="replace") if isinstance(value, bytes) else value
        if isinstance(value, str) and re.match(r"\s*(\[\s*[\"'{]|\{\s*[\"'][\w ]+[\"']:)", value):
            for read in (json.loads, ast.literal_eval):
                with contextlib.suppress(ValueError, SyntaxError):
                    value = read(value.strip()) if isinstance(value, str) else value
        columns |= {name: value} | (flatten(value, f"{name}.") if isinstance(value, dict) else {})
    return columns


def find_column(rows: list[dict[str, Any]], args: RunArgs, flag: str, what: str) -> str:
    """The first of the columns wanted in which some row holds something."""
    chosen = getattr(args, f"{what}_column")
    wanted = [chosen.lower()] if chosen else []
    if not chosen or flag != "--dataset":  # held-out problems may lie in columns of their own
        wanted += COLUMNS[what]
    for column in wanted:
        if any(row.get(column) not in (None, "") for row in rows):
            return column
    name = getattr(args, flag.strip("-").replace("-", "_"))
    why = f"columns found: {sorted(rows[0])[:30]}; wanted: one of {wanted}"
    refuse(flag, name, f"{why}; --{what}-column names another")


def as_chat(value: Any) -> list[dict[str, str]]:
    """Messages up to the user's last, each content as one text; [] where that one says nothing."""
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    chat = []
    for message in messages if isinstance(messages, list) else []:
        if not isinstance(message, dict):
            return []
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
        content = content if isinstance(content, str) else ""
        chat.append({"role": message.get("role"), "content": content})
    while chat and chat[-1]["role"] != "user":
        chat.pop()
    return chat if chat and chat[-1]["content"].strip() else []


def gold_answer(value: Any) -> str:
    r"""The final answer of a gold: after GSM8K's ####, in all of its \boxed{}, or all of it; of a
    list, all are. "" for what is none: a proof, prose, an object, nothing."""
    if isinstance(value, list):
        parts = [gold_answer(part) for part in value]
        return ", ".join(parts) if all(parts) else ""
    if isinstance(value, float):  # without an exponent, and without .0
        value = f"{Decimal(repr(value)).normalize():f}"
    text = "" if isinstance(value, dict) else str(value).strip()
    boxes = dict.fromkeys(last_boxed("\\boxed" + rest) for rest in text.split("\\boxed")[1:])
    boxes.pop(None, None)  # of those never closed
    # Prose has four words that stand before another, and begins with one or has sentences.
    words = re.findall(r"[^\W\d_]{2,}(?=[.:]?\s+[^\W\d_]{2})", text)
    prose = len(words) > 3 and re.match(r"(?s)(\W*\w[.)])?\W*[^\W\d_]{2}|.*\w\.\s+[A-Z]", text)
    if "####" in text:
        text = text.rpartition("####")[2].strip()
    elif boxes:
        text = ", ".join(boxes)
    elif prose or re.match(r"(?i)\W*proof\b", text):
        return ""
    return "" if text.strip(" .").casefold() in NO_ANSWER else text


def template_arguments(args: RunArgs) -> dict[str, Any]:
    """--template-args, and a clock that stands still on --today."""
    try:
        arguments = dict(json.loads(args.template_args or "{}"))
    except (ValueError, TypeError) as error:
        refuse("--template-args", args.template_args, f"is no JSON object: {error}")
    try:
        day = date.fromisoformat(args.today) if args.today else date.today()
    except ValueError as error:
        refuse("--today", args.today, f"is no date: {error}")
    return {"strftime_now": day.strftime} | arguments


def prompt_tokens(tokenizer: Any, question: str | list[Any], **arguments: Any) -> list[int]:
    """Messages through the chat template, or one after another where there is none.

    Raises ValueError where the template fails or leaves the question out.
    """
    chat = [{"role": "user", "content": question}] if isinstance(question, str) else question
    if not tokenizer.chat_template:
        return tokenizer.encode("\n\n".join(message["content"] for message in chat))
    parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in chat]
    wanted, failures = "".join(chat[-1]["content"].split()), []
    for form in (chat, parts):  # some templates want a content in parts
        try:
            prompt = tokenizer.apply_chat_template(
                form, add_generation_prompt=True, tokenize=False, **arguments
            )
        except Exception as error:  # a template raises what it likes
            failures.append(first_line(error))
            continue
        if wanted in "".join(prompt.split()):  # templates trim
            return tokenizer.encode(prompt, add_special_tokens=False)
        failures.append("it leaves the question out")
    raise ValueError(failures[0])


# ------------------------------------------------------------------------------- rollouts


@dataclass
class Group:
    """One problem and its G rollouts, as lists."""

    problem: Problem
    tokens: list[list[int]]  # response token ids, the end-of-sequence token included
    engine_logp: list[list[float]]  # of those tokens, as the engine computed them
    texts: list[str]
    correct: list[float] = dataclasses.field(default_factory=list)  # 1.0 or 0.0, once verified
    ranks: list[int] = dataclasses.field(default_factory=list)  # of chosen first tokens (reft.py)


@dataclass
class Rollouts:
    """P whole groups, right-padded to the longest response."""

    problems: list[Problem]
    tokens: Tensor  # [P, G, T] token ids
    mask: Tensor  # [P, G, T] true on response tokens, the end-of-sequence token included
    engine_logp: Tensor  # [P, G, T] NaN where the engine did not sample the token
    truncated: Tensor  # [P, G] true where a response reached --max-new-tokens
    texts: list[list[str]]
    graph: tuple[Tensor, Tensor] | None = None  # scores that the update can go back from


def roll_out(
    engine: Engine,
    problems: list[Problem],
    args: RunArgs,
    seed: tuple[int | str, ...],
    openers: Tensor | None = None,
) -> list[Group]:
    """G responses to each problem. A response is a function of the weights and its own seed.

    openers: [P, G] token ids that responses begin with; None: every token is sampled.
    """
    prompts, seeds = [], []
    for p, problem in enumerate(problems):
        for g in range(args.group_size):
            opener = [] if openers is None else [int(openers[p, g])]
            prompts.append(problem.prompt + opener)
            seeds.append(seed_for(*seed, p, g))
    length = args.max_new_tokens - (openers is not None)
    responses = engine.generate(prompts, seeds, length, args.temperature)
    groups = []
    for p, problem in enumerate(problems):
        of_group = slice(p * args.group_size, (p + 1) * args.group_size)
        start = len(problem.prompt)
        opened = [prompt[start:] for prompt in prompts[of_group]]
        tokens = [o + ids for o, (ids, _) in zip(opened, responses[of_group], strict=True)]
        logp = [
            [math.nan] * len(o) + values
            for o, (_, values) in zip(opened, responses[of_group], strict=True)
        ]
        groups.append(Group(problem, tokens, logp, engine.decode(tokens)))
    return groups


def verify(grader: Grader, groups: list[Group]) -> None:
    """Fill in `correct`: 1.0 where the response's last \\boxed{} equals the gold answer."""
    texts = [text for group in groups for text in group.texts]
    golds = [group.problem.answer for group in groups for _ in group.texts]
    verdicts = iter(grader.grade(texts, golds))
    for group in groups:
        group.correct = [float(next(verdicts)) for _ in group.texts]


def overlong_punishment(correct: Tensor, lengths: Tensor, *, gamma: float) -> Tensor:
    """Group-relative length punishment: 0 down to -1/2 (GTPO, arXiv 2508.04349, Appendix D).

    correct: [P, G] verdicts; lengths: [P, G] in tokens. Returns [P, G]; zeros where gamma is 0.
    gamma, in (1/2, 1], is the accuracy from which a group is easy: there, long correct rollouts
    are punished, by the lengths of the correct ones. At 1 - gamma or less, none is. Between, those
    of the majority are, by the lengths of all, and the wrong ones on a tie [open].
    """
    if not gamma:
        return torch.zeros_like(lengths, dtype=torch.float32)
    correct = correct > 0
    accuracy = correct.float().mean(-1, keepdim=True)
    easy, hard = accuracy >= gamma, (~correct).float().mean(-1, keepdim=True) >= gamma
    measured = correct | ~easy
    punished = torch.where(accuracy > 0.5, correct, ~correct) & ~hard

    shortest = torch.where(measured, lengths, torch.inf).amin(-1, keepdim=True)
    longest = torch.where(measured, lengths, -torch.inf).amax(-1, keepdim=True)
    mean = torch.where(measured, lengths, 0).sum(-1, keepdim=True) / measured.sum(-1, keepdim=True)
    limit = torch.maximum((shortest + longest) / 2, mean)
    # No measured length reaches 2 * limit, where the paper's slope would end at -1/2.
    punishment = ((limit - lengths) / (2 * limit)).clamp(max=0)  # Eq. D [paper]
    return torch.where(punished, punishment, 0.0)


def stack(groups: list[Group], end_tokens: list[int], where: torch.device) -> Rollouts:
    """Groups as padded tensors; the mask comes from lengths, never from token ids."""

    def pad(rows: list[list[Any]], dtype: torch.dtype) -> Tensor:  # [P, G, T]
        padded = pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True)
        return padded.view(len(groups), -1, padded.shape[-1]).to(where)

    responses = [row for group in groups for row in group.tokens]
    ended = [row[-1] in end_tokens for row in responses]
    return Rollouts(
        problems=[group.problem for group in groups],
        tokens=pad(responses, torch.long),
        mask=pad([[True] * len(row) for row in responses], torch.bool),
        engine_logp=pad([row for group in groups for row in group.engine_logp], torch.float32),
        truncated=~torch.tensor(ended, device=where).view(len(groups), -1),
        texts=[group.texts for group in groups],
    )


# ------------------------------------------------------------------------------- scoring

# All logits at once could fill the memory. A GPU likes large tiles, a CPU's caches small ones.
LOGITS_AT_ONCE = 2**26 if torch.cuda.is_available() else 2**22
Index = tuple[Tensor, Tensor]  # (problem, rollout) indices of n rollouts: x[index] is [n, ...]


def micro_batches(rollouts: Rollouts, token_budget: int, problems: Tensor) -> Iterator[Index]:
    """The rollouts of some problems ([P'] indices), cut into batches of at most `token_budget`
    tokens, padding included. Sorted by length, so there is little of it."""
    group_size = rollouts.mask.shape[1]
    lengths = rollouts.mask.sum(-1).tolist()
    order = sorted(
        (len(rollouts.problems[p].prompt) + int(lengths[p][g]), p, g)
        for p in problems.tolist()
        for g in range(group_size)
    )
    batch: list[tuple[int, int]] = []
    for length, p, g in order:
        if batch and length * (len(batch) + 1) > token_budget:
            yield tuple(torch.tensor(batch).T)
            batch = []
        batch.append((p, g))
    yield tuple(torch.tensor(batch).T)


def hidden_states(model: nn.Module, rollouts: Rollouts, index: Index, args: RunArgs) -> Tensor:
    """Last hidden states (after the final norm) at the positions that predict the live response
    tokens of n rollouts, in the order of `mask[index]`: [tokens, D].

    Where that saves a quarter of the tokens, each prompt is computed once for all its rollouts."""
    body = base_model(model).base_model
    model.train(torch.is_grad_enabled())
    lengths = rollouts.mask[index].sum(-1)  # [n]
    longest = slice(lengths.max())
    tokens, mask = rollouts.tokens[index][:, longest], rollouts.mask[index][:, longest]  # [n, T]
    problems, which = (x.to(mask.device) for x in index[0].unique(return_inverse=True))
    prompts = [rollouts.problems[p].prompt for p in problems]
    # The prompt's last token predicts the response's first, which predicts the second, and so on.
    starts, last = [p[:-1] for p in prompts], tokens.new_tensor([p[-1] for p in prompts])
    inputs = torch.cat([last[which, None], tokens[:, :-1]], dim=1)  # [n, T]
    skipped = tokens.new_tensor([len(start) for start in starts])[which]  # [n]

    together = inputs.numel() + len(starts) * skipped.max()  # tokens to compute
    apart = len(inputs) * (skipped + lengths).max()
    no_cache = args.gradient_checkpointing or is_recurrent(model)
    with autocast(args):
        if together < 0.75 * apart and not no_cache:
            cache, real = prompt_cache(model, starts, which)
            real = torch.cat([real, torch.ones_like(mask)], dim=1)
            places = (real.cumsum(-1) - 1)[:, -inputs.shape[1] :]
            context = {"attention_mask": real, "position_ids": places, "past_key_values": cache}
            return body(input_ids=inputs, **context)[0][mask]
        rows = zip(which, inputs, mask, strict=True)
        rows = [torch.cat([tokens.new_tensor(starts[p]), row[live]]) for p, row, live in rows]
        # Padding is on the right, where causal attention keeps every real token from seeing it.
        states = body(input_ids=pad_sequence(rows, batch_first=True), use_cache=False)[0]
        row, place = mask.nonzero().T
        return states[row, skipped[row] + place]


class HeadLogp(torch.autograd.Function):
    """The LM head, up to the log-probability of each target and the entropy (nats; no gradient):
    two [tokens], float32. Logits exist for one tile of the vocabulary at a time, and are computed
    again in the backward pass.

    hidden: [tokens, D], in the precision of the products; weight: [V, D]; targets: [tokens].
    """

    @staticmethod
    def tiles(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Iterator[Any]:
        width = max(1, LOGITS_AT_ONCE // len(hidden))
        for start, w in zip(range(0, len(weight), width), weight.split(width), strict=True):
            w = w.to(hidden.dtype)
            column = (targets - start)[:, None]
            here = (column >= 0) & (column < len(w))  # whether the target lies in this tile
            logits = (hidden @ w.T).float().div_(temperature)
            yield slice(start, start + len(w)), w, logits, column * here, here

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        masses, picked, entropies = [], [], []  # one value a token of each tile
        for _, _, logits, column, here in HeadLogp.tiles(*inputs):
            logp = logits.log_softmax(-1)
            masses.append(logits.amax(-1) - logp.amax(-1))  # log Σ exp(logits)
            picked.append(logp.gather(-1, column)[:, 0].where(here[:, 0], -torch.inf))
            entropies.append(-torch.linalg.vecdot(logp.exp(), logp))
        masses, picked, entropies = (torch.stack(x) for x in (masses, picked, entropies))
        *tensors, ctx.temperature = inputs
        ctx.save_for_backward(*tensors, masses.logsumexp(0))
        # A token is drawn by drawing its tile first: probabilities multiply, entropies add up.
        tile_logp = masses.log_softmax(0)
        entropy = (tile_logp.exp() * (entropies - tile_logp)).sum(0)
        ctx.mark_non_differentiable(entropy)
        return (picked + tile_logp).amax(0), entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, log_total = ctx.saved_tensors
        hidden, weight, _ = inputs
        scale = grad[:, None] / ctx.temperature
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for rows, w, logits, column, here in HeadLogp.tiles(*inputs, ctx.temperature):
            # ∂ log p_target / ∂ logits = (1[target] - p) / temperature
            d_logits = logits.sub_(log_total[:, None]).exp_().mul_(-scale)
            d_logits = d_logits.scatter_add_(-1, column, scale * here).to(hidden.dtype)
            d_hidden += d_logits @ w
            if d_weight is not None:
                d_weight[rows] = d_logits.T @ hidden
        return d_hidden.to(hidden.dtype), d_weight, None, None


def token_logp(
    model: nn.Module, rollouts: Rollouts, index: Index, args: RunArgs
) -> tuple[Tensor, Tensor]:
    """Log-probability of each response token of n rollouts, and the entropy of the distribution
    it was drawn from (nats, no gradient): two [n, T], 0 outside the mask, float32."""
    if rollouts.graph and torch.is_grad_enabled():
        scores, rollouts.graph = rollouts.graph, None  # one backward pass uses it up
        return tuple(values[index] for values in scores)
    mask = rollouts.mask[index]
    hidden = hidden_states(model, rollouts, index, args).to(precision(args))
    weight = base_model(model).get_output_embeddings().weight
    scores = HeadLogp.apply(hidden, weight, rollouts.tokens[index][mask], args.temperature)
    nothing = torch.zeros(mask.shape, device=mask.device)
    return tuple(nothing.masked_scatter(mask, values) for values in scores)


def drops_out(model: nn.Module, args: Any) -> bool:
    """Whether the model gives other values in training, by dropout of its own or of LoRA."""
    config = base_model(model).config.get_text_config().to_dict()
    return any([args.lora_dropout, *(rate for name, rate in config.items() if "drop" in name)])


@torch.no_grad()
def score(
    model: nn.Module, rollouts: Rollouts, args: Any, *, reuse: bool = False
) -> tuple[Tensor, Tensor]:
    """`token_logp` of every rollout, without a gradient: two [P, G, T].

    reuse: where one micro-batch holds all rollouts of the only update to come, that update need not
    compute the same again: the rollouts keep the graph, for the next `token_logp` to go back from.
    """
    scores = tuple(torch.zeros(rollouts.mask.shape, device=rollouts.mask.device) for _ in "ab")
    everything = torch.arange(len(rollouts.problems))
    batches = list(micro_batches(rollouts, args.token_budget, everything))
    keep = reuse and len(batches) == args.updates_per_rollout == 1
    keep = keep and not drops_out(model, args)
    with torch.set_grad_enabled(keep):
        for index in batches:
            logp, entropy = token_logp(model, rollouts, index, args)
            scores[0][index], scores[1][index] = logp, entropy
    if keep:
        rollouts.graph = scores
    return tuple(values.detach() for values in scores)


def standardize(x: Tensor, mask: Tensor, eps: float) -> Tensor:
    """z-score of x over the live entries of each group.

    x and mask are [..., G, T]; the result too, 0 outside the mask. std is unbiased. Fewer than two
    live entries, or equal ones, give exact zeros even with eps = 0: equality is tested on the
    values, because the mean of equal floats can miss them by an ulp, which eps would magnify.
    """
    group = {"dim": (-2, -1), "keepdim": True}
    count = mask.sum(**group)
    lowest = torch.where(mask, x, torch.inf).amin(**group)
    highest = torch.where(mask, x, -torch.inf).amax(**group)
    mean = torch.where(mask, x, 0.0).sum(**group) / count.clamp(min=1)
    deviation = torch.where(mask, x - mean, 0.0)
    std = (deviation.square().sum(**group) / (count - 1).clamp(min=1)).sqrt()
    return torch.where(mask & (lowest < highest), deviation / (std + eps), 0.0)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the live tokens of each rollout. Both are [..., T]; the result is [..., 1]."""
    return torch.where(mask, x, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)


class Means:
    """Running means over live tokens, across micro-batches."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.count = 0.0

    @torch.no_grad()
    def add(self, mask: Tensor, **values: Tensor) -> None:
        self.count += mask.sum().item()
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value[mask].float().sum().item()

    def result(self) -> dict[str, float]:
        return {name: total / self.count for name, total in self.sums.items()}


def importance_weights(rollouts: Rollouts, old_logp: Tensor, cap: float) -> Tensor:
    """min(π_old / π_engine, cap) of each token, [P, G, T]: truncated importance sampling between
    engine and trainer. 1 where cap is 0, and where the engine did not sample the token."""
    if not cap:
        return torch.ones_like(old_logp)
    ratio = (old_logp - rollouts.engine_logp).exp().clamp(max=cap)
    return torch.where(ratio.isnan(), 1.0, ratio)


# ------------------------------------------------------------------------------- evaluation


def evaluate(engine: Engine, grader: Grader, problems: Problems, args: RunArgs) -> dict[str, float]:
    """Held-out accuracy over samples with a 95% interval over problems, greedy accuracy, length."""
    chosen = problems[: args.eval_problems]
    of_evaluation = copy.copy(args)  # not checked again: a method may need more rollouts
    of_evaluation.group_size = args.eval_samples
    groups = roll_out(engine, chosen, of_evaluation, (args.seed, "evaluation"))
    of_evaluation.group_size, of_evaluation.temperature = 1, 0.0
    greedy = roll_out(engine, chosen, of_evaluation, (args.seed, "greedy"))
    verify(grader, groups + greedy)
    accuracy = np.array([np.mean(group.correct) for group in groups])
    low, high = bootstrap_interval(accuracy)
    return {
        "eval/accuracy": accuracy.mean(),
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/greedy": np.mean([group.correct[0] for group in greedy]),
        "eval/length": np.mean([len(row) for group in groups for row in group.tokens]),
    }


def bootstrap_interval(values: np.ndarray, resamples: int = 2000) -> tuple[float, float]:
    """95% percentile interval of the mean of [problems] values, resampling problems."""
    draws = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[draws].mean(-1), [0.025, 0.975])
    return float(low), float(high)
