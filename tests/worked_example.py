"""The group of four rollouts that the pages in docs/ work by hand: one prompt, [1, 4, 3]."""

import slow
import torch
from torch import Tensor


def pad(rows: list[list[float]], fill: float = 0.0) -> Tensor:
    """Ragged rows of one group -> [1, G, T] in float64, right-padded with fill."""
    width = max(len(row) for row in rows)
    padded = [row + [fill] * (width - len(row)) for row in rows]
    return torch.tensor([padded], dtype=torch.float64)


def pad_mask(rows: list[list[float]]) -> Tensor:
    """True on the entries that `pad` took from the rows. [1, G, T]"""
    return pad([[1.0] * len(row) for row in rows]).bool()


def tensors(group: slow.Group, fill: float = 0.0) -> tuple[Tensor, ...]:
    """rewards [1, G]; entropy, logp, ref_logp and mask [1, G, T]."""
    rewards = torch.tensor([group.rewards], dtype=torch.float64)
    rows = (pad(values, fill) for values in (group.entropy, group.logp, group.ref_logp))
    return rewards, *rows, pad_mask(group.entropy)


ENTROPY = [[3.0, 1.0, 2.0], [1.0, 3.0], [0.5, 2.0, 1.0], [4.0]]
LOGP = [[-0.1, -0.5, -0.2], [-0.3, -0.1], [-0.2, -0.9, -0.4], [-1.2]]
REF_LOGP = [[-0.2, -0.4, -0.3], [-0.3, -0.3], [-0.1, -1.0, -0.2], [-1.0]]

rewards = torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
correct = rewards.bool()
mask = pad_mask(ENTROPY)
entropy = pad(ENTROPY)
logp = pad(LOGP)
ref_logp = pad(REF_LOGP)
