"""Advantages, the two DDPO objectives and one optimizer step over folded timesteps."""

import dataclasses
import math
from dataclasses import dataclass

import torch

from ddpo_lib import memory, parallel
from ddpo_lib.config import Finetune
from ddpo_lib.log_probs import log_prob
from ddpo_lib.policy import Policy, sigma, transition
from ddpo_lib.sampler import Trajectory


@dataclass(frozen=True)
class UpdateMetrics:
    """What one optimizer step did, over all its samples and all timesteps that it learns from."""

    loss: float
    mean_ratio: float
    """Mean importance ratio rho; 1 for the first update after a rollout."""
    clip_fraction: float
    """Share of (sample, timestep) pairs with |rho - 1| > clip_range."""
    approx_kl: float
    """Mean over samples of the sum over timesteps of (rho - 1) - log rho, an estimate of
    KL(old || new) per trajectory in the units of the log-probability's reduction."""
    grad_norm: float
    """Before it is rescaled to max_grad_norm."""
    learning_rate: float


def advantages(
    rewards: torch.Tensor, clip: float, groups: torch.Tensor | None = None
) -> torch.Tensor:
    """Standardised rewards, (reward - mean) / sd within each group, clamped to ± clip.

    Args:
        rewards: (N,).
        groups: (N,) labels: the mini-batch or the prompt that each sample belongs to. None for one
            group, the whole iteration. A group whose rewards are all equal gets advantages of 0.

    Returns:
        (N,) float32.
    """
    rewards = rewards.double()
    groups = torch.zeros(len(rewards), dtype=torch.long) if groups is None else groups
    result = torch.zeros_like(rewards)
    for label in groups.unique():
        members = (groups == label).to(rewards.device)
        group = rewards[members]
        result[members] = (group - group.mean()) / (group.std(correction=0) + 1e-8)
    return result.clamp(-clip, clip).float()


def ddpo_sf_loss(log_probs, old_log_probs, advantage, clip_range) -> torch.Tensor:
    """DDPO-SF's surrogate -A log p_theta, per element; on-policy only (equation 4.2).

    `old_log_probs` and `clip_range` are there so that both objectives are called alike.
    """
    return -advantage * log_probs


def ddpo_is_loss(log_probs, old_log_probs, advantage, clip_range) -> torch.Tensor:
    """DDPO-IS's clipped surrogate max(-A rho, -A clip(rho, 1 ± eps)), per element (equation 4.4).

    Args:
        log_probs: under the policy that learns; carries the gradient.
        old_log_probs: of the rollout.
        advantage: broadcast to the same shape.
        clip_range: eps.
    """
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped)


OBJECTIVES = {"ddpo_sf": ddpo_sf_loss, "ddpo_is": ddpo_is_loss}


def learning_rate(update: int, settings: Finetune) -> float:
    """The rate of optimizer step `update` (0-based): constant, or the schedule of Fig. 5.7.

    A linear warm-up from `learning_rate` to `peak_learning_rate` over the first `warmup` of all
    updates, then half a cosine down to `final_lr_fraction` × `learning_rate` at the last.
    """
    start = settings.learning_rate
    if settings.lr_schedule == "constant":
        return start
    peak, end = settings.peak_learning_rate, settings.final_lr_fraction * start
    n_warmup = settings.warmup * (settings.n_updates - 1)
    if update < n_warmup:
        return start + (peak - start) * update / n_warmup
    progress = (update - n_warmup) / max(1e-9, settings.n_updates - 1 - n_warmup)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    trajectory: Trajectory,
    advantage: torch.Tensor,
    settings: Finetune,
    rate: float,
    generator: torch.Generator | None = None,
) -> UpdateMetrics:
    """One optimizer step on a mini-batch of trajectories.

    Every (timestep, sample) pair is one element of a folded batch, taken `micro_batch` at a time,
    or fewer where a GPU's memory holds no more.
    Processes that hold parts of a mini-batch make one step together, see `parallel`.
    Steps with sigma_t <= `min_std`, at least the deterministic ones, are left out. The loss is the
    objective's mean over samples of its sum (or mean) over timesteps.

    Args:
        trajectory: the mini-batch, see `select`.
        advantage: (N,).
        rate: this step's learning rate.
        generator: draws the timesteps where `timestep_fraction` is below 1; a CPU generator.

    Raises:
        ValueError: no step is stochastic enough (eta = 0, or a large `min_std`).
        FloatingPointError: the gradient is not finite; the weights are left as they were.
        torch.OutOfMemoryError: not even one pair fits.
    """
    every_step = stochastic_steps(policy, trajectory, settings.min_std)
    kept = draw_steps(every_step, settings.timestep_fraction, generator)
    share = len(kept) / len(every_step)
    n_here = trajectory.states.shape[1]
    n = parallel.total(n_here)
    scale = n * share if settings.loss_reduction == "sum" else n * len(kept)
    steps, samples = _pairs(kept, n_here)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def accumulate(micro_batch: int) -> tuple[float, torch.Tensor]:
        """Add up the gradients; the loss, and the log-ratio of every pair."""
        optimizer.zero_grad(set_to_none=True)
        loss, log_ratios = 0.0, [trajectory.log_probs.new_empty(0)]
        for start in range(0, len(steps), micro_batch):
            k, i = (index[start : start + micro_batch] for index in (steps, samples))
            new = score(policy, trajectory, k, i)
            old = trajectory.log_probs[k, i]
            terms = OBJECTIVES[settings.objective](new, old, advantage[i], settings.clip_range)
            part = terms.sum() / scale
            part.backward()
            loss += part.item()
            log_ratios.append((new - old).detach())
        return loss, torch.cat(log_ratios)

    n_pairs = max(1, len(steps))  # none where this process holds no sample of the mini-batch
    loss, log_ratio = memory.fit("update", accumulate, min(settings.micro_batch, n_pairs))
    parallel.sum_gradients(parameters)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm).item()
    if not math.isfinite(grad_norm):
        raise FloatingPointError(
            f"the gradient's norm is {grad_norm}: nothing was updated. Lower the learning rate "
            f"({rate:.3g}), or set bf16 to false"
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    log_ratio = parallel.gather(log_ratio)
    ratio = log_ratio.exp()
    return UpdateMetrics(
        loss=parallel.total(loss),
        mean_ratio=ratio.mean().item(),
        clip_fraction=((ratio - 1).abs() > settings.clip_range).float().mean().item(),
        approx_kl=((ratio - 1 - log_ratio).sum() / (n * share)).item(),
        grad_norm=grad_norm,
        learning_rate=rate,
    )


def stochastic_pairs(
    policy: Policy, trajectory: Trajectory, min_std: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (k, i) of every action: step k of sample i with sigma_t > min_std. Each (K·N,) int64.

    Raises:
        ValueError: there is no such step.
    """
    return _pairs(stochastic_steps(policy, trajectory, min_std), trajectory.states.shape[1])


def stochastic_steps(policy: Policy, trajectory: Trajectory, min_std: float = 0.0) -> torch.Tensor:
    """Indices (K,) int64 of the steps with sigma_t > min_std, the others are no actions.

    Raises:
        ValueError: there is no such step.
    """
    std = sigma(policy, trajectory.timesteps, trajectory.t_prev, trajectory.eta)
    steps = torch.nonzero(std > min_std).view(-1)
    if len(steps) == 0:
        raise ValueError(
            f"no step of these trajectories has sigma_t > {min_std}, the largest is "
            f"{std.max():.3g}: roll out with eta > 0 or lower min_std"
        )
    return steps


def draw_steps(
    steps: torch.Tensor, fraction: float, generator: torch.Generator | None
) -> torch.Tensor:
    """A random share of the steps (K,), at least one and none twice; at 1 all, as they are."""
    if fraction == 1:
        return steps
    order = torch.randperm(len(steps), generator=generator)
    return steps[order[: max(1, round(fraction * len(steps)))]]


def _pairs(steps: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every step with each of n samples."""
    return steps.repeat_interleave(n), torch.arange(n).repeat(len(steps))


def score(policy: Policy, trajectory: Trajectory, k: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    """log p_theta(states[k+1, i] | states[k, i]) for pairs of step and sample, (K,) float32."""
    device = policy.device
    step = transition(
        policy,
        trajectory.states[k, i].to(device),
        trajectory.timesteps[k].to(device),
        trajectory.t_prev[k].to(device),
        trajectory.eta,
    )
    x_prev = trajectory.states[k + 1, i].to(device)
    return log_prob(x_prev, step.mean, step.std, trajectory.reduction)


def select(trajectory: Trajectory, samples: torch.Tensor) -> Trajectory:
    """The trajectories of some samples."""
    return dataclasses.replace(
        trajectory,
        states=trajectory.states[:, samples],
        log_probs=trajectory.log_probs[:, samples],
    )
