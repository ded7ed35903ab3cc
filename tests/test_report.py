"""tools/report.py: the data in the page, and the page in a real browser."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, read_lines, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(ROOT / "tools"))

import report

NASTY = "</script><script>throw Error('run')</script><img src=x onerror=alert(1)>"
NASTY += " \u202e\x1b[31m\x00 &lt;"

# ------------------------------------------------------------------ runs to show


def byte_level_tokenizer(folder: Path) -> Tokenizer:
    """A vocabulary of the 256 bytes, two merged tokens and one special token."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"ab": 256, "Ġa": 257}
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b"), ("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<b>end</b>"])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def make_run(
    folder: Path, *, steps: int = 6, groups: int = 2, size: int = 3, **changed: Any
) -> Path:
    """A run's folder as the scripts write it, with a text that tries to break out of the page."""
    tokenizer = byte_level_tokenizer(folder / "model")
    settings = {"script": "grpo"} | report.defaults("grpo") | {"steps": steps} | changed
    settings |= {"run_dir": str(folder), "resume": "", "content": {"model": "9f"}}
    (folder / "args.json").write_text(json.dumps(settings))
    evaluation = {"eval/accuracy": 0.25, "eval/accuracy_low": 0.2, "eval/accuracy_high": 0.3}
    metrics = [{"step": 0, **evaluation, "eval/greedy": 0.125}]
    rollouts = []
    rng = random.Random(0)
    for step in range(1, steps + 1):
        row = {"step": step, "reward": step / 10, "entropy": 1.5, "loss": 0.0}
        row |= {"boxed": 0.75, "credit/progress": 0.5}
        row |= {"seconds/rollout": 1.5, "seconds/update": 0.5, "seconds/step": 2.0}
        if step == steps:
            row |= {name: value + 0.5 for name, value in evaluation.items()} | {"eval/greedy": 0.75}
        metrics.append(row)
        for p in range(groups):
            for g in range(size):
                text = f"ab é€ {step}.{p}.{g}\n{NASTY}"
                ids = [*tokenizer.encode(text).ids, tokenizer.token_to_id("<b>end</b>")]
                line = {"step": step, "problem": f"problem {p} {NASTY}", "answer": "4"}
                line |= {"rollout": g, "text": text, "tokens": ids, "reward": float(g == 0)}
                line["advantage"] = [1.25 if g == 0 else -0.5] * len(ids)
                line["logp"] = [-rng.random() for _ in ids]
                line["progress"] = [rng.gauss(0, 1) for _ in ids]
                for signal in ("entropy", "outcome"):
                    line[signal] = [rng.random() for _ in ids]
                rollouts.append(line)
    write_jsonl(folder / "metrics.jsonl", metrics)
    write_jsonl(folder / "rollouts.jsonl", rollouts)
    return folder


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(ROOT / "tools" / "report.py")]
    return subprocess.run([*program, *map(str, words)], capture_output=True, text=True)


def blocks_of(page: str) -> dict[str, Any]:
    """The data in a page, by the id of its element."""
    found = re.findall(r'<script type="application/json" id="([^"]+)">(.*?)</script>', page, re.S)
    return {name: json.loads(text) for name, text in found}


# ------------------------------------------------------------------ the browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


class Browser:
    """Chromium, driven through the DevTools protocol on a pipe: JSON messages that end with \\0."""

    def __init__(self, profile: Path) -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        start = (  # the protocol wants file descriptors 3 and 4
            "import fcntl, os, sys; i, o = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) "
            "for n in sys.argv[1:3]); os.dup2(i, 3); os.dup2(o, 4); "
            "os.execv(sys.argv[3], sys.argv[3:])"
        )
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
            "--disable-background-networking --disable-component-update --disable-sync "
            f"--remote-debugging-pipe --user-data-dir={profile} about:blank"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, str(theirs_in), str(theirs_out), BROWSER, *flags.split()],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.read, self.write = ours_in, ours_out
        self.buffer, self.sent, self.session = b"", 0, None
        self.errors: list[str] = []
        self.loaded: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.sent:
                assert "error" not in answer, answer
                return answer["result"]

    def receive(self, seconds: float = 60) -> dict[str, Any]:
        """The next message. Notes the page's warnings, its errors and what it loads."""
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], seconds)
            assert ready, "the browser does not answer"
            piece = os.read(self.read, 1 << 20)
            assert piece, "the browser is gone"
            self.buffer += piece
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        method, params = message.get("method"), message.get("params", {})
        level = params.get("type") or params.get("entry", {}).get("level")
        logs = method in ("Runtime.consoleAPICalled", "Log.entryAdded")
        if method == "Runtime.exceptionThrown" or (logs and level in ("error", "warning")):
            self.errors.append(json.dumps(params))
        elif method == "Network.requestWillBeSent":
            self.loaded.append(params["request"]["url"])
        return message

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        options = {"returnByValue": True, "awaitPromise": True}
        result = self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> Any:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.02)
        return value

    def open(self, page: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.errors.clear()
        self.loaded.clear()
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        url = page.resolve().as_uri()
        self.call("Page.navigate", url=url)
        complete = f"location.href === {json.dumps(url)} && document.readyState === 'complete'"
        self.wait(complete + " && !!document.querySelector('footer')")
        self.wait("!!document.querySelector('.chart path')")

    def hover(self, element: str, across: float = 0.5) -> None:
        """Move the mouse onto an element, given as a JavaScript expression."""
        self.run(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        box = self.run(f"{element}.getClientRects()[0].toJSON()")
        spot = {"x": box["x"] + across * box["width"], "y": box["y"] + box["height"] / 2}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **spot)

    def close(self) -> None:
        with contextlib.suppress(OSError, AssertionError):
            self.session = None
            self.call("Browser.close")
        os.close(self.read)
        os.close(self.write)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome on PATH")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "grpo-1", lr=1e-3)


def all_of(selector: str) -> str:
    return f"[...document.querySelectorAll({json.dumps(selector)})]"


def press(browser: Browser, text: str) -> None:
    wanted = f"(button) => button.textContent === {json.dumps(text)}"
    browser.run(f"{all_of('button')}.find({wanted}).click()")


def set_input(browser: Browser, selector: str, value: float) -> None:
    browser.run(f"document.querySelector('{selector}').value = {value}")
    for event in ("input", "change"):
        browser.run(f"document.querySelector('{selector}').dispatchEvent(new Event('{event}'))")


# ------------------------------------------------------------------ command line


def test_writes_the_page_into_the_run_and_prints_its_path(run):
    done = command(run)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()) == run / "report.html"
    [overview] = blocks_of((run / "report.html").read_text())["runs"]
    assert overview["name"] == "grpo-1"
    assert overview["command"] == "python grpo.py --steps 6 --lr 0.001"
    assert overview["changed"] == ["steps", "lr"]
    assert not {"content", "run_dir", "resume"} & overview["settings"].keys()
    assert overview["metrics"]["eval/accuracy"] == [[0, 6], [0.25, 0.75]]
    assert overview["metrics"]["reward"][0] == [1, 2, 3, 4, 5, 6]
    assert len(overview["groups"]) == 12


def test_out_names_the_file(run, tmp_path):
    page = tmp_path / "page.html"
    assert command(run, "--out", page).stdout.strip() == str(page)
    assert page.read_text().endswith("</html>\n")


def test_rejects_in_one_line_with_code_2(run, tmp_path):
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "metrics.jsonl").write_text('{"step": 0, "rew')
    no_place = [run, "--out", tmp_path / "nowhere" / "page.html"]
    for words in ([tmp_path / "nowhere"], [tmp_path], [tmp_path / "young"], [], no_place):
        done = command(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert not words or str(words[-1]) in done.stderr


def test_starts_without_torch(run):
    script = "import runpy, sys; sys.argv = ['report.py', sys.argv[1]]; "
    script += f"runpy.run_path({str(ROOT / 'tools' / 'report.py')!r}, run_name='__main__'); "
    script += "print({'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script, run], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_command_line_that_repeats_a_run():
    changed = {"dataset": "my file.jsonl", "scale_rewards": False, "kl": 0.1}
    expected = "python grpo.py --dataset 'my file.jsonl' --no-scale-rewards --kl 0.1"
    assert report.repeat("grpo", changed) == expected
    expected = "python gtpo.py --entropy-clamp 0.2 0.28"
    assert report.repeat("gtpo", {"entropy_clamp": [0.2, 0.28]}) == expected


def test_the_defaults_are_those_of_the_script():
    import gtpo

    read = report.defaults("gtpo")
    of_script = json.loads(json.dumps(vars(gtpo.Args())))  # as in args.json, which has no tuples
    assert read == {name: of_script[name] for name in read}
    assert vars(gtpo.Args()).keys() - read.keys() == {"token_budget"}  # it depends on the machine
    assert report.defaults("nowhere") == {}


# ------------------------------------------------------------------ data in the page


def test_incomplete_and_damaged_lines_are_skipped(run, tmp_path):
    damaged = shutil.copytree(run, tmp_path / "damaged")
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        text = (damaged / name).read_bytes()
        (damaged / name).write_bytes(b'[1]\n{"step": "x"}\n\xff\n' + text[:-20])
    read, before = (report.read_run(folder, "run", 1e9) for folder in (damaged, run))
    assert read.metrics["reward"][0] == [1, 2, 3, 4, 5]
    assert read.blocks[:-1] == before.blocks[:-1]
    assert len(json.loads(read.blocks[-1])["rollouts"]) == 2


def test_numbers_that_are_not_finite_do_not_break_the_page(tmp_path):
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"step": 7, "loss": NaN, "reward": Infinity}\n')
    line = {"step": 7, "problem": "p", "rollout": 0, "tokens": [1, 2], "entropy": [float("nan"), 1]}
    write_jsonl(folder / "rollouts.jsonl", [line])
    text = report.page([report.read_run(folder, "run", 1e9)])
    data = blocks_of(text)
    assert data["runs"][0]["metrics"]["loss"][1][-1] is None
    assert data["group-0-0"]["rollouts"][0]["signals"]["entropy"] == [None, 1]
    assert "NaN" not in text.split("<script>")[0] and "Infinity" not in text.split("<script>")[0]


def test_text_of_a_model_cannot_leave_its_data_block(run):
    page = report.page([report.read_run(run, "run", 1e9)])
    head, _, tail = report.TEMPLATE.read_text().partition(report.DATA_MARK)
    inside = page.removeprefix(head).removesuffix(tail)
    data = blocks_of(page)
    assert inside.count("<") == 2 * len(data)  # each block's own two tags and nothing else
    assert data["group-0-0"]["problem"] == f"problem 0 {NASTY}"


def test_signals_are_every_list_of_numbers_as_long_as_the_tokens():
    row = {"step": 1, "tokens": [5, 6], "reward": 1.0, "bonus": 0.5, "gate": [1.23456, -2.0]}
    row |= {"advantage": [0.5, 0.5], "words": ["a", "b"], "short": [1.0], "text": "hi"}
    [rollout] = report.encode_group([row], {}, {})["rollouts"]
    assert rollout["signals"] == {"gate": [1.235, -2.0], "advantage": 0.5}
    assert rollout["bonus"] == 0.5 and rollout["text"] == "hi"


def test_a_group_ends_with_its_step_its_problem_or_a_new_count():
    marks = [(1, "a", 0), (1, "a", 1), (1, "a", 0), (1, "b", 1), (2, "b", 2), (2, "b", 3)]
    rows = [{"step": s, "problem": p, "rollout": r} for s, p, r in marks]
    assert [len(group) for group in report.groups_of(rows)] == [2, 1, 1, 2]


def test_too_many_rollouts_are_thinned_evenly_and_the_last_step_stays(tmp_path):
    folder = make_run(tmp_path / "run", steps=30, groups=2)
    everything = report.read_run(folder, "run", 1e9)
    size = sum(map(len, everything.blocks))
    assert (len(everything.groups), everything.left_out) == (60, 0)
    thin = report.read_run(folder, "run", size / 5)
    kept = [step for step, *_ in thin.groups]
    assert kept == [1, 1, 9, 9, 17, 17, 25, 25, 30, 30]
    assert thin.left_out == 60 - len(kept)
    assert {step for step, *_ in report.read_run(folder, "run", 1).groups} == {1, 30}


# ------------------------------------------------------------------ tokens as text


def pieces(ids: list[int], folder: Path) -> list[str]:
    tokens, _ = report.read_vocabulary(folder, {})
    vocabulary: dict[int, str] = {}
    odd = report.odd_pieces(ids, tokens, vocabulary)
    return [odd.get(k, vocabulary[i]) for k, i in enumerate(ids)]


def test_a_character_belongs_to_the_token_where_it_begins(tmp_path):
    tokenizer = byte_level_tokenizer(tmp_path / "model")
    ids = tokenizer.encode("ab €é!", add_special_tokens=False).ids
    assert pieces(ids, tmp_path) == ["ab", " ", "€", "", "", "é", "", "!"]
    euro = ids[2:5]
    expected = ["\ufffd", "\ufffd", "€", "", "", "\ufffd", "!"]
    assert pieces([*euro[:2], *euro, euro[2], ids[-1]], tmp_path) == expected
    assert pieces([tokenizer.token_to_id("<b>end</b>"), 9999], tmp_path) == ["<b>end</b>", "⟨9999⟩"]


def test_text_of_random_tokens_is_the_tokenizers_own(tmp_path):
    tokenizer = byte_level_tokenizer(tmp_path / "model")
    rng = random.Random(1)
    for length in range(1, 60):
        text = "".join(chr(rng.choice([65, 0xE9, 0x20AC, 0x1F600, 32, 10])) for _ in range(length))
        ids = tokenizer.encode(text).ids
        assert "".join(pieces(ids, tmp_path)) == text == tokenizer.decode(ids)


def test_sentencepiece_vocabulary_with_bytes(tmp_path):
    vocab = {"<0xC3>": 0, "<0xA9>": 1, "▁the": 2, "re": 3, "<0x0A>": 4}
    (tmp_path / "model").mkdir()
    for entries in (vocab, [[token, -1.0] for token in vocab]):  # the second as Unigram has it
        spec = {"model": {"vocab": entries}, "decoder": {"type": "ByteFallback"}}
        (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(spec))
        assert pieces([2, 3, 0, 1, 4], tmp_path) == [" the", "re", "é", "", "\n"]


def test_without_a_tokenizer_the_ids_and_the_text_are_kept(tmp_path):
    folder = make_run(tmp_path / "run", model="org/elsewhere")
    shutil.rmtree(folder / "model")
    rollout = json.loads(report.read_run(folder, "run", 1e9).blocks[0])["rollouts"][0]
    assert rollout["text"].startswith("ab é€ 1.0.0") and "odd" not in rollout


# ------------------------------------------------------------------ in a browser


@pytest.fixture
def opened(browser, run) -> Browser:
    command(run)
    browser.open(run / "report.html")
    return browser


def healthy(browser: Browser) -> bool:
    """No warning in the console, and nothing loaded except the page."""
    assert browser.errors == []
    loaded = [url for url in browser.loaded if not url.startswith("data:")]
    assert loaded == [browser.run("location.href")]
    return True


def test_the_page_shows_the_results(opened):
    text = opened.run("document.body.innerText")
    assert "25.0%" in text and "75.0%" in text and "20.0% to 30.0%" in text
    assert "python grpo.py --steps 6 --lr 0.001" in text
    metrics = opened.run(all_of(".chart") + ".map((c) => c.dataset.metric)")
    assert {"reward", "eval/accuracy", "entropy", "credit/progress", "seconds"} <= set(metrics)
    chart = 'document.querySelector(\'[data-metric="eval/accuracy"] '
    assert opened.run(chart + ".band').getAttribute('d').length") > 20
    assert opened.run(chart + ".line').getAttribute('d').length") > 10
    assert opened.run("document.querySelectorAll('[data-metric=seconds] .part').length") == 2
    assert healthy(opened)


def test_text_of_a_model_is_never_markup(opened):
    assert opened.run("document.images.length") == 0
    problem = NASTY.replace("\u202e", "⟨202e⟩").replace("\x1b", "␛").replace("\x00", "␀")
    assert opened.run("document.querySelector('.problem').textContent") == f"problem 0 {problem}"
    shown = opened.run("document.querySelector('.tokens').textContent")
    assert shown.startswith("ab é€ 6.0.0↵\n</script><script>") and "␛[31m␀" in shown
    assert shown.endswith("<b>end</b>")
    assert healthy(opened)


def test_the_signal_switch_shades_the_tokens(opened):
    pressed = "document.querySelector('#signals [aria-pressed=true]').textContent"
    seen = {}
    for name in ("advantage", "entropy", "logp", "outcome", "progress"):
        press(opened, name)
        assert opened.run(pressed) == name
        shade = "(span) => getComputedStyle(span).backgroundColor"
        seen[name] = opened.run(f"{all_of('.tokens span')}.map({shade})")
        assert len(set(seen[name])) > 1
    assert len({tuple(colours) for colours in seen.values()}) == 5
    press(opened, "advantage")
    classes = opened.run(all_of(".tokens") + ".map((tokens) => tokens.children[0].className)")
    assert classes == ["up", "down", "down"]  # advantages 1.25, -0.5, -0.5
    assert len(set(seen["advantage"])) == 2
    assert healthy(opened)


def test_the_pickers_change_the_rollouts(opened):
    first = "document.querySelector('.tokens').textContent.slice(6, 11)"
    assert opened.run(first) == "6.0.0"
    opened.run("document.querySelector('[aria-label=\"previous step\"]').click()")
    assert opened.run(first) == "5.0.0"
    problem = "document.querySelector('#problem')"
    opened.run(f"{problem}.selectedIndex = 1; {problem}.dispatchEvent(new Event('change'));")
    assert opened.run(first) == "5.1.0"
    set_input(opened, "#step", 0)
    assert opened.run(first) == "1.0.0"
    assert opened.run("document.querySelector('#step-name').textContent") == "1 of 6"
    assert healthy(opened)


def test_hovering_a_token_shows_its_numbers(opened, run):
    row = read_lines(run / "rollouts.jsonl")[-6]
    opened.hover("document.querySelectorAll('.tokens span')[3]")
    opened.wait("!document.querySelector('#tip').hidden")
    tip = opened.run("document.querySelector('#tip').innerText")
    assert f"4 of {len(row['tokens'])}" in tip and str(row["tokens"][3]) in tip
    assert "1.25" in tip and f"{row['entropy'][3]:.3f}"[:4] in tip


def test_hovering_a_curve_reads_every_curve_at_that_step(opened):
    reading = "document.querySelector('[data-metric=\"{}\"] .read').innerText"
    assert opened.run(reading.format("reward")).strip() == "0.6"
    opened.hover("document.querySelector('[data-metric=entropy] svg')", across=0.55)
    opened.wait(reading.format("reward") + ".includes('step 3')")
    assert opened.run(reading.format("reward")).split() == ["step", "3", "0.3"]
    assert "0.25 [0.2, 0.3]" in opened.run(reading.format("eval/accuracy"))


def test_smoothing_redraws_the_curves(opened):
    line = "document.querySelector('[data-metric=reward] .line').getAttribute('d')"
    before = opened.run(line)
    set_input(opened, "#smoothing", 0.9)
    opened.wait(f"{line} !== {json.dumps(before)}")
    assert healthy(opened)


def test_dark_and_light(browser, run):
    command(run)
    paper = "getComputedStyle(document.body).backgroundColor"
    look = {}
    for dark in (False, True):
        browser.open(run / "report.html", dark=dark)
        browser.run("localStorage.clear()")
        browser.open(run / "report.html", dark=dark)
        look[dark] = browser.run(paper)
    assert look[False] != look[True]
    for expected in (look[False], look[True], look[True]):  # light, dark, and auto on a dark screen
        browser.run("document.querySelector('#theme').click()")
        assert browser.run(paper) == expected
    assert healthy(browser)


def test_readable_at_phone_width(browser, run):
    command(run)
    browser.open(run / "report.html", width=390, height=800)
    assert browser.run("document.documentElement.scrollWidth") <= 390
    assert browser.run("document.querySelector('.chart svg').clientWidth") > 300
    assert healthy(browser)


def test_several_runs_side_by_side(browser, run, tmp_path):
    other = make_run(tmp_path / "grpo-1", lr=1e-4, kl=0.04, steps=4)  # a folder of the same name
    page = tmp_path / "page.html"
    assert command(run, other, "--out", page).returncode == 0
    browser.open(page)
    names = browser.run(all_of(".runs button") + ".map((b) => b.textContent)")
    assert names == [str(run), str(other)]
    cells = "(tr) => [...tr.children].map((td) => td.textContent)"
    rows = browser.run(f"{all_of('#differences tbody tr')}.map({cells})")
    assert sorted(rows) == [["kl", "0", "0.04"], ["lr", "0.001", "0.0001"], ["steps", "6", "4"]]
    lines = "document.querySelectorAll('[data-metric=reward] .line').length"
    assert browser.run(lines) == 2
    browser.run("document.querySelector('.runs button').click()")
    browser.wait(f"{lines} === 1")
    set_input(browser, "#run", 1)
    assert browser.run("document.querySelector('#step-name').textContent").endswith("of 4")
    assert healthy(browser)


def test_a_run_with_a_single_step(browser, tmp_path):
    folder = tmp_path / "young"
    write_jsonl(folder / "metrics.jsonl", [{"step": 1, "reward": 0.5}])
    assert command(folder).returncode == 0
    browser.open(folder / "report.html")
    assert browser.run("document.querySelectorAll('.chart').length") == 1
    assert browser.run("document.querySelector('#rollouts')") is None
    assert healthy(browser)


def test_twenty_megabytes_of_rollouts_stay_usable(browser, tmp_path):
    folder = make_run(tmp_path / "long", steps=1)
    rng = random.Random(0)
    steps, size, tokens = 50, 8, 800
    values = [rng.gauss(0, 1) for _ in range(5000)]
    with (folder / "rollouts.jsonl").open("w") as log:
        for step in range(steps):
            for g in range(size):
                start = rng.randrange(len(values) - tokens)
                line = {"step": step, "problem": f"problem {step}", "rollout": g}
                line |= {"reward": g / size}
                line["tokens"] = [(step + g + k) % 256 for k in range(tokens)]
                line |= dict.fromkeys(("advantage", "entropy"), values[start : start + tokens])
                line["logp"] = values[:tokens]
                log.write(json.dumps(line) + "\n")
    assert (folder / "rollouts.jsonl").stat().st_size > 20e6
    assert command(folder).returncode == 0
    page = folder / "report.html"
    assert page.stat().st_size < 12e6  # four digits per number
    browser.open(page)
    spans = "document.querySelectorAll('.tokens span').length"
    assert browser.run(spans) == size * tokens  # of the selected group alone
    title = "document.querySelector('.problem').textContent"
    for place in (0, 25, 49):
        set_input(browser, "#step", place)
        assert browser.run(title) == f"problem {place}"
        press(browser, "logp")
        assert browser.run(spans) == size * tokens
    assert healthy(browser)
