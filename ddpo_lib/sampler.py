"""Between noise and picture: trajectories with log-probabilities, samples, and the way back."""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from diffusers import DDPMScheduler
from tqdm.auto import tqdm

from ddpo_lib import memory
from ddpo_lib.log_probs import log_prob
from ddpo_lib.policy import Policy, Transition, timesteps, transition


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
    share: slice = slice(None),
    store: torch.device | None = None,
) -> Trajectory:
    """Sample one trajectory per noise in x_T and keep every state (Algorithm 2 with DDIM's steps).

    Args:
        x_T: (N, C, H, W) noise, see `noise`.
        n_steps: denoising steps, see `policy.timesteps`.
        generator: a CPU generator for the steps' noise. The noise is drawn for all samples at once,
            so a seed gives the same trajectory whatever the batch size.
        eta: 0 deterministic, 1 the stochastic sampler that policy gradients need.
        reduction: of the log-probabilities, see `log_probs.log_prob`.
        batch_size: pictures per call of the network; fewer where a GPU's memory holds no more.
        progress: label of a progress bar; None for no bar.
        share: roll out this part of x_T alone, as it would be in a rollout of all.
        store: where the states are kept, see `roomy_device`; by default where the policy is.
    """
    store = store or policy.device
    states = torch.empty(n_steps + 1, *x_T[share].shape, device=store)
    states[0], log_probs = x_T[share], []
    chain = _chain(policy, x_T, n_steps, eta, generator, batch_size, progress, share=share)
    for k, (mean, std, x_prev) in enumerate(chain, 1):
        log_probs.append(log_prob(x_prev, mean, std, reduction))
        states[k] = x_prev
    return Trajectory(states, timesteps(policy, n_steps), torch.stack(log_probs), eta, reduction)


def roomy_device(policy: Policy, n: int, n_steps: int) -> torch.device:
    """Where the states of n trajectories fit: the policy's device, unless they would take more than
    a quarter of what is free on a GPU; then the CPU, from where mini-batches are fetched."""
    if policy.device.type != "cuda":
        return policy.device
    free, _ = torch.cuda.mem_get_info(policy.device)
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # cached by PyTorch
    needed = 4 * (n_steps + 1) * n * math.prod(policy.image_shape)
    return policy.device if needed < free / 4 else torch.device("cpu")


def sample(
    policy: Policy,
    x_T: torch.Tensor,
    n_steps: int,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    batch_size: int = 100,
    progress: str | None = None,
    skip: int = 0,
) -> torch.Tensor:
    """The finished pictures x_0 (N, C, H, W) in [-1, 1], without keeping the way there.

    Arguments as in `rollout`; at eta = 0 the result is a function of x_T alone.

    Args:
        skip: how many of the first steps to leave out. `x_T` is then a state from the middle of a
            chain of `n_steps`, that of `timesteps(policy, n_steps)[skip]`.
    """
    if not 0 <= skip < n_steps:
        raise ValueError(f"skip={skip}: of {n_steps} steps, 0 to {n_steps - 1} can be left out")
    chain = _chain(policy, x_T, n_steps, eta, generator, batch_size, progress, skip)
    last = deque(chain, maxlen=1).pop()
    return last[2]


@torch.no_grad()
def denoised(policy: Policy, trajectory: Trajectory, batch_size: int = 100) -> torch.Tensor:
    """x~_{t→0} for every state before the last: (T, N, C, H, W), the picture that the policy
    expects at each step (equation 2.25)."""
    steps = zip(trajectory.states[:-1], trajectory.timesteps, trajectory.t_prev, strict=True)
    return torch.stack(
        [
            _step(policy, x_t.to(policy.device), t, prev, trajectory.eta, batch_size)[2]
            for x_t, t, prev in steps
        ]
    )


@torch.no_grad()
def invert(
    policy: Policy,
    x_0: torch.Tensor,
    n_steps: int,
    n_evaluations: int = 1,
    batch_size: int = 100,
    progress: str | None = None,
) -> torch.Tensor:
    """DDIM inversion (section 2.7): the states from which the sampler would come to given pictures.

    A step at eta = 0 is x_{t-1} = c_t x_t + d_t eps_theta(x_t, t), by equation 2.27 with
    c_t = sqrt(alpha_bar_{t-1} / alpha_bar_t). Backwards, x_t stands on both sides:

        x_t = (x_{t-1} - d_t eps_theta(x_t, t)) / c_t .

    It is found by putting a guess into the right-hand side, first x_{t-1} itself. Doing so once is
    the usual inversion, an approximation that improves with the number of steps; each further
    evaluation goes on from the last one's result, towards the exact inverse.

    The clamp of x~ has no inverse and is left out, whatever the policy says; `unclamped` makes the
    sampler that belongs to the result.

    Args:
        x_0: (N, C, H, W) pictures in [-1, 1].
        n_steps: as in `rollout`.
        n_evaluations: of the network, per step.

    Returns:
        (n_steps + 1, N, C, H, W) float32, in the order of `Trajectory.states`: x_T first, x_0 last.
        `sample(policy, states[k], n_steps, skip=k)` goes on from state k.

    Raises:
        ValueError: pictures that the policy does not draw, or no evaluation.
    """
    _check_shape(policy, x_0)
    if n_evaluations < 1:
        raise ValueError(f"n_evaluations={n_evaluations}: each step needs at least 1")
    policy = unclamped(policy)
    steps = timesteps(policy, n_steps)
    alpha_bar = torch.cat([policy.alpha_bar.cpu()[steps], torch.ones(1)])
    c = (alpha_bar[1:] / alpha_bar[:-1]).sqrt()
    backwards = list(zip(_pairs(policy, n_steps), c, strict=True))[::-1]
    states = [x_0]
    for (t, t_prev), c_t in tqdm(backwards, desc=progress, disable=progress is None, leave=False):
        x_prev = x_t = states[-1]
        for _ in range(n_evaluations):
            mean, _, _ = _step(policy, x_t, t, t_prev, 0.0, batch_size)
            x_t = x_t + (x_prev - mean) / c_t
        states.append(x_t)
    return torch.stack(states[::-1])


def unclamped(policy: Policy) -> Policy:
    """The policy without the clamp of x~ to [-1, 1]; the network is the same object."""
    scheduler = DDPMScheduler.from_config(policy.scheduler.config, clip_sample=False)
    return replace(policy, scheduler=scheduler)


@torch.no_grad()
def _chain(
    policy, x_T, n_steps, eta, generator, batch_size, progress, skip=0, share=slice(None)
) -> Iterator:
    """Yield (mean, std, x_prev) of each step, from noise to picture."""
    _check_shape(policy, x_T)
    if eta > 0 and generator is None:
        raise ValueError(f"eta={eta}: a stochastic sampler needs a generator")
    x = x_T[share]
    pairs = _pairs(policy, n_steps)[skip:]
    for t, t_prev in tqdm(pairs, desc=progress, disable=progress is None, leave=False):
        mean, std, _ = _step(policy, x, t, t_prev, eta, batch_size)
        x = mean
        if std[0] > 0:
            z = torch.randn(x_T.shape, generator=generator)[share].to(x.device)
            x = mean + std.view(-1, 1, 1, 1) * z
        yield mean, std, x


def _pairs(policy, n_steps) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """From where to where each step goes, from noise to picture."""
    steps = timesteps(policy, n_steps)
    return list(zip(steps, [*steps[1:], torch.tensor(-1)], strict=True))


def _check_shape(policy, x) -> None:
    if tuple(x.shape[1:]) != policy.image_shape:
        raise ValueError(
            f"a batch of shape {tuple(x.shape)} does not fit a policy that draws pictures of "
            f"shape {policy.image_shape}; make noise with sampler.noise(policy, n, seed)"
        )


def _step(policy, x_t, t, t_prev, eta, batch_size) -> tuple[torch.Tensor, ...]:
    """The transition of a whole batch at one timestep, `batch_size` samples at a time."""
    t, t_prev = (step.expand(len(x_t)).to(x_t.device) for step in (t, t_prev))

    def split(n: int) -> list[Transition]:
        folded = zip(x_t.split(n), t.split(n), t_prev.split(n), strict=True)
        return [transition(policy, *part, eta) for part in folded]

    parts = memory.fit("sampling", split, min(batch_size, len(x_t)))
    return (
        torch.cat([p.mean for p in parts]),
        torch.cat([p.std for p in parts]),
        torch.cat([p.denoised for p in parts]),
    )
