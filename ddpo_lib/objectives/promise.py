"""Ours: DDPO whose credit is what was still to be earned, and a price for leaving the pretrained.

Section 5.4 of the thesis proposes rewards from denoised intermediate states. The denoised state x~
of x_t is the image that the policy expects; r(x~) is what it promises. With R of the finished one,

    A_t = R - r(x~_t), less its mean over the samples, over one deviation for all t.

What was promised before a step was not earned by it. r(x~_t) is known before the decision, so it is
a baseline and adds no bias; late steps, whose image is all but settled, get little credit. The KL
to the pretrained policy is DPOK's, exact; its weight is the price of diversity, 0 leaves it out.
"""

from dataclasses import dataclass

import torch

from ddpo_lib.experience import peers
from ddpo_lib.objectives import ddpo
from ddpo_lib.objectives.ddpo import compared, helpers, loss, rollout, units  # noqa: F401
from ddpo_lib.settings import number

SCORES_DENOISED = True


@dataclass(frozen=True)
class Settings(ddpo.Settings):
    """DDPO's, with a price for leaving the pretrained policy."""

    kl_weight: float = number(0.1, 0)
    """beta, as in DDPO."""


def credit(experience, settings, loop, _) -> torch.Tensor:
    """A of every decision, (T, N) float32."""
    to_go = (experience.rewards - experience.denoised)[experience.steps]
    centred = to_go.clone()
    for members in peers(compared(experience, settings, loop), to_go.shape[1]):
        centred[:, members] -= to_go[:, members].mean(1, keepdim=True)
    advantage = torch.zeros_like(experience.denoised)
    advantage[experience.steps] = centred / (centred.square().mean().sqrt() + 1e-8)
    return advantage.clamp(-settings.advantage_clip, settings.advantage_clip)
