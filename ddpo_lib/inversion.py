"""DDIM inversion: the noise from which the deterministic sampler comes to a given image."""

from dataclasses import replace

import torch
from tqdm.auto import tqdm

from ddpo_lib import sampler
from ddpo_lib.policy import Policy, configuration, steps
from ddpo_lib.settings import check_whole


@torch.no_grad()
def invert(policy, x_0, n_steps, n_evaluations=1, batch_size=25, progress=None) -> torch.Tensor:
    """DDIM inversion (section 2.7): the states from which the sampler would come to given images.

    A step at eta = 0 is x_{t-1} = c_t x_t + d_t eps_theta(x_t, t), by equation 2.27 with
    c_t = sqrt(alpha_bar_{t-1} / alpha_bar_t). Backwards, x_t stands on both sides:

        x_t = (x_{t-1} - d_t eps_theta(x_t, t)) / c_t .

    It is found by putting a guess into the right-hand side, first x_{t-1} itself. Doing so once is
    the usual inversion, an approximation that improves with the number of steps; each further
    one of `n_evaluations` goes on from the last one's result, towards the exact inverse. The clamp
    of x~ has no inverse and is left out; `unclamped` makes the sampler that belongs to the result.

    Args:
        x_0: (N, C, H, W) images in [-1, 1].
        n_steps, batch_size, progress: as in `sampler.rollout`.

    Returns the states (n_steps + 1, N, C, H, W), float32, in the order of `Trajectory.states`: x_T
    first, x_0 last. `sampler.sample(policy, states[k], n_steps, skip=k)` goes on from state k.
    """
    sampler.check_shape(policy, x_0)
    check_whole("n_evaluations", n_evaluations, 1)
    policy = unclamped(policy)
    t, t_prev = steps(policy, n_steps)
    c = (policy.alpha_bar_at(t_prev) / policy.alpha_bar_at(t)).sqrt().flatten()
    backwards = list(zip(t, t_prev, c, strict=True))[::-1]
    states = [x_0]
    for now, to, c_t in tqdm(backwards, desc=progress, disable=progress is None, leave=False):
        x_prev = x_t = states[-1]
        for _ in range(n_evaluations):
            mean = sampler.step(policy, x_t, now, to, eta=0.0, batch_size=batch_size).mean
            x_t = x_t + (x_prev - mean) / c_t
        states.append(x_t)
    return torch.stack(states[::-1])


def unclamped(policy: Policy) -> Policy:
    """The policy without the clamp of x~ to [-1, 1]; the network is the same object."""
    scheduler = policy.scheduler.from_config(configuration(policy.scheduler), clip_sample=False)
    return replace(policy, scheduler=scheduler)
