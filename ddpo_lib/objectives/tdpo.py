"""TDPO: temporal credit by a critic, and TDPO-R: a reset of its active units (Zhang et al., 2024).

    A_t = R - V(x_t, t), standardised over all decisions;   DDPO-IS on A_t, step by step;
    1/2 max((V - R)^2, (V_old + clamp(V - V_old, ± c) - R)^2) for the critic

The policy is updated after every few steps of the chain, the noisiest first, not once a mini-batch.
Every `reset_every` iterations the units of the critic's hidden layer that are *active* (mean output
over the layer's mean above 0) get new incoming and outgoing weights and forget their Adam moments:
they hold what the critic has become too sure of; dormant ones are kept. Public code's critic reads
CLIP's embedding of the decoded state; here it is the small network of `value`.
"""

from dataclasses import dataclass

import torch

from ddpo_lib.experience import pairs, standardise
from ddpo_lib.objectives import ddpo
from ddpo_lib.objectives.value import Value, new_value, value_of, values
from ddpo_lib.settings import check, number


@dataclass(frozen=True)
class Settings:
    """The clip, the critic and its reset."""

    clip_range: float = number(1e-4, high=1, above=0)
    """eps of the ratio; goes with `log_prob_reduction`."""
    advantage_clip: float = number(10.0, above=0)
    """Standardised advantages are clamped to ± this."""
    steps_per_update: int = number(5, 1)
    """Consecutive steps of the chain that one optimizer step learns from."""
    value_clip: float = number(0.2, above=0)
    """c: how far the critic may move in an iteration before its error stops counting."""
    reset_every: int = number(0, 0)
    """Iterations between two resets of the critic's active units, TDPO-R; 0 for none, TDPO."""
    helper_rate: float = number(20.0, above=0)
    """The critic's learning rate, in multiples of the policy's."""

    __post_init__ = check


def helpers(policy, settings, loop) -> torch.nn.Module:
    """The critic."""
    return new_value(policy)


def credit(experience, settings, loop, helpers) -> torch.Tensor:
    """A, R and the old V of every decision, (3, T, N) float32; A is standardised over those that
    are learned from."""
    value = values(helpers, experience)
    rewards = standardise(experience.rewards, experience.groups).float().expand_as(value)
    raw, advantage = (rewards - value)[experience.steps], torch.zeros_like(value)
    advantage[experience.steps] = standardise(raw.flatten()).float().view_as(raw)
    clip = settings.advantage_clip
    return torch.stack([advantage.clamp(-clip, clip), rewards, value])


def units(experience, settings, loop, generator) -> list[torch.Tensor]:
    """Mini-batches of samples in random order, each in turns over all steps, noisiest first."""
    n, size = len(experience.rewards), loop.minibatch_size
    order = torch.randperm(n, generator=generator).view(-1, size)
    turns = experience.steps.split(settings.steps_per_update)
    return [pairs(steps, samples) for samples in order for steps in turns]


def loss(policy, experience, rows, credit, settings, helpers) -> tuple[torch.Tensor, dict]:
    """DDPO's surrogate on A_t, and the critic's error."""
    step, sample = rows[:, 0].unbind(-1)
    advantage, target, old = credit
    per_decision = ddpo.Settings(clip_range=settings.clip_range)
    surrogate, logged = ddpo.loss(policy, experience, rows, advantage, per_decision, None)
    target, old = (each[step, sample].to(surrogate.device) for each in (target, old))
    new = value_of(helpers, experience, step, sample)
    near = old + (new - old).clamp(-settings.value_clip, settings.value_clip)
    error = 0.5 * torch.maximum((new - target).square(), (near - target).square())
    return surrogate + error, {**logged, "value_error": error.detach()}


def tend(settings, helpers, optimizer, iteration) -> None:
    """TDPO-R's reset, every `reset_every` iterations."""
    if settings.reset_every and iteration % settings.reset_every == 0:
        reset_active(helpers, optimizer, torch.Generator().manual_seed(iteration))


@torch.no_grad()
def reset_active(critic: Value, optimizer, generator) -> None:
    """New weights N(0, 1 / (d + 1)), d inputs, into and out of active hidden units, bias 0."""
    active = critic.activity > 0
    hidden, out = critic.hidden, critic.out
    columns = slice(None), active
    for p, index in ((hidden.weight, active), (out.weight, columns), (hidden.bias, active)):
        fresh = torch.zeros(p.shape)
        if p is not hidden.bias:
            fresh = torch.randn(p.shape, generator=generator) * (p.shape[1] + 1) ** -0.5
        p[index] = fresh.to(p)[index]
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in optimizer.state[p]:
                optimizer.state[p][moment][index] = 0
