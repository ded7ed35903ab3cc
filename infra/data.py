"""Problems: files, folders and hub datasets, their columns, reference answers, chat templates.

docs/data.md describes what is read, and what becomes of what cannot be read.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import functools
import io
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from grading import Grader
from grading.answers import NO_ANSWERS, is_prose, last_boxed
from infra.cli import first_line, reject
from infra.models import seed_for

Row = dict[str, Any]

COLUMNS = {
    "question": ["problem", "question", "prompt", "messages"],
    "answer": [
        *("answer", "final_answer", "expected_answer", "ground_truth"),
        *("reward_model.ground_truth", "solution"),
    ],
}
FILES = {"jsonl", "json", "ndjson", "parquet", "csv", "tsv"}
NOT_A_HUB_NAME = FILES | {"gz", "bz2", "xz", "zst", "zip", "tar", "txt", "arrow", "xlsx"}

# ------------------------------------------------------------------ problems


@dataclass
class Problem:
    """A question, as text and as prompt tokens, and its reference answer."""

    text: str
    answer: str
    prompt: list[int]


class Problems(list[Problem]):
    """Problems in a shuffled order that depends on the seed and the epoch alone."""

    position = 0  # the number of problems taken so far

    def take(self, count: int, seed: int) -> list[Problem]:
        """The next `count` problems. Each epoch has its own order."""
        taken = []
        for position in range(self.position, self.position + count):
            epoch, offset = divmod(position, len(self))
            taken.append(self[epoch_order(len(self), seed, epoch)[offset]])
        self.position += count
        return taken

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(seed_for(seed, "epoch", epoch)).permutation(count)


def load_problems(args: Any, flag: str, tokenizer: Any, grader: Grader) -> Problems:
    """The problems of --dataset or --eval-dataset, as docs/data.md describes.

    flag: which of the two. Prints how many rows were discarded for which reason, and rejects a
    dataset of which none is left.
    """
    name = getattr(args, flag.strip("-").replace("-", "_"))
    for_template = template_arguments(args)
    rows = [flatten(row) for row in read_rows(flag, name) if row]
    if not rows:
        reject(flag, name, "holds no problems")
    question = find_column(rows, args, flag, "question")
    answer = find_column(rows, args, flag, "answer")

    problems, discarded = Problems(), Counter()
    references = [reference_answer(row.get(answer)) for row in rows]
    readable = grader.readable(references)
    unreadable = []
    for row, reference, is_readable in zip(rows, references, readable, strict=True):
        chat = as_chat(row.get(question))
        if not chat:
            discarded[f"problems have no text in {question!r}"] += 1
        elif not is_readable:
            unreadable.append(repr(row.get(answer))[:40])
        else:
            problem = make_problem(chat, reference, tokenizer, args, for_template)
            if len(problem.prompt) <= args.max_prompt_tokens:
                problems.append(problem)
            else:
                discarded[f"prompts exceed --max-prompt-tokens {args.max_prompt_tokens}"] += 1
    if unreadable:
        examples = ", ".join([*dict.fromkeys(unreadable)][:5])
        discarded[f"reference answers cannot be read: {examples}"] = len(unreadable)

    for reason, count in discarded.items():
        if count == len(rows):
            reject(flag, name, f"{count} of {len(rows)} {reason}")
        print(f"{flag} {name}: discarded {count} of {len(rows)}: {reason}", file=sys.stderr)
    if not problems:
        reject(flag, name, f"all {len(rows)} problems were discarded")
    repeated = len(problems) - len({tuple(problem.prompt) for problem in problems})
    if repeated:
        print(f"{flag} {name}: {repeated} problems repeat another and are kept", file=sys.stderr)
    return problems


def make_problem(
    chat: list[Row], reference: str, tokenizer: Any, args: Any, for_template: Row
) -> Problem:
    """Add --instruction and --system-prompt, and apply the chat template."""
    text = chat[-1]["content"]
    if args.instruction:
        chat[-1]["content"] += f"\n{args.instruction}"
    if args.system_prompt and chat[0]["role"] != "system":
        chat.insert(0, {"role": "system", "content": args.system_prompt})
    try:
        prompt = prompt_tokens(tokenizer, chat, **for_template)
    except ValueError as error:
        why = "its chat template"
        if args.system_prompt:
            why += f", given --system-prompt {args.system_prompt}"
        if args.template_args:
            why += f", given --template-args {args.template_args}"
        flag = "--models" if hasattr(args, "models") else "--model"
        reject(flag, tokenizer.name_or_path, f"{why}: {error}")
    return Problem(text, reference, prompt)


# ------------------------------------------------------------------ rows


def read_rows(flag: str, name: str) -> list[Row]:
    """Rows of a local file or folder, or of a hub dataset, name[:config][@split]."""
    split = "train" if flag == "--dataset" else "test"
    repository, config = name, ""
    if not Path(name).exists():
        repository, _, wanted = name.partition("@")
        repository, _, config = repository.partition(":")
        split = wanted or split
    path = Path(repository)
    try:
        if path.is_file():
            return read_file(path, split)
        looks_local = NOT_A_HUB_NAME.intersection(path.name.lower().split(".")[1:])
        is_hub_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", repository) and not looks_local
        is_folder = name and path.is_dir()  # the path of an empty name is the current folder
        if not is_folder and not is_hub_name:
            reject(flag, name, "no such file or folder")
        return read_dataset(flag, name, repository, config, split)
    except Exception as error:  # datasets raises many kinds for a wrong name or broken file
        error = error.__cause__ or error
        reject(flag, name, f"{type(error).__name__}: {first_line(error)[:200]}")


def read_dataset(flag: str, name: str, repository: str, config: str, split: str) -> list[Row]:
    """Rows of a folder or a hub dataset, through `datasets`."""
    import datasets  # slow to import, and not needed for a file

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are printed by the caller
    path = Path(repository)
    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        return datasets.load_dataset(repository, config or None, split=split).to_list()
    saved = datasets.load_from_disk(repository)
    if not isinstance(saved, dict):
        return saved.to_list()
    if split not in saved:
        reject(flag, name, f"its splits are {', '.join(saved)}, and none is {split}")
    return saved[split].to_list()


def read_file(path: Path, split: str) -> list[Row]:
    """Rows of one file, compressed or not. `datasets` would read some texts as numbers or dates."""
    kinds = FILES.intersection(path.name.lower().split("."))
    if not kinds:
        raise ValueError(f"its name ends in none of {', '.join(sorted(FILES))}")
    with fsspec.filesystem("file").open(str(path), compression="infer") as file:
        data = file.read()
    if data.startswith(b"version https://git-lfs"):
        raise ValueError("is a Git LFS pointer: the data itself was not downloaded")
    if "parquet" in kinds:
        import pyarrow.parquet

        return pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    if kinds & {"csv", "tsv"}:
        return read_csv(data)
    return read_json(data.decode(json.detect_encoding(data)), split)


def read_csv(data: bytes) -> list[Row]:
    """Rows of comma, semicolon or tab separated values. Every cell is text."""
    try:
        text = data.decode(json.detect_encoding(data))
    except UnicodeDecodeError:
        text = data.decode("cp1252")  # spreadsheets on Windows write it
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    csv.field_size_limit(sys.maxsize)
    rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    for number, row in enumerate(rows, 1):
        if None in row:
            raise ValueError(f"row {number} has more fields than there are columns")
    return rows


def read_json(text: str, split: str) -> list[Row]:
    """Rows of JSON lines, of a list, or of an object that holds a list of rows for each split."""
    values, position = [], 0
    decoder = json.JSONDecoder()
    space = re.compile(r"\s*")
    while (position := space.match(text, position).end()) < len(text):
        value, position = decoder.raw_decode(text, position)
        values.append(value)

    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    elif len(values) == 1 and isinstance(values[0], dict):
        splits = {key: value for key, value in values[0].items() if is_rows(value)}
        if split in splits:
            values = splits[split]
        elif len(splits) == 1:
            [values] = splits.values()
    for number, row in enumerate(values, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is not a JSON object")
    return values


def is_rows(value: Any) -> bool:
    """Whether a JSON value is a list of rows. A list of messages is not."""
    if not isinstance(value, list) or not value:
        return False
    return isinstance(value[0], dict) and "role" not in value[0]


# ------------------------------------------------------------------ columns

# A text that is a list of texts or objects, or an object: `["1", "2"]`, `{'role': ...}`
NESTED = re.compile(r"\s*(\[\s*[\"'{]|\{\s*[\"'][\w ]+[\"']:)")


def flatten(row: Row, prefix: str = "") -> Row:
    """Columns by their names in lower case; a nested column {"a": {"b": 1}} is also a.b."""
    columns = {}
    for key, value in row.items():
        name = prefix + str(key).strip().lower()
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        if isinstance(value, str) and NESTED.match(value):
            value = parse_nested(value.strip())
        columns[name] = value
        if isinstance(value, dict):
            columns |= flatten(value, f"{name}.")
    return columns


def parse_nested(text: str) -> Any:
    """A list or object written as JSON or as Python, or the text itself."""
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError):
            return parse(text)
    return text


def find_column(rows: list[Row], args: Any, flag: str, kind: str) -> str:
    """The first of the wanted columns in which some row holds a value.

    kind: "question" or "answer". The flag for it, if given, comes first.
    """
    chosen = getattr(args, f"{kind}_column").lower()
    wanted = [chosen] if chosen else []
    if not chosen or flag != "--dataset":  # held-out problems may have columns of their own
        wanted += COLUMNS[kind]
    for column in wanted:
        for row in rows:
            if row.get(column) not in (None, ""):
                return column
    name = getattr(args, flag.strip("-").replace("-", "_"))
    why = f"columns found: {sorted(rows[0])[:30]}; wanted: one of {wanted}"
    reject(flag, name, f"{why}; --{kind}-column names another")


def as_chat(value: Any) -> list[Row]:
    """Messages up to the user's last, each content as one text; [] if that one has no text."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        return []
    chat = []
    for message in value:
        if not isinstance(message, dict):
            return []
        content = message.get("content")
        if isinstance(content, list):  # parts, as multimodal templates have them
            texts = [part.get("text") or "" for part in content if isinstance(part, dict)]
            content = "".join(texts)
        if not isinstance(content, str):
            content = ""
        chat.append({"role": message.get("role"), "content": content})
    while chat and chat[-1]["role"] != "user":
        chat.pop()
    return chat if chat and chat[-1]["content"].strip() else []


def reference_answer(value: Any) -> str:
    r"""The final answer in a reference: after GSM8K's ####, in all of its \boxed{}, or all of it.

    Of a list, every entry. Returns "" for what is no answer: a proof, prose, an object, nothing.
    """
    if isinstance(value, list):
        parts = [reference_answer(part) for part in value]
        return ", ".join(parts) if all(parts) else ""
    if isinstance(value, dict):
        return ""
    if isinstance(value, float):  # 1e-05 as 0.00001, and 2.0 as 2
        value = f"{Decimal(repr(value)).normalize():f}"
    text = str(value).strip()
    boxes = [last_boxed("\\boxed" + rest) for rest in text.split("\\boxed")[1:]]
    boxes = [box for box in dict.fromkeys(boxes) if box is not None]  # None: never closed
    if "####" in text:
        text = text.rpartition("####")[2].strip()
    elif boxes:
        text = ", ".join(boxes)
    elif is_prose(text):
        return ""
    return "" if text.strip(" .").casefold() in NO_ANSWERS else text


# ------------------------------------------------------------------ chat templates


def template_arguments(args: Any) -> dict[str, Any]:
    """--template-args, and a fixed date, because prompts must not change from day to day."""
    try:
        arguments = dict(json.loads(args.template_args or "{}"))
    except (ValueError, TypeError) as error:
        reject("--template-args", args.template_args, f"is not a JSON object: {error}")
    return {"strftime_now": date(2025, 1, 1).strftime} | arguments


def prompt_tokens(tokenizer: Any, question: str | list[Row], **arguments: Any) -> list[int]:
    """Messages through the chat template, or joined by blank lines if there is none.

    Raises ValueError if the template fails or leaves the question out.
    """
    chat = [{"role": "user", "content": question}] if isinstance(question, str) else question
    if not tokenizer.chat_template:
        return tokenizer.encode("\n\n".join(message["content"] for message in chat))

    in_parts = []  # some templates want content as a list of parts
    for message in chat:
        part = {"type": "text", "text": message["content"]}
        in_parts.append(message | {"content": [part]})
    wanted = without_space(chat[-1]["content"])
    failures = []
    for messages in (chat, in_parts):
        try:
            prompt = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **arguments
            )
        except Exception as error:  # a template can raise anything
            failures.append(first_line(error))
            continue
        if wanted in without_space(prompt):
            return tokenizer.encode(prompt, add_special_tokens=False)
        failures.append("it leaves the question out")
    raise ValueError(failures[0])


def without_space(text: str) -> str:
    """The text without white space, which templates trim."""
    return "".join(text.split())
