"""The work of one grpo.py run in TRL's GRPOTrainer, for speed.py.

speed.py runs this script with TRL on the path. The first argument is a JSON file with the settings;
the second is the file for the result: seconds of each step, tokens and peak memory.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shared import read_json, write_json

from grading import Grader


def peak_bytes(device: str) -> int:
    """Peak memory of this process; on a GPU, the peak that PyTorch allocated."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


def main(settings: dict[str, Any]) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    steps, at_once = settings["steps"], settings["rollouts_at_once"]
    # No token ends a response before it has the given length.
    endless = {"min_new_tokens": settings["new_tokens"]}
    if settings["engine"] == "vllm":
        endless = {"ignore_eos": True}
    rows = []
    for line in Path(settings["dataset"]).read_text().splitlines():
        row = json.loads(line)
        prompt = [{"role": "user", "content": row["problem"]}]
        rows.append({"prompt": prompt, "reference": row["answer"]})
    grader = Grader(1, 5.0)

    def reward(completions: list[Any], reference: list[str], **_: Any) -> list[float]:
        """Run the project's grader for its time; return alternating verdicts, as speed.py does."""
        grader.grade([completion[0]["content"] for completion in completions], reference)
        return [float(i % 2) for i in range(len(completions))]

    config = GRPOConfig(
        output_dir=settings["folder"],
        use_cpu=settings["device"] == "cpu",
        bf16=settings["device"] == "cuda",
        gradient_checkpointing=False,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=settings["rollouts"] // at_once,
        num_generations=settings["rollouts"] // len(rows),
        max_completion_length=settings["new_tokens"],
        generation_kwargs=endless,
        max_steps=steps,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        use_vllm=settings["engine"] == "vllm",
        vllm_max_model_length=settings["context"],
        model_init_kwargs={"dtype": "float32"},
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    ends, tokens = [], {"prompt": 0, "generated": 0, "trained": 0}

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    class CountingTrainer(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids: Any, *rest: Any, **more: Any) -> Any:
            completions, logp = super()._generate_single_turn(prompt_ids, *rest, **more)
            tokens["prompt"] += sum(map(len, prompt_ids))
            tokens["generated"] += sum(map(len, completions))
            return completions, logp

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
            tokens["trained"] += int(inputs["completion_mask"].sum())
            return super()._compute_loss(model, inputs)

    trainer = CountingTrainer(
        settings["model"],
        reward,
        config,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Clock()],
    )
    trainer.train()
    grader.close()
    return {
        "trl": version("trl"),
        "optimizer": str(config.optim),
        "seconds": [end - start for start, end in itertools.pairwise(ends)],
        "tokens_a_step": {name: count / steps for name, count in tokens.items()},
        "peak_bytes": peak_bytes(settings["device"]),
    }


if __name__ == "__main__":
    write_json(Path(sys.argv[2]), main(read_json(Path(sys.argv[1]))))
