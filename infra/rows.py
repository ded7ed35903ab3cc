"""Rows of files, folders and hub datasets. Texts stay texts: "007", "1e5", "NA" and dates.

docs/data.md lists the formats.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import re
import sys
import zipfile
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import fsspec

from infra.cli import first_line, reject

Row = dict[str, Any]

FILES = {"jsonl", "json", "ndjson", "parquet", "csv", "tsv"}
# A name that ends in one of these is no hub name.
FILE_ENDINGS = FILES | {"gz", "bz2", "xz", "zst", "zip", "tar", "txt", "arrow", "xlsx"}
BATCH = 256  # rows of an Arrow table that are in memory at a time

# ------------------------------------------------------------------ names


def read_rows(flag: str, name: str, needed: Container[str] = ()) -> Iterator[Row]:
    """Rows of a local file or folder, or of a hub dataset, name[:config][@split].

    needed: the columns, in lower case; others may be missing. Empty: every column.
    """
    split = "train" if flag == "--dataset" else "test"
    repository, config, chosen = name, "", ""
    if not Path(name).exists():
        repository, _, chosen = name.partition("@")
        repository, _, config = repository.partition(":")
        split = chosen or split

    path = Path(repository)
    looks_local = FILE_ENDINGS.intersection(path.name.lower().split(".")[1:])
    is_hub_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", repository) and not looks_local
    is_local = name and path.exists()  # the path of an empty name is the current folder
    if not is_local and not is_hub_name:
        reject(flag, name, "no such file or folder")

    try:
        if path.is_file():
            if config:
                raise ValueError("is a file, which has no configuration")
            if chosen and kind_of(path) != "json":
                raise ValueError("is a file of rows, which has no split")
            yield from read_file(path, split, needed, must_name_split=bool(chosen))
        else:
            yield from read_dataset(repository, config, split, needed)
    except Exception as error:  # datasets raises many kinds for a wrong name or broken file
        error = error.__cause__ or error
        text = " ".join(str(error).split())  # the second line names a data set's configurations
        reject(flag, name, f"{type(error).__name__}: {text[:200]}")


def read_dataset(repository: str, config: str, split: str, needed: Container[str]) -> Iterator[Row]:
    """Rows of a folder or a hub dataset. `datasets` finds the files of a folder's split."""
    import datasets  # slow to import, and not needed for a file

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are printed by the caller

    path = Path(repository)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        table = datasets.load_from_disk(repository)
        if isinstance(table, dict):
            table = of_split(table, split)
    else:
        files = []
        if path.is_dir():
            repository = str(path.absolute())  # "json" alone would be a loader of `datasets`
            found = datasets.load_dataset_builder(repository, config or None).config.data_files
            files = [Path(file) for file in of_split(found, split)]

        if files and all(map(kind_of, files)):
            yield from read_files(files, split, needed)
            return
        table = datasets.load_dataset(repository, config or None, split=split)

    table = table.select_columns(present(table.column_names, needed))
    yield from arrow_rows(table.with_format("arrow").iter(BATCH))


def read_files(files: list[Path], split: str, needed: Container[str]) -> Iterator[Row]:
    for file in files:
        try:
            yield from read_file(file, split, needed)
        except Exception as error:  # which of the files it is
            raise ValueError(f"{file.name}: {first_line(error)}") from None


def of_split(splits: dict[str, Any], split: str) -> Any:
    if split not in splits:
        raise ValueError(f"its splits are {', '.join(map(str, splits))}, and none is {split}")
    return splits[split]


# ------------------------------------------------------------------ files


def kind_of(path: Path) -> str:
    """The format that a file's name gives: "jsonl" of train.jsonl.gz; "" if there is none."""
    for part in reversed(path.name.lower().split(".")):
        if part in FILES:
            return part
    return ""


def open_file(path: Path) -> BinaryIO:
    return fsspec.filesystem("file").open(str(path), compression="infer")


def open_text(path: Path, encoding: str, newline: str | None = None) -> TextIO:
    return io.TextIOWrapper(open_file(path), encoding, newline=newline)


def read_file(
    path: Path, split: str, needed: Container[str], must_name_split: bool = False
) -> Iterator[Row]:
    """Rows of one file, compressed or not. `datasets` would read some texts as numbers or dates.

    must_name_split: raise ValueError unless it is a JSON object with that split.
    """
    kind = kind_of(path)
    if not kind:
        raise ValueError(f"its name ends in none of {', '.join(sorted(FILES))}")
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
        if len(members) > 1:  # only the first would be read
            raise ValueError(f"holds {len(members)} files: unpack it and name the folder")
    with open_file(path) as file:
        start = file.read(50)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError("is a Git LFS pointer: the data itself was not downloaded")

    encoding = json.detect_encoding(start)  # UTF-8 or UTF-16, from the first bytes
    if kind == "parquet":
        yield from read_parquet(path, needed)
    elif kind in ("csv", "tsv"):
        yield from read_csv(path, encoding)
    else:
        yield from read_json(path, encoding, split, needed, must_name_split)


def read_csv(path: Path, encoding: str) -> Iterator[Row]:
    """Rows of comma, semicolon or tab separated values. Every cell is text."""
    try:
        with open_text(path, encoding) as text:
            for _ in text:
                pass
    except UnicodeDecodeError:
        encoding = "cp1252"  # spreadsheets on Windows write it

    csv.field_size_limit(sys.maxsize)
    with open_text(path, encoding, newline="") as text:
        header = text.readline()
        delimiter = max(",;\t", key=header.count)
        lines = itertools.chain([header], text)
        rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
        for number, row in enumerate(rows, 1):
            if None in row:
                raise ValueError(f"row {number} has more fields than there are columns")
            yield row


# ------------------------------------------------------------------ JSON


def read_json(
    path: Path, encoding: str, split: str, needed: Container[str], must_name_split: bool
) -> Iterator[Row]:
    """Rows of JSON lines, of a list, or of an object that holds a list of rows for each split."""
    with open_text(path, encoding) as text:
        values = json_values(text)
        first = list(itertools.islice(values, 2))
        rows = itertools.chain(first, values)

        if must_name_split:
            is_object = len(first) == 1 and isinstance(first[0], dict)
            rows = first[0].get(split) if is_object else None
            if not isinstance(rows, list):
                raise ValueError(f"is not an object with a list of rows for {split}")
        elif len(first) == 1:
            rows = rows_within(first[0], split, needed)
        for number, row in enumerate(rows, 1):
            if is_chat(row):
                row = {"conversations": row}
            if not isinstance(row, dict):
                raise ValueError(f"row {number} is not a JSON object")
            yield row


def json_values(text: TextIO) -> Iterator[Any]:
    """The JSON values of a file, one per line.

    From the first line on that is not one JSON value, they may have any layout.
    """
    for number, line in enumerate(text):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            blank_lines = "\n" * number  # so that an error gives the line of the file
            yield from decode_all(blank_lines + line + text.read())
            return
        yield value


def decode_all(text: str) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    space = re.compile(r"\s*")
    position = space.match(text).end()
    while position < len(text):
        value, position = decoder.raw_decode(text, position)
        yield value
        position = space.match(text, position).end()


def rows_within(value: Any, split: str, needed: Container[str]) -> list[Any]:
    """The rows of a file that holds one JSON value.

    {"train": [...], "test": [...]} and {"data": [...]} hold rows; an object with a needed column
    next to its lists is a row. A split that is empty is not replaced by another.
    """
    if isinstance(value, list) and not is_chat(value):
        return value
    if isinstance(value, dict):
        splits = {key: rows for key, rows in value.items() if is_rows(rows)}
        is_row = any(key.strip().lower() in needed for key in value.keys() - splits.keys())
        if (split in splits or value.get(split) == []) and not is_row:
            return value[split]
        if len(splits) == 1 and not is_row:
            return next(iter(splits.values()))
    return [value]


def is_rows(value: Any) -> bool:
    """Whether a JSON value is a list of rows: of objects, or of conversations."""
    if not isinstance(value, list) or not value or is_chat(value):
        return False
    return isinstance(value[0], dict) or is_chat(value[0])


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages, with `role` and `content` or `from` and `value`."""
    if not isinstance(value, list) or not value:
        return False
    if not all(isinstance(message, dict) for message in value):
        return False
    keys = value[0].keys()
    return not keys.isdisjoint({"role", "from"}) and not keys.isdisjoint({"content", "value"})


# ------------------------------------------------------------------ Arrow


def read_parquet(path: Path, needed: Container[str]) -> Iterator[Row]:
    import pyarrow.parquet

    with open_file(path) as data:
        file = pyarrow.parquet.ParquetFile(data)
        columns = present(file.schema_arrow.names, needed)
        yield from arrow_rows(file.iter_batches(BATCH, columns=columns))


def present(names: list[str], needed: Container[str]) -> list[str]:
    """Those of a table's columns that are needed, or all if none is."""
    return [name for name in names if name.strip().lower() in needed] or names


def arrow_rows(batches: Iterable[Any]) -> Iterator[Row]:
    """The rows of tables. Values that `datasets` stored as JSON are decoded."""
    for batch in batches:
        mixed = [field for field in batch.schema if "arrow.json" in str(field.type)]
        for row in batch.to_pylist():
            for field in mixed:
                row[field.name] = decode_json(row[field.name], field.type)
            yield row


def decode_json(value: Any, kind: Any) -> Any:
    r"""A value of an Arrow type that contains JSON, which `datasets` makes of a mixed column.

    In such a type `datasets` puts a text in quotes unless it takes it for JSON, such as `007` or
    `[1, 2]`. A value in quotes is decoded, and so is a list of lists, which begins with `[[`.
    Anything else is kept as text, because it may have been one.
    """
    if isinstance(value, str) and "arrow.json" in str(kind) and value.startswith(('"', "[[")):
        with contextlib.suppress(ValueError):  # [[007]] is not JSON
            return json.loads(value)
    if isinstance(value, dict):
        return {field.name: decode_json(value[field.name], field.type) for field in kind}
    if isinstance(value, list):
        return [decode_json(item, kind.value_type) for item in value]
    return value
