"""Measure what the differences between text, published code and mathematics do in the toy world.

    python benchmarks/fidelity.py [--profile toy]

Prints the numbers of docs/fidelity.md as one JSON object. One rollout of the toy faces with the
settings of their compressibility task and one pass of updates over it; about a minute on one core.
"""

import argparse
import copy
import json
import math
from dataclasses import replace

import torch
from torch.nn.functional import cosine_similarity

from ddpo_lib import policy, rewards, sampler
from ddpo_lib.book import paths, profiles
from ddpo_lib.experience import Experience, learnable_steps, pairs, rescore
from ddpo_lib.log_probs import log_prob
from ddpo_lib.objectives import ddpo
from ddpo_lib.settings import Finetune
from ddpo_lib.update import update

SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="toy")
    run = profiles.load(parser.parse_args().profile).run("faces", "compressibility")
    settings, own = run.settings, run.objective_settings
    pretrained = policy.load(paths.resolve(run.source))
    seeds = sampler.seeds(SEED, settings.n_samples)
    trajectory = sampler.rollout(
        pretrained,
        sampler.noise(pretrained, seeds),
        settings.n_steps,
        seeds,
        settings.eta,
        settings.log_prob_reduction,
        progress="rollout",
    )
    reward = rewards.jpeg_compressibility(trajectory.x_0)
    advantage = ddpo.advantages(reward, own.advantage_clip)
    result = {
        "jpeg": jpeg(trajectory.x_0),
        "advantages": advantage_scopes(reward, settings, own),
        "gradient": gradients(pretrained, trajectory, advantage, own),
        "updated": after_one_iteration(pretrained, run, trajectory, advantage),
    }
    print(json.dumps(result, indent=1))


def jpeg(pictures: torch.Tensor) -> dict:
    """File sizes under both encodings, and how far they agree on which picture is larger."""
    sizes = {name: rewards.jpeg_kilobytes(pictures, name) for name in ("rescaled", "published")}
    ranks = torch.stack([size.argsort().argsort().float() for size in sizes.values()])
    black = (rewards.to_uint8(pictures, "published") == 0).float().mean().item()
    moments = {name: {"mean": s.mean().item(), "sd": s.std().item()} for name, s in sizes.items()}
    return {
        **moments,
        "rank_correlation": torch.corrcoef(ranks)[0, 1].item(),
        "published_share_of_black_values": black,
    }


def advantage_scopes(reward: torch.Tensor, settings: Finetune, own: ddpo.Settings) -> dict:
    """Standardised over the iteration, and within mini-batches of consecutive samples."""
    groups = torch.arange(len(reward)) // settings.minibatch_size
    whole = ddpo.advantages(reward, own.advantage_clip)
    within = ddpo.advantages(reward, own.advantage_clip, groups)
    return {
        "correlation": torch.corrcoef(torch.stack([whole, within]))[0, 1].item(),
        "share_with_other_sign": (whole.sign() != within.sign()).float().mean().item(),
    }


def gradients(pretrained, trajectory, advantage, own) -> dict:
    """Of all steps, without the last stochastic one, and of that alone: norm, and the cosine
    between two halves of the samples, which is near 0 where there is only noise."""
    std, n = trajectory.stds.tolist(), len(advantage)
    stochastic = [k for k, value in enumerate(std) if value > 0]
    parts = {
        "all_steps": stochastic,
        "without_last_stochastic": stochastic[:-1],
        "last_stochastic_alone": stochastic[-1:],
    }
    result = {"last_sigmas": std[-4:]}
    even, odd = torch.arange(0, n, 2), torch.arange(1, n, 2)
    squared_scores = [1 / std[k] ** 2 for k in stochastic]
    result["last_share_of_squared_score"] = squared_scores[-1] / sum(squared_scores)
    for name, steps in parts.items():
        halves = [
            gradient(pretrained, trajectory, advantage, own, steps, samples)
            for samples in (even, odd)
        ]
        result[name] = {
            "norm": ((halves[0] + halves[1]) / 2).norm().item(),
            "cosine_of_halves": cosine_similarity(*halves, dim=0).item(),
        }
    result["norm_if_mean_over_t"] = result["all_steps"]["norm"] / len(stochastic)
    return result


def gradient(pretrained, trajectory, advantage, own, steps, samples) -> torch.Tensor:
    """Of the clipped objective over some steps of some samples, flat."""
    learner = copy.deepcopy(pretrained)
    for k in steps:
        new = rescore(learner, trajectory, torch.full((len(samples),), k), samples)
        terms = ddpo.is_loss(new.log_ratio, advantage[samples], own.clip_range)
        (terms.sum() / len(samples)).backward()
    return torch.cat([p.grad.reshape(-1) for p in learner.unet.parameters()])


def after_one_iteration(pretrained, run, trajectory, advantage) -> dict:
    """Log-ratios after one iteration's updates: per step, summed over pixels, and the last step's
    under a floor of 1e-6 for sigma, where it should be no action at all."""
    settings, own = run.settings, run.objective_settings
    learner = copy.deepcopy(pretrained)
    optimizer = torch.optim.AdamW(learner.unet.parameters(), lr=settings.learning_rate)
    seen = Experience(trajectory, None, learnable_steps(trajectory.stds, settings.min_std))
    for samples in torch.arange(settings.n_samples).split(settings.minibatch_size):
        rows = pairs(seen.steps, samples)
        update(
            learner.unet,
            optimizer,
            rows,
            lambda part: ddpo.loss(learner, seen, part, advantage, own, None),
            n_units=len(rows),
            micro_batch=settings.micro_batch,
            max_grad_norm=settings.max_grad_norm,
            rate=settings.learning_rate,
        )
    everyone = torch.arange(settings.n_samples)
    n_values = math.prod(pretrained.image_shape)

    def log_ratio(k, floor=0.0, bf16=settings.bf16):
        t = trajectory.timesteps[k].expand(len(everyone))
        t_prev = trajectory.t_prev[k].expand(len(everyone))
        with torch.no_grad():
            old, new = (
                policy.transition(model, trajectory.states[k], t, t_prev, trajectory.eta)
                for model in (replace(pretrained, bf16=bf16), replace(learner, bf16=bf16))
            )
        std = old.std.clamp(min=floor)
        x = trajectory.states[k + 1] if old.std[0] > 0 else old.mean
        return log_prob(x, new.mean, std) - log_prob(x, old.mean, std)

    steps = torch.stack([log_ratio(k) for k in range(settings.n_steps - 1)])
    in_float32 = torch.stack([log_ratio(k, bf16=False) for k in range(settings.n_steps - 1)])
    both = torch.stack([steps.flatten(), in_float32.flatten()])
    floored = log_ratio(settings.n_steps - 1, floor=1e-6)

    def clip_fraction(scale, clip_range):
        return ((scale * steps).exp() - 1).abs().gt(clip_range).float().mean().item()

    return {
        "median_abs_log_ratio_mean_over_pixels": steps.abs().median().item(),
        "median_abs_log_ratio_sum_over_pixels": n_values * steps.abs().median().item(),
        "correlation_with_float32": torch.corrcoef(both)[0, 1].item(),
        "median_abs_log_ratio_of_last_step_floored": floored.abs().median().item(),
        "clip_fraction_mean_1e-4": clip_fraction(1, 1e-4),
        "clip_fraction_mean_1e-2": clip_fraction(1, 1e-2),
        "clip_fraction_sum_0.2": clip_fraction(n_values, 0.2),
    }


if __name__ == "__main__":
    main()
