"""Evaluation sets of a profile's policies before and after finetuning, and what comes of them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from filelock import FileLock

from ddpo_lib import encoders, evaluation, policy, runs
from ddpo_lib.book import finetuning, model_cards, paths
from ddpo_lib.book.profiles import Evaluation, Profile, Run
from ddpo_lib.evaluation import standard_error

COLUMNS = [
    "policy", "task", "n", "baseline_mean", "baseline_sd", "baseline_se",
    "ddpo_mean", "ddpo_se", "effect_size",
]  # fmt: skip


def pretrained_pictures(profile: Profile, policy_name: str, bf16: bool | None = None) -> np.ndarray:
    """The evaluation set of a pretrained policy of the profile, uint8 (n, H, W, C); bf16 as in
    `policy.load`, by default the profile's."""
    bf16 = profile.finetune.get("bf16", True) if bf16 is None else bf16
    folder = paths.RUNS / profile.name / f"{policy_name}-pretrained"
    cache = folder / ("evaluation.npz" if bf16 else "evaluation-float32.npz")
    return pictures(profile.policies[policy_name], profile.evaluation, cache, bf16)


def finetuned_pictures(profile: Profile, run: Run) -> np.ndarray:
    """The evaluation set of a run's best checkpoint, uint8 (n, H, W, C); of a run that was never
    begun the published policy's, if the profile names one."""
    home, published = finetuning.home(run), profile.published(run)
    source, base = str(home / "best"), None
    if published and not finetuning.begun(run):
        home, base = home.with_name(f"{run.policy}-{run.task}-published"), run.source
        source = published
    return pictures(source, profile.evaluation, home / "evaluation.npz", run.settings.bf16, base)


def pictures(
    source: str, settings: Evaluation, cache: Path, bf16: bool = True, base: str | None = None
) -> np.ndarray:
    """The evaluation set of one policy, uint8 (n, H, W, C); source, bf16 and base as in
    `policy.load`. The cache, an .npz, is made again if it cannot be read or is of other settings or
    another policy."""
    models = [finetuning.identify(each) for each in (source, base) if each]
    key = json.dumps([dataclasses.asdict(settings), models, bf16])
    cache.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(cache.with_name(f".{cache.name}.lock")):  # who comes second finds it made
        try:
            with np.load(cache) as stored:
                if str(stored["key"]) == key:
                    return stored["pictures"]
        except Exception:  # missing or, in one of many ways, damaged
            pass
        agent = policy.load(source, bf16=bf16, base=base)
        n, n_steps, seed = dataclasses.astuple(settings)
        drawn = evaluation.draw(agent, n, n_steps, seed, progress=f"evaluation set, {n}")
        with runs.replacing(cache) as draft:
            np.savez(draft, pictures=drawn, key=key)
    return drawn


def finish(profile: Profile, run: Run) -> dict:
    """Score a run's best checkpoint, in evaluation.json, which makes the run complete, and on the
    model card. ValueError if the run was not begun."""
    if not finetuning.begun(run):
        raise ValueError(f"{run.name} was not begun: finetune it first")
    home, (before, after) = finetuning.home(run), _scores(profile, run)
    result = {
        "n": len(after),
        "iterations": runs.iterations_done(home),
        "reward_mean": float(after.mean()),
        "reward_sd": float(after.std(ddof=1)),
        "reward_se": float(standard_error(after)),
        "before_mean": float(before.mean()),
        "before_se": float(standard_error(before)),
    }
    runs.write_json(home / "evaluation.json", result)
    model_cards.save(home)
    return result


def table_5_1(profile: Profile, table_runs: list[Run]):
    """A DataFrame of `COLUMNS`: mean and standard error before and after, from the same noise; of
    JPEG tasks in kB. The effect size is the change of the mean reward in standard deviations of the
    pretrained policy's, positive in the intended direction."""
    import pandas as pd

    rows = []
    for run in table_runs:
        before, after = _scores(profile, run)
        sign = -1 if run.reward == "jpeg_compressibility" else 1
        rows.append([
            run.policy, run.task, len(after),
            sign * before.mean(), before.std(ddof=1), standard_error(before),
            sign * after.mean(), standard_error(after), evaluation.change(before, after),
        ])  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)


def share_over_50(images: np.ndarray, models: dict[str, str]) -> tuple[float, float]:
    """Share of faces that the age classifier puts at 50 or over, and its standard error."""
    classifier, first = encoders.load_age_classifier(models["age"]), min(encoders.OVER50)
    old = evaluation.score(
        images, lambda batch: (encoders.age_logits(classifier, batch).argmax(1) >= first).float()
    )
    return old.mean(), standard_error(old)


def _scores(profile: Profile, run: Run) -> list[np.ndarray]:
    """Of the evaluation set before and after, (n,) each, entry i of both from the same noise."""
    reward = finetuning.load_reward(run)
    before = pretrained_pictures(profile, run.policy, run.settings.bf16)
    sets = (before, finetuned_pictures(profile, run))
    return [evaluation.score(images, reward) for images in sets]
