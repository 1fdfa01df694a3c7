"""Fixed-noise evaluation sets, their scores, and effect sizes with intervals."""

from collections.abc import Callable

import numpy as np
import torch

from ddpo_lib import policy as policies
from ddpo_lib import rewards, sampler
from ddpo_lib.log_probs import kl
from ddpo_lib.prompts import cycle
from ddpo_lib.settings import check_whole


def draw(policy, n, n_steps, seed, eta=0.0, batch_size=25, progress=None, prompts=()) -> np.ndarray:
    """Pictures from fixed noise: uint8 (n, H, W, C); the first of n are the same for every n.

    The seed is that of the initial noise, and above eta = 0 of the steps' noise, for every policy
    alike. The prompts of a text-to-image policy take turns. Other arguments as in
    `sampler.rollout`.
    """
    seeds = sampler.seeds(seed, n)
    x_T, context = sampler.noise(policy, seeds), policies.encode(policy, cycle(prompts, n))
    options = {"context": context, "batch_size": batch_size, "progress": progress}
    x_0 = sampler.sample(policy, x_T, n_steps, eta, seeds, **options)
    return rewards.to_uint8(policies.decode(policy, x_0)).numpy()


def kl_nats(policy, reference, n, n_steps, seed, eta=1.0, batch_size=25, prompts=()) -> float:
    """KL(policy || reference) of a trajectory in nats: exact at every stochastic step, added up and
    averaged over n trajectories of the policy. Other arguments as in `draw`."""
    seeds = sampler.seeds(seed, n)
    x_T, context = sampler.noise(policy, seeds), policies.encode(policy, cycle(prompts, n))
    options = {"context": context, "batch_size": batch_size}
    trajectory = sampler.rollout(policy, x_T, n_steps, seeds, eta, **options)
    steps = zip(trajectory.states, trajectory.timesteps, trajectory.t_prev, strict=False)
    total = torch.zeros(n, dtype=torch.float64, device=policy.device)
    with torch.no_grad():
        for mean, (x, t, t_prev) in zip(trajectory.means, steps, strict=True):
            other = sampler.step(reference, x, t, t_prev, eta, **options)
            total += kl(mean, other.mean, other.std)
    return total.mean().item()


def score(pictures, reward: Callable, batch_size=250, device=None, prompts=()) -> np.ndarray:
    """A reward of uint8 pictures (n, H, W, C): what a viewer's file would score, (n,) float64. The
    reward gets them on `device`, by default a GPU if there is one; prompts as in `draw`."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    judge, told, values = rewards.checked(reward), cycle(prompts, len(pictures)), []
    for i in range(0, len(pictures), batch_size):
        part = slice(i, i + batch_size)
        images = rewards.from_uint8(torch.from_numpy(pictures[part])).to(device)
        values.append(judge(images, told and told[part]).cpu())
    return torch.cat(values).double().numpy()


def standard_error(values: np.ndarray) -> float:
    """Of the mean: sd / √n."""
    return values.std(ddof=1) / np.sqrt(len(values))


def bootstrap(
    statistic: Callable[..., float], *samples: np.ndarray, seed: int, n_bootstrap: int = 1000
) -> tuple[float, float, float]:
    """A statistic and the middle 95 % of its values on resampled pictures: value, low, high.

    Args:
        statistic: takes arrays like `samples` and gives a number.
        samples: finite arrays (n, …), n at least 2, whose rows belong together, for instance scores
            of pictures from the same noise before and after: they are resampled together.
    """
    check_whole("seed", seed, 0)
    check_whole("n_bootstrap", n_bootstrap, 1)
    lengths = [len(sample) for sample in samples]
    if len(set(lengths)) != 1 or lengths[0] < 2:
        raise ValueError(f"samples of {lengths} rows: all need the same number of them, at least 2")
    if bad := [i for i, sample in enumerate(samples) if not np.isfinite(sample).all()]:
        raise ValueError(f"samples {bad} hold values that are not finite")
    picks = np.random.default_rng(seed).integers(lengths[0], size=(n_bootstrap, lengths[0]))
    values = [statistic(*(sample[pick] for sample in samples)) for pick in picks]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(statistic(*samples)), float(low), float(high)


def effect_size(before: np.ndarray, after: np.ndarray, seed: int) -> tuple[float, float, float]:
    """`change` and its 95 % interval; entry i of before and after (n,) is from the same noise."""
    if len(before) and np.ptp(before) == 0:
        said = f"all {len(before)} values before are {before[0]}"
        raise ValueError(f"{said}: there is no standard deviation to measure a change in")
    return bootstrap(change, before, after, seed=seed)


def change(before: np.ndarray, after: np.ndarray) -> float:
    """The effect size: the change of the mean in standard deviations of `before`."""
    return (after.mean() - before.mean()) / before.std(ddof=1)
