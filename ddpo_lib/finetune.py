"""The loop: rollout → reward → credit → updates → development set → checkpoint."""

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from tqdm.auto import tqdm

from ddpo_lib import (
    adapter,
    checkpoints,
    disk,
    diversity,
    objectives,
    parallel,
    policy,
    rewards,
    runs,
    sampler,
    watch,
)
from ddpo_lib.experience import Experience, learnable_steps, roll_out
from ddpo_lib.identity import fingerprint
from ddpo_lib.policy import Policy
from ddpo_lib.prompts import cycle, turns
from ddpo_lib.settings import Finetune, check_whole, learning_rate
from ddpo_lib.update import update


@dataclass(frozen=True)
class Training:
    """A finetuning on its way."""

    learner: Policy
    optimizer: torch.optim.Optimizer
    reward: rewards.Reward  # as `rewards.checked` gives it
    objective: ModuleType
    own: object  # the objective's settings
    helpers: torch.nn.Module | None
    settings: Finetune
    seed: int
    embed: Callable[[np.ndarray], np.ndarray] | None = None


def finetune(
    policy: Policy,
    reward: Callable,
    objective: str | ModuleType,
    settings: Finetune,
    home: str | Path,
    *,
    seed: int = 0,
    objective_settings: object = None,
    embed: Callable[[np.ndarray], np.ndarray] | None = None,
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
        home: the run's folder, see `runs`; returned. Its best/ is the policy that
            `settings.select_by` keeps, for `policy.load` or plain diffusers.
        seed: of noise and mini-batches, at least 0.
        objective_settings: the objective's `Settings`; its defaults if None.
        embed: pictures (n, H, W, C) uint8 to embeddings (n, D) of length 1, such as
            `diversity.embed` with a CLIP: the metrics then have Vendi scores, see `watch`.
        on_iteration: called after each iteration, when its checkpoint is on the disk, with its
            metrics, one flat dict of numbers; `wandb.log` is one. If it answers True, the run stops
            there; the same call again goes on with it.

    Raises:
        ValueError: settings, reward or folder do not fit; before anything is written.
        FloatingPointError: images, rewards, gradients or weights are not finite; the last
            checkpoint stays.
    """
    home = Path(home).absolute()
    training = prepare(policy, reward, objective, settings, seed, objective_settings, embed)
    identity = _identity(policy, reward, training)
    with contextlib.ExitStack() as stack:
        refusal = None
        if parallel.is_main():
            try:
                # Others would wait too, and time out, while the main process waits for the folder.
                patience = math.inf if parallel.n_processes() == 1 else 1
                stack.enter_context(disk.locked(home, patience))
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
    """One iteration, from 1: sample trajectories, score them, update the policy in place. Returns
    the rewards (n_samples,) of the samples, and what `update.update` returns of each step."""
    learner, settings, objective = training.learner, training.settings, training.objective
    sample_seed, order_seed, _ = _seeds(training.seed, iteration)
    share = parallel.share(settings.n_samples)
    seeds = sampler.seeds(sample_seed, settings.n_samples)[share]
    generator = torch.Generator().manual_seed(order_seed)
    chosen = prompts_of(settings, training.seed, iteration)
    prompts = None if chosen is None else [settings.prompts[i] for i in chosen[share]]
    context = policy.encode(learner, prompts)
    asked = (learner, training.own, settings, training.helpers)
    if hasattr(objective, "rollout"):
        trajectory = objective.rollout(*asked, seeds, context, iteration, generator)
    else:
        trajectory = roll_out(learner, settings, seeds, context)

    def judge(x_0):
        return parallel.gather(training.reward(policy.decode(learner, x_0), prompts)).cpu()

    scores = judge(trajectory.x_0.to(learner.device))
    steps = learnable_steps(trajectory.stds, settings.min_std)
    experience = Experience(trajectory, scores, steps, chosen)
    if getattr(objective, "SCORES_DENOISED", False):
        expected = sampler.denoised(learner, trajectory, settings.micro_batch)
        experience = dataclasses.replace(experience, denoised=torch.stack([*map(judge, expected)]))
    credit = objective.credit(experience, *asked[1:])
    if not credit.any():
        tqdm.write(f"iteration {iteration}: every credit is 0, nothing can be learned from it")
    batches = []
    for _ in range(settings.n_inner_epochs):
        batches += objective.units(experience, training.own, settings, generator)
    experience = dataclasses.replace(experience, rewards=scores[share], groups=None, denoised=None)
    credit = credit[..., share]

    def loss(rows):
        return objective.loss(learner, experience, rows, credit, training.own, training.helpers)

    limits = {"micro_batch": settings.micro_batch, "max_grad_norm": settings.max_grad_norm}
    n_updates, updates = settings.n_iterations * len(batches), []
    for rows in tqdm(batches, desc="update", leave=False, disable=not parallel.is_main()):
        n = (iteration - 1) * len(batches) + len(updates)
        step = {"n_units": len(rows), "rate": learning_rate(n / max(1, n_updates - 1), settings)}
        mine = parallel.local(rows, share)
        try:
            done = update(learner.unet, training.optimizer, mine, loss, **step, **limits)
        except FloatingPointError as error:
            raise FloatingPointError(f"update {n}: {error}") from error
        updates.append({"update": n, **done})
    if hasattr(objective, "tend"):
        objective.tend(training.own, training.helpers, training.optimizer, iteration)
    return scores, updates


def prompts_of(settings: Finetune, seed: int, iteration: int) -> torch.Tensor | None:
    """Which of settings.prompts each sample of an iteration has, see `turns`; None without any."""
    if not settings.prompts:
        return None
    n, size = len(settings.prompts), settings.samples_per_prompt
    return turns(n, size, settings.n_samples, _seeds(seed, iteration)[2])


def development_seeds(seed: int, n: int) -> list[int]:
    """The seeds of the development set (A.1) of a run with this seed, for `sampler.noise`."""
    return sampler.seeds(_seeds(seed, 0)[0], n)


def prepare(base, reward, objective, settings, seed, own=None, embed=None) -> Training:
    """A finetuning at its beginning; arguments as in `finetune`. Everything that can be refused is
    looked at here, before anything is written or long."""
    check_whole("seed", seed, 0)
    objective = objectives.load(objective)
    own = objective.Settings() if own is None else own
    expected = {"policy": (base, Policy), "settings": (settings, Finetune)}
    expected |= {"objective_settings": (own, objective.Settings)}
    for argument, (value, kind) in expected.items():
        if not isinstance(value, kind):
            raise ValueError(f"{argument}={value!r}: must be a {kind.__module__}.{kind.__name__}")
    if base.text is None and rewards.needs_prompts(reward):
        title = f"the reward {rewards.name(reward)!r}"
        raise ValueError(f"{title} reads prompts: this policy needs a function of images alone")
    policy.encode(base, (*settings.prompts, *settings.unseen_prompts) or None)
    if settings.adapter_rank and base.text is None:
        raise ValueError(f"adapter_rank={settings.adapter_rank}: the policy takes no text, take 0")
    t, t_prev = policy.steps(base, settings.n_steps)
    learnable_steps(policy.sigma(base, t, t_prev, settings.eta), settings.min_std)
    # The layout that `policy.load` gives, so that a run rounds alike before and after a stop.
    unet = copy.deepcopy(base.unet).to(memory_format=torch.channels_last)
    if settings.adapter_rank:
        adapter.add(unet, settings.adapter_rank, settings.adapter_alpha, seed)
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    bf16 = settings.bf16 and policy.has_bf16(base.device)
    learner = dataclasses.replace(base, unet=unet, bf16=bf16)
    helpers = objective.helpers(learner, own, settings)
    learned = [{"params": [p for p in unet.parameters() if p.requires_grad], "factor": 1.0}]
    if own_weights := [p for p in helpers.parameters() if p.requires_grad] if helpers else []:
        learned += [{"params": own_weights, "factor": getattr(own, "helper_rate", 1.0)}]
    optimizer = torch.optim.AdamW(learned, weight_decay=settings.weight_decay)
    judge = rewards.checked(reward)
    return Training(learner, optimizer, judge, objective, own, helpers, settings, seed, embed)


def _identity(base, reward, training) -> dict:
    """What decides the result, and nothing more."""
    functions = [getattr(training.objective, name, None) for name in objectives.PARTS]
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
        checkpoints.restore_learner(home, training.learner)
        checkpoints.restore(home, training.optimizer, training.helpers)
    if main:
        runs.drop_after(home, done if resumed else -1)
    if not resumed:
        try:
            _keep(training, home, {"iteration": 0}, {})
        except Exception:
            if main:
                runs.forget(home)
            raise
    todo = range(done + 1, settings.n_iterations + 1)
    whole = {"initial": done, "total": settings.n_iterations, "unit": "iteration"}
    bar = tqdm(todo, desc=home.name, disable=not main, **whole)
    for iteration in bar:
        start = time.perf_counter()
        try:
            scores, updates = iterate(training, iteration)
            scored = {"reward_mean": scores.mean().item(), "reward_sd": scores.std().item()}
            names = [name for name in updates[0] if name != "update"]
            means = {name: float(np.mean([each[name] for each in updates])) for name in names}
            row = {"iteration": iteration, **scored, **means}
            chosen = prompts_of(settings, training.seed, iteration)
            lists = {"rewards": scores.tolist(), "updates": updates}
            lists |= {} if chosen is None else {"prompts": chosen.tolist()}
            row = _keep(training, home, row, lists, start)
        except FloatingPointError as error:
            kept = f"{home} keeps the checkpoint of iteration {iteration - 1}"
            raise FloatingPointError(f"iteration {iteration}: {error}; {kept}") from error
        except KeyboardInterrupt:
            tqdm.write(f"Stopped. {home} keeps what was done; the next start goes on with it.")
            raise
        bar.set_postfix({k: f"{row[k]:.3f}" for k in ("reward_mean", "development_reward")})
        for warning in watch.warnings(runs.metrics(home)) if main else ():
            tqdm.write(f"iteration {iteration}: {warning}")
        said = on_iteration(row) if on_iteration is not None and main else None
        if parallel.everywhere(isinstance(said, bool | np.bool_) and bool(said)):
            break


def _keep(training: Training, home: Path, row: dict, lists: dict, start=None) -> dict:
    """Draw the development set and write all of an iteration; the checkpoint comes last, so that
    what a crash leaves of an iteration is made again. Returns the row with the set's metrics."""
    learner, settings, iteration = training.learner, training.settings, row["iteration"]
    sets, row = _develop(training), dict(row)
    for name, (pictures, values) in sets.items():
        row[f"{name}_reward"], row[f"{name}_sd"] = float(values.mean()), float(values.std(ddof=1))
        row[f"{name}_spread"] = diversity.spread(pictures)
        if training.embed is not None and parallel.is_main():
            row[f"{name}_vendi"] = diversity.vendi_score(training.embed(pictures))
    if start is not None:
        row["seconds"] = round(time.perf_counter() - start, 2)
    if not parallel.is_main():
        return row
    checkpoints.check_finite(learner, training.helpers)
    runs.save_development(home, iteration, sets)
    runs.append_metrics(home, row | lists)
    reward = row.get(f"{settings.select_by}_reward", row["development_reward"])
    kept = runs.best(home) if iteration > 0 and settings.select_by != "latest" else None
    # One of this iteration is a crash's, which is made again.
    if not kept or kept["iteration"] == iteration or reward > kept["reward"]:
        checkpoints.save_best(home, learner, iteration, reward)
    if iteration > 0:
        checkpoints.save_last(home, learner, training.optimizer, training.helpers, iteration)
    return row


def _develop(training: Training) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The development set of all processes at eta = 0 and as in training, in one batch: pictures
    uint8 (n, H, W, C), rewards (n,)."""
    learner, settings, sets = training.learner, training.settings, {}
    n, progress = settings.n_development, "development set" if parallel.is_main() else None
    seeds = development_seeds(training.seed, n)[parallel.share(n)] * 2
    prompts = settings.prompts and cycle(settings.prompts, n)[parallel.share(n)]
    options = {"context": policy.encode(learner, prompts * 2 or None), "progress": progress}
    options |= {"seeds": seeds, "batch_size": settings.micro_batch}
    eta = torch.tensor([0.0, settings.eta]).repeat_interleave(len(seeds) // 2)
    x_0 = sampler.sample(learner, sampler.noise(learner, seeds), settings.n_steps, eta, **options)
    for name, half in zip(("development", "stochastic"), x_0.chunk(2), strict=True):
        images = policy.decode(learner, half)
        values = parallel.gather(training.reward(images, prompts or None)).cpu().numpy()
        sets[name] = parallel.gather(rewards.to_uint8(images)).numpy(), values
    return sets


def _seeds(seed: int, iteration: int) -> list[int]:
    """Of an iteration's samples, mini-batches and prompts; iteration 0 is the development set's."""
    return np.random.SeedSequence([seed, iteration]).generate_state(3).tolist()
