"""Gaussian log-probability of a denoising transition."""

import math

import torch

REDUCTIONS = ("mean", "sum")


def log_prob(
    x_prev: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    """log N(x_prev; mean, std^2 I) for each sample (equation 4.2).

    Args:
        x_prev, mean: (N, C, H, W).
        std: (N,). Where it is 0 the step is deterministic: it is no action, its log-probability
            is 0 and it carries no gradient.
        reduction: "sum" over C·H·W is the log-density in nats. "mean" divides it by C·H·W, so that
            exp of a difference is the (C·H·W)-th root of the true ratio; the clip range goes with
            it.

    Returns:
        (N,) float32.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"log-probability reduction {reduction!r}: must be one of {REDUCTIONS}")
    stochastic = std > 0
    safe_std = torch.where(stochastic, std, 1.0).view(-1, 1, 1, 1)
    z = (x_prev - mean) / safe_std
    density = -0.5 * z**2 - safe_std.log() - 0.5 * math.log(2 * math.pi)
    total = density.mean((1, 2, 3)) if reduction == "mean" else density.sum((1, 2, 3))
    return torch.where(stochastic, total, 0.0)
