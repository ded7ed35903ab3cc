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
TRAINER = HERE.parent / "trl_trainer.py"
TINY = HERE.parents[1] / "tiny"
METHODS = ["grpo", "ep_grpo", "erpo", "gtpo", "grpo_s", "holderpo", "arca", "reft"]
METHODS += ["forking", "lambda_grpo", "fipo", "stare"]
VARIANTS = ["grpo", "updates", "lora"]
EXACT = 1e-5
# EP-GRPO divides log-ratios by their standard deviation, and so their rounding.
LIMITS = {"advantage": 5e-5}
# Without MPI, accelerate starts one process with --cpu, so two need --multi_gpu.
TWO = ["--num_processes", "2", "--main_process_port", "0"]
LAYOUTS = {
    "one": ["--cpu", "--num_processes", "1"],
    "ddp": ["--multi_gpu", *TWO],
    "fsdp2": [
        "--config_file",
        str(HERE.parent / "fsdp-8gpu.yaml"),
        "--mixed_precision",
        "no",
        *TWO,
    ],
}
PROCESSES = {"one": 1, "ddp": 2, "fsdp2": 2}


def run(script: Path, *words: str, layout: str = "", **env: str) -> subprocess.CompletedProcess:
    """Run a script, under accelerate if a layout is given."""
    launch = ["-m", "accelerate.commands.launch", *LAYOUTS[layout]] if layout else []
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *launch, str(script), *words],
        env=os.environ | quiet | {"ACCELERATE_USE_CPU": "true"} | env,
        capture_output=True,
        text=True,
        timeout=900,
    )


def worker(mode: str, folder: Path, layout: str = "", names: list[str] = METHODS) -> Any:
    """The results of each process, by method or variant."""
    ended = run(HERE / "worker.py", mode, str(folder), *names, layout=layout)
    assert ended.returncode == 0, ended.stderr[-4000:]
    if not layout:
        return None
    processes = PROCESSES[layout]
    found = json.loads((folder / f"{mode}-{processes}.json").read_text())
    assert all(len(of_process) == processes for of_process in found.values())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two steps of every script."""
    path = tmp_path_factory.mktemp("scripts")
    worker("script", path)
    return path


@pytest.fixture(scope="module", params=["one", "ddp"])
def compared(request: pytest.FixtureRequest, folder: Path) -> dict[str, list[dict[str, float]]]:
    return worker("compare", folder, request.param)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_equals_the_scripts(
    method: str, compared: dict[str, list[dict[str, float]]]
) -> None:
    """With two processes, each has rollouts of the second group."""
    for gaps in compared[method]:
        assert gaps.pop("largest_advantage") > 0.1
        limits = {name: LIMITS.get(name, EXACT) for name in gaps}
        assert {name: gap for name, gap in gaps.items() if not gap <= limits[name]} == {}
        assert {"advantage", "logp", "mean_loss", "grad_norm"} <= gaps.keys()
        assert ("credit" in gaps, "loss" in gaps) == (method == "arca", method == "holderpo")


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """The layout, the folder of the runs, and the results."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, worker("train", folder, request.param)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_stay_one_policy(method: str, trained: tuple) -> None:
    layout, _, results = trained
    for found in results[method]:
        assert found["sharded"] == (layout == "fsdp2")
        assert found["same"] and found["moved"]
        assert len(found["losses"]) == len(found["script_rates"])
        assert found["rates"] == pytest.approx(found["script_rates"])
        if method == "reft":
            assert set(found["openers"]) == {2}  # --openers 2, in every group


def test_every_final_model_loads_and_can_be_evaluated(trained: tuple) -> None:
    _, folder, _ = trained
    models = [str(folder / f"{method}-5" / "model") for method in METHODS]
    command = ["--models", *models, "--datasets", str(TINY / "test.jsonl"), "--problems", "2"]
    command += ["--samples", "1", "--max-new-tokens", "16", "--engine", "transformers"]
    command += ["--folder", str(folder / "evaluations"), "--output", str(folder / "summary.json")]
    ended = run(HERE.parents[1] / "tools" / "evaluate.py", *command)
    assert ended.returncode == 0, ended.stderr[-4000:]
    summary = (folder / "summary.json").read_text()
    assert all(model in summary for model in models)


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """GRPO in each layout, with the rollouts of one process."""
    folder = tmp_path_factory.mktemp("followed")
    return {layout: worker("follow", folder, layout, VARIANTS) for layout in LAYOUTS}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_does(
    layout: str, variant: str, followed: dict[str, dict]
) -> None:
    """The weights after five steps: of GRPO, with two updates per step, with LoRA."""
    [alone] = followed["one"][variant]
    first, second = followed[layout][variant]
    assert first["sharded"] == second["sharded"] == (layout == "fsdp2")
    assert first["weights"] == second["weights"]
    assert alone["updates"] == first["updates"] == (10 if variant == "updates" else 5)
    assert alone["moved"] > 100 * EXACT
    assert first["gap"] <= EXACT


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_killed_run_resumes(layout: str, tmp_path: Path) -> None:
    """Killed in step 3, and again while saving: the metrics of an uninterrupted run."""
    words = f"--method ep_grpo --model {TINY} --dataset {TINY}/train.jsonl --steps 4 --lr 1e-3"
    words += f" --eval-dataset {TINY}/test.jsonl --eval-problems 2 --eval-samples 2 --eval-every 1"
    words += " --prompts-per-step 3 --group-size 4 --max-new-tokens 24 --save-every 1 --device cpu"
    words += " --keep-checkpoints 3"
    through = tmp_path / "through"
    ended = run(
        HERE / "worker.py", "command", *words.split(), "--run-dir", str(through), layout=layout
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    killed = tmp_path / "killed"
    command = [*words.split(), "--run-dir", str(killed)]
    ended = run(HERE / "worker.py", "command", *command, layout=layout, KILL_AT="3")
    assert ended.returncode != 0
    names = sorted(path.name for path in killed.glob("checkpoint-*"))
    assert names == ["checkpoint-1", "checkpoint-2"]
    (killed / "checkpoint-3").mkdir()  # its trainer_state.json is missing
    written = (killed / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns
    ended = run(HERE / "worker.py", "command", "--resume", str(killed), layout=layout)
    assert ended.returncode == 0, ended.stderr[-4000:]
    again = (killed / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns
    assert again == written  # the run did not start from the beginning

    assert len([*killed.glob("checkpoint-*")]) == len([*through.glob("checkpoint-*")]) == 3
    uninterrupted, resumed = metrics_of(through), metrics_of(killed)
    assert len(resumed) == len(uninterrupted) == 9  # 4 steps, 5 evaluations
    for expected, found in zip(uninterrupted, resumed, strict=True):
        assert found == pytest.approx(expected, abs=1e-6, rel=1e-6)


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    """What the last checkpoint's trainer_state.json logged, without times."""
    history = json.loads((run_dir / "checkpoint-4" / "trainer_state.json").read_text())
    rows = []
    for row in history["log_history"]:
        times = ("time", "per_second")
        rows.append({name: row[name] for name in row if not name.endswith(times)})
    return rows


REJECTED = {
    "--group-size 3": "--group-size 3: 9 rollouts do not divide by 2 processes x 1 updates",
    "--dynamic-sampling": "--dynamic-sampling True: only the single-file scripts do",
    "--micro-batch 0": "--micro-batch 0: must be at least 1",
}


@pytest.mark.parametrize("flag", REJECTED)
def test_unsupported_flags_are_rejected_by_name(flag: str) -> None:
    command = ["--method", "grpo", "--prompts-per-step", "3", "--device", "cpu", *flag.split()]
    ended = run(TRAINER, *command, layout="ddp")
    assert ended.returncode != 0
    assert f"error: {REJECTED[flag]}" in ended.stderr


def test_a_precision_that_accelerate_would_override_is_rejected(tmp_path: Path) -> None:
    """FSDP would compute in bfloat16. The variable is accelerate launch's."""
    command = ["--device", "cpu", "--run-dir", str(tmp_path)]
    ended = run(TRAINER, *command, ACCELERATE_MIXED_PRECISION="bf16")
    assert ended.returncode == 2
    why = "accelerate launch has --mixed_precision bf16, which would override it"
    assert f"error: --precision auto: {why}" in ended.stderr


def test_parameters_that_fsdp_leaves_whole_are_rejected(tmp_path: Path) -> None:
    """accelerate applies FSDP2 only to processes with GPUs: these two would be data parallel."""
    words = f"--model {TINY} --dataset {TINY}/train.jsonl --eval-dataset {TINY}/test.jsonl"
    ended = run(TRAINER, *words.split(), "--run-dir", str(tmp_path), layout="fsdp2")
    assert "error: ACCELERATE_USE_FSDP true: the parameters are whole" in ended.stderr
    assert "exitcode  : 2" in ended.stderr  # in torch's report
    assert not (tmp_path / "model").exists()


def test_processes_that_did_not_join_are_rejected() -> None:
    """Two are launched, and accelerate leaves each alone."""
    ended = run(HERE / "worker.py", "command", "--device", "cpu", layout="ddp", ALONE="1")
    assert "error: --num_processes 2: only 1 joined, so each would train alone" in ended.stderr
    assert "exitcode  : 2" in ended.stderr


def test_vineppo_is_rejected_by_name() -> None:
    ended = run(TRAINER, "--method", "vineppo")
    assert ended.returncode == 2
    [line] = ended.stderr.splitlines()
    assert line.startswith("error: --method vineppo: runs only as vineppo.py")


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    ended = run(TRAINER, "--run-dir", str(tmp_path))
    assert ended.returncode == 2
    assert f"holds a run; resume it with --resume {tmp_path}" in ended.stderr


def test_a_resumed_run_keeps_its_settings(tmp_path: Path) -> None:
    saved = {"script": "trl_trainer", "method": "ep_grpo", "eta": 0.3}
    (tmp_path / "args.json").write_text(json.dumps(saved))
    ended = run(TRAINER, "--resume", str(tmp_path), "--eta", "0.5")
    assert ended.returncode == 2
    assert "error: --eta 0.5: the run started with 0.3" in ended.stderr


def test_the_trainer_fits_on_a_few_pages() -> None:
    lines = TRAINER.read_text().splitlines()
    assert sum(1 for line in lines if line) <= 280
