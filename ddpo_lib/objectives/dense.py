"""Dense reward: preferences over whole trajectories, discounted in time (Yang et al., 2024). A
trajectory's score is its log-ratio to the frozen pretrained policy,

    s_i = C mean_{k in K} clamp(log p_theta - log p_pre, ± eps)  at step k of trajectory i,

over K steps drawn with probability proportional to gamma^k, noisiest first (k = 0), and shared
by the trajectories that are compared. Their order by reward is learned by Plackett and Luce:

    sum_i [log sum_{j >= i} exp(s_j) - s_i],   i, j in the order of falling reward,

of two trajectories that of Bradley and Terry. The sum over steps stands inside the logarithm, so a
unit is a group of trajectories at K steps. The constants are public code's.
"""

from dataclasses import dataclass

import torch

from ddpo_lib.experience import frozen, rescore, rescore_by
from ddpo_lib.objectives.ddpo import check_groups
from ddpo_lib.settings import check, number


@dataclass(frozen=True)
class Settings:
    """The comparison and its discount."""

    group_size: int = number(4, 2)
    """Trajectories that are compared with each other."""
    n_draws: int = number(3, 1)
    """K: steps of a trajectory in one comparison."""
    n_comparisons: int = number(3, 1)
    """Comparisons of a group in an epoch, each at other steps."""
    discount: float = number(0.9, high=1, above=0)
    """gamma: at 1 all steps are alike, below it the noisy ones count more."""
    scale: float = number(10.0, above=0)
    """C: how steep preferences are."""
    clip_range: float = number(1e-4, above=0)
    """eps: range of a step's log-ratio, which has no gradient beyond; see `log_prob_reduction`."""

    __post_init__ = check


def helpers(policy, settings, loop) -> torch.nn.Module:
    """The pretrained policy. ValueError where mini-batches are not whole groups."""
    check_groups(settings.group_size, loop, "minibatch_size")
    return frozen(policy)


def credit(experience, settings, loop, helpers) -> torch.Tensor:
    """The rewards (N,), of which the order within a group is what counts."""
    return experience.rewards


def units(experience, settings, loop, generator) -> list[torch.Tensor]:
    """Mini-batches of groups in random order; a unit is a group at K steps, group by step."""
    size, steps = settings.group_size, experience.steps
    n_groups, n_draws = len(experience.rewards) // size, min(settings.n_draws, len(steps))
    weights = settings.discount ** (steps - steps[0]).double()
    batches = []
    order = torch.randperm(n_groups, generator=generator).view(-1, loop.minibatch_size // size)
    for chosen in order:
        rows = []
        for group in chosen.repeat(settings.n_comparisons):
            drawn = steps[torch.multinomial(weights, n_draws, generator=generator)]
            rows.append(torch.cartesian_prod(group * size + torch.arange(size), drawn).flip(1))
        batches.append(torch.stack(rows))
    return batches


def loss(policy, experience, rows, credit, settings, helpers) -> tuple[torch.Tensor, dict]:
    """The loss of each group at its steps."""
    step, sample = rows.flatten(0, 1).unbind(-1)
    new = rescore(policy, experience.trajectory, step, sample)
    old = rescore_by(helpers, policy, experience.trajectory, step, sample)
    shape = (len(rows), settings.group_size, -1)
    score = trajectory_scores((new.log_prob - old.log_prob).view(shape), settings)
    rewards = credit[sample.view(shape)[..., 0]].to(score.device)
    kl = len(experience.steps) * new.kl.view(len(rows), -1).mean(1)
    return plackett_luce(score, rewards), {"kl": kl}


def trajectory_scores(log_ratio, settings) -> torch.Tensor:
    """s of trajectories, (U, G), of log-ratios (U, G, K)."""
    return settings.scale * log_ratio.clamp(-settings.clip_range, settings.clip_range).mean(-1)


def plackett_luce(score, rewards) -> torch.Tensor:
    """Minus the log-likelihood of the order of falling reward, (U,); score and rewards (U, G)."""
    order = rewards.argsort(dim=1, descending=True, stable=True)
    score = score.gather(1, order)
    rest = score.flip(1).logcumsumexp(1).flip(1)  # log sum over this and all worse ones
    return (rest - score).sum(1)
