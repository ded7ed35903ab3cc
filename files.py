"""Files and folders that a crash leaves whole or leaves out."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from settings import StopRun, first_line, refuse

UNFINISHED = ".unfinished"  # ends the name of what must not be taken for whole

# ------------------------------------------------------------------------------- lines


def append_line(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def parse_line(line: str) -> dict[str, Any] | None:
    """One row of a run's jsonl file; None where a crash or a disk has damaged it."""
    with contextlib.suppress(ValueError):
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's jsonl file, but for damaged ones."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace") as lines:
        return [row for line in lines if (row := parse_line(line))]


def keep_steps(path: Path, last: int) -> int:
    """Drop the rows after a step, and damaged ones; how many were damaged."""
    if not path.exists():
        return 0
    damaged = 0
    with replacing(path) as new, path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            row = parse_line(line)
            damaged += row is None
            if row and row["step"] <= last:
                new.write(line.rstrip("\n") + "\n")
    return damaged


# ------------------------------------------------------------------------------- files


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A new file that takes the old one's place in the end: a reader never sees a part of it."""
    partial = path.with_name(path.name + UNFINISHED)
    with partial.open("w", encoding="utf-8") as file:
        yield file
    partial.replace(path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as file:
        json.dump(value, file, indent=1)


def flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------- folders


@contextlib.contextmanager
def whole_folder(folder: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """A temporary folder to fill, which is given its name in the end: it is whole or not there.

    Adds the settings and the size of each file. Raises StopRun where it cannot be written.
    """
    torn = folder.with_name(folder.name + UNFINISHED)
    try:
        shutil.rmtree(torn, ignore_errors=True)
        torn.mkdir(parents=True)
        yield torn
        write_json(torn / "args.json", settings)
        files = [file for file in torn.rglob("*") if file.is_file()]
        write_json(torn / "sizes.json", {str(f.relative_to(torn)): f.stat().st_size for f in files})
        for path in [*torn.rglob("*"), torn]:
            flush(path)  # after a power cut there must not be the name without the content
        remove(folder)
        torn.rename(folder)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch and safetensors have their own
        shutil.rmtree(torn, ignore_errors=True)
        why = f"{folder} cannot be written; is the disk full? ({first_line(error)})"
        raise StopRun(why) from error


def is_whole(folder: Path) -> bool:
    """Whether every file is there with the size it was written with."""
    with contextlib.suppress(OSError, ValueError):
        sizes = read_json(folder / "sizes.json")
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    return False


def remove(folder: Path) -> None:
    """Delete a folder; a crash halfway leaves nothing under its name."""
    if folder.exists():
        doomed = folder.with_name(f"{folder.name}.old{UNFINISHED}")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def lock(folder: Path) -> TextIO:
    """Make a folder, and this process its only writer for as long as the returned file is open.

    Refuses where another process is. What a crash has left halfway is deleted.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in (*folder.glob(f"*{UNFINISHED}"), *folder.glob(f"checkpoints/*{UNFINISHED}")):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    except BlockingIOError:
        refuse("--run-dir", folder, "another run is writing here")
    except OSError as error:
        refuse("--run-dir", folder, f"cannot be written: {error.strerror}")
    return file
