"""Time the thesis's 256×256 model: one DDPO iteration and sampling, on a GPU.

    python benchmarks/gpu.py [--small]

Builds the exact network of google/ddpm-celebahq-256, 113.7 million random weights, and measures in
one run, taking turns:

- one iteration (100 trajectories of 40 steps, 10 updates) of this library, rollout and update
  apart, against the straightforward loop of iteration.py in TF32, one forward and backward a step;
- the arithmetic that this took, over what a large bfloat16 matrix product reaches on this device;
- sampling in bfloat16 against diffusers' own DDIMPipeline as it comes, in TF32;
- gradients in bfloat16 against float32, and the ratios before the first step;
- an iteration in float32 and 14 GB, as a T4 has to do it.

Takes a GPU with bfloat16 and about 30 GB, which the straightforward loop needs. Prints one JSON
object; progress goes to stderr. --small has the same parts with a tiny network and
runs anywhere; its numbers say nothing.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import statistics
import sys
import time

import torch
from diffusers import DDIMPipeline, DDPMScheduler, UNet2DModel
from iteration import ddim, new_optimizer, straightforward_iteration
from torch.nn.functional import cosine_similarity
from torch.utils.flop_counter import FlopCounterMode

from ddpo_lib import finetune, policy, rewards, sampler
from ddpo_lib.experience import learnable_steps, pairs, rescore
from ddpo_lib.objectives import ddpo
from ddpo_lib.settings import Finetune

BATCH = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a tiny network, a few steps")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each")
    arguments = parser.parse_args()
    if not (arguments.small or torch.cuda.is_available()):
        print("nothing was measured: this takes a GPU (--small runs anywhere)", file=sys.stderr)
        return
    size = {"n_samples": 10, "n_steps": 4} if arguments.small else {"n_samples": 100, "n_steps": 40}
    settings = Finetune(**size, minibatch_size=BATCH, micro_batch=BATCH)  # as in thesis.yaml
    pretrained = new_policy(arguments.small)
    torch.set_float32_matmul_precision("high")  # TF32, for the straightforward loop
    torch.backends.cudnn.allow_tf32 = True

    ours, theirs = [], []
    for turn in range(arguments.repeats):
        ours.append(measure_ours(pretrained, settings))
        theirs.append(measure_straightforward(pretrained, settings))
        print(f"turn {turn}: ours {ours[-1]}, straightforward {theirs[-1]}", file=sys.stderr)
    ours, theirs = median(ours), median(theirs)
    rate, peak = arithmetic(pretrained, settings) / ours["iteration_s"], matrix_rate(pretrained)
    result = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "weights": sum(p.numel() for p in pretrained.unet.parameters()),
        **size,
        "ours": ours,
        "straightforward": theirs,
        "speedup": theirs["iteration_s"] / ours["iteration_s"],
        "tflops": rate / 1e12,
        "matrix_tflops": peak / 1e12,
        "share_of_matrix_rate": rate / peak,
        "sampling": sampling(pretrained, settings),
        **exactness(pretrained, settings),
        "t4_setting": measure_in_14_gb(pretrained, settings),  # the last: it limits the memory
    }
    print(json.dumps(result))


def new_policy(small: bool) -> policy.Policy:
    torch.manual_seed(0)
    unet = exact_unet(16, (8, 8), groups=4) if small else exact_unet(256)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = unet.eval().to(device, memory_format=torch.channels_last)
    return policy.Policy(unet, DDPMScheduler(1000))


def exact_unet(side: int, widths=(128, 128, 256, 256, 512, 512), groups: int = 32) -> UNet2DModel:
    """google/ddpm-celebahq-256's network as its config.json describes it, with random weights."""
    down, up = ["DownBlock2D"] * len(widths), ["UpBlock2D"] * len(widths)
    down[-2], up[1] = "AttnDownBlock2D", "AttnUpBlock2D"
    return UNet2DModel(
        sample_size=side,
        block_out_channels=widths,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=2,
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        norm_num_groups=groups,
    )


# ------------------------------------------------------------------------------- an iteration


def measure_ours(pretrained: policy.Policy, settings: Finetune) -> dict:
    """`finetune.iterate`, with a clock in its reward, between rollout and updates."""
    learner = policy.Policy(copy.deepcopy(pretrained.unet), pretrained.scheduler, settings.bf16)
    clocks = [clock(reset_memory=True)]

    def reward(images):
        scores = rewards.jpeg_compressibility(images)
        clocks.append(clock())
        return scores

    training = finetune.Training(
        learner, new_optimizer(learner.unet, settings), rewards.checked(reward), ddpo,
        ddpo.Settings(), None, settings, seed=0,
    )  # fmt: skip
    finetune.iterate(training, iteration=1)
    (start, middle), end = clocks, clock()
    return {
        "iteration_s": end - start,
        "rollout_s": middle - start,
        "update_s": end - middle,
        "peak_memory_gb": peak_memory(),
    }


def measure_straightforward(pretrained: policy.Policy, settings: Finetune) -> dict:
    learner = copy.deepcopy(pretrained)
    start = clock(reset_memory=True)
    straightforward_iteration(learner, settings)
    return {"iteration_s": clock() - start, "peak_memory_gb": peak_memory()}


def clock(reset_memory: bool = False) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        if reset_memory:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return time.perf_counter()


def peak_memory() -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None


def median(turns: list[dict]) -> dict:
    return {
        name: None if turns[0][name] is None else statistics.median(turn[name] for turn in turns)
        for name in turns[0]
    }


# ------------------------------------------------------------------------------- arithmetic


def arithmetic(pretrained: policy.Policy, settings: Finetune) -> float:
    """Floating-point operations of an iteration; a backward pass counts as two forward ones."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        x_t = sampler.noise(pretrained, [0])
        policy.predict_noise(pretrained, x_t, torch.zeros(1, dtype=torch.long, device=x_t.device))
    passes = settings.n_samples * (settings.n_steps + 3 * (settings.n_steps - 1))
    return passes * counter.get_total_flops()


def matrix_rate(pretrained: policy.Policy) -> float:
    """Operations a second of a large bfloat16 matrix product: the best of ten."""
    n = 8192 if torch.cuda.is_available() else 512
    a, b = torch.randn(2, n, n, device=pretrained.device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(10):
        start = clock()
        a @ b
        seconds.append(clock() - start)
    return 2 * n**3 / min(seconds)


# ------------------------------------------------------------------------------- the rest


def sampling(pretrained: policy.Policy, settings: Finetune) -> dict:
    """Pictures a second, ours against diffusers' pipeline, both at eta = 0 on the same batch."""
    pipeline = DDIMPipeline(unet=pretrained.unet, scheduler=ddim(pretrained, settings))
    pipeline.set_progress_bar_config(disable=True)
    n = min(settings.micro_batch, settings.n_samples)
    x_T = sampler.noise(pretrained, sampler.seeds(1, n))
    steps = settings.n_steps
    ways = {
        "ours": lambda: sampler.sample(pretrained, x_T, steps),
        "diffusers": lambda: pipeline(n, num_inference_steps=steps, output_type="np"),
    }
    rates = {name: [] for name in ways}
    for _ in range(3):
        for name, draw in ways.items():
            start = clock()
            draw()
            rates[name].append(n / (clock() - start))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return medians | {"speedup": medians["ours"] / medians["diffusers"]}


def exactness(pretrained: policy.Policy, settings: Finetune) -> dict:
    """Cosine between the gradients of one mini-batch in bfloat16 and in float32, and the largest
    |ratio - 1| before the first step in both.

    Each is on the trajectories that it has drawn from the same noise, as in training: on those of
    the other, what rounding does to a mean would count as exploration.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    gradients, ratios = {}, {}
    for name, bf16 in (("fp32", False), ("bf16", True)):
        learner = policy.Policy(copy.deepcopy(pretrained.unet), pretrained.scheduler, bf16)
        n = settings.micro_batch
        seeds = sampler.seeds(0, n)
        own = sampler.rollout(learner, sampler.noise(learner, seeds), settings.n_steps, seeds)
        advantage = torch.linspace(-1, 1, n, device=learner.device)
        errors = []
        rows = pairs(learnable_steps(own.stds), torch.arange(n))[:, 0]
        for part in rows.split(n):
            new = rescore(learner, own, *part.unbind(-1))
            errors.append(new.log_ratio.detach().exp() - 1)
            (-advantage[part[:, 1]] * new.log_prob).sum().backward()
        gradients[name] = torch.cat([p.grad.reshape(-1) for p in learner.unet.parameters()])
        ratios[f"max_ratio_error_{name}"] = torch.cat(errors).abs().max().item()
    cosine = cosine_similarity(gradients["bf16"], gradients["fp32"], dim=0)
    return {"cosine": cosine.item(), **ratios}


def measure_in_14_gb(pretrained: policy.Policy, settings: Finetune) -> dict:
    """An iteration as a T4 has to do it: in float32, with no more memory than it has."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties().total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 14e9 / total))
    settings = dataclasses.replace(settings, bf16=False)
    with contextlib.redirect_stdout(sys.stderr):
        measure_ours(pretrained, settings)  # finds the batches that fit
    return measure_ours(pretrained, settings)


if __name__ == "__main__":
    main()
