"""DiffusionNFT (Zheng et al., 2025): no log-probabilities, a denoising loss that pulls towards good
samples and pushes away from bad ones, on re-noised samples of any sampler. With the prediction v of
the learner and v_old of the policy that drew the samples, two implicit policies,

    v_+ = b v + (1 - b) v_old,   v_- = (1 + b) v_old - b v,   u = clip(A, ± 5) / 10 + 1/2,

    [u ||v_+ - target||^2 + (1 - u) ||v_- - target||^2] / b + lambda ||v - v_pre||^2 .

v_+ and v_- average to v_old. Public code has b = 1 or 0.1, and v_old is a moving average. Here
v_old is the policy of the rollout, and the loss is on eps, a linear function of v at every x_t.
"""

from dataclasses import dataclass, replace

import torch

from ddpo_lib.experience import advantages, corrupt, frozen, frozen_copy, roll_out
from ddpo_lib.objectives.rwr import units  # noqa: F401
from ddpo_lib.policy import predict_noise
from ddpo_lib.settings import check, number


@dataclass(frozen=True)
class Settings:
    """The strength of guidance, and how often a sample is looked at."""

    beta: float = number(1.0, above=0)
    """b: how far the implicit policies lie from the old one; small is bold."""
    kl_weight: float = number(0.0, 0)
    """lambda, of the squared distance from the pretrained policy's prediction."""
    n_draws: int = number(9, 1)
    """Timesteps of a sample in an epoch."""

    __post_init__ = check


def helpers(policy, settings, loop) -> torch.nn.Module:
    """The pretrained policy, and the one that draws the samples."""
    return torch.nn.ModuleDict({"reference": frozen(policy), "old": frozen_copy(policy)})


def rollout(policy, settings, loop, helpers, seeds, context, iteration, generator):
    """The learner's trajectories; it becomes the old policy."""
    helpers["old"].load_state_dict(policy.unet.state_dict())
    return roll_out(policy, loop, seeds, context)


def credit(experience, settings, loop, helpers) -> torch.Tensor:
    """u, how good a sample is, in [0, 1], (N,) float32."""
    return advantages(experience.rewards, 5.0, experience.groups) / 10 + 0.5


def loss(policy, experience, rows, credit, settings, helpers) -> tuple[torch.Tensor, dict]:
    """The loss of each corrupted sample."""
    x_t, eps, t, context = corrupt(policy, experience, rows)
    new = predict_noise(policy, x_t, t, context)
    with torch.no_grad():
        others = (replace(policy, unet=helpers[name]) for name in ("old", "reference"))
        old, pretrained = (predict_noise(other, x_t, t, context) for other in others)
    u = credit[rows[:, 0, 1]].to(new.device)
    toward, away = implicit(new, old, settings.beta)
    differences = toward - eps, away - eps, new - pretrained
    good, bad, distance = (each.square().flatten(1).mean(1) for each in differences)
    value = (u * good + (1 - u) * bad) / settings.beta + settings.kl_weight * distance
    return value, {"distance": distance.detach()}


def implicit(new, old, beta) -> tuple[torch.Tensor, torch.Tensor]:
    """The implicit policies' predictions, towards and away."""
    return beta * new + (1 - beta) * old, (1 + beta) * old - beta * new
