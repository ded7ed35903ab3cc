"""Problems: columns of a dataset, reference answers, chat templates.

docs/data.md lists what can be read, and what is discarded or rejected.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any, NoReturn

import numpy as np

from grading import Grader
from grading.answers import escape_latex
from infra.cli import StopRun, first_line, reject, report, require
from infra.models import context_limit, seed_for
from infra.rows import Row, is_chat, read_rows

COLUMNS = {
    "question": ["problem", "question", "prompt", "messages", "conversations"],
    "answer": [
        "answer",
        "final_answer",
        "expected_answer",
        "ground_truth",
        "reward_model.ground_truth",
        "solution",
        # fields of the assistant's turn that ends a conversation, as `flatten` names them
        "conversations.ground_truth.value",
        "conversations.ground_truth",
        "conversations.value",
        "conversations.content",
        "messages.content",
    ],
}

# ------------------------------------------------------------------ problems


@dataclass
class Problem:
    """A question, as text and as prompt tokens, and its reference answers."""

    text: str
    answer: str
    prompt: list[int]
    alternatives: tuple[str, ...] = ()  # further reference answers, each of them right


class Problems(list[Problem]):
    """Problems in the order of the file. `take` draws them in a shuffled order."""

    position = 0  # the number of problems taken so far

    def take(self, count: int, seed: int) -> list[Problem]:
        """The next `count` problems. Only the seed and an epoch's number determine its order."""
        taken = []
        for position in range(self.position, self.position + count):
            epoch, offset = divmod(position, len(self))
            taken.append(self[epoch_order(len(self), seed, epoch)[offset]])
        self.position += count
        return taken

    @functools.cached_property
    def digest(self) -> str:
        """Differs for other problems, and for the same ones in another order."""
        digest = hashlib.sha256()
        for problem in self:
            digest.update(repr(problem).encode())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "digest": self.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StopRun if a checkpoint is of a run on other problems."""
        if state["digest"] != self.digest:
            raise StopRun("the problems of --dataset have changed since the run began")
        self.position = state["position"]


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(seed_for(seed, "epoch", epoch)).permutation(count)


def grade(grader: Grader, responses: list[str], problems: list[Problem]) -> list[bool]:
    """Whether the answer of each response equals a reference answer of its problem."""
    texts, references, places = [], [], []
    for place, problem in enumerate(problems):
        for reference in (problem.answer, *problem.alternatives):
            texts.append(responses[place])
            references.append(reference)
            places.append(place)
    correct = [False] * len(responses)
    for place, verdict in zip(places, grader.grade(texts, references), strict=True):
        correct[place] = correct[place] or verdict
    return correct


SURROGATE = re.compile("[\ud800-\udfff]")  # unpaired ones; no tokenizer reads them
# Ends the reason for discarding a prompt that holds tokens of the chat template.
WHY_TEMPLATED = (
    "which the chat template writes too; --template-args "
    """'{"chat_template": "{{ messages[-1].content }}"}' takes prompts as they are"""
)


def load_problems(args: Any, flag: str, tokenizer: Any, grader: Grader) -> Problems:
    """The problems of --dataset or --eval-dataset, as docs/data.md describes.

    flag: which of the two. Prints how many rows were discarded and why; rejects an empty rest.
    """
    name = dataset_name(args, flag)
    template_args = template_arguments(args)
    column, questions, answers = read_columns(args, flag)
    references = readable_references(grader, answers, args.references)

    problems, discarded, unreadable = Problems(), Counter(), []
    made: dict[str, Problem] = {}  # some datasets repeat each problem a hundred times
    check_system_prompt(tokenizer, args.system_prompt, template_args)
    written = template_tokens(tokenizer, template_args)

    for question, answer, readable in zip(questions, answers, references, strict=True):
        chat = as_chat(question)
        if not chat:
            discarded[f"problems have no text in {column!r}"] += 1
        elif any(token in message["content"] for message in chat for token in written):
            discarded[f"prompts hold {' or '.join(written)}, {WHY_TEMPLATED}"] += 1
        elif any(SURROGATE.search(message["content"]) for message in chat):
            discarded["problems hold an unpaired surrogate, which is invalid Unicode"] += 1
        elif not readable:
            unreadable.append(repr(answer)[:40])
        else:
            row = repr((question, readable))
            if row not in made:
                made[row] = make_problem(chat, readable, tokenizer, args, template_args)
            problem = made[row]
            if len(problem.prompt) <= args.max_prompt_tokens:
                problems.append(problem)
            else:
                discarded[f"prompts exceed --max-prompt-tokens {args.max_prompt_tokens}"] += 1

    if unreadable:
        examples = ", ".join([*dict.fromkeys(unreadable)][:5])
        discarded[f"reference answers cannot be read: {examples}"] = len(unreadable)

    report_discarded(discarded, len(questions), flag, name)
    if not problems:
        reject(flag, name, f"all {len(questions)} problems were discarded")
    check_context(problems, flag, args)
    print_notes(problems, f"{flag} {name}", grader.answer_format, args.instruction)
    return problems


def report_discarded(discarded: Counter[str], rows: int, flag: str, name: str) -> None:
    """Print how many rows were discarded for which reason. Reject if one reason holds for all."""
    for reason, count in discarded.items():
        if count == rows:
            reject(flag, name, f"{count} of {rows} {reason}")
        report(f"{flag} {name}: discarded {count} of {rows}: {reason}")


def check_context(problems: Problems, flag: str, args: Any) -> None:
    """Reject --max-new-tokens if prompts of the dataset `flag` leave too little of the context."""
    limit = context_limit(args)
    room = limit - args.max_new_tokens
    flag_and_value = "--max-new-tokens", args.max_new_tokens
    require(room > 0, *flag_and_value, f"leaves no room in the model's context of {limit} tokens")
    too_long = sum(len(problem.prompt) > room for problem in problems)
    why = (
        f"{too_long} of {len(problems)} prompts of {flag} leave less than that in the model's "
        f"context of {limit} tokens; --max-prompt-tokens {room} discards them"
    )
    require(not too_long, *flag_and_value, why)


def print_notes(problems: Problems, source: str, answer_format: str, instruction: str) -> None:
    """Print whether most prompts ask for another answer format, and how many are repeated."""
    asked = Counter()
    for problem in problems:
        asked[asked_format(problem.text + instruction)] += 1
    wanted, count = asked.most_common(1)[0]
    if wanted and answer_format not in (wanted, "auto"):
        why = f"{count} of {len(problems)} prompts ask for another --answer-format: {wanted}"
        report(f"{source}: {why}")
    repeated = len(problems) - len({tuple(problem.prompt) for problem in problems})
    if repeated:
        report(f"{source}: {repeated} problems repeat another and are kept")


def dataset_name(args: Any, flag: str) -> str:
    return getattr(args, flag.strip("-").replace("-", "_"))


def make_problem(
    chat: list[Row], references: list[str], tokenizer: Any, args: Any, template_args: Row
) -> Problem:
    """Add --instruction and --system-prompt, and apply the chat template."""
    text = chat[-1]["content"]
    if args.instruction:
        chat[-1]["content"] += f"\n{args.instruction}"

    if args.system_prompt and chat[0]["role"] != "system":
        chat.insert(0, {"role": "system", "content": args.system_prompt})
    try:
        prompt = prompt_tokens(tokenizer, chat, **template_args)
    except ValueError as error:
        why = "its chat template"
        if args.system_prompt:
            why += f", given --system-prompt {args.system_prompt}"
        if args.template_args:
            why += f", given --template-args {args.template_args}"
        flag = "--models" if hasattr(args, "models") else "--model"  # tools/evaluate.py has several
        reject(flag, tokenizer.name_or_path, f"{why}: {error}")
    return Problem(text, references[0], prompt, tuple(references[1:]))


# ------------------------------------------------------------------ columns

# A text that holds a list of texts or objects, or an object: `["1", "2"]`, `{'role': ...}`. Not
# `[1, 2]`, which may be an interval.
NESTED = re.compile(r"\s*((\[\s*)+[\"'{]|\{\s*[\"'][\w ]+[\"']:)")
# Roles as ShareGPT names them. All others keep their names.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}


def read_columns(args: Any, flag: str) -> tuple[str, list[Any], list[Any]]:
    """The name of the problem's column, its values, and the values of the reference answer.

    Each of the two columns is the first wanted one in which any row holds a value; rows without a
    value there get None. To save memory, only each row's first value is kept while reading: no row
    has a value in a wanted column before the chosen one.
    """
    wanted = {kind: wanted_columns(args, flag, kind) for kind in COLUMNS}
    needed = set()
    for column in [*wanted["question"], *wanted["answer"]]:
        while column:  # a.b.c, a.b, a
            needed.add(column)
            column = column.rpartition(".")[0]

    found: dict[str, list[tuple[int, Any]]] = {kind: [] for kind in COLUMNS}
    for row in read_rows(flag, dataset_name(args, flag), needed):
        if row:
            columns = flatten(row, needed)
            for kind, names in wanted.items():
                found[kind].append(first_value(columns, names))

    chosen, values = {}, {}
    for kind, of_rows in found.items():
        first = min((place for place, _ in of_rows), default=len(wanted[kind]))
        if first == len(wanted[kind]):
            reject_columns(args, flag, kind, wanted[kind])
        values[kind] = [value if place == first else None for place, value in of_rows]
        chosen[kind] = wanted[kind][first]
    return chosen["question"], values["question"], values["answer"]


def wanted_columns(args: Any, flag: str, kind: str) -> list[str]:
    """Columns by preference: first --question-column or --answer-column, if given.

    kind: "question" or "answer".
    """
    chosen = getattr(args, f"{kind}_column").lower()
    wanted = [chosen] if chosen else []
    if not chosen or flag != "--dataset":  # held-out problems may have columns of their own
        wanted += COLUMNS[kind]
    return wanted


def first_value(columns: Row, wanted: list[str]) -> tuple[int, Any]:
    """The place of the first wanted column that holds a value, and the value."""
    for place, name in enumerate(wanted):
        if columns.get(name) not in (None, ""):
            return place, columns[name]
    return len(wanted), None


def reject_columns(args: Any, flag: str, kind: str, wanted: list[str]) -> NoReturn:
    name = dataset_name(args, flag)
    row = next((row for row in read_rows(flag, name) if row), None)
    if row is None:
        reject(flag, name, "holds no problems")
    why = f"columns found: {sorted(flatten(row))[:30]}; wanted: one of {wanted}"
    reject(flag, name, f"{why}; --{kind}-column names another")


def flatten(row: Row, needed: Container[str] = (), prefix: str = "") -> Row:
    """Columns by their names in lower case; a nested column {"a": {"b": 1}} is also a.b.

    Of a conversation that ends with the assistant's turn, the fields of that turn are columns too:
    messages.content. needed: the names that are kept; empty: all.
    """
    columns = {}
    for key, value in row.items():
        name = prefix + str(key).strip().lower()
        if needed and name not in needed:
            continue
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        if isinstance(value, str) and NESTED.match(value):
            value = parse_nested(value.strip())

        columns[name] = value
        nested = value
        if is_chat(value) and role_of(value[-1]) == "assistant":
            nested = value[-1]
        if isinstance(nested, dict):
            columns |= flatten(nested, needed, f"{name}.")
    return columns


def parse_nested(text: str) -> Any:
    """A list or object written as JSON or as Python, or the text itself."""
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return parse(escape_latex(text))
    return text


def role_of(message: Row) -> str:
    role = str(message.get("role") or message.get("from")).lower()
    return ROLES.get(role, role)


def as_chat(value: Any) -> list[Row]:
    """Messages up to the user's last, each content as one text; [] if the last has no text."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        return []
    chat = []
    for message in value:
        if not isinstance(message, dict):
            return []
        content = message.get("content") or message.get("value")
        if isinstance(content, list):  # parts, as multimodal templates have them
            texts = [part.get("text") for part in content if isinstance(part, dict)]
            content = "".join(text for text in texts if isinstance(text, str))
        if not isinstance(content, str):
            content = ""

        chat.append({"role": role_of(message), "content": content})

    while chat and chat[-1]["role"] != "user":
        chat.pop()
    if chat and chat[-1]["content"].strip():
        return chat
    return []


# ------------------------------------------------------------------ reference answers

THOUGHTS = re.compile(r"(?s).*(?:</think>|<\|end_of_thought\|>)")
# A text in quotes, escaped as in JSON: "1\/2". Not "\frac{1}{2}", where \f is LaTeX.
QUOTED = re.compile(r'"(?:[^"\\\x00-\x1f]|\\[\\/"])*"')


def asked_format(prompt: str) -> str:
    """The answer format that a prompt asks for: "boxed", "line", or "" if it names none."""
    if "boxed" in prompt:
        return "boxed"
    return "line" if re.search(r"(?i)\banswer:|####", prompt) else ""


def readable_references(grader: Grader, answers: list[Any], mode: str) -> list[list[str]]:
    """The reference answers of each row that the grader can read."""
    references = [reference_answers(answer, mode) for answer in answers]
    every = [text for texts in references for text in texts]
    readable = dict(zip(every, grader.readable(every), strict=True))
    return [[text for text in texts if readable[text]] for texts in references]


def reference_answers(value: Any, mode: str) -> list[str]:
    """The reference answers of a row: of a list, its distinct entries.

    mode: with "any" each entry is a reference answer, with "all" the joined entries are one. A list
    that holds lists, such as pairs, is always joined.
    """
    if not isinstance(value, list):
        value = [value]
    texts = [*dict.fromkeys(map(reference_answer, value))]
    if mode == "all" or any(isinstance(entry, list) for entry in value):
        texts = [", ".join(texts)] if all(texts) else []
    for i, text in enumerate(texts):
        if text and not Grader.reference(text):  # prose, whose box is gone
            texts[i] = rf"\boxed{{{text}}}"
    return [text for text in texts if text]


def reference_answer(value: Any) -> str:
    r"""The final answer in a reference.

    It is what `Grader.reference` reads in the text after `</think>`. A list is a tuple: (1, 2).
    Returns "" if there is no answer: for a proof, prose, an object, or nothing.
    """
    if isinstance(value, list):
        parts = [reference_answer(part) for part in value]
        if len(parts) == 1:
            return parts[0]
        return f"({', '.join(parts)})" if parts and all(parts) else ""
    if isinstance(value, dict):
        return ""
    return Grader.reference(THOUGHTS.sub("", as_text(value)))


def as_text(value: Any) -> str:
    """A value as text: 1e-05 as 0.00001, 2.0 as 2, midnight as its date, "1/2" without quotes."""
    if isinstance(value, float | Decimal):
        text = f"{Decimal(str(value)):f}"
        return text.rstrip("0").removesuffix(".") if "." in text else text
    if isinstance(value, datetime):  # a date that `datasets` read as a time
        return value.isoformat().removesuffix("T00:00:00")
    text = str(value).strip()
    if QUOTED.fullmatch(text):
        return json.loads(text)
    return text


# ------------------------------------------------------------------ chat templates

# Rendered to see what a chat template writes.
EXAMPLE = [
    {"role": "system", "content": "Think first."},
    {"role": "user", "content": "What is 3+4?"},
    {"role": "assistant", "content": "It is 7."},
]


def template_arguments(args: Any) -> dict[str, Any]:
    """--template-args, and a fixed date, because prompts must not change from day to day."""

    try:
        arguments = json.loads(args.template_args or "{}")
    except ValueError as error:
        reject("--template-args", args.template_args, f"is not a JSON object: {error}")
    is_object = isinstance(arguments, dict)
    require(is_object, "--template-args", args.template_args, "is not a JSON object")
    return {"strftime_now": date(2025, 1, 1).strftime} | arguments


def prompt_tokens(tokenizer: Any, chat: list[Row], **arguments: Any) -> list[int]:
    """Messages through the chat template, or joined by blank lines if there is none.

    Raises ValueError if the template fails or omits the question.
    """
    if not arguments.get("chat_template", tokenizer.chat_template):
        return tokenizer.encode("\n\n".join(message["content"] for message in chat))

    prompt = apply_template(tokenizer, chat, **arguments)
    return tokenizer.encode(prompt, add_special_tokens=False)


def apply_template(tokenizer: Any, chat: list[Row], **arguments: Any) -> str:
    """Messages as text. After a user's message the text ends with the generation prompt.

    Raises ValueError if the template fails or leaves the last message out.
    """
    wanted = without_space(chat[-1]["content"])
    add = chat[-1]["role"] == "user"
    in_parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in chat]

    failures = []
    for messages in (chat, in_parts):  # some templates want each content as a list of parts
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add, **arguments
            )
        except Exception as error:  # a template can raise anything
            failures.append(first_line(error))
            continue
        if wanted in without_space(text):
            return text
        failures.append("it omits the question")
    raise ValueError(failures[0])


def check_system_prompt(tokenizer: Any, text: str, arguments: dict[str, Any]) -> None:
    """Reject --system-prompt if the chat template omits it."""
    if not text:
        return
    with contextlib.suppress(ValueError):  # a template that fails is rejected with the problems
        prompt = prompt_tokens(tokenizer, EXAMPLE[:2], **arguments)
        same = prompt == prompt_tokens(tokenizer, EXAMPLE[1:2], **arguments)
        require(not same, "--system-prompt", text, "the chat template omits it")


def special_tokens(tokenizer: Any) -> set[int]:
    """The ids of the special tokens, without the one for unknown text."""
    special = set()
    for number, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            special.add(number)
    return special - {tokenizer.unk_token_id}


def template_tokens(tokenizer: Any, arguments: dict[str, Any]) -> list[str]:
    """The special tokens that the chat template writes into a prompt, as texts."""
    if not arguments.get("chat_template", tokenizer.chat_template):
        return []
    try:
        prompt = prompt_tokens(tokenizer, EXAMPLE[1:2], **arguments)
    except ValueError:  # for example, the template requires a system message
        return []
    return tokenizer.convert_ids_to_tokens(sorted(special_tokens(tokenizer).intersection(prompt)))


def turn_ends(args: Any, tokenizer: Any) -> set[int]:
    """The ids of the special tokens that end an assistant's turn: the first after its content.

    At most one is from the model's chat template and one from that of --template-args. A template
    that writes only the last message ends no turn.
    """
    question, answer = EXAMPLE[1]["content"], EXAMPLE[2]["content"]
    arguments = template_arguments(args)
    special, ends = special_tokens(tokenizer), set()
    templates = {None, arguments.pop("chat_template", None)}  # None: the model's
    for template in templates:
        with contextlib.suppress(ValueError):  # a template that fails ends no turn
            text = apply_template(tokenizer, EXAMPLE[1:], chat_template=template, **arguments)
            before, _, after = text.rpartition(answer)
            if question in before:  # not so in a template that writes only the last message
                ids = tokenizer.encode(after, add_special_tokens=False)
                first = next((number for number in ids if number in special), None)
                if first is not None:
                    ends.add(first)
    return ends


def without_space(text: str) -> str:
    """The text without white space, which templates trim."""
    return "".join(text.split())
