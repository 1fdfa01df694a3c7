"""The loop: rollout → reward → credit → updates → development set → checkpoint."""

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from tqdm.auto import tqdm

from ddpo_lib import checkpoints, objectives, parallel, policy, rewards, runs, sampler
from ddpo_lib.experience import Experience, learnable_steps
from ddpo_lib.identity import fingerprint
from ddpo_lib.policy import Policy
from ddpo_lib.settings import Finetune, learning_rate
from ddpo_lib.update import update


@dataclass(frozen=True)
class Training:
    """A finetuning on its way."""

    learner: Policy
    optimizer: torch.optim.Optimizer
    reward: rewards.Reward
    """As `rewards.checked` gives it."""
    objective: ModuleType
    own: object
    """The objective's settings."""
    helpers: torch.nn.Module | None
    settings: Finetune
    seed: int


def finetune(
    policy: Policy,
    reward: Callable,
    objective: str | ModuleType,
    settings: Finetune,
    home: str | Path,
    *,
    seed: int = 0,
    objective_settings: object = None,
    on_iteration: Callable[[dict], object] | None = None,
) -> Path:
    """Finetune a policy, or go on with, or return, a run that is in its folder already.

    Every random number of iteration i comes from (seed, i) alone, so a run that was stopped after
    any iteration and started again ends with the same weights, bit for bit, as one that never was
    (on a CPU; a GPU may round differently from call to call).

    Args:
        policy: where to start; it stays as it is.
        reward: images (N, C, H, W) in [-1, 1] to N numbers, higher is better; see `rewards`.
        objective: a name, "ddpo", or a module of your own; see `objectives`.
        settings: of the loop.
        home: the run's folder, see `runs`. Its best/ is the policy with the highest development
            reward, for `policy.load` or plain diffusers.
        seed: of noise and mini-batches, at least 0.
        objective_settings: the objective's `Settings`; its defaults if None.
        on_iteration: called after each iteration, when its checkpoint is on the disk, with its
            metrics, one flat dict of numbers; `wandb.log` is one.

    Returns:
        The run's folder.

    Raises:
        ValueError: settings that do not go together, a reward that does not fit, or a folder that
            holds something else; before anything is written.
        FloatingPointError: images or gradients are not finite; names the iteration, and the last
            checkpoint stays.
    """
    home = Path(home).absolute()
    training = _prepare(policy, reward, objective, settings, seed, objective_settings)
    identity = _identity(policy, reward, training)
    with contextlib.ExitStack() as stack:
        refusal = None
        if parallel.is_main():
            try:
                # Others would wait too, and time out, while the main process waits for the folder.
                stack.enter_context(runs.hold(home, wait=parallel.n_processes() == 1))
                runs.open_folder(home, identity, settings)
            except (OSError, ValueError, RuntimeError) as error:
                refusal = error
        if refusal := parallel.everywhere(refusal):
            raise refusal
        if runs.iterations_done(home) < settings.n_iterations:
            _run(training, home, on_iteration)
        parallel.wait()
    return home


def iterate(training: Training, iteration: int) -> tuple[torch.Tensor, list[dict]]:
    """One iteration: sample trajectories, score them, update the policy in place.

    Args:
        iteration: from 1.

    Returns:
        The rewards (n_samples,) of the samples, and what `update.update` returns of each step.
    """
    learner, settings, objective = training.learner, training.settings, training.objective
    sample_seed, order_seed = _seeds(training.seed, iteration)
    share = parallel.share(settings.n_samples)
    seeds = sampler.seeds(sample_seed, settings.n_samples)[share]
    trajectory = sampler.rollout(
        learner,
        sampler.noise(learner, seeds),
        settings.n_steps,
        seeds,
        settings.eta,
        settings.log_prob_reduction,
        batch_size=settings.micro_batch,
        progress="rollout" if parallel.is_main() else None,
        store=sampler.roomy_device(learner, len(seeds), settings.n_steps),
    )
    images = policy.decode(learner, trajectory.x_0.to(learner.device))
    scores = parallel.gather(training.reward(images)).cpu()
    steps = learnable_steps(trajectory.stds, settings.min_std)
    experience = Experience(trajectory, scores, steps)
    credit = objective.credit(experience, training.own, settings, training.helpers)
    if not credit.any():
        tqdm.write(f"iteration {iteration}: every credit is 0, nothing can be learned from it")
    generator = torch.Generator().manual_seed(order_seed)
    batches = [
        rows
        for _ in range(settings.n_inner_epochs)
        for rows in objective.units(experience, training.own, settings, generator)
    ]
    experience = dataclasses.replace(experience, rewards=scores[share])
    credit = credit[..., share]

    def loss(rows):
        return objective.loss(learner, experience, rows, credit, training.own, training.helpers)

    n_updates, updates = settings.n_iterations * len(batches), []
    for rows in tqdm(batches, desc="update", leave=False, disable=not parallel.is_main()):
        n = (iteration - 1) * len(batches) + len(updates)
        done = update(
            learner.unet,
            training.optimizer,
            _local(rows, share),
            loss,
            n_units=len(rows),
            micro_batch=settings.micro_batch,
            max_grad_norm=settings.max_grad_norm,
            rate=learning_rate(n / max(1, n_updates - 1), settings),
        )
        updates.append({"update": n, **done})
    return scores, updates


def development_noise(policy: Policy, seed: int, n: int) -> torch.Tensor:
    """The noise (n, C, H, W) of the development set of a run with this seed (A.1)."""
    return sampler.noise(policy, sampler.seeds(_seeds(seed, 0)[0], n))


def _prepare(base, reward, objective, settings, seed, own) -> Training:
    """Everything that can be refused is looked at here, before anything is written or long."""
    if type(seed) is not int or seed < 0:
        raise ValueError(f"seed={seed!r}: must be a whole number from 0 up")
    objective = objectives.load(objective)
    own = objective.Settings() if own is None else own
    if not isinstance(own, objective.Settings):
        raise ValueError(f"objective_settings={own!r}: must be a {objective.__name__}.Settings")
    if rewards.needs_prompts(reward):
        raise ValueError(
            f"the reward {rewards.name(reward)!r} reads prompts, and this policy draws without: "
            "give a function of the images alone"
        )
    t, t_prev = policy.steps(base, settings.n_steps)
    learnable_steps(policy.sigma(base, t, t_prev, settings.eta), settings.min_std)
    helpers = objective.helpers(base, own, settings)
    # The layout that `policy.load` gives, so that a run rounds alike before and after a stop.
    unet = copy.deepcopy(base.unet).to(memory_format=torch.channels_last)
    bf16 = settings.bf16 and policy.has_bf16(base.device)
    learner = dataclasses.replace(base, unet=unet, bf16=bf16)
    return Training(learner, None, rewards.checked(reward), objective, own, helpers, settings, seed)


def _identity(base, reward, training) -> dict:
    """What decides the result, and nothing more."""
    functions = [getattr(training.objective, name) for name in objectives.FUNCTIONS]
    return {
        "policy": fingerprint(base),
        "reward": {"name": rewards.name(reward), "fingerprint": fingerprint(reward)},
        "objective": {"name": training.objective.__name__, "fingerprint": fingerprint(functions)},
        "objective_settings": dataclasses.asdict(training.own),
        "settings": training.settings.decisive,
        "seed": training.seed,
    }


def _run(training: Training, home: Path, on_iteration) -> None:
    """Go on from last/, or begin."""
    settings, main = training.settings, parallel.is_main()
    done, resumed = runs.iterations_done(home), (home / "last").exists()
    if resumed:
        learner = checkpoints.load_learner(home, training.learner)
        training = dataclasses.replace(training, learner=learner)
    training = _with_optimizer(training)
    if resumed:
        checkpoints.restore(home, training.optimizer, training.helpers)
    if settings.gradient_checkpointing:
        training.learner.unet.enable_gradient_checkpointing()
    if main:
        runs.drop_after(home, done if resumed else -1)
    if not resumed:
        _keep(training, home, {"iteration": 0}, {})
    todo = range(done + 1, settings.n_iterations + 1)
    whole = {"initial": done, "total": settings.n_iterations, "unit": "iteration"}
    bar = tqdm(todo, desc=home.name, disable=not main, **whole)
    for iteration in bar:
        start = time.perf_counter()
        try:
            scores, updates = iterate(training, iteration)
            row = {
                "iteration": iteration,
                "reward_mean": scores.mean().item(),
                "reward_sd": scores.std().item(),
                **{k: float(np.mean([u[k] for u in updates])) for k in updates[0] if k != "update"},
            }
            lists = {"rewards": scores.tolist(), "updates": updates}
            row = _keep(training, home, row, lists, start)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"iteration {iteration}: {error}. The checkpoint of iteration {iteration - 1} is "
                f"whole, in {home}"
            ) from error
        bar.set_postfix({k: f"{row[k]:.3f}" for k in ("reward_mean", "development_reward")})
        if on_iteration is not None and main:
            on_iteration(row)


def _keep(training: Training, home: Path, row: dict, lists: dict, start=None) -> dict:
    """Draw the development set and write all of an iteration; the checkpoint comes last, so that
    what a crash leaves of an iteration is made again. Returns the row with the set's rewards."""
    learner, iteration = training.learner, row["iteration"]
    noise = development_noise(learner, training.seed, training.settings.n_development)
    x_0 = sampler.sample(
        learner,
        noise[parallel.share(len(noise))],
        training.settings.n_steps,
        batch_size=training.settings.micro_batch,
        progress="development set" if parallel.is_main() else None,
    )
    images = policy.decode(learner, x_0)
    pictures = parallel.gather(rewards.to_uint8(images)).numpy()
    values = parallel.gather(training.reward(images)).cpu().numpy()
    reward = float(values.mean())
    row = {**row, "development_reward": reward, "development_sd": float(values.std(ddof=1))}
    if start is not None:
        row["seconds"] = round(time.perf_counter() - start, 2)
    if parallel.is_main():
        runs.save_development(home, iteration, pictures, values)
        runs.append_metrics(home, row | lists)
        kept = runs.best(home) if iteration > 0 else None
        # One of this iteration is a crash's, which is made again.
        if not kept or kept["iteration"] == iteration or reward > kept["development_reward"]:
            checkpoints.save_best(home, learner, iteration, reward)
        if iteration > 0:
            checkpoints.save_last(home, learner, training.optimizer, training.helpers, iteration)
    return row


def _with_optimizer(training: Training) -> Training:
    parameters = list(training.learner.unet.parameters())
    if training.helpers is not None:
        parameters += [p for p in training.helpers.parameters() if p.requires_grad]
    settings = training.settings
    decay = settings.weight_decay
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=decay)
    return dataclasses.replace(training, optimizer=optimizer)


def _local(rows: torch.Tensor, share: slice) -> torch.Tensor:
    """The units (U, D, 2) whose samples this process holds, counted from its first."""
    samples = rows[..., 1]
    mine = ((samples >= share.start) & (samples < share.stop)).all(1)
    return rows[mine] - rows.new_tensor([0, share.start])


def _seeds(seed: int, iteration: int) -> list[int]:
    """Of an iteration's samples, and of its mini-batches; iteration 0 is the development set's."""
    return np.random.SeedSequence([seed, iteration]).generate_state(2).tolist()
