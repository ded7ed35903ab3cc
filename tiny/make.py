"""Make a task's folder: a very small language model, its tokenizer and its problems.

    python tiny/make.py [--task sums|needle]

A problem is a calculation; a solution works it out step by step and ends in a box. sums_task.py and
needle_task.py define how problems and solutions are drawn.

The model is trained in two phases. First it sees only correct solutions and learns to calculate.
Then it sees solutions with errors, at rates that the task sets. Sampled at temperature 1, the model
makes errors as often as its examples. It is therefore able to calculate better than it does, and
can learn to from rewards alone.
"""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    get_cosine_schedule_with_warmup,
)

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, Python sees only this folder

from tiny import needle_task, sums_task

TASKS = {"sums": sums_task, "needle": needle_task}
SEED = 0
TRAIN_PROBLEMS, TEST_PROBLEMS = 3000, 256

# Problems


def draw_data(task: ModuleType) -> tuple[list[dict], list[dict]]:
    """Train and test problems, without overlap."""
    rng = random.Random(SEED)
    problems: dict[str, None] = {}  # a set that keeps its order
    while len(problems) < TRAIN_PROBLEMS + TEST_PROBLEMS:
        problems[task.draw_problem(rng)] = None
    rows = [{"problem": p, "answer": task.answer(p)} for p in problems]
    return rows[:TRAIN_PROBLEMS], rows[TRAIN_PROBLEMS:]


# Tokenizer and model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and three special tokens and a chat template with Qwen's names."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        padding_side="left",
        chat_template=(
            "{% for message in messages %}"
            "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
            "{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    )


def make_model(task: ModuleType, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The model before any training."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,  # the smallest that vLLM's CPU attention supports
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.1,  # about 1 / sqrt(hidden size): the default is for wide models
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    for layer in model.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            torch.nn.init.constant_(norm.weight, task.SHARPNESS)
    return model


def make_prompt(tokenizer: PreTrainedTokenizerFast, problem: str) -> str:
    """A problem in the chat template."""
    messages = [{"role": "user", "content": problem}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


# Training


WARMUP = 50


def draw_batch(
    task: ModuleType,
    tokenizer: PreTrainedTokenizerFast,
    stage: sums_task.Stage | needle_task.Stage,
    held_out: set[str],
    rng: random.Random,
) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] of prompts and solutions, and the mask [B, T] of solution tokens."""
    examples = []
    while len(examples) < task.BATCH_SIZE:
        if (problem := task.draw_problem(rng, stage)) not in held_out:
            examples.append((problem, task.draw_example(problem, stage, rng)))
    prompts = [make_prompt(tokenizer, problem) for problem, _ in examples]
    solutions = [solution + tokenizer.eos_token for _, solution in examples]
    prompt_ids, solution_ids = tokenizer(prompts).input_ids, tokenizer(solutions).input_ids

    length = max(len(p) + len(s) for p, s in zip(prompt_ids, solution_ids, strict=True))
    ids = torch.full((task.BATCH_SIZE, length), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, (p, s) in enumerate(zip(prompt_ids, solution_ids, strict=True)):
        ids[i, : len(p) + len(s)] = torch.tensor(p + s)
        mask[i, len(p) : len(p) + len(s)] = True
    return ids, mask


def train(
    task: ModuleType,
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out: set[str],
) -> None:
    """Train the model, stage by stage, on solutions drawn for every batch."""
    rng = random.Random(SEED + 1)
    stages = [stage for stage in task.STAGES for _ in range(stage.steps)]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=task.LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, len(stages))
    for step, stage in enumerate(stages, start=1):
        ids, mask = draw_batch(task, tokenizer, stage, held_out, rng)
        # With padding on the right, causal attention needs no attention mask.
        hidden = model.model(ids).last_hidden_state[:, :-1][mask[:, 1:]]
        loss = F.cross_entropy(model.lm_head(hidden), ids[:, 1:][mask[:, 1:]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step:4d} of {len(stages)}  loss {loss:.3f}", flush=True)


# Measuring


@torch.no_grad()
def respond(
    task: ModuleType,
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[str],
    opener: str = "",
    greedy: bool = False,
) -> list[str]:
    """One response per problem, at temperature 1 or greedy, continuing a given opener."""
    prompts = [make_prompt(tokenizer, problem) + opener for problem in problems]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    sampling = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0}
    ids = model.generate(**inputs, **sampling, max_new_tokens=task.MAX_NEW_TOKENS)
    new = ids[:, inputs.input_ids.shape[1] :]
    return [opener + text for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def accuracy(responses: list[str], rows: list[dict]) -> float:
    """Share of responses that end in the correct box."""
    right = [
        r.endswith(f"\\boxed{{{row['answer']}}}") for r, row in zip(responses, rows, strict=True)
    ]
    return round(sum(right) / len(right), 4)


@torch.no_grad()
def first_byte_probabilities(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[str]
) -> Tensor:
    """Mean probability [V] of each token as the first of a response."""
    prompts = [make_prompt(tokenizer, problem) for problem in problems]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    return model(**inputs).logits[:, -1].softmax(-1).mean(0)


def measure(
    task: ModuleType,
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict],
    samples: int = 2,
) -> dict:
    """The model's accuracy on held-out problems, in total and per opener, if the task has any."""
    many = rows * samples
    problems = [row["problem"] for row in many]
    sampled = respond(task, model, tokenizer, problems)
    lengths = [len(response.encode()) + 1 for response in sampled]  # a token per byte, and EOS
    first = first_byte_probabilities(model, tokenizer, [row["problem"] for row in rows])
    greedy = respond(task, model, tokenizer, [row["problem"] for row in rows], greedy=True)

    openers = {}
    for opener in task.OPENERS:
        letters = task.OTHER_LETTERS if opener.text[0] == "?" else [opener.text[0]]
        text = opener.text.replace("?", letters[0])
        openers[opener.text.strip()] = {
            "probability": round(first[tokenizer.convert_tokens_to_ids(letters)].sum().item(), 4),
            "sampled_accuracy": accuracy(
                respond(task, model, tokenizer, problems, opener=text), many
            ),
        }
    return {
        "sampled_accuracy": accuracy(sampled, many),
        "greedy_accuracy": accuracy(greedy, rows),
        "mean_tokens": round(sum(lengths) / len(lengths), 1),
        "longest": max(lengths),
        **({"openers": openers} if openers else {}),
        "examples": [
            {**row, "response": response} for row, response in zip(rows[:6], sampled, strict=False)
        ],
    }


def write_lines(path: Path, rows: list[dict]) -> None:
    """Write a jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write the files of a task's folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="sums")
    task = TASKS[parser.parse_args().task]
    start, folder = time.time(), task.FOLDER
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(
        task.THREADS
    )  # the order of summation, and so the last bits, depend on it
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)

    train_rows, test_rows = draw_data(task)
    write_lines(folder / "train.jsonl", train_rows)
    write_lines(folder / "test.jsonl", test_rows)

    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    model = make_model(task, tokenizer)
    train(task, model, tokenizer, held_out={row["problem"] for row in test_rows})
    model.bfloat16().save_pretrained(folder)

    model.float().eval()  # measure the model as saved, with rounded weights
    stats = {
        "parameters": sum(p.numel() for p in model.parameters()),
        **measure(task, model, tokenizer, test_rows),
        "seconds": round(time.time() - start),
        "cores": os.cpu_count(),
    }
    stats["bytes"] = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    (folder / "stats.json").write_text(json.dumps(stats, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(stats, indent=2))


if __name__ == "__main__":
    main()
