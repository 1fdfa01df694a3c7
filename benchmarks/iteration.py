"""Time one DDPO iteration of this library against a straightforward loop, side by side.

    python benchmarks/iteration.py [--repeats 3] [--threads 2] [--small]

Both take the same policy, sample 100 trajectories of 20 steps, score them by JPEG size and make 10
optimizer steps of 10 trajectories each. The straightforward loop is what one writes first, and what
public code does: float32, contiguous format, diffusers' scheduler, one forward and one backward per
timestep, batches of 10. The two take turns, and medians are compared. `cosine` is between the two
loops' gradients at the same weights on the same trajectories, both in float32.

Prints one JSON object; progress goes to stderr.
"""

import argparse
import copy
import json
import statistics
import sys
import time

import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ddpo_lib import finetune, policy, rewards, sampler
from ddpo_lib.book import paths
from ddpo_lib.experience import Experience, learnable_steps
from ddpo_lib.objectives import ddpo
from ddpo_lib.settings import Finetune
from ddpo_lib.toy.policies import new_unet
from ddpo_lib.update import update

BATCH = 10
REWARD, OWN = rewards.jpeg_compressibility, ddpo.Settings()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="turns of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a fiftieth of the work")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = {"n_samples": 10, "n_steps": 4} if arguments.small else {"n_samples": 100, "n_steps": 20}
    settings = Finetune(**size, n_iterations=1, minibatch_size=BATCH, learning_rate=3e-5)
    pretrained, name = load_policy()

    loops = {"straightforward": straightforward_iteration, "ours": our_iteration}
    seconds = {loop: [] for loop in loops}
    for turn in range(arguments.repeats):
        for loop, iteration in loops.items():
            learner = copy.deepcopy(pretrained)
            start = time.perf_counter()
            iteration(learner, settings)
            seconds[loop].append(time.perf_counter() - start)
            print(f"turn {turn}: {loop} {seconds[loop][-1]:.2f} s", file=sys.stderr)
    medians = {loop: statistics.median(times) for loop, times in seconds.items()}
    result = {
        "straightforward_s": round(medians["straightforward"], 3),
        "ours_s": round(medians["ours"], 3),
        "speedup": round(medians["straightforward"] / medians["ours"], 3),
        "cosine": cosine(pretrained, settings),
        "device": str(pretrained.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "policy": name,
        "repeats": arguments.repeats,
        **size,
    }
    print(json.dumps(result))


def load_policy() -> tuple[policy.Policy, str]:
    """The toy faces, or their architecture with random weights if they are not there."""
    folder = paths.TOY / "faces"
    if folder.is_dir():
        return policy.load(folder), "toy/faces"
    torch.manual_seed(0)
    return policy.Policy(new_unet().eval(), DDPMScheduler(1000)), "random weights"


def new_optimizer(unet, settings: Finetune) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        unet.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )


def our_iteration(learner: policy.Policy, settings: Finetune) -> None:
    training = finetune.Training(
        learner, new_optimizer(learner.unet, settings), rewards.checked(REWARD), ddpo, OWN, None,
        settings, seed=0,
    )  # fmt: skip
    finetune.iterate(training, iteration=1)


# ------------------------------------------------------------------ the straightforward loop


def straightforward_iteration(learner: policy.Policy, settings: Finetune) -> None:
    unet = learner.unet.to(memory_format=torch.contiguous_format)
    scheduler = ddim(learner, settings)
    optimizer = new_optimizer(unet, settings)
    generator = torch.Generator().manual_seed(0)
    batches = [sample_batch(unet, scheduler, generator) for _ in range(settings.n_samples // BATCH)]
    scores = [REWARD(states[-1]) for states, _ in batches]
    everything = torch.cat(scores)
    for (states, log_probs), score in zip(batches, scores, strict=True):
        advantage = (score - everything.mean()) / (everything.std() + 1e-8)
        advantage = advantage.clamp(-OWN.advantage_clip, OWN.advantage_clip)
        accumulate_gradient(unet, scheduler, states, log_probs, advantage, settings, optimizer)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), settings.max_grad_norm)
        optimizer.step()


def ddim(learner: policy.Policy, settings: Finetune) -> DDIMScheduler:
    scheduler = DDIMScheduler.from_config(learner.scheduler.config)
    scheduler.set_timesteps(settings.n_steps)
    return scheduler


@torch.no_grad()
def sample_batch(unet, scheduler, generator):
    """BATCH trajectories: their states and their log-probabilities, one entry a timestep."""
    size = unet.config.sample_size
    states = [torch.randn(BATCH, 3, size, size, generator=generator).to(unet.device)]
    log_probs = []
    for t in scheduler.timesteps:
        eps = unet(states[-1], t).sample
        mean, std = mean_and_std(scheduler, eps, t, states[-1])
        states.append(mean + std * torch.randn(mean.shape, generator=generator).to(unet.device))
        log_probs.append(gaussian_log_prob(states[-1], mean, std))
    return states, log_probs


def accumulate_gradient(unet, scheduler, states, old, advantage, settings, optimizer) -> None:
    """One forward and one backward per timestep; the last step is deterministic and no action."""
    optimizer.zero_grad()
    for k, t in enumerate(scheduler.timesteps[:-1]):
        eps = unet(states[k], t).sample
        mean, std = mean_and_std(scheduler, eps, t, states[k])
        ratio = (gaussian_log_prob(states[k + 1], mean, std) - old[k]).exp()
        clipped = ratio.clamp(1 - OWN.clip_range, 1 + OWN.clip_range)
        loss = torch.maximum(-advantage * ratio, -advantage * clipped).mean()
        loss.backward()


def mean_and_std(scheduler, eps, t, x_t):
    """Of p(x_{t-1} | x_t) at eta = 1, from diffusers' own step."""
    nothing = torch.zeros_like(x_t)
    mean = scheduler.step(eps, t, x_t, eta=1.0, variance_noise=nothing).prev_sample
    previous = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    return mean, scheduler._get_variance(t, previous).sqrt().to(x_t.device)


def gaussian_log_prob(x, mean, std):
    """Averaged over the pixels; 0 for the deterministic step."""
    if std == 0:
        return torch.zeros(len(x), device=x.device)
    return torch.distributions.Normal(mean, std).log_prob(x).mean((1, 2, 3))


# ------------------------------------------------------------------ the same gradient?


def cosine(pretrained: policy.Policy, settings: Finetune) -> float:
    """Between the two gradients of one mini-batch, at the same weights and trajectories."""
    learner = policy.Policy(copy.deepcopy(pretrained.unet), pretrained.scheduler, bf16=False)
    seeds = sampler.seeds(1, BATCH)
    trajectory = sampler.rollout(learner, sampler.noise(learner, seeds), settings.n_steps, seeds)
    scores = REWARD(trajectory.x_0)
    seen = Experience(trajectory, scores, learnable_steps(trajectory.stds))
    advantage = ddpo.credit(seen, OWN, settings, None)
    optimizer = new_optimizer(learner.unet, settings)

    def gradient():
        return torch.cat([p.grad.double().reshape(-1) for p in learner.unet.parameters()])

    accumulate_gradient(
        learner.unet, ddim(learner, settings), trajectory.states, trajectory.log_probs, advantage,
        settings, optimizer,
    )  # fmt: skip
    theirs = gradient()
    rows = torch.cat(ddpo.units(seen, OWN, settings, torch.Generator()))
    update(
        learner.unet,
        optimizer,
        rows,
        lambda part: ddpo.loss(learner, seen, part, advantage, OWN, None),
        n_units=len(rows),
        micro_batch=settings.micro_batch,
        max_grad_norm=settings.max_grad_norm,
        rate=0.0,
    )
    ours = gradient()
    return torch.nn.functional.cosine_similarity(ours, theirs, dim=0).item()


if __name__ == "__main__":
    main()
