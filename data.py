"""What users bring: rows of files, folders and hub data sets, questions, golds, chat templates.

docs/data.md says what is read, and what becomes of what cannot be.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import io
import json
import re
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec

from engine import first_line, refuse
from grading.answers import NO_ANSWERS, is_prose, last_boxed

COLUMNS = {
    "question": "problem question prompt messages",
    "answer": "answer final_answer expected_answer ground_truth reward_model.ground_truth solution",
}
FILES = {"jsonl", "json", "ndjson", "parquet", "csv", "tsv"}
LOCAL = FILES | {"gz", "bz2", "xz", "zst", "zip", "tar", "txt", "arrow", "xlsx"}


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


def find_column(rows: list[dict[str, Any]], args: Any, flag: str, what: str) -> str:
    """The first of the columns wanted in which some row holds something."""
    chosen = getattr(args, f"{what}_column")
    wanted = [chosen.lower()] if chosen else []
    if not chosen or flag != "--dataset":  # held-out problems may lie in columns of their own
        wanted += COLUMNS[what].split()
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
    if "####" in text:
        text = text.rpartition("####")[2].strip()
    elif boxes:
        text = ", ".join(boxes)
    elif is_prose(text):
        return ""
    return "" if text.strip(" .").casefold() in NO_ANSWERS else text


def template_arguments(args: Any) -> dict[str, Any]:
    """--template-args, and a clock that stands still, for prompts must not change by the day."""
    try:
        arguments = dict(json.loads(args.template_args or "{}"))
    except (ValueError, TypeError) as error:
        refuse("--template-args", args.template_args, f"is no JSON object: {error}")
    return {"strftime_now": date(2025, 1, 1).strftime} | arguments


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
