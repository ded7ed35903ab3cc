"""benchmark/credit.py: the truth against new samples, the measures by hand, a small run."""

from pathlib import Path
from typing import Any

import credit
import numpy as np
import pytest
import shared
import truth
from conftest import HAS_VLLM
from truth import (
    CLEAR,
    MEASURES,
    Truth,
    cosine,
    estimate,
    on_decisive,
    penalised,
    rank_in_rollouts,
    spearman,
    wrong_sign,
)

COUNT = 8  # continuations of the smoke run
SMOKE = {"prompts": 2, "group_size": 8, "continuations": COUNT}


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=float)


# ------------------------------------------------------------------------------- the truth


def test_values_and_advantages_by_hand():
    curve = truth.true_advantages(array(0.5, 0.2), array(1, 3), 4, 1.0)
    # With its last token the rollout is right; before it, 0.8 · 1 + 0.2 · 3/4; then 0.5 · (...)
    assert curve.values == pytest.approx([0.5 * 0.95 + 0.5 * 0.25, 0.95, 1.0])
    assert curve.advantages == pytest.approx([0.35, 0.05])


def test_a_certain_token_has_no_advantage_and_no_error():
    curve = truth.true_advantages(array(0.0, 1.0), array(0, 2), 4, 0.0)
    assert curve.advantages.tolist() == [0.0, -0.5]
    assert curve.errors[0] == 0.0 < curve.errors[1]


def test_estimates_are_unbiased_with_correct_errors():
    others, elsewhere, count = array(0.3, 0.4, 0.9), array(0.2, 0.7, 0.4), 50
    exact = truth.true_advantages(others, elsewhere * count, count, 1.0)
    drawn = [
        truth.true_advantages(others, wins, count, 1.0)
        for wins in np.random.default_rng(0).binomial(count, elsewhere, size=(2000, 3))
    ]
    for name, error in (("values", "value_errors"), ("advantages", "errors")):
        off = np.array([getattr(d, name) - getattr(exact, name) for d in drawn])[:, :3]
        z = off / np.array([getattr(d, error) for d in drawn])[:, :3]
        assert z.mean(0) == pytest.approx([0, 0, 0], abs=0.1)
        assert np.sqrt(np.square(z).mean(0)) == pytest.approx([1, 1, 1], abs=0.1)


# ------------------------------------------------------------------------------- the measures


def test_rank_correlation_by_hand():
    assert spearman(array(1, 2, 3), array(1, 10, 100)) == pytest.approx(1)
    # Without ties: 1 - 6 Σd² / (n (n² - 1)), here d = (1, -1, 1, -1)
    assert spearman(array(2, 1, 4, 3), array(1, 2, 3, 4)) == pytest.approx(1 - 6 * 4 / 60)
    # Ties share a rank: (1.5, 1.5, 3) against (1, 2, 3)
    assert spearman(array(0, 0, 1), array(1, 2, 3)) == pytest.approx(1.5 / 3**0.5)
    assert spearman(array(5, 5, 5), array(1, 2, 3)) == 0
    assert cosine(array(0, 0), array(1, 2)) == 0


TRUE = Truth(
    advantages=[array(0.5, -0.1, 0.0), array(0.3, 0.01, -0.6)],
    clear=[np.array([True, True, False]), np.array([True, False, True])],
    correct=[1.0, 0.0],
    steps=[
        [(slice(0, 2), False)],
        [(slice(0, 1), True), (slice(1, 2), True), (slice(2, 3), False)],
    ],
)


def test_measures_by_hand():
    given = [array(2, 1, -7), array(-1, -2, -1)]
    # Clear signs: 2 and 0.5 agree, 1 and -0.1 do not, -1 and 0.3 do not, -1 and -0.6 agree.
    assert wrong_sign(given, TRUE) == (2, 4)
    assert on_decisive(given, TRUE) == (2 + 1 + 1, 14)  # 0.5, 0.3 and -0.6 exceed 0.2
    assert penalised(given, TRUE) == (2, 2)  # of the failed rollout, its two right steps
    assert penalised(given, TRUE, CLEAR) == (1, 1)  # the second of which gained only 0.01
    assert rank_in_rollouts(given, TRUE)[0] == pytest.approx(0.5 + 0)
    assert rank_in_rollouts(given, TRUE, (0,)) == pytest.approx((0, 1))


def test_no_credit_has_no_sign_and_no_share():
    given = [np.zeros(3), np.zeros(3)]
    assert wrong_sign(given, TRUE) == (0, 0)
    assert on_decisive(given, TRUE) == (0, 0)
    assert penalised(given, TRUE) == (0, 2)


def test_the_mirror_image_of_the_truth():
    reversed_truth = [-advantages for advantages in TRUE.advantages]
    for name in ("rank, group", "rank, right rollout", "rank, failed rollout", "cosine"):
        right, count = MEASURES[name](TRUE.advantages, TRUE)
        assert right == pytest.approx(count)
        assert MEASURES[name](reversed_truth, TRUE)[0] == pytest.approx(-count)
    assert wrong_sign(TRUE.advantages, TRUE) == (0, 4)
    assert wrong_sign(reversed_truth, TRUE) == (4, 4)
    helpful = MEASURES["helpful steps penalised"]
    assert helpful(TRUE.advantages, TRUE) == (0, 1) and helpful(reversed_truth, TRUE) == (1, 1)


def test_an_estimate_is_a_ratio_of_sums_with_an_interval():
    measured = np.array([[1, 2], [3, 4]] * 20, dtype=float)
    found = estimate(measured, measured)
    assert found["value"] == pytest.approx(4 / 6)
    assert 0.5 < found["interval"][0] < 4 / 6 < found["interval"][1] < 0.75
    assert not found["differs"]
    assert estimate(measured + np.array([0.5, 0]), measured)["differs"]
    assert estimate(np.zeros((3, 2)), np.ones((3, 2))) is None


# ------------------------------------------------------------------------------- a small run


@pytest.fixture(scope="module")
def smoke(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small run, with its engine and its last problem."""
    if not HAS_VLLM:
        pytest.skip("vLLM's CPU build is not installed")
    folder = tmp_path_factory.mktemp("credit")
    kept: dict[str, Any] = {}
    measure = truth.measure

    def keep(engine: Any, grader: Any, policy: Any, problem: Any, *rest: Any) -> Any:
        kept.update(engine=engine, problem=problem)
        return measure(engine, grader, policy, problem, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truth, "measure", keep)
        patch.setattr(credit, "POLICIES", ("starting",))
        patch.setattr(credit, "RESULTS", folder)
        credit.main(credit.Args(**SMOKE, run_dir=folder))
    kept["rows"] = shared.read_json(folder / "starting.json")
    kept["policy"] = shared.read_json(folder / "credit.json")["policies"]["starting"]
    return kept


def test_advantages_sum_to_reward_minus_the_prompts_value(smoke):
    found = smoke["policy"]["soundness"]
    assert found["advantages of a rollout − (reward − V(prompt)), largest"] < 1e-12
    assert found["rms z"] < 2.5  # of few rollouts, and those of a group are not independent
    assert found["an advantage measured twice, rms z"] < 1.5


def test_values_agree_with_plain_continuations(smoke):
    """In the middle of a rollout, where no part of the estimate comes from the same samples."""
    row, problem, engine = smoke["rows"][1], smoke["problem"], smoke["engine"]
    curves = credit.read_curves(row, [0, 1], COUNT)
    answer = f"boxed{{{problem.answer}}}"
    for tokens, others, curve in zip(row["tokens"], row["others"], curves, strict=True):
        t = int(np.argmax(others[3:])) + 3  # the least certain token after the third
        prompts = [problem.prompt + tokens[:t]] * 300
        continued = engine.generate(prompts, list(range(300)), [64 - t] * 300, 1.0)
        texts = engine.decode([tokens[:t] + response for response, _ in continued])
        plain = np.mean([text.endswith(answer) for text in texts])
        error = np.hypot(curve.value_errors[t], np.sqrt(plain * (1 - plain) / 300))
        assert abs(curve.values[t] - plain) < 4 * error + 0.01


def test_the_truth_measured_again(smoke):
    methods = smoke["policy"]["methods"]
    again = methods["truth, measured again"]
    assert again["cosine"]["value"] > 0.8
    assert again["cosine"]["value"] > methods["GRPO"]["cosine"]["value"]
    assert again["wrong sign"]["value"] < 0.1


def test_methods_that_need_a_moved_policy_begin_as_grpo(smoke):
    methods = smoke["policy"]["methods"]
    for name in ("ARCA", "ARCA's divergence"):
        assert methods[name] == methods["GRPO"]
    assert not any(figure["differs"] for figure in methods["ERPO"].values() if figure)
    assert methods["GRPO"]["rank, failed rollout"]["value"] == 0
    assert methods["GTPO"]["rank, failed rollout"]["value"] != 0


def test_steps_match_their_tokens(smoke):
    for row in smoke["rows"]:
        for pieces in row["pieces"]:
            for tokens, _ in credit.read_steps(row["problem"], pieces):
                assert credit.check_steps(row["problem"], "".join(pieces[tokens]))


def test_the_figure_has_a_row_for_each_method(smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(credit.figures, "FOLDER", tmp_path)
    credit.figures.draw_credit(smoke["policy"]["example"])
    drawn = (tmp_path / "credit.svg").read_text()
    for name in smoke["policy"]["methods"]:
        if "again" not in name:
            assert f">{name.replace(chr(39), '&#x27;')}<" in drawn


@pytest.mark.parametrize("flags", [{"prompts": 1}, {"continuations": 1}])
def test_a_mistake_is_one_line(flags, rejection):
    [(name, value)] = flags.items()
    assert rejection(credit.main, credit.Args(**flags)).startswith(f"--{name} {value}: ")
