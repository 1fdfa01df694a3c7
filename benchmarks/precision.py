"""Does rounding decide clips at the thesis's settings? Measured on the exact 256×256 network.

    python benchmarks/precision.py [--side 256] [--decisions 10] [--threads 2]

The network of google/ddpm-celebahq-256 with random weights makes decisions at timesteps spread over
the 40 of a trajectory, takes one optimizer step at the thesis's learning rate, 9e-8, against the
policy gradient of other decisions, and scores its decisions again: in float32, under bfloat16
autocast, and in float64 for the truth. The same for a step ten times as large, which is as much as
an iteration's ten updates can add up to. Takes half an hour on two cores.

Log-probabilities are averaged over pixels, which the clip range of 1e-4 goes with.
Prints one JSON object; progress goes to stderr.
"""

import argparse
import copy
import json
import sys
from dataclasses import replace

import numpy as np
import torch
from diffusers import DDPMScheduler
from gpu import exact_unet
from tqdm.auto import tqdm

from ddpo_lib.log_probs import log_prob
from ddpo_lib.policy import Policy, steps, transition

N_STEPS, RATE, CLIP_RANGE = 40, 9e-8, 1e-4
PRECISIONS = ("float32", "bf16", "float64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--decisions", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    policy = Policy(exact_unet(arguments.side).eval(), DDPMScheduler(1000), bf16=False)
    policy.unet.to(memory_format=torch.channels_last)
    t, t_prev = steps(policy, N_STEPS)
    kept = torch.linspace(0, N_STEPS - 2, arguments.decisions).round().long()
    t, t_prev = t[kept], t_prev[kept]
    direction = adam_direction(policy, t[1::3], t_prev[1::3])

    states = [noisy(policy, each, seed=i) for i, each in enumerate(t)]
    eps = {"old": predict(policy, states, t)}
    for name, rate in (("one update", RATE), ("ten updates", 10 * RATE)):
        learner = moved(policy, direction, rate)
        eps[name] = predict(learner, states, t)
    result = {
        "side": arguments.side, "learning_rate": RATE, "clip_range": CLIP_RANGE,
        "timesteps": t.tolist(), "torch": torch.__version__,
    }  # fmt: skip
    for clip in (True, False):
        scheduler = DDPMScheduler(1000, clip_sample=clip)
        for name in ("one update", "ten updates"):
            key = f"{name}, {'clamped' if clip else 'unclamped'} x~"
            result[key] = compare(
                replace(policy, scheduler=scheduler), eps, name, states, t, t_prev
            )
    print(json.dumps(result, indent=1))


def noisy(policy: Policy, t: torch.Tensor, seed: int) -> torch.Tensor:
    """x_t of a smooth image, (1, 3, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    _, side, _ = policy.image_shape
    small = torch.rand(1, 3, 8, 8, generator=generator) * 2 - 1
    x_0 = torch.nn.functional.interpolate(small, (side, side), mode="bicubic").clamp(-1, 1)
    a = policy.alpha_bar[t]
    return a.sqrt() * x_0 + (1 - a).sqrt() * torch.randn(x_0.shape, generator=generator)


def adam_direction(policy: Policy, t, t_prev) -> list[torch.Tensor]:
    """Of the first AdamW step: the gradient's signs, for decisions that half are praised."""
    for k, (now, to) in enumerate(zip(t, t_prev, strict=True)):
        generator = torch.Generator().manual_seed(1000 + k)
        x_t = noisy(policy, now, seed=100 + k)
        step = transition(policy, x_t, now.view(1), to.view(1))
        z = torch.randn(x_t.shape, generator=generator)
        x_prev = (step.mean + step.std.view(-1, 1, 1, 1) * z).detach()
        ((-1) ** k * log_prob(x_prev, step.mean, step.std)).sum().backward()
        print(f"gradient of decision {k + 1} of {len(t)}", file=sys.stderr)
    signs = [p.grad.sign() for p in policy.unet.parameters()]
    policy.unet.zero_grad()
    return signs


def moved(policy: Policy, direction: list[torch.Tensor], rate: float) -> Policy:
    unet = copy.deepcopy(policy.unet)
    with torch.no_grad():
        for p, sign in zip(unet.parameters(), direction, strict=True):
            p += rate * sign
    return replace(policy, unet=unet)


@torch.no_grad()
def predict(policy: Policy, states, t) -> dict[str, list[torch.Tensor]]:
    """eps_theta of each state in each precision, as float64."""
    found = {}
    for precision in PRECISIONS:
        unet = policy.unet.double() if precision == "float64" else policy.unet.float()
        bar = tqdm(list(zip(states, t, strict=True)), desc=precision)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            found[precision] = [
                unet(x.to(next(unet.parameters()).dtype), now.view(1)).sample.double()
                for x, now in bar
            ]
    policy.unet.float()
    return found


def compare(policy: Policy, eps, name, states, t, t_prev) -> dict:
    """Log-ratios of decisions made and scored again in each precision, against the truth."""
    log_ratios = {p: [] for p in PRECISIONS}
    for k, (x_t, now, to) in enumerate(zip(states, t, t_prev, strict=True)):
        z = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(2000 + k)).double()
        for p in PRECISIONS:
            exact = p == "float64"
            old, new = (
                step_from(policy, eps[which][p][k], x_t, now, to, exact) for which in ("old", name)
            )
            x_prev = old.mean + old.std.view(-1, 1, 1, 1) * (z if exact else z.float())
            pair = (log_prob(x_prev, each.mean, each.std) for each in (new, old))
            log_ratios[p].append((next(pair) - next(pair)).item())
    truth = np.array(log_ratios["float64"])
    result = {"true log-ratio": summary(truth)}
    for p in ("float32", "bf16"):
        found = np.array(log_ratios[p])
        outside = np.abs(np.expm1(found)) > CLIP_RANGE
        result[p] = {
            "log-ratio": summary(found),
            "error": summary(found - truth),
            "correlation with the truth": round(float(np.corrcoef(found, truth)[0, 1]), 4),
            "outside the clip range": int(outside.sum()),
            "clips that rounding decides": int(
                (outside != (np.abs(np.expm1(truth)) > CLIP_RANGE)).sum()
            ),
        }
    return result


def step_from(policy, eps, x_t, now, to, exact):
    """The transition with a noise prediction that is there already."""

    class Known(torch.nn.Module):
        device, config = torch.device("cpu"), policy.unet.config

        def forward(self, x_t, t):
            return type("Output", (), {"sample": eps if exact else eps.float()})

    x_t = x_t.double() if exact else x_t
    return transition(replace(policy, unet=Known()), x_t, now.view(1), to.view(1))


def summary(values: np.ndarray) -> dict:
    return {"sd": float(f"{values.std():.2e}"), "largest": float(f"{np.abs(values).max():.2e}")}


if __name__ == "__main__":
    main()
