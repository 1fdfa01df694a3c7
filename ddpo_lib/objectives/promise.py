"""Ours: DDPO whose credit is what was still to be earned, and a price for leaving the pretrained.

Section 5.4 of the thesis proposes rewards from denoised intermediate states. The denoised state x~
of x_t is the image that the policy expects; r(x~) is what it promises. With R of the finished one,

    A_t = R - r(x~_t), less its mean over the samples, over one deviation for all t.

What was promised before a step was not earned by it. r(x~_t) is known before the decision, so it is
a baseline and adds no bias; late steps, whose image is all but settled, get little credit. The KL
to the pretrained policy is DPOK's, exact; its weight is the price of diversity, 0 leaves it out.
"""

from dataclasses import dataclass, replace

import torch

from ddpo_lib.experience import frozen, rescore
from ddpo_lib.log_probs import kl
from ddpo_lib.objectives import ddpo
from ddpo_lib.objectives.ddpo import rollout, units  # noqa: F401
from ddpo_lib.settings import check, number

SCORES_DENOISED = True


@dataclass(frozen=True)
class Settings(ddpo.Settings):
    """DDPO's, and the price of leaving the pretrained policy."""

    kl_weight: float = number(0.1, 0)
    """Of a decision's KL in the unit of the log-probability, over advantages of about 1."""

    def __post_init__(self):
        check(self)


def helpers(policy, settings, loop) -> torch.nn.Module:
    """The pretrained policy."""
    ddpo.helpers(policy, settings, loop)
    return frozen(policy)


def credit(experience, settings, loop, helpers) -> torch.Tensor:
    """A of every decision, (T, N) float32."""
    to_go = (experience.rewards - experience.denoised)[experience.steps]
    centred = to_go - to_go.mean(1, keepdim=True)
    advantage = torch.zeros_like(experience.denoised)
    advantage[experience.steps] = centred / (centred.square().mean().sqrt() + 1e-8)
    return advantage.clamp(-settings.advantage_clip, settings.advantage_clip)


def loss(policy, experience, rows, credit, settings, helpers) -> tuple[torch.Tensor, dict]:
    """DDPO's surrogate on A_t, and the KL to the pretrained policy."""
    step, sample = rows[:, 0].unbind(-1)
    new = rescore(policy, experience.trajectory, step, sample)
    with torch.no_grad():
        old = rescore(replace(policy, unet=helpers), experience.trajectory, step, sample)
    advantage = credit[step, sample].to(new.log_prob.device)
    surrogate = ddpo.is_loss(new.log_ratio, advantage, settings.clip_range)
    distance, n_steps = kl(new.mean, old.mean, new.std), len(experience.steps)
    per = new.mean[0].numel() if experience.trajectory.reduction == "mean" else 1
    ratio = new.log_ratio.detach().exp()
    clipped = ((ratio - 1).abs() > settings.clip_range).double()
    logged = {"clip_fraction": clipped, "kl": n_steps * new.kl}
    logged["kl_pretrained"] = n_steps * distance.detach()
    return n_steps * (surrogate + settings.kl_weight * distance / per), logged
