"""Log-probability and Kullback–Leibler divergence of denoising transitions, exact in float64.

At 3×256×256 a log-density is about 6e5 nats while a small update changes it by a hundredth of one:
more digits than float32 has. In float64 the difference keeps eight of them.
"""

import math

import torch


def log_prob(x_prev, mean, std, reduction: str = "mean") -> torch.Tensor:
    """log N(x_prev; mean, std^2 I) for each sample, (N,) float64 (equation 4.2).

    Args:
        x_prev, mean: (N, C, H, W).
        std: (N,). Where it is 0 the step is deterministic: it is no action, its log-probability
            is 0 and it carries no gradient.
        reduction: "sum" over C·H·W is the log-density in nats. "mean" divides it by C·H·W, so that
            exp of a difference is the (C·H·W)-th root of the true ratio; a clip range goes with it.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"log-probability reduction {reduction!r}: must be one of ('mean', 'sum')")
    stochastic = std > 0
    log_std = torch.where(stochastic, std, 1.0).double().log()
    n_pixels = math.prod(x_prev.shape[1:])
    total = -kl(x_prev, mean, std) - n_pixels * (log_std + 0.5 * math.log(2 * math.pi))
    return torch.where(stochastic, total / (n_pixels if reduction == "mean" else 1), 0.0)


def kl(mean: torch.Tensor, other: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, std^2 I) || N(other, std^2 I)) = ||mean - other||^2 / (2 std^2), (N,) float64.

    In nats, over all pixels, whatever the log-probability's reduction. Symmetric, since both have
    the same deviation. Arguments as in `log_prob`: 0 where std is.
    """
    stochastic = std > 0
    safe = torch.where(stochastic, std, 1.0).double()
    squared = (mean.double() - other.double()).square().flatten(1).sum(1)
    return torch.where(stochastic, squared / (2 * safe.square()), 0.0)
