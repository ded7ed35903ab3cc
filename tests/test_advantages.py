"""Properties that the advantage functions of all methods share.

HölderPO's weights, ARCA's credit, forking.py's mask and the weights of λ-GRPO, FIPO and STARE are
tested with them: they shape a response's gradient too. VinePPO's values and steps are made of the
same random numbers.
"""

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import pytest
import slow
import torch
import worked_example as example
from torch import Tensor
from torch.nn.functional import pad
from worked_example import tensors

import arca
from ep_grpo import ep_grpo_advantages
from erpo import erpo_advantages
from fipo import fipo_weights
from forking import forking_mask
from grpo import grpo_advantages
from gtpo import Args, grpo_s_advantages, gtpo_advantages, token_advantages
from holderpo import gradient_weights
from lambda_grpo import lambda_weights
from stare import stare_weights
from vineppo import vineppo_advantages


@dataclass
class Batch:
    rewards: Tensor  # [P, G]
    entropy: Tensor  # [P, G, T], as all below
    logp: Tensor
    ref_logp: Tensor
    mask: Tensor

    def change(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with a function applied to every tensor."""
        return Batch(*(function(getattr(self, item.name)) for item in fields(self)))


Method = Callable[[Batch], Tensor]  # [P, G, T]


def grpo(batch: Batch, scale: bool = True) -> Tensor:
    return grpo_advantages(batch.rewards, scale=scale)[..., None] * batch.mask


def with_progress(advantages: Callable[..., Tensor]) -> Method:
    def method(batch: Batch) -> Tensor:
        given = batch.rewards, batch.entropy, batch.logp, batch.ref_logp, batch.mask
        return advantages(*given, buckets=3)

    return method


def gtpo(**settings: str) -> Method:
    def method(batch: Batch) -> Tensor:
        correct = batch.rewards > 0.5
        return gtpo_advantages(correct, batch.entropy, batch.mask, **settings)

    return method


def grpo_s(batch: Batch) -> Tensor:
    advantages = grpo_s_advantages(batch.rewards > 0.5, batch.entropy, batch.mask)
    return advantages[..., None] * batch.mask


def gtpo_by_batch(**settings: str) -> Method:
    """Through the script's own `token_advantages`, which makes all rollouts one group."""

    def method(batch: Batch) -> Tensor:
        correct = (batch.rewards > 0.5).to(batch.entropy.dtype)
        rollouts = SimpleNamespace(correct=correct, entropy=batch.entropy, mask=batch.mask)
        return token_advantages(rollouts, Args(scope="batch", **settings))

    return method


def vineppo(whiten: bool) -> Method:
    def method(batch: Batch) -> Tensor:
        """Steps of two tokens; the first token's log-probability gives the value before a step."""
        step = torch.arange(batch.mask.shape[-1], device=batch.mask.device) // 2
        values = batch.logp[..., ::2].exp()
        return vineppo_advantages(
            values, step * batch.mask, batch.rewards, batch.mask, whiten=whiten
        )

    return method


def fipo(batch: Batch) -> Tensor:
    bounds = {"low": 0.2, "ratio_cap": 1.3, "safety": 1.1}
    return fipo_weights(batch.logp, batch.ref_logp, grpo(batch), batch.mask, **bounds)


def stare(batch: Batch) -> Tensor:
    return stare_weights(batch.logp, grpo(batch), batch.mask, top=0.3, attenuate=0.9)


def credit(signal: Callable[[Batch], Tensor]) -> Method:
    return lambda batch: arca.credit_weights(signal(batch), batch.mask)


def residual(batch: Batch) -> Tensor:
    adapted = torch.stack([batch.entropy, batch.logp], dim=-1)
    return arca.residual_norm(adapted, batch.ref_logp[..., None])


def shared_prefix(batch: Batch) -> Tensor:
    """Two token ids, by the entropy, so that rollouts do share prefixes."""
    return lambda_weights((batch.entropy > 1).long(), batch.mask)


METHODS: dict[str, Method] = {
    "grpo": grpo,
    "grpo without scale": lambda batch: grpo(batch, scale=False),
    "ep_grpo": with_progress(ep_grpo_advantages),
    "erpo": with_progress(erpo_advantages),
    "gtpo with-zeros": gtpo(normalize="with-zeros"),
    "gtpo own-set": gtpo(normalize="own-set"),
    "gtpo joint": gtpo(normalize="joint"),
    "gtpo by batch": gtpo_by_batch(),
    "grpo_s": grpo_s,
    "grpo_s by batch": gtpo_by_batch(level="sequence"),
    "vineppo": vineppo(whiten=False),
    "vineppo whitened": vineppo(whiten=True),
    "holderpo weights": lambda b: gradient_weights(b.logp, b.ref_logp, b.mask, 2.0),
    "fipo weights": fipo,
    "stare weights": stare,
    "arca surprisal": credit(lambda b: arca.surprisal(b.logp)),
    "arca entropy": credit(lambda b: arca.entropy_reduction(b.entropy, b.mask)),
    "arca divergence": credit(lambda b: arca.divergence(b.logp, b.ref_logp)),
    "arca residual": credit(residual),
    "forking mask": lambda b: forking_mask(b.entropy, b.mask).to(b.rewards.dtype),
    "lambda_grpo weights": shared_prefix,
}
# Whitened or ranked over all groups
OF_A_STEP = [
    "vineppo whitened",
    "gtpo by batch",
    "grpo_s by batch",
    "forking mask",
    "stare weights",
]
OF_REWARDS_ALONE = ["grpo", "grpo without scale", "vineppo", "vineppo whitened"]
ALL = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)

EXAMPLE = Batch(example.rewards, example.entropy, example.logp, example.ref_logp, example.mask)


def random_batch(seed: int, fill: float = 0.0) -> Batch:
    """One group of slow.random_group, with `fill` in the padding."""
    return Batch(*tensors(slow.random_group(seed), fill))


def float32_batch() -> Batch:
    """64 groups of 8 rollouts with entropies from just below 0 to the largest."""
    grid = torch.tensor([-1e-7, 0.0, 1e-45, 1e-30, 1e-6, 1.0, slow.LARGEST_ENTROPY])
    generator = torch.Generator().manual_seed(0)
    entropy = grid[torch.randint(len(grid), (64, 8, 16), generator=generator)]
    logp, ref_logp = -10 * torch.rand(2, 64, 8, 16, generator=generator)
    mask = torch.arange(16) < torch.randint(1, 17, (64, 8, 1), generator=generator)
    rewards = torch.randint(2, (64, 8), generator=generator).float()
    return Batch(rewards, entropy, logp, ref_logp, mask)


@ALL
def test_not_zero_on_the_example(method):
    """Zeros would have the properties below."""
    assert method(EXAMPLE).abs().max() > 0.1


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@ALL
def test_nothing_outside_the_mask_is_read(method, garbage):
    for seed in range(20):
        clean, dirty = random_batch(seed), random_batch(seed, fill=garbage)
        result = method(dirty)
        assert torch.equal(result, method(clean))
        assert not result[~clean.mask].any()


@ALL
def test_more_padding_changes_nothing(method):
    for seed in range(20):
        batch = random_batch(seed)
        wider = batch.change(lambda x: pad(x, (0, 3), value=0) if x.dim() == 3 else x)
        result = method(wider)
        # ARCA's weights are float32, whose sums may be rounded in another order.
        torch.testing.assert_close(result[..., :-3], method(batch), atol=1e-6, rtol=0)
        assert not result[..., -3:].any()


@ALL
def test_a_permutation_of_the_rollouts_permutes_the_advantages(method):
    for seed in range(20):
        batch = random_batch(seed)
        order = torch.randperm(batch.mask.shape[1], generator=torch.Generator().manual_seed(seed))
        permuted = method(batch.change(lambda x, order=order: x[:, order]))
        torch.testing.assert_close(permuted, method(batch)[:, order], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in OF_A_STEP])
def test_groups_do_not_mix(name):
    method = METHODS[name]
    other = Batch(
        torch.tensor([[0.0, 0.0, 1.0, 0.0]], dtype=torch.float64),
        example.entropy.flip(1).square(),
        example.ref_logp,
        example.logp,
        example.mask,
    )
    pairs = [(getattr(EXAMPLE, item.name), getattr(other, item.name)) for item in fields(Batch)]
    both = Batch(*(torch.cat(pair) for pair in pairs))
    apart = torch.cat([method(EXAMPLE), method(other)])
    torch.testing.assert_close(method(both), apart, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in OF_REWARDS_ALONE])
def test_no_gradient(name):
    leaves = EXAMPLE.change(
        lambda x: x.clone().requires_grad_() if x.is_floating_point() else x.clone()
    )
    assert not METHODS[name](leaves).requires_grad


@ALL
def test_inputs_are_left_alone(method):
    for batch in (random_batch(1, fill=7.0), float32_batch()):
        before = batch.change(torch.clone)
        method(batch)
        for item in fields(batch):
            assert torch.equal(getattr(batch, item.name), getattr(before, item.name))


READS_VALUES = ["forking mask", "stare weights"]  # the number of kept tokens depends on the mask


@pytest.mark.parametrize("name", [name for name in METHODS if name not in READS_VALUES])
def test_no_tensor_is_made_on_another_device(name):
    """The meta device, like a GPU, rejects tensors of the CPU with dimensions."""
    result = METHODS[name](EXAMPLE.change(lambda x: x.to("meta")))
    assert result.device.type == "meta"
    assert result.shape == EXAMPLE.mask.shape


@ALL
def test_finite_in_float32(method):
    batch = float32_batch()
    for rewards in (batch.rewards, torch.zeros_like(batch.rewards)):
        result = method(replace(batch, rewards=rewards))
        assert result.dtype == torch.float32
        assert result.isfinite().all()


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith(("g", "erpo"))])
def test_equal_rewards_give_exact_zeros(name, reward):
    """EP-GRPO's do not: see test_worked_example_of_equal_rewards."""
    for seed in range(20):
        batch = random_batch(seed)
        result = METHODS[name](replace(batch, rewards=torch.full_like(batch.rewards, reward)))
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize(
    "script",
    ["ep_grpo", "erpo", "holderpo", "arca", "reft", "forking", "lambda_grpo", "fipo", "stare"],
)
def test_every_script_has_the_same_grpo_advantages(script):
    """test_grpo.py tests the one of grpo.py."""
    copied = importlib.import_module(script).grpo_advantages
    assert inspect.getsource(copied) == inspect.getsource(grpo_advantages)
