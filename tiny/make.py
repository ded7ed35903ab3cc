"""Make everything in this folder: a very small language model, its tokenizer and its problems.

    python tiny/make.py

A problem is an expression, an answer is worked out step by step and ends in a box:

    What is 17+5*3-9?   ->   Well, 5*3=15; 17+15=32; 32-9=23; \\boxed{23}

The model is taught twice. At school it sees only faultless solutions, and learns to calculate.
Then it picks up habits: four ways to open a solution, each with its own rate of slips. The common
opener is careless, the careful one is rare. A slip is a wrong result that looks right (a forgotten
carry, a neighbour in the times table), and the steps after it go on from it faithfully. Sampled at
temperature 1 the model slips as often as its examples did. So it can calculate better than it
does, and three things can be learnt from rewards alone: which opener to choose, which results to
be sure of, and where in a failed response the one wrong step is.
"""

import json
import os
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

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

from tiny.steps import OPERATIONS, Terms, apply, evaluate, next_operator, parse

FOLDER = Path(__file__).parent
SEED = 0
TRAIN_PROBLEMS, TEST_PROBLEMS = 3000, 256
MAX_NEW_TOKENS = 64

# Problems


def draw_problem(rng: random.Random) -> str:
    """An expression of 2 to 4 operations whose intermediate results all lie in 0..99."""
    while True:
        signs = rng.choices("+-*", weights=(3, 3, 2), k=rng.randint(2, 4))
        if "**" in "".join(signs):
            continue
        terms: Terms = [rng.randint(2, 9)]
        for sign in signs:
            terms += [sign, rng.randint(2, 9)]
        if all(0 <= result < 100 for *_, result in work_out(terms)):
            return f"What is {''.join(map(str, terms))}?"


def draw_data() -> tuple[list[dict], list[dict]]:
    """Train and test problems, no problem in both."""
    rng = random.Random(SEED)
    problems: dict[str, None] = {}  # a set that keeps its order
    while len(problems) < TRAIN_PROBLEMS + TEST_PROBLEMS:
        problems[draw_problem(rng)] = None
    rows = [{"problem": p, "answer": str(evaluate(parse(p)))} for p in problems]
    return rows[:TRAIN_PROBLEMS], rows[TRAIN_PROBLEMS:]


# Solutions


@dataclass
class Opener:
    """A way to begin a solution, known by its first byte."""

    text: str
    share: float  # of the solutions
    slip: float  # chance of a slip in a step
    slip_borrow: float  # and in a subtraction that borrows


OPENERS = [
    Opener("Easy! ", share=0.54, slip=0.36, slip_borrow=0.65),
    Opener("Well, ", share=0.28, slip=0.25, slip_borrow=0.35),
    Opener("First ", share=0.09, slip=0.14, slip_borrow=0.20),
    Opener("Slowly: ", share=0.07, slip=0.0, slip_borrow=0.0),
    # Now and then some other letter, so that any opener is followed by a solution.
    Opener("?: ", share=0.02, slip=0.25, slip_borrow=0.35),
]
OTHER_LETTERS = sorted(set("ABCDEFGHIJKLMNOPQRSTUVWXYZ") - {o.text[0] for o in OPENERS})


def work_out(
    terms: Terms, rng: random.Random | None = None, slip: float = 0.0, slip_borrow: float = 0.0
) -> list[tuple[int, str, int, int]]:
    """The steps (a, sign, b, result) that solve an expression, with slips at the given rates."""
    steps = []
    while len(terms) > 1:
        i = next_operator(terms)
        a, sign, b = terms[i - 1 : i + 2]
        result = OPERATIONS[sign](a, b)
        carries = sign == "+" and a % 10 + b % 10 > 9
        borrows = sign == "-" and a % 10 < b % 10
        if rng and rng.random() < (slip_borrow if borrows else slip):
            if sign == "*":
                result += rng.choice([-a, a])  # the neighbour in the times table
            elif carries or borrows:
                result += 10 if borrows else -10  # the carry forgotten
            else:
                result += rng.choice([-1, 1])
        steps.append((a, sign, b, result))
        terms = apply(terms, i, result)
    return steps


def draw_solution(problem: str, opener: Opener, rng: random.Random) -> str:
    """A response to a problem, opened and carried out in the opener's way."""
    steps = []
    while not steps or not all(0 <= result < 100 for *_, result in steps):
        steps = work_out(parse(problem), rng, opener.slip, opener.slip_borrow)
    text = opener.text.replace("?", rng.choice(OTHER_LETTERS))
    text += "".join(f"{a}{sign}{b}={result}; " for a, sign, b, result in steps)
    return text + f"\\boxed{{{steps[-1][-1]}}}"


# Tokenizer and model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, three special tokens and a chat template, named as Qwen names them."""
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


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The model before any training."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,  # the smallest that vLLM's CPU attention knows
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.1,  # about 1 / sqrt(hidden size): the default is for wide models
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def make_prompt(tokenizer: PreTrainedTokenizerFast, problem: str) -> str:
    """A problem in the chat template."""
    messages = [{"role": "user", "content": problem}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


# Training


@dataclass
class Stage:
    """A part of the training: which solutions the model sees, and for how many steps."""

    steps: int
    slips: bool  # do the openers slip, or is every solution faultless?
    shares: bool  # are the openers as frequent as their shares, or all equally?


STAGES = [
    Stage(steps=350, slips=False, shares=False),  # learn to calculate
    Stage(steps=850, slips=True, shares=False),  # learn how reliable each opener is
    Stage(steps=300, slips=True, shares=True),  # learn how common each opener is
]
BATCH_SIZE, LEARNING_RATE, WARMUP = 64, 5e-3, 50


def draw_example(stage: Stage, held_out: set[str], rng: random.Random) -> tuple[str, str]:
    """A problem that is not held out, and a solution to it."""
    while (problem := draw_problem(rng)) in held_out:
        pass
    weights = [opener.share if stage.shares else 1.0 for opener in OPENERS]
    opener = rng.choices(OPENERS, weights)[0]
    if not stage.slips:
        opener = replace(opener, slip=0.0, slip_borrow=0.0)
    return problem, draw_solution(problem, opener, rng)


def draw_batch(
    tokenizer: PreTrainedTokenizerFast, stage: Stage, held_out: set[str], rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] of prompts and solutions, and the mask [B, T] of the solutions' tokens."""
    examples = [draw_example(stage, held_out, rng) for _ in range(BATCH_SIZE)]
    prompts = [make_prompt(tokenizer, problem) for problem, _ in examples]
    solutions = [solution + tokenizer.eos_token for _, solution in examples]
    prompt_ids, solution_ids = tokenizer(prompts).input_ids, tokenizer(solutions).input_ids

    length = max(len(p) + len(s) for p, s in zip(prompt_ids, solution_ids, strict=True))
    ids = torch.full((BATCH_SIZE, length), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, (p, s) in enumerate(zip(prompt_ids, solution_ids, strict=True)):
        ids[i, : len(p) + len(s)] = torch.tensor(p + s)
        mask[i, len(p) : len(p) + len(s)] = True
    return ids, mask


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, held_out: set[str]) -> None:
    """Teach the model, stage by stage, on solutions that are drawn anew for every batch."""
    rng = random.Random(SEED + 1)
    stages = [stage for stage in STAGES for _ in range(stage.steps)]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, len(stages))
    for step, stage in enumerate(stages, start=1):
        ids, mask = draw_batch(tokenizer, stage, held_out, rng)
        # Padding is on the right, where causal attention never looks: no attention mask.
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
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[str],
    opener: str = "",
    greedy: bool = False,
) -> list[str]:
    """One response to each problem, at temperature 1 or greedy, after an opener that is given."""
    prompts = [make_prompt(tokenizer, problem) + opener for problem in problems]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    sampling = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0}
    ids = model.generate(**inputs, **sampling, max_new_tokens=MAX_NEW_TOKENS)
    new = ids[:, inputs.input_ids.shape[1] :]
    return [opener + text for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def accuracy(responses: list[str], rows: list[dict]) -> float:
    """Share of the responses that end in the right box."""
    right = [
        r.endswith(f"\\boxed{{{row['answer']}}}") for r, row in zip(responses, rows, strict=True)
    ]
    return round(sum(right) / len(right), 4)


@torch.no_grad()
def first_byte_probabilities(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[str]
) -> Tensor:
    """Mean probability [V] of every first token of a response."""
    prompts = [make_prompt(tokenizer, problem) for problem in problems]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    return model(**inputs).logits[:, -1].softmax(-1).mean(0)


def measure(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict], samples: int = 2
) -> dict:
    """What the model can do on held-out problems, whole and opener by opener."""
    many = rows * samples
    problems = [row["problem"] for row in many]
    sampled = respond(model, tokenizer, problems)
    lengths = [len(response.encode()) + 1 for response in sampled]  # a token per byte, and EOS
    first = first_byte_probabilities(model, tokenizer, [row["problem"] for row in rows])
    greedy = respond(model, tokenizer, [row["problem"] for row in rows], greedy=True)

    openers = {}
    for opener in OPENERS:
        letters = OTHER_LETTERS if opener.text[0] == "?" else [opener.text[0]]
        text = opener.text.replace("?", letters[0])
        openers[opener.text.strip()] = {
            "probability": round(first[tokenizer.convert_tokens_to_ids(letters)].sum().item(), 4),
            "sampled_accuracy": accuracy(respond(model, tokenizer, problems, opener=text), many),
        }
    return {
        "sampled_accuracy": accuracy(sampled, many),
        "greedy_accuracy": accuracy(greedy, rows),
        "mean_tokens": round(sum(lengths) / len(lengths), 1),
        "longest": max(lengths),
        "openers": openers,
        "examples": [
            {**row, "response": response} for row, response in zip(rows[:6], sampled, strict=False)
        ],
    }


def write_lines(path: Path, rows: list[dict]) -> None:
    """Write a jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write every file of the folder."""
    start = time.time()
    torch.set_num_threads(2)  # the order of sums, and so the last bits, depend on it
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)

    train_rows, test_rows = draw_data()
    write_lines(FOLDER / "train.jsonl", train_rows)
    write_lines(FOLDER / "test.jsonl", test_rows)

    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(FOLDER)
    model = make_model(tokenizer)
    train(model, tokenizer, held_out={row["problem"] for row in test_rows})
    model.bfloat16().save_pretrained(FOLDER)

    model.float().eval()  # with the rounded weights: what is measured is what was saved
    stats = {
        "parameters": sum(p.numel() for p in model.parameters()),
        **measure(model, tokenizer, test_rows),
        "seconds": round(time.time() - start),
        "cores": os.cpu_count(),
    }
    stats["bytes"] = sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file())
    (FOLDER / "stats.json").write_text(json.dumps(stats, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(stats, indent=2))


if __name__ == "__main__":
    main()
