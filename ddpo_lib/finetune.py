"""The loop: rollout → reward → advantages → updates → development set → checkpoint."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ddpo_lib import paths, policy, ppo, rewards, runs, sampler
from ddpo_lib.config import Run

ROW_FILES = ("metrics.csv", "iterations.csv", "rewards.csv")


def finetune(run: Run) -> Path:
    """Finetune a policy with DDPO, or go on with, or return, a run that is there already.

    Every random number of iteration i comes from (seed, i) alone, so a run that was stopped after
    any iteration and started again ends with the same weights, bit for bit, as one that never was.

    Returns:
        The run's folder; what it holds is described in `runs`. best/ is the policy with the highest
        development reward.
    """
    with runs.hold(run):
        return _finetune(run)


def _finetune(run: Run) -> Path:
    home = runs.open_folder(run)
    settings = run.settings
    resumed = (home / "last").exists()
    if resumed:
        learner = runs.load_learner(home, settings.bf16)
    else:
        learner = policy.load(paths.resolve(run.source), bf16=settings.bf16)
    optimizer = torch.optim.AdamW(
        learner.unet.parameters(),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    state = {"iterations_done": 0, "best_iteration": 0, "best_reward": None}
    if resumed:
        state = runs.load_checkpoint(home, optimizer)
    if state["iterations_done"] == settings.n_iterations:
        return home
    reward = rewards.load(run.reward, run.models, jpeg_encoding=settings.jpeg_encoding)
    for name in ROW_FILES:
        runs.drop_rows(home / name, state["iterations_done"])
    fixed_noise = development_noise(learner, run)
    if not resumed:
        before = _develop(home, learner, reward, fixed_noise, settings, 0)
        state["best_reward"] = before.mean().item()
        runs.save_best(home, learner)

    bar = tqdm(
        range(state["iterations_done"], settings.n_iterations),
        desc=run.name,
        initial=state["iterations_done"],
        total=settings.n_iterations,
        unit="iteration",
    )
    for iteration in bar:
        start = time.perf_counter()
        scores, metrics = iterate(learner, optimizer, reward, run, iteration)
        development = _develop(home, learner, reward, fixed_noise, settings, iteration + 1)
        row = {
            "iteration": iteration,
            "reward_mean": scores.mean().item(),
            "reward_sd": scores.std().item(),
            "development_reward": development.mean().item(),
            "development_sd": development.std().item(),
            "seconds": round(time.perf_counter() - start, 2),
        }
        runs.append_rows(home / "iterations.csv", [row])
        runs.append_rows(home / "metrics.csv", metrics)
        runs.append_rows(
            home / "rewards.csv",
            [
                {"iteration": iteration, "sample": i, "reward": score}
                for i, score in enumerate(scores.tolist())
            ],
        )
        if row["development_reward"] > state["best_reward"]:
            state |= {
                "best_iteration": iteration + 1,
                "best_reward": row["development_reward"],
            }
            runs.save_best(home, learner)
        state["iterations_done"] = iteration + 1
        runs.save_checkpoint(home, learner, optimizer, state)
        bar.set_postfix(
            reward=f"{row['reward_mean']:.3f}", development=f"{row['development_reward']:.3f}"
        )
    return home


def iterate(
    learner: policy.Policy,
    optimizer: torch.optim.Optimizer,
    reward: rewards.Reward,
    run: Run,
    iteration: int,
) -> tuple[torch.Tensor, list[dict]]:
    """One iteration: sample trajectories, score them, update the policy in place.

    Returns:
        The rewards (n_samples,) of the sampled pictures, and one row of metrics per update.
    """
    settings = run.settings
    noise_seed, step_seed, order_seed = _seeds(run.seed, iteration)
    trajectory = sampler.rollout(
        learner,
        sampler.noise(learner, settings.n_samples, noise_seed),
        settings.n_steps,
        torch.Generator().manual_seed(step_seed),
        settings.eta,
        settings.log_prob_reduction,
        progress="rollout",
    )
    scores = reward(trajectory.x_0)
    generator = torch.Generator().manual_seed(order_seed)
    updates_per_epoch = settings.n_samples // settings.minibatch_size
    metrics = []
    for epoch in range(settings.n_inner_epochs):
        order = torch.randperm(settings.n_samples, generator=generator)
        groups = None
        if settings.advantage_scope == "minibatch":
            groups = torch.empty(settings.n_samples, dtype=torch.long)
            groups[order] = torch.arange(settings.n_samples) // settings.minibatch_size
        advantages = ppo.advantages(scores, settings.advantage_clip, groups)
        minibatches = tqdm(order.split(settings.minibatch_size), desc="update", leave=False)
        for j, samples in enumerate(minibatches):
            n = (iteration * settings.n_inner_epochs + epoch) * updates_per_epoch + j
            done = ppo.update(
                learner,
                optimizer,
                ppo.select(trajectory, samples),
                advantages[samples],
                settings,
                ppo.learning_rate(n, settings),
            )
            metrics.append({"iteration": iteration, "update": n, **dataclasses.asdict(done)})
    return scores, metrics


def development_noise(learner: policy.Policy, run: Run) -> torch.Tensor:
    """The noise (n_development, C, H, W) of the run's development set (A.1)."""
    return sampler.noise(learner, run.settings.n_development, _seeds(run.seed, -1)[0])


def _develop(home, learner, reward, noise, settings, iteration) -> torch.Tensor:
    """Regenerate and score the development set; its pictures and rewards go to development/."""
    x_0 = sampler.sample(learner, noise, settings.n_steps, progress="development set")
    pictures = rewards.to_uint8(x_0)
    scores = reward(x_0)
    np.savez_compressed(
        home / "development" / f"{iteration:03d}.npz",
        pictures=pictures.numpy(),
        rewards=scores.cpu().numpy(),
    )
    return scores


def _seeds(seed: int, iteration: int) -> list[int]:
    """Three independent seeds for an iteration; iteration -1 is the development set's."""
    return np.random.SeedSequence([seed, iteration + 1]).generate_state(3).tolist()
