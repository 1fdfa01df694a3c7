"""Evaluation sets of a profile's policies before and after finetuning, and what comes of them.

Every set is drawn by two samplers from the same initial noise: at eta = 0, and as in training,
which in the tables is called eta1.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np

from ddpo_lib import disk, diversity, encoders, evaluation, policy, runs
from ddpo_lib.book import finetuning, model_cards, paths
from ddpo_lib.book.profiles import Evaluation, Profile, Run
from ddpo_lib.evaluation import standard_error

COLUMNS = [
    "policy", "task", "n", "baseline_mean", "baseline_sd", "baseline_se", "ddpo_mean", "ddpo_se",
    "effect_size", "ddpo_eta1_mean", "ddpo_eta1_se", "effect_size_eta1", "vendi_ratio",
    "vendi_ratio_eta1",
]  # fmt: skip


def pretrained_pictures(
    profile: Profile, policy_name: str, bf16: bool | None = None, eta: float = 0.0, **told
) -> np.ndarray:
    """The evaluation set of a pretrained policy of the profile, uint8 (n, H, W, C); bf16 as in
    `policy.load`, by default the profile's; told, of a policy that takes text, as in `pictures`."""
    bf16 = profile.finetune.get("bf16", True) if bf16 is None else bf16
    folder = paths.RUNS / profile.name / f"{policy_name}-pretrained"
    cache = folder / ("evaluation.npz" if bf16 else "evaluation-float32.npz")
    source = profile.policies[policy_name]
    return pictures(source, profile.evaluation, cache, bf16, eta=eta, **told)


def finetuned_pictures(profile: Profile, run: Run, eta: float = 0.0, **told) -> np.ndarray:
    """The evaluation set of a run's best checkpoint, uint8 (n, H, W, C); of a run that was never
    begun the published policy's, if the profile names one. told as in `pictures`."""
    home, published = finetuning.home(run), profile.published(run)
    source, base = str(home / "best"), run.source if run.settings.adapter_rank else None
    if published and not finetuning.begun(run):
        home, base = home.with_name(f"{run.policy}-{run.task}-published"), run.source
        source = published
    cache = home / "evaluation.npz"
    return pictures(source, profile.evaluation, cache, run.settings.bf16, base, eta, **told)


def pictures(
    source: str,
    settings: Evaluation,
    cache: Path,
    bf16: bool = True,
    base: str | None = None,
    eta: float = 0.0,
    prompts: tuple = (),
    guidance: float = 1.0,
) -> np.ndarray:
    """The evaluation set of one policy, uint8 (n, H, W, C); source, bf16, base and guidance as in
    `policy.load`, prompts as in `evaluation.draw`. The cache, an .npz, for each eta and for each
    set of prompts one beside it, is made again if it cannot be read or is of other settings or
    another policy."""
    models = [finetuning.identify(each) for each in (source, base) if each]
    key = json.dumps([dataclasses.asdict(settings), models, bf16, float(eta)])
    cache = cache if eta == 0 else cache.with_stem(f"{cache.stem}-eta{eta:g}")
    if prompts:
        told = json.dumps([prompts, float(guidance)])
        key += told
        cache = cache.with_stem(f"{cache.stem}-{hashlib.sha256(told.encode()).hexdigest()[:8]}")
    with disk.locked(cache):  # who comes second finds it made, however long that takes
        try:
            with np.load(cache) as stored:
                if str(stored["key"]) == key:
                    return stored["pictures"]
        except Exception:  # missing or, in one of many ways, damaged
            pass
        agent = policy.load(source, bf16=bf16, base=base, guidance=guidance)
        n, n_steps, seed = dataclasses.astuple(settings)
        label = f"evaluation set, {n} at η = {eta:g}"
        drawn = evaluation.draw(agent, n, n_steps, seed, eta, progress=label, prompts=prompts)
        drawn = np.ascontiguousarray(drawn)  # as it will be read, for sums depend on the order
        with disk.replacing(cache) as draft:
            np.savez(draft, pictures=drawn, key=key)
    return drawn


def finish(profile: Profile, run: Run) -> dict:
    """Score a run's best checkpoint, in evaluation.json, which makes the run complete, and on the
    model card; draw its sets of unseen prompts too. ValueError if the run was not begun."""
    if not finetuning.begun(run):
        raise ValueError(f"{run.name} was not begun: finetune it first")
    home, clip = finetuning.home(run), encoders.load_clip(profile.models["clip"])
    samplers = {name: measure(profile, run, eta, clip) for name, eta in etas(run).items()}
    if unseen := run.settings.unseen_prompts:
        for eta in etas(run).values():
            sets(profile, run, eta, unseen)
    result = {"n": profile.evaluation.n, "iterations": runs.iterations_done(home), **samplers}
    disk.write_json(home / "evaluation.json", result)
    model_cards.save(home)
    return result


def etas(run: Run) -> dict[str, float]:
    """The two samplers: the name of each in tables, and its eta."""
    return {"eta0": 0.0, "eta1": run.settings.eta}


def measure(profile: Profile, run: Run, eta: float, clip: encoders.Clip) -> dict[str, float]:
    """What finetuning did to the evaluation set at eta: rewards and Vendi scores before and after,
    of faces also the share of those aged 50 or over. None stands for what there is not: Vendi
    scores of images that CLIP cannot see, an effect where all rewards before are equal."""
    both = sets(profile, run, eta)
    before, after = _score(run, both)
    vendi = [np.nan, np.nan]
    if encoders.can_see(both[0].shape[3], *both[0].shape[1:3]):
        vendi = [diversity.vendi_score(diversity.embed(images, clip)) for images in both]
    result = {
        "before_mean": before.mean(), "before_sd": before.std(ddof=1),
        "before_se": standard_error(before), "reward_mean": after.mean(),
        "reward_sd": after.std(ddof=1), "reward_se": standard_error(after),
        "effect_size": evaluation.change(before, after) if np.ptp(before) else np.nan,
        "before_vendi": vendi[0], "vendi": vendi[1], "vendi_ratio": vendi[1] / vendi[0],
    }  # fmt: skip
    if run.policy == "faces":
        shares = [share_over_50(images, profile.models)[0] for images in both]
        result |= {"before_share_over_50": shares[0], "share_over_50": shares[1]}
    return {name: float(value) if np.isfinite(value) else None for name, value in result.items()}


def table_5_1(profile: Profile, table_runs: list[Run]):
    """A DataFrame of `COLUMNS`: mean and standard error before and after, from the same noise; of
    JPEG tasks in kB. The effect size is the change of the mean reward in standard deviations of the
    pretrained policy's, positive in the intended direction; the Vendi ratio the share of the
    pretrained policy's Vendi score that is left. What ends in eta1 is by the training sampler,
    against the pretrained policy's set by that sampler."""
    import pandas as pd

    rows, clip = [], encoders.load_clip(profile.models["clip"])
    for run in table_runs:
        still, noisy = (measure(profile, run, eta, clip) for eta in etas(run).values())
        sign = -1 if run.reward == "jpeg_compressibility" else 1
        rows.append([
            run.policy, run.task, profile.evaluation.n,
            sign * still["before_mean"], still["before_sd"], still["before_se"],
            sign * still["reward_mean"], still["reward_se"], still["effect_size"],
            sign * noisy["reward_mean"], noisy["reward_se"], noisy["effect_size"],
            still["vendi_ratio"], noisy["vendi_ratio"],
        ])  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)


def share_over_50(images: np.ndarray, models: dict[str, str]) -> tuple[float, float]:
    """Share of faces that the age classifier puts at 50 or over, and its standard error."""
    classifier, first = encoders.load_age_classifier(models["age"]), min(encoders.OVER50)
    old = evaluation.score(
        images, lambda batch: (encoders.age_logits(classifier, batch).argmax(1) >= first).float()
    )
    return old.mean(), standard_error(old)


def scores(profile: Profile, run: Run, eta: float = 0.0) -> list[np.ndarray]:
    """Of the evaluation set before and after, (n,) each, entry i of both from the same noise."""
    return _score(run, sets(profile, run, eta))


def sets(profile: Profile, run: Run, eta: float, prompts: tuple | None = None) -> list[np.ndarray]:
    """The evaluation set at eta before and after, uint8 (n, H, W, C) each; of a policy that takes
    text of these prompts, by default those that it is finetuned on."""
    told = {"prompts": run.settings.prompts if prompts is None else prompts}
    told["guidance"] = run.guidance
    before = pretrained_pictures(profile, run.policy, run.settings.bf16, eta, **told)
    return [before, finetuned_pictures(profile, run, eta, **told)]


def _score(run: Run, both: list[np.ndarray]) -> list[np.ndarray]:
    reward, prompts = finetuning.load_reward(run), run.settings.prompts
    return [evaluation.score(images, reward, prompts=prompts) for images in both]
