"""The methods side by side: a finished run of profile methods is a row."""

import contextlib
import dataclasses
import functools
import io

import numpy as np
import torch
from diffusers import UNet2DModel

from ddpo_lib import disk, evaluation, finetune, policy, runs
from ddpo_lib.book import finetuning, paths, results, seeds
from ddpo_lib.book.profiles import Profile, Run
from ddpo_lib.toy import regressor

COLUMNS = [
    "method", "variant", "task", "seed", "samples", "network_calls", "seconds", "proxy_gain",
    "true_gain", "proxy_gain_eta1", "true_gain_eta1", "vendi_ratio", "vendi_ratio_eta1", "kl_nats",
]  # fmt: skip
N_KL = 32
"""Trajectories over which the divergence from the pretrained policy is averaged."""
N_SHOWN = 8
"""Images of each variant that are kept for the notebooks."""
SMALL = {
    "block_out_channels": (4,), "norm_num_groups": 1,
    "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "sample_size": 8,
}  # fmt: skip
"""What makes a denoiser's configuration that of a small one, of small images."""


def tables(profile: Profile) -> dict:
    """What `make methods` leaves in data/seeds/methods: `table`, curves like `seeds.fooled`'s of
    every run on the aesthetic score and on OVER50, and `images`."""
    done = seeds.finished(profile)
    curves = {
        name: seeds.fooled(profile, [run for run in done if run.reward == reward])
        for name, reward in (("along", "aesthetic"), ("along_over50", "over50"))
    }
    return {"methods": table(profile), **curves, "images": images(profile)}


def table(profile: Profile):
    """A DataFrame of `COLUMNS`. Gains are in standard deviations of the pretrained policy's, of the
    reward that was optimised (proxy) and of the rater's taste as a regressor reads it (true);
    network_calls are images through a denoiser, forward, while training without the development
    sets; seconds are the iterations'; kl_nats is `evaluation.kl_nats` of best/."""
    import pandas as pd

    rows = seeds.each(functools.partial(row, profile), seeds.finished(profile), "methods")
    return pd.DataFrame(rows, columns=COLUMNS).round(4)


def row(profile: Profile, run: Run) -> dict:
    """A row of `table`."""
    home = finetuning.home(run)
    told, best = runs.metrics(home)[1:], policy.load(home / "best", bf16=run.settings.bf16)
    n_steps, noise, eta = run.settings.n_steps, profile.evaluation.seed, run.settings.eta
    kl = evaluation.kl_nats(best, finetuning.load_policy(run), N_KL, n_steps, noise, eta)
    return {
        "method": run.objective, "variant": run.task, "task": run.reward, "seed": run.seed,
        "samples": len(told) * run.settings.n_samples, "network_calls": network_calls(run),
        "seconds": sum(row["seconds"] for row in told),
        **gains(profile, run, regressor.load_regressor(paths.TOY / "regressor")),
        "kl_nats": kl,
    }  # fmt: skip


def images(profile: Profile) -> dict[str, np.ndarray]:
    """The first images of the evaluation sets at eta = 0, uint8 (N_SHOWN, H, W, C): "pretrained",
    and each task's first seed."""
    shown = {}
    for run in seeds.finished(profile):
        if run.task not in shown:
            before, after = results.sets(profile, run, eta=0.0)
            shown |= {"pretrained": before[:N_SHOWN], run.task: after[:N_SHOWN]}
    return shown


def vendi_at(along, gain: float, column: str = "truth"):
    """Of curves like `seeds.fooled`'s, by one sampler: the share of the Vendi score that is left
    where a run's gain first reaches a value, between two iterations linearly. A DataFrame with a
    row a run: task, seed, vendi, NaN where the run never came so far."""
    import pandas as pd

    rows = []
    for (task, seed), own in along.groupby(["task", "seed"], sort=False):
        gains, left = own[column].to_numpy(), own.vendi.to_numpy() / own.vendi.iloc[0]
        at = int(np.argmax(gains >= gain))  # 0 where there is none
        share = np.nan
        if gains[at] >= gain:
            before = max(at - 1, 0)
            rise = gains[at] - gains[before]
            part = (gain - gains[before]) / rise if rise > 0 else 1.0
            share = left[before] + part * (left[at] - left[before])
        rows.append([task, seed, share])
    return pd.DataFrame(rows, columns=["task", "seed", "vendi"])


def gains(profile: Profile, run: Run, judge: regressor.Regressor) -> dict[str, float]:
    """Proxy and true gain and the Vendi ratio, by both samplers; the true one of the aesthetic
    task alone, for there is a taste behind it."""
    told = disk.read_json(finetuning.home(run) / "evaluation.json")
    found = {}
    for name, eta in results.etas(run).items():
        end = "" if name == "eta0" else "_eta1"
        pictures = results.sets(profile, run, eta)
        old, new = (seeds.taste(each, run.policy, judge) for each in pictures)
        true = evaluation.change(old, new) if run.reward == "aesthetic" else np.nan
        found |= {f"proxy_gain{end}": told[name]["effect_size"], f"true_gain{end}": true}
        found[f"vendi_ratio{end}"] = told[name]["vendi_ratio"]
    return found


def network_calls(run: Run) -> int:
    """Images through a denoiser, forward, in all iterations: counted with a small network in place
    of the pretrained one, which is asked as often."""
    base, counted = finetuning.load_policy(run), []
    small = UNet2DModel.from_config(dict(base.unet.config) | SMALL)
    # Its iterations differ, for they choose at random where siblings part.
    n = run.settings.n_iterations if run.objective == "hrf" else 1

    def count(module, arguments, output) -> None:
        if hasattr(module, "time_embedding"):  # a denoiser, and none of its layers
            counted.append(len(arguments[0]))

    training = begin(run, dataclasses.replace(base, unet=small))
    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        for iteration in range(1, n + 1):
            with contextlib.redirect_stderr(io.StringIO()):  # bars that `seeds.each` would mix
                finetune.iterate(training, iteration)
    finally:
        hook.remove()
    return sum(counted) * run.settings.n_iterations // n


def begin(run: Run, base: policy.Policy | None = None) -> finetune.Training:
    """The run's finetuning, before its first iteration; base, if not the pretrained policy."""
    base, reward = base or finetuning.load_policy(run), finetuning.load_reward(run)
    own = run.objective_settings
    return finetune.prepare(base, reward, run.objective, run.settings, run.seed, own)
