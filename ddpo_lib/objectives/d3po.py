"""D3PO: direct preference for denoising (Yang et al., 2023). The two samples of a pair share their
initial noise and differ in the noise of the steps; one of them is the better. At every step

    -log sigmoid(c [h_0 log clamp(r_0, 1 ± eps) + h_1 log clamp(r_1, 1 ± eps)])

with h = 1 for the better, -1 for the worse, 0 for both of a tie, and r the ratio of the policy to
the frozen *pretrained* one at the decision that was taken. As in public code c = 0.1 and eps = 0.1:
the clamp confines a pair's loss to 0.683 … 0.703, which is why users see it stand still.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ddpo_lib.experience import draw_steps, frozen, rescore, rescore_by, roll_out
from ddpo_lib.objectives.ddpo import check_groups
from ddpo_lib.settings import check, number

PAIR = 2


@dataclass(frozen=True)
class Settings:
    """The two constants of the published code."""

    temperature: float = number(0.1, above=0)
    """c: how much a preference is worth against the distance from the pretrained policy."""
    clip_range: float = number(0.1, below=1, above=0)
    """eps: the ratio's range; goes with `log_prob_reduction`."""

    __post_init__ = check


def helpers(policy, settings, loop) -> torch.nn.Module:
    """The pretrained policy. ValueError where mini-batches are not whole pairs."""
    check_groups(PAIR, loop, "minibatch_size")
    return frozen(policy)


def rollout(policy, settings, loop, helpers, seeds, context, iteration, generator):
    """The learner's trajectories, two from each initial noise."""
    return roll_out(policy, loop, seeds, context, together=PAIR)


def credit(experience, settings, loop, helpers) -> torch.Tensor:
    """1 for the better of a pair, -1 for the worse, 0 for a tie, (N,) float32."""
    first, second = experience.rewards.view(-1, PAIR).unbind(1)
    sign = (first - second).sign()
    return torch.stack([sign, -sign], dim=1).flatten().float()


def units(experience, settings, loop, generator) -> list[torch.Tensor]:
    """Mini-batches of pairs in random order; a unit is both decisions of a pair at one step."""
    n = len(experience.rewards) // PAIR
    order = torch.randperm(n, generator=generator).view(-1, loop.minibatch_size // PAIR)
    batches = []
    for chosen in order:
        steps = draw_steps(experience.steps, loop.timestep_fraction, generator)
        step, pair = torch.cartesian_prod(steps, chosen).view(-1, 2).unbind(1)
        both = [torch.stack([step, PAIR * pair + k], dim=1) for k in range(PAIR)]
        batches.append(torch.stack(both, dim=1))
    return batches


def loss(policy, experience, rows, credit, settings, helpers) -> tuple[torch.Tensor, dict]:
    """The preference loss of each pair at its step."""
    step, sample = rows.flatten(0, 1).unbind(-1)
    new = rescore(policy, experience.trajectory, step, sample)
    old = rescore_by(helpers, policy, experience.trajectory, step, sample)
    h = credit[sample].to(new.log_prob.device).view(-1, PAIR)
    value = pair_loss((new.log_prob - old.log_prob).view(-1, PAIR), h, settings)
    return value, {"kl": len(experience.steps) * new.kl.view(-1, PAIR).mean(1)}


def pair_loss(log_ratio, h, settings) -> torch.Tensor:
    """The loss of pairs, (U,), of log r and h, (U, 2) each."""
    ratio = log_ratio.exp().clamp(1 - settings.clip_range, 1 + settings.clip_range)
    return -F.logsigmoid(settings.temperature * (h * ratio.log()).sum(1))
