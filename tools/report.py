"""Write one or several runs as a self-contained HTML page: no network, no server.

    python tools/report.py runs/grpo-1-20260101-120000
    python tools/report.py runs/grpo-* runs/ep_grpo-* --out compare.html

The page shows the main results, the curves, the settings and how they differ between runs, and the
logged rollouts with every token shaded by its advantage, entropy or another logged signal. Works
while a run is in progress and does not import torch.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import math
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = Path(__file__).with_suffix(".html")
DATA_MARK = "<!-- data -->"
DIGITS = 4  # significant digits of a token's values: enough to read, a third of the bytes

Row = dict[str, Any]
# A group's step, problem and mean reward, and whether its rewards differ.
Title = tuple[int, str, float | None, bool]


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders"""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """output file; None: report.html in the first run's folder"""
    rollout_megabytes: float = 40.0
    """maximum size of a run's rollouts in the page (MB); above it, evenly spaced steps are kept"""


def reject(what: object, why: str) -> NoReturn:
    """Print the error in one line and exit with code 2."""
    print(f"error: {what}: {why}", file=sys.stderr)
    raise SystemExit(2)


# ------------------------------------------------------------------------------- a run's folder


@dataclass
class Run:
    """The data of one run that the page shows."""

    name: str
    command: str | None
    settings: Row
    changed: list[str]
    metrics: dict[str, list[list[float | None]]]
    vocabulary: dict[int, str] = field(default_factory=dict)
    special: list[int] = field(default_factory=list)
    groups: list[Title] = field(default_factory=list)
    left_out: int = 0
    blocks: list[str] = field(default_factory=list)  # one group each, as JSON


def read_run(folder: Path, name: str, rollout_bytes: float) -> Run:
    """Read a run's folder. Exits with code 2 if it holds no run."""
    if not folder.is_dir():
        reject(folder, "not found")
    log = folder / "metrics.jsonl"
    if not log.is_file():
        reject(folder, "has no metrics.jsonl, so it is not a run folder")

    metrics = read_metrics(log)
    if not metrics:
        reject(log, "has no step yet")
    try:
        settings = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = {}

    settings = settings if isinstance(settings, dict) else {}
    of_folder = ("content", "run_dir", "resume")  # not settings of the user
    settings = {name: value for name, value in settings.items() if name not in of_folder}

    script = settings.get("script")
    usual = {"script": script} | defaults(str(script))
    changed = [name for name, value in settings.items() if usual.get(name, ...) != value]
    command = repeat(script, {name: settings[name] for name in changed}) if script else None

    run = Run(name, command, settings, changed, metrics)
    read_rollouts(run, folder, rollout_bytes)
    return run


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of a jsonl file that have a step. Incomplete and invalid lines are skipped."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and is_number(row.get("step")):
                yield row


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def rounded(value: float, digits: int) -> float | None:
    """A number with so many significant digits; None for NaN and infinity, which JSON lacks."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def read_metrics(path: Path) -> dict[str, list[list[float | None]]]:
    """The steps and the values of each metric."""
    metrics: dict[str, list[list[float | None]]] = {}
    for row in rows_of(path):
        for name, value in row.items():
            if name != "step" and is_number(value):
                steps, values = metrics.setdefault(name, [[], []])
                steps.append(row["step"])
                values.append(rounded(value, 6))
    return metrics


# ------------------------------------------------------------------------------- the command line


def defaults(script: str) -> Row:
    """A script's settings with their defaults, parsed from the source to avoid importing torch."""
    values: Row = {}

    files = [ROOT / "common.py", ROOT / f"{script}.py"]
    if not all(file.is_file() for file in files):
        return values
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Args"):
                for entry in node.body:
                    if is_setting(entry):
                        with contextlib.suppress(ValueError):  # it depends on the machine
                            value = ast.literal_eval(entry.value)
                            is_tuple = isinstance(value, tuple)  # a list in args.json
                            values[entry.target.id] = list(value) if is_tuple else value
    return values


def is_setting(entry: ast.stmt) -> bool:
    """Whether a statement of a dataclass is a field with a default."""
    has_value = isinstance(entry, ast.AnnAssign) and entry.value is not None
    return has_value and "ClassVar" not in ast.unparse(entry.annotation)


def repeat(script: str, changed: Row) -> str:
    """The command that repeats a run in a new folder."""
    words = ["python", f"{script}.py"]
    for name, value in changed.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


# ------------------------------------------------------------------------------- rollouts


def groups_of(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Split rollouts into groups, at a new step, a new problem or a restarted rollout number."""
    group: list[Row] = []
    for row in rows:
        last = group[-1] if group else row
        same = all(row.get(k) == last.get(k) for k in ("step", "problem"))
        if group and not (same and row.get("rollout", 0) > last.get("rollout", -1)):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def read_rollouts(run: Run, folder: Path, most_bytes: float) -> None:
    """Add the rollouts to the run. Above most_bytes, keep every 2nd, 4th, ... step and the last."""
    path = folder / "rollouts.jsonl"
    if not path.is_file():
        return

    tokens, run.special = read_vocabulary(folder, run.settings)
    kept: list[tuple[list[Title], list[str]]] = []  # one step each
    count, size, stride = 0, 0, 1
    by_step = itertools.groupby(groups_of(rows_of(path)), key=lambda group: group[0]["step"])
    for place, (step, groups) in enumerate(by_step):
        encoded = [encode_group(group, tokens, run.vocabulary) for group in groups]
        titles = [title_of(step, group) for group in encoded]
        blocks = [json.dumps(group, separators=(",", ":"), allow_nan=False) for group in encoded]

        last = titles, blocks
        count += len(blocks)
        if place % stride == 0:
            kept.append(last)
            size += sum(map(len, blocks))

        while size > most_bytes and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            size = sum(len(block) for _, blocks in kept for block in blocks)

    if count and kept[-1] is not last:
        kept.append(last)
    run.groups = [title for titles, _ in kept for title in titles]
    run.blocks = [block for _, blocks in kept for block in blocks]
    run.left_out = count - len(run.groups)


def title_of(step: int, group: Row) -> Title:
    rewards = {rollout.get("reward") for rollout in group["rollouts"]}
    return step, shorten(group["problem"]), group["mean"], len(rewards) > 1


def shorten(text: str, most: int = 90) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def encode_group(rows: list[Row], tokens: dict[int, bytes], vocabulary: dict[int, str]) -> Row:
    """A group as the page stores it. Adds the texts of its tokens to the vocabulary.

    Every list of numbers with one entry per token is a signal. A constant signal, such as an
    advantage that all tokens share, is stored as a single number.
    """
    rewards = [row["reward"] for row in rows if is_number(row.get("reward"))]
    encoded = []
    for row in rows:
        ids = [int(i) for i in row.get("tokens") or []]
        signals, other = {}, {}
        for name, value in row.items():
            if isinstance(value, list) and name != "tokens" and len(value) == len(ids):
                if all(map(is_number, value)):
                    short = [rounded(v, DIGITS) for v in value]
                    signals[name] = short[0] if len(set(short)) == 1 else short
            elif is_number(value) and name not in ("step", "rollout"):
                other[name] = rounded(value, 6)

        rollout = {"number": row.get("rollout", 0), "tokens": ids} | other | {"signals": signals}
        if tokens and (odd := odd_pieces(ids, tokens, vocabulary)):
            rollout["odd"] = odd
        elif not tokens:
            rollout["text"] = str(row.get("text", ""))
        encoded.append(rollout)
    return {
        "problem": str(rows[0].get("problem", "")),
        "answer": str(rows[0].get("answer", "")),
        "mean": rounded(sum(rewards) / len(rewards), DIGITS) if rewards else None,
        "rollouts": encoded,
    }


# ------------------------------------------------------------------------------- tokens as text


def read_vocabulary(folder: Path, settings: Row) -> tuple[dict[int, bytes], list[int]]:
    """The bytes of every token and the ids of the special tokens, from the tokenizer.json of the
    run, its newest checkpoint or its initial model; empty if there is none."""
    model = Path(str(settings.get("model", "")))
    places = [folder / "model", *sorted(folder.glob("checkpoints/step-*"), reverse=True)]
    for place in (*places, model, ROOT / model):
        try:
            spec = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue

        vocab = spec["model"]["vocab"]
        if isinstance(vocab, list):  # Unigram: pairs of a token and its score
            vocab = {token: i for i, (token, _) in enumerate(vocab)}
        decoder = json.dumps(spec.get("decoder"))
        to_bytes = byte_level if "ByteLevel" in decoder else sentence_piece
        tokens = {i: to_bytes(token) for token, i in vocab.items()}
        added = spec.get("added_tokens", [])
        tokens |= {entry["id"]: entry["content"].encode() for entry in added}
        return tokens, [entry["id"] for entry in added if entry["special"]]
    return {}, []


def byte_alphabet() -> dict[str, int]:
    """The character of each byte in a byte-level vocabulary: printable bytes represent themselves,
    the others are 256, 257, ... in order (Radford et al. 2019, GPT-2)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


ALPHABET = byte_alphabet()


def byte_level(token: str) -> bytes:
    return b"".join(bytes([ALPHABET[c]]) if c in ALPHABET else c.encode() for c in token)


def sentence_piece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def odd_pieces(
    ids: list[int], tokens: dict[int, bytes], vocabulary: dict[int, str]
) -> dict[int, str]:
    """Add the texts of these tokens to the vocabulary. Return, by position, the texts that differ
    from the vocabulary.

    A token may contain only a part of a character. The character then belongs to the token in which
    it begins, and the tokens that complete it have the remaining text, often none. Invalid bytes
    are shown as U+FFFD.
    """
    pieces = [tokens.get(i, f"⟨{i}⟩".encode()) for i in ids]
    owner = [position for position, piece in enumerate(pieces) for _ in piece]
    texts = [""] * len(ids)
    place = 0
    # surrogateescape maps each invalid byte to one lone surrogate, so positions stay aligned.
    for character in b"".join(pieces).decode("utf-8", errors="surrogateescape"):
        bad = "\udc80" <= character <= "\udcff"
        texts[owner[place]] += "\ufffd" if bad else character
        place += 1 if bad else len(character.encode())

    odd = {}
    for position, (i, piece, text) in enumerate(zip(ids, pieces, texts, strict=True)):
        if vocabulary.setdefault(i, piece.decode(errors="replace")) != text:
            odd[position] = text
    return odd


# ------------------------------------------------------------------------------- the page


def data_block(name: str, text: str) -> str:
    """A script element with JSON. Escapes "<", so that no text can close the element."""
    safe = text.replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{safe}</script>'


def page(runs: list[Run]) -> str:
    """The HTML of the page. Each group of rollouts is its own block, parsed when selected."""
    shown = ("name", "command", "settings", "changed", "metrics")
    shown += ("vocabulary", "special", "groups", "left_out")
    overview = [{name: getattr(run, name) for name in shown} for run in runs]
    blocks = [data_block("runs", json.dumps(overview, separators=(",", ":")))]
    for r, run in enumerate(runs):
        blocks += [data_block(f"group-{r}-{g}", block) for g, block in enumerate(run.blocks)]
    head, tail = TEMPLATE.read_text(encoding="utf-8").split(DATA_MARK)
    return head + "\n".join(blocks) + tail


def names_of(folders: tuple[Path, ...]) -> list[str]:
    """The folders' names, or the paths as given if two names are equal."""
    names = [folder.resolve().name for folder in folders]
    unique = len(set(names)) == len(names)
    return names if unique else [str(folder) for folder in folders]


def main(args: Args) -> None:
    if not args.runs:
        reject("runs", "at least one run folder is required")
    most = args.rollout_megabytes * 1e6
    named = zip(args.runs, names_of(args.runs), strict=True)
    text = page([read_run(folder, name, most) for folder, name in named])
    out = args.out or args.runs[0] / "report.html"
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        reject(out, f"cannot be written: {error.strerror}")
    print(out)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
