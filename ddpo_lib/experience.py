"""What an iteration has seen, and what every objective asks of it: decisions, rescored."""

import copy
from dataclasses import dataclass, replace

import torch

from ddpo_lib import adapter, parallel, sampler
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
    denoised: torch.Tensor | None = None  # (T, N) float32: rewards of x~ before each step, if asked


@dataclass(frozen=True)
class Rescored:
    """Decisions under the policy that learns, beside the policy that made them."""

    log_prob: torch.Tensor  # (U,) float64, carries the gradient
    log_ratio: torch.Tensor  # (U,) float64: log rho, log_prob minus the rollout's; with gradient
    kl: torch.Tensor  # (U,) float64: between the two in nats, whatever the reduction; no gradient
    mean: torch.Tensor  # (U, C, H, W) float32: of the policy that learns, carries the gradient
    std: torch.Tensor  # (U,) float32


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
    result = torch.zeros_like(rewards)
    for members in peers(groups, len(rewards)):
        group = rewards[members]
        result[members] = (group - group.mean()) / (group.std(correction=0) + 1e-8)
    return result


def advantages(rewards: torch.Tensor, clip: float, groups=None) -> torch.Tensor:
    """Standardised rewards (N,) clamped to ± clip, float32; groups as in `standardise`."""
    return standardise(rewards, groups).clamp(-clip, clip).float()


def peers(groups: torch.Tensor | None, n: int) -> list[torch.Tensor]:
    """The indices of each group's samples, of labels (n,); all of them where groups is None."""
    if groups is None:
        return [torch.arange(n)]
    return [torch.nonzero(groups == label).view(-1) for label in groups.unique()]


def rescore(policy: Policy, trajectory: Trajectory, step, sample) -> Rescored:
    """Score decisions (step[u], sample[u]), (U,) int64 each, under the policy."""
    device, context = policy.device, trajectory.context and trajectory.context.select(sample)
    x_t, x_prev = (trajectory.states[k, sample].to(device) for k in (step, step + 1))
    t, t_prev = (each[step].to(device) for each in (trajectory.timesteps, trajectory.t_prev))
    new = transition(policy, x_t, t, t_prev, trajectory.eta, context)
    value = log_prob(x_prev, new.mean, new.std, trajectory.reduction)
    log_ratio = value - trajectory.log_probs[step, sample].to(device)
    old_mean = trajectory.means[step, sample].to(device)
    between = kl(new.mean.detach(), old_mean, new.std)
    return Rescored(value, log_ratio, between, new.mean, new.std)


def rescore_by(network, policy: Policy, trajectory: Trajectory, step, sample) -> Rescored:
    """As `rescore`, under the policy with another, frozen network; without gradient."""
    with torch.no_grad():
        return rescore(replace(policy, unet=network), trajectory, step, sample)


def roll_out(policy: Policy, loop, seeds, context=None, x=None, skip=0, together=1) -> Trajectory:
    """Trajectories under the loop's settings: from the seeds' noise, which `together` consecutive
    samples share, or from states x (N, C, H, W) that have come through `skip` steps already."""
    if x is None:
        x = sampler.noise(policy, [seeds[i - i % together] for i in range(len(seeds))])
    chain = {"eta": loop.eta, "reduction": loop.log_prob_reduction, "skip": skip}
    chain["context"] = context
    chain |= {"batch_size": loop.micro_batch, "progress": "rollout" if parallel.is_main() else None}
    store = sampler.roomy_device(policy, len(seeds), loop.n_steps)
    return sampler.rollout(policy, x, loop.n_steps, seeds, store=store, **chain)


def frozen(policy: Policy) -> torch.nn.Module:
    """The policy's network as it was pretrained, for an objective's helpers: where an adapter
    learns, the network without it, otherwise a copy."""
    return adapter.Without(policy.unet) if adapter.is_in(policy.unet) else frozen_copy(policy)


def frozen_copy(policy: Policy) -> torch.nn.Module:
    """A copy that learns nothing, in the layout of the one that learns, so that the two round
    alike."""
    copied = copy.deepcopy(policy.unet).to(memory_format=torch.channels_last)
    return copied.requires_grad_(False)


UNIFORM = 2**40  # what the first column of `corruptions` lies below


def corruptions(experience: Experience, loop, n: int, generator) -> list[torch.Tensor]:
    """Units of a denoising loss, mini-batch by mini-batch: n times each sample, (M·n, 1, 3) int64
    of a uniform number, for the timestep, the sample, and the noise's seed; see `corrupt`."""
    batches, size = [], loop.minibatch_size
    for samples in torch.randperm(len(experience.rewards), generator=generator).view(-1, size):
        sample = samples.repeat_interleave(n)
        u, seed = torch.randint(UNIFORM, (2, len(sample)), generator=generator)
        batches.append(torch.stack([u, sample, seed], dim=1)[:, None])
    return batches


def corrupt(policy: Policy, experience: Experience, rows: torch.Tensor) -> tuple:
    """Finished samples with fresh noise (equation 2.8), as `corruptions` names them: x_t and eps,
    (U, C, H, W) each, t (U,), uniform over all timesteps, and their context."""
    u, sample, seed = rows[:, 0].unbind(-1)
    x_0 = experience.trajectory.x_0[sample].to(policy.device)
    generators = [torch.Generator().manual_seed(int(each)) for each in seed]
    eps = torch.stack([torch.randn(x_0.shape[1:], generator=each) for each in generators])
    t, eps = (u * len(policy.alpha_bar) // UNIFORM).to(policy.device), eps.to(policy.device)
    a_t = policy.alpha_bar_at(t)
    context = experience.trajectory.context and experience.trajectory.context.select(sample)
    return a_t.sqrt() * x_0 + (1 - a_t).sqrt() * eps, eps, t, context
