"""RWR: reward-weighted regression (Peters & Schaal, 2007; for diffusion Lee et al., 2023, and Black
et al., 2023), the denoising loss of one's own samples, weighted by what they were worth:

    sum_i w_i ||eps - eps_theta(x_t, t)||^2,   w = softmax(R / tau)

with x_t the finished sample i under fresh noise at a uniform timestep. Public code takes the raw
reward, with 1 / tau = 0.2; here R is standardised, so that one tau does for all. RWR-sparse takes
the best tenth of an iteration alone, with equal weights.
"""

from dataclasses import dataclass

import torch

from ddpo_lib.experience import corrupt, corruptions, standardise
from ddpo_lib.policy import predict_noise
from ddpo_lib.settings import check, choice, number


@dataclass(frozen=True)
class Settings:
    """The weights, and how often a sample is looked at."""

    weights: str = choice("softmax", "sparse")
    """"softmax" of the standardised rewards, or "sparse": the best `kept` alone, all alike."""
    inverse_temperature: float = number(1.0, 0)
    """1 / tau: 0 weighs all alike, large ones the best alone."""
    kept: float = number(0.1, high=1, above=0)
    """Share of an iteration's samples that "sparse" learns from, at least one."""
    n_draws: int = number(9, 1)
    """Timesteps of a sample in an epoch; 9 cost as much as DDPO's half of 18 decisions."""

    __post_init__ = check


def helpers(policy, settings, loop) -> None:
    """RWR needs no other network."""


def credit(experience, settings, loop, helpers) -> torch.Tensor:
    """The weight of every sample, (N,) float32; their mean is 1."""
    rewards = standardise(experience.rewards, experience.groups)
    n = len(rewards)
    if settings.weights == "softmax":
        return n * (settings.inverse_temperature * rewards).softmax(0).float()
    n_kept = max(1, round(settings.kept * n))
    weights = torch.zeros(n)
    weights[rewards.argsort(descending=True, stable=True)[:n_kept]] = n / n_kept
    return weights


def units(experience, settings, loop, generator) -> list[torch.Tensor]:
    """Mini-batches of samples in random order, each sample at several timesteps."""
    return corruptions(experience, loop, settings.n_draws, generator)


def loss(policy, experience, rows, credit, settings, helpers) -> tuple[torch.Tensor, dict]:
    """The weighted denoising loss of each corrupted sample."""
    error = denoising_error(policy, experience, rows)
    weight = credit[rows[:, 0, 1]].to(error.device)
    return weight * error, {"denoising_error": error.detach()}


def denoising_error(policy, experience, rows) -> torch.Tensor:
    """||eps - eps_theta(x_t, t)||^2 as a mean over pixels, (U,) (equation 2.9)."""
    x_t, eps, t, context = corrupt(policy, experience, rows)
    return (predict_noise(policy, x_t, t, context) - eps).square().flatten(1).mean(1)
