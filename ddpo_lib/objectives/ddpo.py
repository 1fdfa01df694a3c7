"""DDPO: denoising diffusion policy optimization (Black et al., 2023; equations 4.2 to 4.4).

Denoising is a decision process: the state is (x_t, t), the action x_{t-1}, and only the finished
image is rewarded. A decision is worth the sample's standardised reward A, and the loss is

    IS:  sum_t max(-A rho_t, -A clip(rho_t, 1 ± eps)),  rho_t = p_theta / p_old     (equation 4.4)
    SF:  sum_t -A log p_theta                                                       (equation 4.2)

averaged over samples. Public code averages log-probabilities over pixels, so rho is a root of the
ratio, and standardises within each sampling batch; both are settings. Here the deterministic last
step is no decision. With `group_size` samples share their initial noise and are compared within
such a group alone: the group-relative advantage of Flow-GRPO and DanceGRPO (2025).
"""

from dataclasses import dataclass

import torch

from ddpo_lib import parallel
from ddpo_lib.experience import advantages, draw_steps, frozen, pairs, rescore, rescore_by, roll_out
from ddpo_lib.log_probs import kl
from ddpo_lib.sampler import Trajectory
from ddpo_lib.settings import check, choice, number


@dataclass(frozen=True)
class Settings:
    """The defaults are the thesis's (Table A.2)."""

    estimator: str = choice("is", "sf")
    """"is": clipped importance ratios, DDPO-IS. "sf": the score function, DDPO-SF, which allows one
    update per rollout."""
    clip_range: float = number(1e-4, high=1, above=0)
    """eps: half-width of the ratio's trust interval; goes with `log_prob_reduction`."""
    advantage_scope: str = choice("iteration", "minibatch")
    """Rewards are standardised over the whole "iteration", or, as in the published code, within
    each "minibatch", which then is a run of consecutive samples."""
    group_size: int = number(1, 1)
    """Consecutive samples that share their initial noise and are standardised among themselves; 1
    for no groups."""
    advantage_clip: float = number(4.5, above=0)
    """Standardised advantages are clamped to ± this."""
    loss_reduction: str = choice("sum", "mean")
    """Over timesteps: "sum" as in equation 4.4, or "mean"."""
    kl_weight: float = number(0.0, 0)
    """beta: adds beta KL(p_theta || p_pre) of every decision, exact, in the unit of the
    log-probability, over advantages of about 1. The thesis has none: 0."""

    __post_init__ = check


def helpers(policy, settings, loop) -> torch.nn.Module | None:
    """The pretrained policy, where leaving it has a price. ValueError for settings under which DDPO
    would not learn."""
    one_update = loop.minibatch_size == loop.n_samples and loop.n_inner_epochs == 1
    if settings.estimator == "sf" and not one_update:
        needed = f"set minibatch_size to n_samples, {loop.n_samples}, and n_inner_epochs to 1"
        raise ValueError(f"estimator='sf' allows one update per rollout: {needed}; or take 'is'")
    alike = loop.minibatch_size > 1 and settings.group_size == 1 and not loop.prompts
    if settings.advantage_scope == "minibatch" and not alike:
        needed = "minibatch_size > 1, group_size=1, no prompts; or take 'iteration'"
        raise ValueError(f"advantage_scope='minibatch' needs {needed}")
    check_groups(settings.group_size, loop)
    return frozen(policy) if settings.kl_weight else None


def check_groups(size: int, loop, *others: str) -> None:
    """ValueError unless samples of an iteration, of a prompt, of a process, and of `others` are
    whole groups."""
    for name in ("n_samples", *others, *["samples_per_prompt"] * bool(loop.prompts)):
        if (n := getattr(loop, name)) % size:
            raise ValueError(f"{name}={n} is no multiple of the groups' size, {size}")
    n, parts = loop.n_samples, parallel.n_processes()
    if any(n * i // parts % size for i in range(parts)):
        raise ValueError(
            f"n_samples={n} in {parts} processes: each must hold whole groups of {size}"
        )


def rollout(policy, settings, loop, helpers, seeds, context, _, generator) -> Trajectory:
    """The learner's trajectories; from shared noise where there are groups."""
    return roll_out(policy, loop, seeds, context, together=settings.group_size)


def credit(experience, settings, loop, helpers) -> torch.Tensor:
    """The advantage of every sample, (N,) float32."""
    groups = compared(experience, settings, loop)
    return advantages(experience.rewards, settings.advantage_clip, groups)


def compared(experience, settings, loop) -> torch.Tensor | None:
    """Labels (N,) of the samples that are compared with each other; None for all."""
    within = {"minibatch": loop.minibatch_size, "iteration": settings.group_size}
    together = within[settings.advantage_scope]
    return torch.arange(len(experience.rewards)) // together if together > 1 else experience.groups


def units(experience, settings, loop, generator) -> list[torch.Tensor]:
    """Mini-batches of samples in random order; every decision is a unit of its own."""
    n, size = len(experience.rewards), loop.minibatch_size
    together = size if settings.advantage_scope == "minibatch" else 1  # consecutive samples
    order = torch.arange(n).view(-1, together)[torch.randperm(n // together, generator=generator)]
    steps, share = experience.steps, loop.timestep_fraction
    return [pairs(draw_steps(steps, share, generator), samples) for samples in order.view(-1, size)]


def loss(policy, experience, rows, credit, settings, helpers) -> tuple[torch.Tensor, dict]:
    """The surrogate of each decision, times the number of steps where the loss sums over them. The
    credit may differ from step to step, (T, N). The logged KL is of a whole trajectory."""
    step, sample = rows[:, 0].unbind(-1)
    new = rescore(policy, experience.trajectory, step, sample)
    worth = credit[sample] if credit.ndim == 1 else credit[step, sample]
    advantage = worth.to(new.log_prob.device)
    if settings.estimator == "sf":
        value = sf_loss(new.log_prob, advantage)
    else:
        value = is_loss(new.log_ratio, advantage, settings.clip_range)
    n_steps, ratio = len(experience.steps), new.log_ratio.detach().exp()
    clipped = ((ratio - 1).abs() > settings.clip_range).double()
    logged = {"mean_ratio": ratio, "clip_fraction": clipped, "kl": n_steps * new.kl}
    if settings.kl_weight:
        price, logged["kl_pretrained"] = kl_price(policy, experience, step, sample, new, helpers)
        value = value + settings.kl_weight * price
    return value * (n_steps if settings.loss_reduction == "sum" else 1), logged


def kl_price(policy, experience, step, sample, new, reference) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p_theta || p_pre) of decisions that are rescored as `new`, (U,): in the unit of the
    log-probability, with gradient; and of a whole trajectory, in nats."""
    old = rescore_by(reference, policy, experience.trajectory, step, sample)
    distance = kl(new.mean, old.mean, new.std)
    per = new.mean[0].numel() if experience.trajectory.reduction == "mean" else 1
    return distance / per, len(experience.steps) * distance.detach()


def is_loss(log_ratio, advantage, clip_range) -> torch.Tensor:
    """DDPO-IS's clipped surrogate max(-A rho, -A clip(rho, 1 ± eps)), per element (equation 4.4).

    `log_ratio` is log rho and carries the gradient, `advantage` is A, `clip_range` is eps, infinite
    for the surrogate without a clip (equation 4.3).
    """
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped)


def sf_loss(log_prob, advantage) -> torch.Tensor:
    """DDPO-SF's surrogate -A log p_theta, per element; on-policy only (equation 4.2)."""
    return -advantage * log_prob
