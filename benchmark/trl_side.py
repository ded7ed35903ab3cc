"""The work of one grpo.py run, done by TRL's GRPOTrainer: what speed.py compares with.

Runs in .venv-trl, which speed.py makes. Reads its settings as JSON from the first argument's file
and writes what it measured to the second's: seconds of each step, tokens, peak memory.
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from verifier import Grader  # noqa: E402 (the scripts lie one folder up)


def force_lengths(trainer: Any, lengths: list[int], engine: str) -> None:
    """Rollout i of every step gets exactly lengths[i] tokens, whatever it samples."""
    import torch

    if engine == "vllm":
        llm = trainer.vllm_generation.llm
        generate = llm.generate

        def of_length(prompts: list[Any], sampling_params: Any, **rest: Any) -> Any:
            each = [sampling_params.clone() for _ in lengths]
            for params, length in zip(each, lengths, strict=True):
                params.max_tokens, params.ignore_eos = length, True
            return generate(prompts, sampling_params=each, **rest)

        llm.generate = of_length
        return

    model, ends = trainer.model, trainer.eos_token_ids
    generate, start, longest = model.generate, {}, torch.tensor(lengths)

    def end_on_time(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        made = ids.shape[1] - start["width"] + 1  # tokens with the one now drawn
        logits[:, ends] = -torch.inf
        last = longest <= made
        logits[last] = -torch.inf
        logits[last, ends[0]] = 0.0
        return logits

    def of_length(input_ids: torch.Tensor, **rest: Any) -> torch.Tensor:
        start["width"] = input_ids.shape[1]
        return generate(input_ids=input_ids, logits_processor=[end_on_time], **rest)

    model.generate = of_length


def main(settings: dict[str, Any]) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    lengths, steps = settings["lengths"], settings["steps"]
    rows = [json.loads(line) for line in Path(settings["dataset"]).read_text().splitlines()]
    data = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": r["problem"]}], "gold": r["answer"]} for r in rows]
    )
    grader = Grader(1, 5.0)

    def reward(completions: list[Any], gold: list[str], **_: Any) -> list[float]:
        """The project's verifier, for its time; the verdicts alternate, as on the other side."""
        grader.grade([completion[0]["content"] for completion in completions], gold)
        return [float(i % 2) for i in range(len(completions))]

    config = GRPOConfig(
        output_dir=settings["folder"],
        use_cpu=settings["device"] == "cpu",
        bf16=settings["device"] == "cuda",
        gradient_checkpointing=False,
        per_device_train_batch_size=settings["rollouts_at_once"],
        gradient_accumulation_steps=len(lengths) // settings["rollouts_at_once"],
        num_generations=len(lengths) // len(rows),
        max_completion_length=max(lengths),
        max_steps=steps,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        use_vllm=settings["engine"] == "vllm",
        vllm_max_model_length=settings["context"],
        use_transformers_continuous_batching=settings["engine"] == "continuous",
        model_init_kwargs={"dtype": "float32"},
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    ends, tokens = [], {"prompt": 0, "generated": 0, "trained": 0}

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    class Counted(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids: Any, *rest: Any, **more: Any) -> Any:
            completions, logp = super()._generate_single_turn(prompt_ids, *rest, **more)
            tokens["prompt"] += sum(map(len, prompt_ids))
            tokens["generated"] += sum(map(len, completions))
            return completions, logp

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
            tokens["trained"] += int(inputs["completion_mask"].sum())
            return super()._compute_loss(model, inputs)

    trainer = Counted(
        model=settings["model"],
        reward_funcs=reward,
        args=config,
        train_dataset=data,
        callbacks=[Clock()],
    )
    force_lengths(trainer, lengths, settings["engine"])
    trainer.train()
    grader.close()
    # A step ends where the next begins to load its data: the generation lies before on_step_begin
    # in some releases, so the time is taken from end to end.
    stops = ends[1::2]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if settings["device"] == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {
        "trl": version("trl"),
        "optimizer": str(config.optim),
        "seconds": [b - a for a, b in itertools.pairwise(stops)],
        "tokens_a_step": {name: count / steps for name, count in tokens.items()},
        "peak_bytes": peak,
    }


if __name__ == "__main__":
    measured = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(measured), encoding="utf-8")
