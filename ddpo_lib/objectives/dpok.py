"""DPOK: policy gradient with a KL to the pretrained policy and a value network (Fan et al., 2023):

    -(R - V(x_t, t)) clamp(rho_t, 1 ± eps) + beta KL(p_theta || p_pre)(x_t) + 1/2 (V(x_t, t) - R)^2

The clamp has no maximum beside it, as in the paper's code: outside the range there is no gradient
on either side. Public code has ||eps_theta - eps_pre||^2 for the KL, without its 1 / (2 sigma^2),
keeps a replay buffer, and multiplies R - V by 10. Here the KL is exact, per pixel where the
log-probability is, R is standardised, and every sample is used in its own iteration.
"""

from dataclasses import dataclass

import torch

from ddpo_lib.experience import frozen, rescore, standardise
from ddpo_lib.objectives import ddpo
from ddpo_lib.objectives.value import new_value, value_of, values
from ddpo_lib.settings import check, number


@dataclass(frozen=True)
class Settings:
    """The clip, the KL and the critic."""

    clip_range: float = number(1e-4, high=1, above=0)
    """eps: half-width of the ratio's range; goes with `log_prob_reduction`."""
    kl_weight: float = number(0.1, 0)
    """beta, of a decision's KL in the unit of the log-probability, over advantages of about 1."""
    value_weight: float = number(1.0, 0)
    """Of the value network's loss; 0 leaves V at 0."""
    helper_rate: float = number(20.0, above=0)
    """The value network's learning rate, in multiples of the policy's."""

    __post_init__ = check


def helpers(policy, settings, loop) -> torch.nn.Module:
    """The pretrained policy and the value network."""
    return torch.nn.ModuleDict({"reference": frozen(policy), "critic": new_value(policy)})


def credit(experience, settings, loop, helpers) -> torch.Tensor:
    """R - V(x_t, t) of every decision, and below it R, (2, T, N) float32."""
    rewards = standardise(experience.rewards, experience.groups).float()
    rewards = rewards.expand(len(experience.trajectory.stds), -1)
    return torch.stack([rewards - values(helpers["critic"], experience), rewards])


def units(experience, settings, loop, generator) -> list[torch.Tensor]:
    """Mini-batches of samples in random order; every decision is a unit of its own."""
    return ddpo.units(experience, ddpo.Settings(), loop, generator)


def loss(policy, experience, rows, credit, settings, helpers) -> tuple[torch.Tensor, dict]:
    """The clamped surrogate, the KL and the value network's error of each decision."""
    step, sample = rows[:, 0].unbind(-1)
    new = rescore(policy, experience.trajectory, step, sample)
    advantage, target = credit[:, step, sample].to(new.log_prob.device)
    ratio = new.log_ratio.exp()
    surrogate = -advantage * ratio.clamp(1 - settings.clip_range, 1 + settings.clip_range)
    price, whole = ddpo.kl_price(policy, experience, step, sample, new, helpers["reference"])
    error = 0.5 * (value_of(helpers["critic"], experience, step, sample) - target).square()
    n_steps = len(experience.steps)
    clipped = ((ratio.detach() - 1).abs() > settings.clip_range).double()
    logged = {"clip_fraction": clipped, "kl": n_steps * new.kl, "value_error": error.detach()}
    logged["kl_pretrained"] = whole
    value = surrogate + settings.kl_weight * price
    return n_steps * value + settings.value_weight * error, logged
