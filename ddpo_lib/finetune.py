"""The loop: rollout → reward → advantages → updates → development set → checkpoint."""

import argparse
import contextlib
import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ddpo_lib import config, evaluation, parallel, paths, policy, ppo, rewards, runs, sampler
from ddpo_lib.config import Run

ROW_FILES = ("metrics.csv", "iterations.csv", "rewards.csv")


def finetune(run: Run) -> Path:
    """Finetune a policy with DDPO, or go on with, or return, a run that is there already.

    Every random number of iteration i comes from (seed, i) alone, so a run that was stopped after
    any iteration and started again ends with the same weights, bit for bit, as one that never was
    (on a CPU; a GPU may round differently from call to call).

    Returns:
        The run's folder; what it holds is described in `runs`. best/ is the policy with the highest
        development reward.
    """
    with runs.hold(run) if parallel.is_main() else contextlib.nullcontext():
        return _finetune(run)


def _finetune(run: Run) -> Path:
    home = runs.folder(run)
    if parallel.is_main():
        runs.open_folder(run)
    parallel.wait()
    settings = run.settings
    resumed = (home / "last").exists()
    if resumed:
        learner = runs.load_learner(home, settings.bf16)
    else:
        learner = policy.load(paths.resolve(run.source), bf16=settings.bf16)
    if settings.gradient_checkpointing:
        learner.unet.enable_gradient_checkpointing()
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
    fixed_noise = development_noise(learner, run)
    if parallel.is_main():
        for name in ROW_FILES:
            runs.drop_rows(home / name, state["iterations_done"])
    if not resumed:
        before = _develop(home, learner, reward, fixed_noise, settings, 0)
        state["best_reward"] = before.mean().item()
        if parallel.is_main():
            runs.save_best(home, learner)

    bar = tqdm(
        range(state["iterations_done"], settings.n_iterations),
        desc=run.name,
        initial=state["iterations_done"],
        total=settings.n_iterations,
        unit="iteration",
        disable=not parallel.is_main(),
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
        better = row["development_reward"] > state["best_reward"]
        if better:
            state |= {"best_iteration": iteration + 1, "best_reward": row["development_reward"]}
        state["iterations_done"] = iteration + 1
        if parallel.is_main():
            _write_rows(home, row, metrics, scores)
            if better:
                runs.save_best(home, learner)
            runs.save_checkpoint(home, learner, optimizer, state)
        bar.set_postfix(
            reward=f"{row['reward_mean']:.3f}", development=f"{row['development_reward']:.3f}"
        )
    parallel.wait()
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
    share = parallel.share(settings.n_samples)
    trajectory = sampler.rollout(
        learner,
        sampler.noise(learner, settings.n_samples, noise_seed),
        settings.n_steps,
        torch.Generator().manual_seed(step_seed),
        settings.eta,
        settings.log_prob_reduction,
        settings.micro_batch,
        progress="rollout" if parallel.is_main() else None,
        share=share,
        store=sampler.roomy_device(learner, share.stop - share.start, settings.n_steps),
    )
    scores = parallel.gather(reward(trajectory.x_0.to(learner.device)))
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
        minibatches = tqdm(
            order.split(settings.minibatch_size),
            desc="update",
            leave=False,
            disable=not parallel.is_main(),
        )
        for j, minibatch in enumerate(minibatches):
            samples = minibatch[(minibatch >= share.start) & (minibatch < share.stop)]
            n = (iteration * settings.n_inner_epochs + epoch) * updates_per_epoch + j
            done = ppo.update(
                learner,
                optimizer,
                ppo.select(trajectory, samples - share.start),
                advantages[samples],
                settings,
                ppo.learning_rate(n, settings),
                generator,
            )
            metrics.append({"iteration": iteration, "update": n, **dataclasses.asdict(done)})
    return scores, metrics


def development_noise(learner: policy.Policy, run: Run) -> torch.Tensor:
    """The noise (n_development, C, H, W) of the run's development set (A.1)."""
    return sampler.noise(learner, run.settings.n_development, _seeds(run.seed, -1)[0])


def _develop(home, learner, reward, noise, settings, iteration) -> torch.Tensor:
    """Regenerate and score the development set; its pictures and rewards go to development/."""
    x_0 = sampler.sample(
        learner,
        noise[parallel.share(len(noise))],
        settings.n_steps,
        progress="development set" if parallel.is_main() else None,
    )
    pictures, scores = parallel.gather(rewards.to_uint8(x_0)), parallel.gather(reward(x_0))
    if parallel.is_main():
        np.savez_compressed(
            home / "development" / f"{iteration:03d}.npz",
            pictures=pictures.numpy(),
            rewards=scores.cpu().numpy(),
        )
    return scores


def _write_rows(home, row, metrics, scores) -> None:
    runs.append_rows(home / "iterations.csv", [row])
    runs.append_rows(home / "metrics.csv", metrics)
    rows = [
        {"iteration": row["iteration"], "sample": i, "reward": score}
        for i, score in enumerate(scores.tolist())
    ]
    runs.append_rows(home / "rewards.csv", rows)


def _seeds(seed: int, iteration: int) -> list[int]:
    """Three independent seeds for an iteration; iteration -1 is the development set's."""
    return np.random.SeedSequence([seed, iteration + 1]).generate_state(3).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="accelerate launch -m ddpo_lib.finetune",
        description="Finetune and evaluate, in as many processes as accelerate launches.",
    )
    parser.add_argument("profile")
    parser.add_argument("policy")
    parser.add_argument("task")
    parser.add_argument("--reward")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        profile = config.load(arguments.profile)
        run = profile.run(arguments.policy, arguments.task, arguments.reward, arguments.seed)
    except ValueError as error:
        sys.exit(f"Nothing was run: {error}")
    finetune(run)
    if parallel.is_main():
        evaluation.finish(profile, run)


if __name__ == "__main__":
    main()
