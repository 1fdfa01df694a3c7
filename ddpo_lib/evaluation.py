"""The fixed-noise evaluation set: scores before and after finetuning, and Table 5.1."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ddpo_lib import encoders, paths, policy, rewards, runs, sampler
from ddpo_lib.config import Evaluation, Models, Profile, Run

COLUMNS = [
    "policy", "task", "n", "baseline_mean", "baseline_sd", "baseline_se",
    "ddpo_mean", "ddpo_se", "effect_size",
]  # fmt: skip


def pictures(
    source: str | Path,
    settings: Evaluation,
    cache: Path,
    bf16: bool = True,
    base: str | Path | None = None,
) -> np.ndarray:
    """The evaluation set of one policy: uint8 (n, H, W, C), from the profile's fixed noise, η = 0.

    Args:
        source, bf16, base: as in `policy.load`.
        cache: an .npz file that keeps the pictures; made again if it came from other weights or
            other settings.
    """
    key = json.dumps([str(settings), runs.fingerprint(str(source)), bf16])
    if cache.exists():
        with np.load(cache) as stored:
            if str(stored["key"]) == key:
                return stored["pictures"]
    model = policy.load(source, bf16=bf16, base=base)
    x_T = sampler.noise(model, settings.n, settings.seed)
    x_0 = sampler.sample(model, x_T, settings.n_steps, progress=f"evaluation set, {settings.n}")
    result = rewards.to_uint8(x_0).numpy()
    cache.parent.mkdir(parents=True, exist_ok=True)
    draft = cache.with_name(f"draft-{os.getpid()}-{cache.name}")
    np.savez(draft, pictures=result, key=key)
    draft.replace(cache)
    return result


def pretrained_pictures(profile: Profile, policy_name: str, bf16: bool | None = None) -> np.ndarray:
    """The evaluation set of a pretrained policy of the profile: uint8 (n, H, W, C).

    Args:
        bf16: as in `policy.load`; by default as the profile finetunes. Give that of a run which
            differs from its profile.
    """
    if bf16 is None:
        bf16 = profile.finetune.get("bf16", True)
    home = paths.RUNS / profile.name / f"{policy_name}-pretrained"
    source = paths.resolve(profile.policies[policy_name])
    cache = home / ("evaluation.npz" if bf16 else "evaluation-float32.npz")
    return pictures(source, profile.evaluation, cache, bf16)


def finetuned_pictures(profile: Profile, run: Run) -> np.ndarray:
    """The evaluation set of a run's best checkpoint: uint8 (n, H, W, C).

    Of a run that was never begun it is the published policy's, if the profile names one.
    """
    home = runs.folder(run)
    begun, published = (home / "best").exists(), profile.published(run)
    source = paths.resolve(published) if published and not begun else home / "best"
    return pictures(
        source, profile.evaluation, home / "evaluation.npz", run.settings.bf16,
        base=paths.resolve(run.source),
    )  # fmt: skip


def score(images: np.ndarray, reward: rewards.Reward, batch_size: int = 250) -> np.ndarray:
    """A reward of uint8 pictures (n, H, W, C): what a viewer's file would score, (n,) float64."""
    batches = torch.from_numpy(images).split(batch_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = [reward(rewards.from_uint8(batch).to(device)).cpu() for batch in batches]
    return torch.cat(values).double().numpy()


def finish(profile: Profile, run: Run) -> dict:
    """Score a finished run's best checkpoint and write evaluation.json, which marks it complete."""
    reward = rewards.load(run.reward, run.models, jpeg_encoding=run.settings.jpeg_encoding)
    images = finetuned_pictures(profile, run)
    values = score(images, reward)
    result = {
        "n": len(values),
        "reward_mean": values.mean(),
        "reward_sd": values.std(ddof=1),
        "reward_se": standard_error(values),
    }
    runs.write_json(runs.folder(run) / "evaluation.json", result)
    return result


def table_5_1(profile: Profile, table_runs: list[Run]) -> pd.DataFrame:
    """Mean ± standard error before and after finetuning, from the same initial noise.

    JPEG tasks are given in kB. The effect size is the change of the mean reward in units of the
    pretrained policy's standard deviation, positive in the intended direction.
    """
    rows = []
    for run in table_runs:
        reward = rewards.load(run.reward, run.models, jpeg_encoding=run.settings.jpeg_encoding)
        before = score(pretrained_pictures(profile, run.policy, run.settings.bf16), reward)
        after = score(finetuned_pictures(profile, run), reward)
        sign = -1 if run.reward == "jpeg_compressibility" else 1
        rows.append(
            [
                run.policy, run.task, len(after),
                sign * before.mean(), before.std(ddof=1), standard_error(before),
                sign * after.mean(), standard_error(after),
                _change(before, after),
            ]
        )  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)


def share_over_50(images: np.ndarray, models: Models) -> tuple[float, float]:
    """Share of faces that the age classifier puts at 50 or over, and its standard error."""
    classifier = encoders.load_age_classifier(paths.resolve(models.age))

    def is_old(batch):
        return (encoders.age_logits(classifier, batch).argmax(1) >= min(encoders.OVER50)).float()

    with torch.no_grad():
        old = score(images, is_old)
    return old.mean(), standard_error(old)


def standard_error(values: np.ndarray) -> float:
    """Of the mean: sd / √n."""
    return values.std(ddof=1) / np.sqrt(len(values))


def bootstrap(
    statistic: Callable[..., float], *samples: np.ndarray, seed: int, n_bootstrap: int = 1000
) -> tuple[float, float, float]:
    """A statistic of pictures and its 95 % interval: value, low, high.

    The interval is the middle 95 % of the statistic's values on resampled pictures.

    Args:
        statistic: takes arrays like `samples` and gives a number.
        samples: arrays (n, …) whose rows belong together, for instance scores of pictures from the
            same noise before and after. A resample takes the same rows from all of them.

    Raises:
        ValueError: the samples differ in length, or have fewer than two rows.
    """
    lengths = [len(sample) for sample in samples]
    if len(set(lengths)) != 1 or lengths[0] < 2:
        raise ValueError(
            f"samples of {lengths} rows: a bootstrap resamples rows that belong together, so all "
            "need the same number of them, at least 2"
        )
    picks = np.random.default_rng(seed).integers(lengths[0], size=(n_bootstrap, lengths[0]))
    values = [statistic(*(sample[pick] for sample in samples)) for pick in picks]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(statistic(*samples)), float(low), float(high)


def effect_size(before: np.ndarray, after: np.ndarray, seed: int) -> tuple[float, float, float]:
    """The change of the mean in standard deviations of `before`, and its 95 % interval.

    Args:
        before, after: (n,), entry i of both from the same noise.

    Raises:
        ValueError: the lengths differ, or all of `before` is one value.
    """
    if np.ptp(before) == 0:
        raise ValueError(
            f"all {len(before)} values before are {before[0]}: there is no standard deviation to "
            "measure a change in"
        )
    return bootstrap(_change, before, after, seed=seed)


def _change(before: np.ndarray, after: np.ndarray) -> float:
    """Of the mean, in standard deviations of `before`."""
    return (after.mean() - before.mean()) / before.std(ddof=1)
