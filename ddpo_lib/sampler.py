"""From noise to image: trajectories with log-probabilities, and samples."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from ddpo_lib import memory
from ddpo_lib.log_probs import log_prob
from ddpo_lib.policy import Context, Policy, Transition, steps, transition
from ddpo_lib.settings import check_whole


@dataclass(frozen=True)
class Trajectory:
    """N denoising chains of T steps: what the policy saw, what it did, how likely that was."""

    states: torch.Tensor  # (T+1, N, C, H, W) float32: x_T (noise) first, x_0 (images) last
    means: torch.Tensor  # (T, N, C, H, W) float32: of p_theta(states[k+1] | states[k])
    stds: torch.Tensor  # (T,) float32: sigma_t; 0 where a step was deterministic, no action
    timesteps: torch.Tensor  # (T,) int64, descending: step k starts from states[k] at timesteps[k]
    t_prev: torch.Tensor  # (T,) int64: where each step goes; negative for the clean image
    log_probs: torch.Tensor  # (T, N) float64: log p_theta(states[k+1] | states[k]); 0 where stds is
    eta: float  # DDIM's eta, which scales sigma_t
    reduction: str  # how log_probs reduces over pixels, "mean" or "sum"
    context: Context | None = None

    @property
    def x_0(self) -> torch.Tensor:
        """(N, C, H, W): the finished samples."""
        return self.states[-1]


def seeds(seed: int, n: int) -> list[int]:
    """n seeds, one a sample; entry i depends on `seed` and i alone, not on n."""
    check_whole("seed", seed, 0)
    check_whole("n", n, 0)
    return [int(np.random.SeedSequence([seed, i]).generate_state(1)[0]) for i in range(n)]


def noise(policy: Policy, seeds: Sequence[int]) -> torch.Tensor:
    """x_T ~ N(0, I), (N, C, H, W); sample i is a function of seeds[i], the same on every device."""
    return next(_draws(policy, seeds, stream=0))


def step_noise(policy: Policy, seeds: Sequence[int]) -> Iterator[torch.Tensor]:
    """The noise of the steps of chains with these seeds, one (N, C, H, W) after the other; it has
    nothing to do with `noise` of the same seeds."""
    return _draws(policy, seeds, stream=1)


def rollout(
    policy: Policy,
    x_T: torch.Tensor,
    n_steps: int,
    seeds: Sequence[int],
    eta: float = 1.0,
    reduction: str = "mean",
    context: Context | None = None,
    batch_size: int = 25,
    progress: str | None = None,
    store: torch.device | None = None,
    skip: int = 0,
) -> Trajectory:
    """Sample one trajectory per noise in x_T and keep every state (Algorithm 2 with DDIM's steps).

    Args:
        x_T: (N, C, H, W) noise, see `noise`.
        n_steps: denoising steps, see `policy.steps`.
        seeds: N seeds of the steps' noise. Those whose noise x_T is will do: the streams differ.
        eta: 0 deterministic, 1 the stochastic sampler that policy gradients need.
        reduction: of the log-probabilities, see `log_probs.log_prob`.
        batch_size: samples per call of the network; fewer where a GPU's memory holds no more.
        progress: label of a progress bar; None for no bar.
        store: where states and means are kept, see `roomy_device`; by default where the policy is.
        skip: steps that x_T has come through already; it is then the state after them, at timestep
            `steps(policy, n_steps)[0][skip]`, and the trajectory has n_steps - skip.
    """
    check_shape(policy, x_T)
    t, t_prev = (each[skip:] for each in steps(policy, n_steps))
    states = torch.empty(len(t) + 1, *x_T.shape, device=store or policy.device)
    means = torch.empty(len(t), *x_T.shape, device=states.device)
    states[0], stds, log_probs = x_T, [], []
    chain = _chain(policy, x_T, n_steps, eta, seeds, context, batch_size, progress, skip)
    for k, (mean, std, x_prev) in enumerate(chain):
        states[k + 1], means[k] = x_prev, mean
        stds.append(std[0].cpu())
        log_probs.append(log_prob(x_prev, mean, std, reduction))
    stds, log_probs = torch.stack(stds), torch.stack(log_probs)
    return Trajectory(states, means, stds, t, t_prev, log_probs, eta, reduction, context)


def roomy_device(policy: Policy, n: int, n_steps: int) -> torch.device:
    """Where n trajectories fit: the policy's device, unless they would take more than a quarter of
    what is free on a GPU; then the CPU, from where mini-batches are fetched."""
    if policy.device.type != "cuda":
        return policy.device
    free, _ = torch.cuda.mem_get_info(policy.device)
    cached = torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
    needed = 4 * (2 * n_steps + 1) * n * math.prod(policy.image_shape)
    return policy.device if needed < (free + cached) / 4 else torch.device("cpu")


def sample(
    policy, x_T, n_steps, eta=0.0, seeds=None, context=None, batch_size=25, progress=None, skip=0
) -> torch.Tensor:
    """The finished samples x_0 (N, C, H, W) in [-1, 1], without keeping the way there.

    Arguments as in `rollout`, but eta may be a tensor (N,); at eta = 0 the result is a function of
    x_T alone.
    """
    chain = _chain(policy, x_T, n_steps, eta, seeds, context, batch_size, progress, skip)
    return deque(chain, maxlen=1).pop()[2]


@torch.no_grad()
def denoised(policy: Policy, trajectory: Trajectory, batch_size: int = 25) -> torch.Tensor:
    """x~_{t→0} for every state before the last: (T, N, C, H, W), the image that the policy expects
    at each step (equation 2.25)."""
    rest = trajectory.eta, trajectory.context, batch_size
    decisions = zip(trajectory.states[:-1], trajectory.timesteps, trajectory.t_prev, strict=True)
    done = (step(policy, x_t.to(policy.device), t, to, *rest) for x_t, t, to in decisions)
    return torch.stack([each.denoised for each in done])


def step(policy, x_t, t, t_prev, eta, context=None, batch_size=25) -> Transition:
    """The transition of a whole batch at one timestep (0-d t, t_prev), `batch_size` at a time."""
    check_whole("batch_size", batch_size, 1)
    t, t_prev = (each.expand(len(x_t)).to(x_t.device) for each in (t, t_prev))
    etas = torch.as_tensor(eta, dtype=torch.float64).expand(len(x_t))

    def split(n: int) -> list[Transition]:
        parts = [slice(start, start + n) for start in range(0, len(x_t), n)]
        given = ((x_t[p], t[p], t_prev[p], etas[p], context and context.select(p)) for p in parts)
        return [transition(policy, *each) for each in given]

    done = memory.fit(policy.unet, "sampling", split, min(batch_size, len(x_t)))
    return Transition(*map(torch.cat, zip(*(vars(part).values() for part in done), strict=True)))


def check_shape(policy: Policy, x: torch.Tensor) -> None:
    """Raise ValueError unless x is a float32 batch of at least one state of the policy."""
    fits = isinstance(x, torch.Tensor) and x.dtype == torch.float32
    if not fits or tuple(x.shape[1:]) != policy.image_shape or len(x) == 0:
        found = f"{x.dtype} of shape {tuple(x.shape)} does not fit"
        needed = f"a policy of shape {policy.image_shape}: a float32 tensor, as of sampler.noise"
        raise ValueError(f"a batch of {found} {needed}")


@torch.no_grad()
def _chain(policy, x_T, n_steps, eta, seeds, context, batch_size, progress, skip=0) -> Iterator:
    """Yield (mean, std, x_prev) of each step, from noise to image."""
    check_shape(policy, x_T)
    stochastic = bool((torch.as_tensor(eta) > 0).any())
    if stochastic and (seeds is None or len(seeds) != len(x_T)):
        raise ValueError(f"eta={eta}: a stochastic sampler needs a seed for each of {len(x_T)}")
    pairs = list(zip(*steps(policy, n_steps), strict=True))
    if not 0 <= skip < n_steps:
        raise ValueError(f"skip={skip}: of {n_steps} steps, 0 to {n_steps - 1} can be left out")
    memory.start_over(policy.unet)
    draws, x = step_noise(policy, seeds), x_T
    for _ in range(skip if stochastic else 0):  # x_T has seen the noise of the steps left out
        next(draws)
    for t, t_prev in tqdm(pairs[skip:], desc=progress, disable=progress is None, leave=False):
        done = step(policy, x, t, t_prev, eta, context, batch_size)
        x = done.mean
        if done.std.max() > 0:
            x = x + done.std.view(-1, 1, 1, 1) * next(draws)
        yield done.mean, done.std, x


def _draws(policy: Policy, seeds: Sequence[int], stream: int) -> Iterator[torch.Tensor]:
    """Noise (N, C, H, W) without end, made on the CPU; the streams of one seed are independent."""
    check_whole("number of seeds", len(seeds), 1)
    device, shape = policy.device, policy.image_shape  # asked once: for it every layer is looked at
    mixed = [np.random.SeedSequence([seed, stream]).generate_state(1)[0] for seed in seeds]
    generators = [torch.Generator().manual_seed(int(seed)) for seed in mixed]
    while True:
        yield torch.stack([torch.randn(shape, generator=each) for each in generators]).to(device)
