"""What an iteration has seen, and what every objective asks of it: decisions, rescored."""

from dataclasses import dataclass

import torch

from ddpo_lib.log_probs import kl, log_prob
from ddpo_lib.policy import Policy, transition
from ddpo_lib.sampler import Trajectory


@dataclass(frozen=True)
class Experience:
    """An iteration's trajectories and what their images were worth.

    A decision is a pair (step k, sample i): the policy went from states[k, i] to states[k+1, i].
    """

    trajectory: Trajectory  # of N samples
    rewards: torch.Tensor  # (N,) float32
    steps: torch.Tensor  # (K,) int64: the steps k that are learned from, see `learnable_steps`
    groups: torch.Tensor | None = None  # (N,) int64 labels of samples to compare; None for one


@dataclass(frozen=True)
class Rescored:
    """Decisions under the policy that learns, beside the policy that made them."""

    log_prob: torch.Tensor  # (U,) float64, carries the gradient
    log_ratio: torch.Tensor  # (U,) float64: log rho, log_prob minus the rollout's; with gradient
    kl: torch.Tensor  # (U,) float64: between the two in nats, whatever the reduction; no gradient


def learnable_steps(stds: torch.Tensor, min_std: float = 0.0) -> torch.Tensor:
    """Indices (K,) int64 of the steps with sigma_t > min_std, of stds (T,); others are no actions.
    ValueError where there is none."""
    steps = torch.nonzero(stds > min_std).view(-1)
    if len(steps) == 0:
        largest = f"no step has sigma_t > {min_std}, the largest is {stds.max():.3g}"
        raise ValueError(f"{largest}: roll out with eta > 0 and more steps, or lower min_std")
    return steps


def draw_steps(steps: torch.Tensor, fraction: float, generator: torch.Generator) -> torch.Tensor:
    """A random share of the steps (K,), at least one and none twice; at 1 all, as they are."""
    if fraction == 1:
        return steps
    order = torch.randperm(len(steps), generator=generator)
    return steps[order[: max(1, round(fraction * len(steps)))]]


def pairs(steps: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """Every step (K,) with every sample (M,): units of one decision each, (K·M, 1, 2) int64."""
    return torch.cartesian_prod(steps, samples).view(-1, 1, 2)


def standardise(rewards: torch.Tensor, groups: torch.Tensor | None = None) -> torch.Tensor:
    """(reward - mean) / sd of rewards (N,) within each group, (N,) float64; zeros where all of a
    group are equal. Groups are labels (N,), None for one group."""
    rewards = rewards.double()
    groups = torch.zeros(len(rewards), dtype=torch.long) if groups is None else groups
    result = torch.zeros_like(rewards)
    for label in groups.unique():
        members = (groups == label).to(rewards.device)
        group = rewards[members]
        result[members] = (group - group.mean()) / (group.std(correction=0) + 1e-8)
    return result


def rescore(policy: Policy, trajectory: Trajectory, step, sample) -> Rescored:
    """Score decisions (step[u], sample[u]), (U,) int64 each, under the policy."""
    device, context = policy.device, trajectory.context and trajectory.context.select(sample)
    x_t, x_prev = (trajectory.states[k, sample].to(device) for k in (step, step + 1))
    t, t_prev = (each[step].to(device) for each in (trajectory.timesteps, trajectory.t_prev))
    new = transition(policy, x_t, t, t_prev, trajectory.eta, context)
    value = log_prob(x_prev, new.mean, new.std, trajectory.reduction)
    log_ratio = value - trajectory.log_probs[step, sample].to(device)
    old_mean = trajectory.means[step, sample].to(device)
    return Rescored(value, log_ratio, kl(new.mean.detach(), old_mean, new.std))
