"""Denoising from noise to picture: trajectories with their log-probabilities, or samples alone."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from ddpo_lib.log_probs import log_prob
from ddpo_lib.policy import Policy, timesteps, transition


@dataclass(frozen=True)
class Trajectory:
    """N denoising chains of T steps: what the policy saw, what it did, how likely that was."""

    states: torch.Tensor
    """(T+1, N, C, H, W) float32: x_T (noise) first, x_0 (pictures in [-1, 1]) last."""
    timesteps: torch.Tensor
    """(T,) int64, descending to 0: step k goes from states[k] at timesteps[k] to states[k+1]."""
    log_probs: torch.Tensor
    """(T, N) float32: log p_theta(states[k+1] | states[k]) when sampled. Row k is 0 where step k
    was deterministic: no action was taken there."""
    eta: float
    """DDIM's eta, which scales sigma_t."""
    reduction: str
    """How `log_probs` reduces over pixels, "mean" or "sum"."""

    @property
    def x_0(self) -> torch.Tensor:
        """(N, C, H, W): the finished pictures."""
        return self.states[-1]

    @property
    def t_prev(self) -> torch.Tensor:
        """(T,) int64: where each step goes; -1 stands for the clean picture."""
        return torch.cat([self.timesteps[1:], self.timesteps.new_tensor([-1])])


def noise(policy: Policy, n: int, seed: int) -> torch.Tensor:
    """x_T ~ N(0, I), (n, C, H, W), the same on every device for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *policy.image_shape, generator=generator).to(policy.device)


def rollout(
    policy: Policy,
    x_T: torch.Tensor,
    n_steps: int,
    generator: torch.Generator,
    eta: float = 1.0,
    reduction: str = "mean",
    batch_size: int = 100,
    progress: str | None = None,
) -> Trajectory:
    """Sample one trajectory per noise in x_T and keep every state (Algorithm 2 with DDIM's steps).

    Args:
        x_T: (N, C, H, W) noise, see `noise`.
        n_steps: denoising steps, see `policy.timesteps`.
        generator: a CPU generator for the steps' noise. The noise is drawn for all samples at once,
            so a seed gives the same trajectory whatever the batch size.
        eta: 0 deterministic, 1 the stochastic sampler that policy gradients need.
        reduction: of the log-probabilities, see `log_probs.log_prob`.
        batch_size: pictures per call of the network.
        progress: label of a progress bar; None for no bar.
    """
    states, log_probs = [x_T], []
    for mean, std, x_prev in _chain(policy, x_T, n_steps, eta, generator, batch_size, progress):
        log_probs.append(log_prob(x_prev, mean, std, reduction))
        states.append(x_prev)
    return Trajectory(
        torch.stack(states), timesteps(policy, n_steps), torch.stack(log_probs), eta, reduction
    )


def sample(
    policy: Policy,
    x_T: torch.Tensor,
    n_steps: int,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    batch_size: int = 100,
    progress: str | None = None,
) -> torch.Tensor:
    """The finished pictures x_0 (N, C, H, W) in [-1, 1], without keeping the way there.

    Arguments as in `rollout`; at eta = 0 the result is a function of x_T alone.
    """
    chain = _chain(policy, x_T, n_steps, eta, generator, batch_size, progress)
    last = deque(chain, maxlen=1).pop()
    return last[2]


@torch.no_grad()
def denoised(policy: Policy, trajectory: Trajectory, batch_size: int = 100) -> torch.Tensor:
    """x~_{t→0} for every state before the last: (T, N, C, H, W), the picture that the policy
    expects at each step (equation 2.25)."""
    steps = zip(trajectory.states[:-1], trajectory.timesteps, trajectory.t_prev, strict=True)
    return torch.stack(
        [_step(policy, x_t, t, prev, trajectory.eta, batch_size)[2] for x_t, t, prev in steps]
    )


@torch.no_grad()
def _chain(policy, x_T, n_steps, eta, generator, batch_size, progress) -> Iterator:
    """Yield (mean, std, x_prev) of each step, from noise to picture."""
    if tuple(x_T.shape[1:]) != policy.image_shape:
        raise ValueError(
            f"noise of shape {tuple(x_T.shape)} does not fit a policy that draws pictures of "
            f"shape {policy.image_shape}; make it with sampler.noise(policy, n, seed)"
        )
    if eta > 0 and generator is None:
        raise ValueError(f"eta={eta}: a stochastic sampler needs a generator")
    x = x_T
    steps = timesteps(policy, n_steps)
    previous = [*steps[1:], torch.tensor(-1)]
    pairs = list(zip(steps, previous, strict=True))
    for t, t_prev in tqdm(pairs, desc=progress, disable=progress is None, leave=False):
        mean, std, _ = _step(policy, x, t, t_prev, eta, batch_size)
        x = mean
        if std[0] > 0:
            z = torch.randn(x.shape, generator=generator).to(x.device)
            x = mean + std.view(-1, 1, 1, 1) * z
        yield mean, std, x


def _step(policy, x_t, t, t_prev, eta, batch_size) -> tuple[torch.Tensor, ...]:
    """The transition of a whole batch at one timestep, `batch_size` samples at a time."""
    parts = [
        transition(
            policy, x, t.expand(len(x)).to(x.device), t_prev.expand(len(x)).to(x.device), eta
        )
        for x in x_t.split(batch_size)
    ]
    return (
        torch.cat([p.mean for p in parts]),
        torch.cat([p.std for p in parts]),
        torch.cat([p.denoised for p in parts]),
    )
