"""The trainer against the single-file scripts, in one process and in two. `make scale-test`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("trl") is None:
    pytest.skip("TRL is not installed: make scale-test", allow_module_level=True)

HERE = Path(__file__).parent
METHODS = ["grpo", "ep_grpo", "erpo", "gtpo", "grpo_s", "holderpo", "arca", "reft"]
METHODS += ["forking", "lambda_grpo"]
EXACT = 1e-5


def run(script: Path, *words: str, processes: int = 0) -> subprocess.CompletedProcess:
    """Run a script, under accelerate if a number of processes is given.

    Without MPI, accelerate starts one process with --cpu, so two need --multi_gpu.
    """
    several = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    launch = ["-m", "accelerate.commands.launch", *several, "--num_processes", str(processes)]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *(launch if processes else []), str(script), *words],
        env=os.environ | quiet | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def worker(mode: str, folder: Path, processes: int = 0, methods: list[str] = METHODS) -> Any:
    """The results of each process, by method."""
    ended = run(HERE / "worker.py", mode, str(folder), *methods, processes=processes)
    assert ended.returncode == 0, ended.stderr[-4000:]
    results = folder / f"{mode}-{processes}.json"
    return json.loads(results.read_text()) if processes else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two steps of every script."""
    path = tmp_path_factory.mktemp("scripts")
    worker("script", path)
    return path


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def compared(request: pytest.FixtureRequest, folder: Path) -> dict[str, list[dict[str, float]]]:
    found = worker("compare", folder, processes=request.param)
    assert all(len(of_process) == request.param for of_process in found.values())
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_step_equals_the_scripts(
    method: str, compared: dict[str, list[dict[str, float]]]
) -> None:
    """With two processes, each has rollouts of the second group."""
    for gaps in compared[method]:
        assert gaps.pop("largest_advantage") > 0.1
        assert {name: gap for name, gap in gaps.items() if not gap <= EXACT} == {}
        assert {"advantage", "logp", "mean_loss", "grad_norm"} <= gaps.keys()
        assert ("credit" in gaps, "loss" in gaps) == (method == "arca", method == "holderpo")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return worker("train", tmp_path_factory.mktemp("trained"), processes=2)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_stay_one_policy(
    method: str, trained: dict[str, list[dict[str, Any]]]
) -> None:
    assert len(trained[method]) == 2
    for found in trained[method]:
        assert found["same"] and found["moved"]
        assert len(found["losses"]) == 5
        assert found["rates"] == pytest.approx(found["script_rates"])
        if method == "reft":
            assert set(found["openers"]) == {2}  # --openers 2, in every group


REJECTED = {
    "--group-size 3": "--group-size 3: groups do not divide evenly over 2 processes and 1 updates",
    "--dynamic-sampling": "--dynamic-sampling True: only the single-file scripts do",
}


@pytest.mark.parametrize("flag", REJECTED)
def test_unsupported_flags_are_rejected_by_name(flag: str) -> None:
    command = ["--method", "grpo", "--prompts-per-step", "3", "--device", "cpu", *flag.split()]
    ended = run(HERE.parent / "trl_trainer.py", *command, processes=2)
    assert ended.returncode != 0
    assert f"error: {REJECTED[flag]}" in ended.stderr


def test_vineppo_is_rejected() -> None:
    ended = run(HERE.parent / "trl_trainer.py", "--method", "vineppo")
    assert ended.returncode == 2
    assert "invalid choice 'vineppo'" in ended.stdout + ended.stderr


def test_the_trainer_fits_on_a_few_pages() -> None:
    assert len((HERE.parent / "trl_trainer.py").read_text().splitlines()) <= 318
