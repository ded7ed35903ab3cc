"""A run that is killed, starved, misled or interrupted goes on as if nothing had happened."""

import dataclasses
import errno
import gc
import hashlib
import importlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import engine
import pytest
import run as run_module
import torch
from conftest import ROOT, needs_vllm, read_metrics
from run import Run, parse_args
from safetensors.torch import load_file, save_file
from torch import nn

import common
import grpo

SCRIPTS = ("grpo", "ep_grpo", "erpo", "gtpo", "holderpo", "arca", "reft", "vineppo")
FULL = {"dynamic_sampling": True, "updates_per_rollout": 2}
LORA = {"lora_rank": 4, "lora_dropout": 0.3, "lr": 1e-2}


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it, and nothing is tidied up."""


# ------------------------------------------------------------------------------- whole runs


@pytest.fixture
def graded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models solve nothing: here an answer is right by the parity of its tokens' sum."""

    def verify(_: Any, groups: list[common.Group]) -> None:
        for group in groups:
            group.correct = [float(sum(row) % 2) for row in group.tokens]

    monkeypatch.setattr(common, "verify", verify)


def launch(args: Any, script: str = "grpo") -> int:
    """The exit code of a script with these settings, started in a random state of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "parse_args", lambda _: dataclasses.replace(args))
        return start(script)


def go_on(folder: Path, *flags: str, script: str = "grpo") -> int:
    """The exit code of `python SCRIPT.py --resume FOLDER`, with more flags."""
    return start(script, "--resume", str(folder), *flags)


def start(script: str, *command: str) -> int:
    torch.manual_seed(int.from_bytes(os.urandom(4)))
    module = importlib.import_module(script)
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *command])
        try:
            module.launch(module.main, module.Args)
        except SystemExit as error:
            code = error.code or 0
        except Killed:
            code = 137
    gc.collect()  # a dead process holds no lock
    return code


def of_script(script: str, args: Any, **changes: Any) -> Any:
    """The settings of grpo.py as another script's, as far as it has them."""
    kind = importlib.import_module(script).Args
    names = {field.name for field in dataclasses.fields(kind)}
    values = dataclasses.asdict(args) | changes
    return kind(**{k: v for k, v in values.items() if k in names})


def steady(path: Path) -> list[dict[str, Any]]:
    """The lines of a log but for what the clock has put there."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    clock = ("seconds/", "tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows]


def content(folder: Path) -> dict[str, str]:
    """The hash of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def weights_of(folder: Path) -> dict[str, str]:
    return {k: v for k, v in content(folder).items() if k.endswith(".safetensors")}


def assert_same(one: Path, other: Path, last: str = "step-000004") -> None:
    """The same weights, optimiser, logs; bit for bit."""
    for log in ("metrics.jsonl", "rollouts.jsonl"):
        assert steady(one / log) == steady(other / log), log
    assert weights_of(one / "model") == weights_of(other / "model")
    a, b = (content(run / "checkpoints" / last) for run in (one, other))
    assert a["trainer.pt"] == b["trainer.pt"]
    assert weights_of(one / "checkpoints" / last) == weights_of(other / "checkpoints" / last)


def killed_after(run: Path, step: int, copy: Path) -> Path:
    """A copy of a finished run as a kill in a later step would have left it."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model")
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    return copy


def scalars(run: Path, name: str) -> list[int]:
    """The steps that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [e.step for e in EventAccumulator(str(run / "tensorboard")).Reload().Scalars(name)]


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_steps_resumed_are_four_steps(
    script: str, kind: str, graded: None, make_args: Callable, tmp_path: Path
) -> None:
    if (script, kind) == ("arca", "full"):
        pytest.skip("ARCA needs LoRA")
    changes = {"steps": 4, "save_every": 2, "eval_every": 2} | (LORA if kind == "lora" else FULL)
    args = of_script(script, make_args(**changes))
    alone, killed = Path(args.run_dir), tmp_path / "killed"
    assert launch(args, script) == 0
    killed_after(alone, 2, killed)
    middle, end = (weights_of(alone / "checkpoints" / f"step-00000{n}") for n in (2, 4))
    assert middle != end  # else a run that loads nothing would pass
    assert go_on(killed, script=script) == 0
    assert_same(alone, killed)
    assert scalars(killed, "reward") == [1, 2, 3, 4]
    assert scalars(killed, "eval/accuracy") == [0, 2, 4]


def test_more_steps_after_the_last(
    graded: None, make_args: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill after the last of them leaves no model/ of fewer steps."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert launch(make_args(steps=4, run_dir=str(once), save_every=0)) == 0
    assert launch(make_args(steps=2, run_dir=str(twice), save_every=0)) == 0
    first = weights_of(twice / "model")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", kill)
        assert go_on(twice, "--steps", "4") == 137
    assert go_on(twice) == 0
    assert first != weights_of(once / "model") == weights_of(twice / "model")


def test_killed_before_the_first_checkpoint(
    graded: None,
    make_args: Callable,
    tied_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps 0 and 1 are written anew, with the same random numbers for the model's own dropout."""
    model = shutil.copytree(tied_model, tmp_path / "with_dropout")
    config = json.loads((model / "config.json").read_text()) | {"attention_dropout": 0.2}
    (model / "config.json").write_text(json.dumps(config))
    changes = {"steps": 2, "save_every": 2, "model": str(model)}
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert launch(make_args(**changes, run_dir=str(alone))) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", kill)
        assert launch(make_args(**changes, run_dir=str(killed))) == 137
    assert [row["step"] for row in read_metrics(killed)] == [0, 1]
    assert go_on(killed) == 0
    assert_same(alone, killed, "step-000002")
    assert scalars(killed, "eval/accuracy") == [0, 2]


def fail(error: BaseException) -> Callable[..., Any]:
    """A function that raises it, whatever it is called with."""

    def failing(*_: Any, **__: Any) -> Any:
        raise error

    return failing


def kill(*_: Any, **__: Any) -> None:
    raise Killed


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("name", ["trainer.pt", "model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_damaged_checkpoint(
    name: str,
    damage: Callable[[Path], None],
    small_run: Callable,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The one before it is used. Where none can be loaded the run refuses and touches nothing."""
    run = small_run(steps=3, save_every=1, keep_checkpoints=3)
    run.train(2)
    one, two = (run.folder / "checkpoints" / f"step-00000{n}" for n in (1, 2))
    damage(two / name)
    again = small_run(steps=3, resume=True, save_every=1, keep_checkpoints=1)
    assert again.run.step == 1
    assert "step-000002 is damaged (" in capsys.readouterr().err
    assert again.weights()["weight"].equal(load_file(one / "model.safetensors")["weight"])
    assert [row["step"] for row in read_metrics(run.folder)] == [0, 1]

    damage(one / name)
    again.close()
    before = content(run.folder)
    again = {"steps": 3, "resume": True, "save_every": 1, "keep_checkpoints": 1}
    error = refusal(capsys, lambda: small_run(**again))
    assert "none of its checkpoints can be loaded" in error
    assert content(run.folder) == before


def test_damaged_newer_checkpoint_does_not_push_out_a_good_one(small_run: Callable) -> None:
    run = small_run(steps=9, save_every=3, keep_checkpoints=1)
    run.train(3)
    good, bad = (run.folder / "checkpoints" / f"step-00000{n}" for n in (3, 6))
    shutil.copytree(good, bad)
    truncate(bad / "trainer.pt")
    again = small_run(steps=9, save_every=1, keep_checkpoints=1, resume=True)
    assert again.run.step == 3
    again.train(1)
    again = small_run(steps=9, save_every=3, keep_checkpoints=1, resume=True)
    assert again.run.step == 4
    again.train(2)
    assert [folder.name for folder in again.run.checkpoints()] == ["step-000006"]
    assert small_run(steps=9, resume=True).run.step == 6


def test_memory_that_runs_out_is_no_damage(
    small_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run(steps=3, save_every=1).train(1)
    monkeypatch.setattr(torch, "load", fail(MemoryError()))
    with pytest.raises(MemoryError):
        small_run(steps=3, resume=True)


# ------------------------------------------------------------------------------- a small policy


class Small(nn.Linear):
    """A policy of four weights that is saved and loaded as transformers does it."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__(4, 1, bias=False)
        nn.init.ones_(self.weight)

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text("{}")

    @classmethod
    def from_pretrained(cls, folder: Path, **_: Any) -> nn.Module:
        policy = cls()
        json.loads((folder / "config.json").read_text())
        policy.load_state_dict(load_file(folder / "model.safetensors"))
        return policy


class SmallRun:
    """The loop of a script, on four weights."""

    def __init__(self, args: Any) -> None:
        self.args, self.policy = args, Small()
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=0.1)
        self.run = Run(args)
        self.folder = self.run.folder
        self.run.restore(self.policy, optimizer=self.optimizer)
        if self.run.step == 0:
            self.run.log(0, {"reward": 0.0})

    def train(self, steps: int, **metrics: Any) -> None:
        for step in self.run.steps():
            self.update(self.policy.weight.square().sum() * torch.rand(()))
            shown = {"reward": 0.0, "length": 9.0, "truncated": 0.0} | metrics
            self.run.log(step, shown, tokens=1)
            self.run.save(step, self.policy, self, optimizer=self.optimizer, position=step)
            steps -= 1
            if not steps:
                break

    def update(self, loss: torch.Tensor) -> float:
        loss.backward()
        return self.run.update(self.optimizer, 0.1, loss.item())

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")

    def weights(self) -> dict[str, torch.Tensor]:
        return {k: v.clone() for k, v in self.policy.state_dict().items()}

    def close(self) -> None:
        self.run.lock.close()


@pytest.fixture
def small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SmallRun]:
    """A new process for each call: the one before has let go of the folder. No TensorBoard."""
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", MagicMock())
    open_runs: list[SmallRun] = []

    def make(**changes: Any) -> SmallRun:
        for run in open_runs:
            run.close()
        open_runs.clear()
        folder = str(tmp_path / "small")
        changes["resume"] = folder if changes.get("resume") else ""
        names = {"model": "none", "dataset": "none"}
        open_runs.append(SmallRun(grpo.Args(run_dir=folder, **names, **changes)))
        return open_runs[0]

    return make


def test_a_disk_too_small_for_a_checkpoint_is_refused(
    small_run: Callable[..., SmallRun],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Four weights in float32: 48 bytes of weights and moments, and 16 of model/."""
    free = 64
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    small_run()
    free = 63
    line = refusal(capsys, lambda: small_run(resume=True))
    assert line.startswith("error: --run-dir ")
    assert "a checkpoint and model/ need 0.0 GB, and 0.0 GB are free" in line


def test_the_folder_of_all_runs_is_not_tidied(tmp_path: Path) -> None:
    """What another run is writing at the moment stays, where its parent folder is named."""
    other = tmp_path / "other" / "checkpoints" / "step-000001.unfinished"
    other.mkdir(parents=True)
    run_module.lock(tmp_path).close()
    assert other.exists()
    run_module.lock(tmp_path / "other").close()
    assert not other.exists()


def test_a_file_never_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    taken = run_module.whole(tmp_path / "a")
    with pytest.raises(engine.StopRun, match="cannot be written"), taken as partial:
        partial.write_text("a file")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_kill_at_any_operation_on_files(
    small_run: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before and after every single one that changes the folder, through three checkpoints."""
    operations = [
        *[(Path, name) for name in ("mkdir", "rename", "replace", "unlink", "open")],
        *[(os, name) for name in ("rmdir", "unlink", "fsync")],
        *[(Small, "save_pretrained"), (torch, "save"), (SmallRun, "save_pretrained")],
    ]
    fuse = [math.inf]

    def burning(operation: Callable[..., Any]) -> Callable[..., Any]:
        def operate(*args: Any, **kwargs: Any) -> Any:
            fuse[0] -= 1
            if fuse[0] == 0:
                raise Killed
            value = operation(*args, **kwargs)
            fuse[0] -= 1
            if fuse[0] == 0:
                raise Killed
            return value

        return operate

    whole = small_run(steps=3, save_every=1, keep_checkpoints=1)
    whole.train(3)
    expected = whole.weights()
    shutil.rmtree(whole.folder)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and no power is cut here
    for owner, name in operations:
        monkeypatch.setattr(owner, name, burning(getattr(owner, name)))
    kills = 0
    for moment in range(1, 2000):
        fuse[0] = moment
        reached = 0
        try:
            run = small_run(steps=3, save_every=1, keep_checkpoints=1)
            for step in (1, 2, 3):
                run.train(1)
                reached = step
        except Killed:
            kills += 1
        done = fuse[0] > 0
        fuse[0] = math.inf
        capsys.readouterr()
        again = small_run(steps=3, save_every=1, keep_checkpoints=1, resume=True)
        assert again.run.step >= reached, moment  # what was saved is still there
        assert "damaged" not in capsys.readouterr().err, moment
        again.train(3)
        assert again.weights()["weight"].equal(expected["weight"]), moment
        assert [row["step"] for row in read_metrics(again.folder)] == [0, 1, 2, 3]
        assert not list(again.folder.rglob("*.unfinished"))
        shutil.rmtree(again.folder)
        if done:
            break
    assert kills > 100


def test_last_and_best_are_kept(small_run: Callable) -> None:
    run = small_run(steps=9, save_every=1, keep_checkpoints=2)
    interval = {"eval/accuracy_low": 0.0, "eval/accuracy_high": 1.0, "eval/greedy": 0.0}
    for step in range(1, 8):
        accuracy = {2: 0.4, 3: 0.9, 5: 0.5}.get(step)
        run.train(1, **({"eval/accuracy": accuracy} | interval if accuracy else {}))
    names = [folder.name for folder in run.run.checkpoints()]
    assert names == ["step-000003", "step-000006", "step-000007"]


def test_without_an_evaluation_only_the_last_are_kept(small_run: Callable) -> None:
    run = small_run(steps=9, save_every=1, keep_checkpoints=2)
    run.train(5)
    assert [folder.name for folder in run.run.checkpoints()] == ["step-000004", "step-000005"]


# ------------------------------------------------------------------------------- refusals


def refusal(capsys: pytest.CaptureFixture[str], start: Callable[[], Any]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as refused:
        start()
    assert refused.value.code == 2
    del refused
    gc.collect()  # with it goes the refused run's hold on the folder
    return capsys.readouterr().err.splitlines()[-1] + "\n"


@pytest.fixture
def resume(small_run: Callable, tmp_path: Path) -> Callable[..., grpo.Args]:
    """What the command line `--resume FOLDER` and more gives, after a run of 2 steps of 4."""

    def resume(*flags: str, **began: Any) -> grpo.Args:
        if not (tmp_path / "small").exists():
            small_run(**{"steps": 4, "save_every": 1} | began).train(2)
        return parse_args(grpo.Args, ["--resume", str(tmp_path / "small"), *flags])

    return resume


@pytest.mark.parametrize(
    "flags",
    [
        *["--group-size 4", "--seed 2", "--lr 1.0", "--temperature 0.5", "--max-new-tokens 9"],
        *["--lr-schedule cosine", "--engine transformers", "--run-dir elsewhere", "--kl 0.5"],
    ],
)
def test_settings_that_may_not_be_given_anew(
    flags: str, resume: Callable, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    resume()
    before = content(tmp_path / "small")
    error = refusal(capsys, lambda: resume(*flags.split()))
    assert error.startswith(f"error: {flags}: this run began with "), error
    assert content(tmp_path / "small") == before


def test_settings_that_may_be_given_anew(resume: Callable) -> None:
    """The others are those the run began with, whatever the defaults have become."""
    args = resume("--steps", "9", "--token-budget", "9", "--save-every", "3", lr=0.5, seed=7)
    assert (args.steps, args.token_budget, args.save_every) == (9, 9, 3)
    assert (args.lr, args.seed) == (0.5, 7)
    assert resume("--max-logp-gap", "1.0").steps == 4
    assert args.run_dir == args.resume


def test_settings_of_every_script_are_read_back(tmp_path: Path) -> None:
    """Those that are no plain number too."""
    changes = {"gtpo": {"entropy_clamp": (0.2, 0.28)}, "reft": {"base": "dapo"}}
    for script in SCRIPTS:
        args = importlib.import_module(script).Args(
            lr=1e-7, model="none", dataset="none", run_dir=str(tmp_path / f"{script}'s folder")
        )
        args = dataclasses.replace(args, **changes.get(script, {}))
        Run(args).open_logs()
        again = parse_args(type(args), ["--resume", args.run_dir])
        assert again == dataclasses.replace(args, resume=args.run_dir)


@pytest.mark.parametrize(
    ("script", "began", "fine"),
    [
        *[("grpo", {}, True), ("grpo", {"lr_schedule": "cosine"}, False)],
        *[("grpo", {"warmup_ratio": 0.1}, False), ("grpo", {"warmup_steps": 2}, True)],
        *[("holderpo", {}, False), ("holderpo", {"schedule": "constant"}, True)],
    ],
)
def test_steps_that_shape_a_schedule(
    script: str, began: dict, fine: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = importlib.import_module(script).Args
    folder = str(tmp_path / "run")
    Run(kind(steps=4, model="none", dataset="none", run_dir=folder, **began)).open_logs()

    def more() -> Any:
        return parse_args(kind, ["--resume", folder, "--steps", "8"])

    if fine:
        assert more().steps == 8
    else:
        assert refusal(capsys, more).startswith("error: --steps 8: this run began with 4")


@pytest.mark.parametrize("name", ["model", "dataset"])
def test_moved_content(
    name: str,
    small_run: Callable,
    tied_model: Path,
    problem_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same lies elsewhere now; other content is refused, wherever it lies."""
    shutil.copytree(tied_model, tmp_path / "one/model")
    shutil.copy(problem_file, tmp_path / "one/dataset")
    folder = str(tmp_path / "run")
    names = {name: str(tmp_path / "one" / name) for name in ("model", "dataset")}
    Run(grpo.Args(run_dir=folder, **names)).open_logs()
    command = ["--resume", folder]
    assert parse_args(grpo.Args, command)
    moved = (tmp_path / "one" / name).rename(tmp_path / "moved it")
    gone = f"error: --{name} {tmp_path / 'one' / name}: does not hold what this run began with"
    assert refusal(capsys, lambda: parse_args(grpo.Args, command)).startswith(gone)
    command += [f"--{name}", str(moved)]
    assert vars(parse_args(grpo.Args, command))[name] == str(moved)
    largest = max(moved.iterdir(), key=lambda f: f.stat().st_size) if moved.is_dir() else moved
    with largest.open("r+b") as file:
        file.seek(-9, os.SEEK_END)
        file.write(b"#")
    other = f"error: --{name} {moved}: does not hold what this run began with"
    assert refusal(capsys, lambda: parse_args(grpo.Args, command)).startswith(other)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "7", "{}", '{"script": "grpo"}'])
def test_folder_of_no_run(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "args.json").write_text(text)
    error = refusal(capsys, lambda: parse_args(grpo.Args, ["--resume", str(tmp_path)]))
    assert error.startswith(f"error: --resume {tmp_path}: is not the folder of a run: ")


def test_run_of_another_script(
    resume: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import erpo

    resume()
    command = ["--resume", str(tmp_path / "small")]
    assert "is a run of grpo.py" in refusal(capsys, lambda: parse_args(erpo.Args, command))


def test_folder_of_another_run(small_run: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    """One that runs, with --resume or without; one that has ended, without --resume."""
    run = small_run(steps=4, save_every=1)
    for resume in (run.args.run_dir, ""):
        args = dataclasses.replace(run.args, resume=resume)
        assert "another run is writing here" in refusal(capsys, lambda a=args: Run(a))
    run.train(1)
    before = content(run.folder)
    error = refusal(capsys, lambda: small_run(steps=4))
    assert error.startswith(f"error: --run-dir {run.folder}: holds a run; --resume ")
    assert content(run.folder) == before


def test_fewer_steps_than_were_made(
    small_run: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    small_run(steps=4, save_every=1).train(3)
    error = refusal(capsys, lambda: small_run(steps=2, resume=True))
    assert error == "error: --steps 2: the run has come to step 3\n"
    assert small_run(steps=3, resume=True).run.step == 3


def test_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    inside = grpo.Args(run_dir=str(tmp_path / "file" / "run"))
    error = refusal(capsys, lambda: Run(inside))
    assert "cannot be written: Not a directory" in error

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "open", read_only)
    args = grpo.Args(run_dir=str(tmp_path / "run"))
    error = refusal(capsys, lambda: Run(args))
    assert "cannot be written: Read-only file system" in error


def test_hidden_files_of_others_stay(small_run: Callable) -> None:
    run = small_run(steps=4)
    (run.folder / ".git").mkdir()
    (run.folder / "notes.txt").touch()
    small_run(steps=4, resume=True)
    assert (run.folder / ".git").exists() and (run.folder / "notes.txt").exists()


def test_wandb_knows_a_run_that_goes_on(
    small_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an identity of its own, which another run in a folder of this name has not."""
    wandb = MagicMock(__spec__=MagicMock())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    small_run(steps=4, save_every=1, wandb_project="p").train(1)
    small_run(steps=4, wandb_project="p", resume=True).close()
    shutil.rmtree(tmp_path / "small")
    small_run(steps=4, wandb_project="p")
    first, second, other = (call.kwargs for call in wandb.init.call_args_list)
    assert first["id"] == second["id"] != other["id"]
    assert (first["project"], first["resume"], first["sync_tensorboard"]) == ("p", "allow", True)
    assert first["config"]["group_size"] == 8


def test_finished_run(
    graded: None, make_args: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    args = make_args(steps=1)
    folder = Path(args.run_dir)
    assert launch(args) == 0
    before = content(folder)
    capsys.readouterr()
    assert go_on(folder) == 0
    assert "is finished: 1 steps" in capsys.readouterr().out
    assert content(folder) == before
    shutil.rmtree(folder / "model")  # killed after the last checkpoint
    assert go_on(folder) == 0
    weights = {k: v for k, v in before.items() if k.endswith(".safetensors")}
    assert weights_of(folder) == weights


# ------------------------------------------------------------------------------- guards


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_update_that_is_not_finite(
    value: float, small_run: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    """It changes neither weights nor optimiser; the third in a row ends the run."""
    run = small_run(steps=9, save_every=1)
    run.train(1)
    weights, state = run.weights(), json.dumps(str(run.optimizer.state_dict()))
    for bad in (
        lambda: run.policy.weight.sum() * value,
        lambda: run.policy.weight.sum() + value,  # a fine gradient
        lambda: slope_of(run, value),  # a fine loss
    ):
        run.update(bad())
        run.update(bad())
        assert run.weights()["weight"].equal(weights["weight"])
        assert json.dumps(str(run.optimizer.state_dict())) == state
        assert "update skipped" in capsys.readouterr().err
        run.update(run.policy.weight.sum())  # so that they are not in a row
        weights, state = run.weights(), json.dumps(str(run.optimizer.state_dict()))
    run.update(bad())
    run.update(bad())
    with pytest.raises(engine.StopRun, match="3 updates in a row"):
        run.update(bad())
    assert run.weights()["weight"].equal(weights["weight"])


def slope_of(run: SmallRun, slope: float) -> torch.Tensor:
    """A finite loss, the gradient of which is not finite."""
    loss = run.policy.weight.sum()
    loss.register_hook(lambda _: torch.tensor(slope))
    return loss


def test_skipped_updates_are_counted(
    graded: None, make_args: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a whole run: step 2 leaves the weights where step 1 put them, and step 3 moves them."""
    seen = []

    def clipped_loss(logp: torch.Tensor, *rest: Any) -> Any:
        seen.append(1)
        loss, clipped = original(logp, *rest)
        return loss * (math.nan if len(seen) == 2 else 1.0), clipped

    original = grpo.clipped_loss
    monkeypatch.setattr(grpo, "clipped_loss", clipped_loss)
    args = make_args(steps=3, save_every=1, keep_checkpoints=3)
    assert launch(args) == 0
    run = Path(args.run_dir)
    assert [row["skipped_updates"] for row in read_metrics(run)[1:]] == [0, 1, 0]
    one, two, three = (weights_of(run / f"checkpoints/step-00000{n}") for n in (1, 2, 3))
    assert one == two != three


def test_weights_that_are_not_finite_are_not_saved(small_run: Callable) -> None:
    run = small_run(steps=9, save_every=1)
    run.train(1)
    with torch.no_grad():
        run.policy.weight[0, 0] = math.inf
    with pytest.raises(engine.StopRun, match="weights are not finite"):
        run.run.save(2, run.policy, run)
    assert [folder.name for folder in run.run.checkpoints()] == ["step-000001"]


@pytest.mark.parametrize(
    ("sick", "healthy"),
    [
        ({"truncated": 1.0}, {"truncated": 0.9}),
        ({"zero_variance": 1.0}, {"zero_variance": 0.5}),
        ({"length": 1.0}, {"length": 1.5}),
        ({"boxed": 0.0}, {"boxed": 0.1}),
    ],
)
def test_hopeless_run_is_reported_once(
    sick: dict, healthy: dict, small_run: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(steps=40, save_every=0)
    run.train(4, **sick)
    run.train(5, **healthy)
    run.train(4, **sick)
    assert "warning" not in capsys.readouterr().err
    run.train(9, **sick)
    assert capsys.readouterr().err.count("warning: for 5 steps ") == 1


def test_policy_that_is_not_finite(
    graded: None,
    make_args: Callable,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def update(run: Run, optimizer: torch.optim.Optimizer, *_: Any) -> float:
        optimizer.param_groups[0]["params"][0].data.fill_(math.nan)
        return 0.0

    monkeypatch.setattr(Run, "update", update)
    args = make_args(steps=3, save_every=0)
    assert launch(args) == 1
    assert "log-probabilities are not finite" in capsys.readouterr().err


MEMORY_ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    MemoryError(),
)
SCARCE = {  # where memory runs out in step 2 of a run that goes on, and what is to be changed
    "transformers.AutoModelForCausalLM.from_pretrained": "--model ",
    "engine.precision": "--kl 0.1 ",
    "torch.load": "--model ",
    "transformers.GenerationConfig": "--prompts-per-step than 4",
    "common.token_logp": "--token-budget 200,",
    "torch.Tensor.backward": "--token-budget 200,",
    "torch.optim.AdamW.step": "--token-budget 200,",
    "transformers.GenerationMixin.generate": "--prompts-per-step than 4",  # in an evaluation
}


@pytest.mark.parametrize("where", SCARCE)
def test_out_of_memory(
    where: str,
    graded: None,
    make_args: Callable,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two lines: the flag with its value, and the command that goes on."""
    args = make_args(steps=1, kl=0.1, token_budget=200)
    if where != "transformers.GenerationMixin.generate":  # which a new run meets in its step 0
        assert launch(args) == 0
    error = MEMORY_ERRORS[list(SCARCE).index(where) % 3]
    with monkeypatch.context() as patch:
        patch.setattr(where, fail(error))
        capsys.readouterr()
        ended = go_on(args.run_dir, "--steps", "2") if Path(args.run_dir).exists() else launch(args)
    assert ended == 1
    *_, what, how = capsys.readouterr().err.splitlines()
    assert what.startswith("stopped: out of memory: ") and SCARCE[where] in what
    assert how == f"go on with: python grpo.py --resume {args.run_dir}"
    error.__traceback__ = None  # with its frames goes the hold on the folder
    gc.collect()
    assert go_on(args.run_dir) == 0
    assert [row["step"] for row in read_metrics(Path(args.run_dir))][:2] == [0, 1]


def test_out_of_memory_in_vllm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_: Any) -> None:
        llm = MagicMock(wake_up=fail(MEMORY_ERRORS[0]))
        engine.VLLM.sync(MagicMock(sleeps=True, llm=llm), None)

    monkeypatch.setattr(sys, "argv", ["grpo.py"])
    with pytest.raises(SystemExit):
        run_module.launch(main, grpo.Args)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stopped: out of memory: --gpu-memory 0.3 is vLLM's share")


def test_other_errors_are_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["grpo.py"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        run_module.launch(fail(RuntimeError("size mismatch")), grpo.Args)


def test_printed_command_is_a_shell_command(
    graded: None,
    make_args: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a relative folder that has spaces; from another working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "score", fail(OSError(errno.ENOSPC, "No space left on device")))
    assert launch(make_args(run_dir="it's a folder")) == 1
    what, how = capsys.readouterr().err.splitlines()[-2:]
    assert what == "stopped: [Errno 28] No space left on device"
    command = shlex.split(how.removeprefix("go on with: "))
    assert command == ["python", "grpo.py", "--resume", "it's a folder"]
    assert parse_args(grpo.Args, command[2:]).run_dir == "it's a folder"


# ------------------------------------------------------------------------------- disks


def test_full_disk_under_a_log(small_run: Callable, tmp_path: Path) -> None:
    """A real one: every write to /dev/full fails."""
    run = small_run(steps=9, save_every=1)
    run.train(1)
    log = run.folder / "metrics.jsonl"
    kept = log.read_text()
    log.rename(tmp_path / "kept")
    log.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        run.run.log(2, {"reward": 1.0})
    log.unlink()
    log.write_text(kept + '{"step": 2, "rew')  # what fitted
    assert small_run(steps=9, resume=True).run.step == 1
    assert log.read_text() == kept


@pytest.mark.parametrize(
    "error",
    [
        (OSError, errno.ENOSPC, os.strerror(errno.ENOSPC)),
        (RuntimeError, "PytorchStreamWriter failed writing file data/2: file write failed"),
    ],
)
def test_full_disk_under_a_checkpoint(
    error: tuple[Any, ...],
    graded: None,
    make_args: Callable,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One message, and the command that goes on; the checkpoint before it is whole."""
    saved = []

    def save(values: Any, path: Path) -> None:
        saved.append(path)
        if len(saved) == 2:
            path.write_bytes(b"some")
            raise error[0](*error[1:])
        original(values, path)

    original = torch.save
    monkeypatch.setattr(torch, "save", save)
    args = make_args(steps=3, save_every=1)
    assert launch(args) == 1
    said = capsys.readouterr().err
    assert "stopped: " in said and "step-000002 cannot be written; is the disk full? (" in said
    checkpoints = Path(args.run_dir) / "checkpoints"
    assert [folder.name for folder in checkpoints.iterdir()] == ["step-000001"]
    assert go_on(args.run_dir) == 0


def test_full_disk_under_the_settings(
    make_args: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is nothing to go on with."""
    monkeypatch.setattr(Path, "write_text", fail(OSError(errno.ENOSPC, "No space left on device")))
    assert launch(make_args()) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "args.json cannot be written; is the disk full?" in line


def test_damaged_lines(small_run: Callable) -> None:
    """They are dropped; the others stay as they are, byte for byte."""
    run = small_run(steps=9, save_every=1)
    run.train(3)
    log = run.folder / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    damaged = b"\xff\0\xfe{}\n7\n[]\n{}\nnull\n" + b'{"step": "x"}\n\n'
    log.write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[2] + damaged + lines[3])
    small_run(steps=9, resume=True)
    assert log.read_bytes() == lines[0] + lines[2] + lines[3]


# ------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_ends_the_step_and_saves(
    number: int,
    graded: None,
    make_args: Callable,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    args = make_args(steps=4, save_every=4, run_dir=str(tmp_path / "alone"))
    assert launch(args) == 0
    args.run_dir = str(tmp_path / "interrupted")
    original = common.stack
    steps = []

    def stack(*rest: Any) -> Any:
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), number)
        return original(*rest)

    monkeypatch.setattr(common, "stack", stack)
    before = signal.getsignal(number)
    capsys.readouterr()
    assert launch(args) == 130
    assert [row["step"] for row in read_metrics(tmp_path / "interrupted")] == [0, 1, 2]
    assert signal.getsignal(number) is before
    said = capsys.readouterr().err
    assert "Traceback" not in said
    command = shlex.split(said.rpartition("go on with: ")[2])
    assert start("grpo", *command[2:]) == 0
    assert len(steps) == 4
    assert_same(tmp_path / "alone", tmp_path / "interrupted")


def test_second_signal_stops_at_once(
    graded: None, make_args: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stack(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")

    args = make_args(steps=2, save_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(common, "stack", stack)
        assert launch(args) == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [row["step"] for row in read_metrics(Path(args.run_dir))] == [0]
    assert go_on(args.run_dir) == 0


def test_signal_while_saving(small_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes too late for this step's checkpoint, so another step is made and saved."""
    run = small_run(steps=9, save_every=2)
    original = Run.save

    def save(this: Run, step: int, *rest: Any, **state: Any) -> None:
        original(this, step, *rest, **state)
        if step == 3:
            this.interrupt()

    monkeypatch.setattr(Run, "save", save)
    run.train(9)
    assert run.run.step == 4
    assert small_run(steps=9, resume=True).run.step == 4


# ------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_others_can_load_a_checkpoint(
    kind: str, graded: None, make_args: Callable, tied_model: Path
) -> None:
    """The policy through transformers and peft alone: what they compute is what model/ computes."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    args = make_args(steps=1, **(LORA if kind == "lora" else {}))
    assert launch(args) == 0
    last, end = (Path(args.run_dir) / name for name in ("checkpoints/step-000001", "model"))
    before = AutoModelForCausalLM.from_pretrained(tied_model)
    final = AutoModelForCausalLM.from_pretrained(end)
    if kind == "lora":
        policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tied_model), last)
    else:
        policy = AutoModelForCausalLM.from_pretrained(last)
    ids = torch.arange(8)[None]
    logits = [model.eval()(ids).logits for model in (before, policy, final)]
    assert torch.allclose(logits[1], logits[2], atol=1e-4)
    assert (logits[0] - logits[2]).abs().max() > 1e-3


def test_sampling_settings_that_transformers_does_not_save(
    graded: None, make_args: Callable, tied_model: Path, tmp_path: Path
) -> None:
    """Some published models come with a temperature but without do_sample."""
    model = shutil.copytree(tied_model, tmp_path / "model")
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.6, "top_p": 0.9}))
    assert launch(make_args(model=str(model))) == 0


# ------------------------------------------------------------------------------- processes


def script(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


SHORT = "--lr 1e-3 --prompts-per-step 4 --group-size 4 --max-new-tokens 32 --eval-problems 4"
SHORT += " --eval-samples 1"


@needs_vllm
def test_resume_with_vllm(tiny_model: Path, tmp_path: Path) -> None:
    """In a process of its own, as in life."""
    command = ["grpo.py", *SHORT.split(), "--engine", "vllm", "--steps", "4", "--save-every", "2"]
    script(*command, "--run-dir", str(tmp_path / "alone"))
    killed = killed_after(tmp_path / "alone", 2, tmp_path / "killed")
    script(command[0], "--resume", str(killed))
    assert_same(tmp_path / "alone", killed)
