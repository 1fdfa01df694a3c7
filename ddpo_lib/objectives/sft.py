"""SFT: supervised finetuning on the pretrained policy's samples (Lee et al., 2023; the baseline of
DPOK, Fan et al., 2023):

    R_i ||eps - eps_theta(x_t, t)||^2 + beta ||eps_theta(x_t, t) - eps_pre(x_t, t)||^2

It is offline: the samples are the pretrained policy's in every iteration, whatever was learned. Lee
et al. have rewards in [0, 1]; others are brought there, the worst sample of an iteration to 0 and
the best to 1. There is no public code.
"""

from dataclasses import dataclass, replace

import torch

from ddpo_lib.experience import corrupt, frozen, roll_out
from ddpo_lib.objectives.rwr import units  # noqa: F401
from ddpo_lib.policy import predict_noise
from ddpo_lib.settings import check, number


@dataclass(frozen=True)
class Settings:
    """How much the pretrained policy holds back, and how often a sample is looked at."""

    kl_weight: float = number(0.0, 0)
    """beta; 0 for SFT without its KL."""
    n_draws: int = number(9, 1)
    """Timesteps of a sample in an epoch."""

    __post_init__ = check


def helpers(policy, settings, loop) -> torch.nn.Module:
    """The pretrained policy, which draws the data."""
    return frozen(policy)


def rollout(policy, settings, loop, helpers, seeds, context, iteration, generator):
    """Trajectories of the pretrained policy."""
    return roll_out(replace(policy, unet=helpers), loop, seeds, context)


def credit(experience, settings, loop, helpers) -> torch.Tensor:
    """Rewards brought to [0, 1], (N,) float32; zeros where all are equal."""
    lowest, highest = experience.rewards.min(), experience.rewards.max()
    return ((experience.rewards - lowest) / (highest - lowest).clamp(min=1e-8)).float()


def loss(policy, experience, rows, credit, settings, helpers) -> tuple[torch.Tensor, dict]:
    """The weighted denoising loss of each corrupted sample, and its distance from pretrained."""
    x_t, eps, t, context = corrupt(policy, experience, rows)
    new = predict_noise(policy, x_t, t, context)
    with torch.no_grad():
        old = predict_noise(replace(policy, unet=helpers), x_t, t, context)
    error, distance = ((new - other).square().flatten(1).mean(1) for other in (eps, old))
    weight = credit[rows[:, 0, 1]].to(error.device)
    logged = {"denoising_error": error.detach(), "distance": distance.detach()}
    return weight * error + settings.kl_weight * distance, logged
