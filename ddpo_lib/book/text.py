"""Text-to-image, in the toy world: what finetuning does to prompts, seen in training and unseen.

A task of profile text is named <prompts>-<method>, such as many-ddpo. A prompt is a subject with
attributes: "a baby with a beard".
"""

import functools

import numpy as np

from ddpo_lib import diversity, encoders, evaluation, rewards, runs
from ddpo_lib.book import finetuning, results, seeds
from ddpo_lib.book.profiles import Profile, Run
from ddpo_lib.prompts import cycle
from ddpo_lib.toy import alignment

SCORES = ("alignment", "true", "aesthetic")
COLUMNS = [
    "prompts", "split", "method", "seed", "sampler", "n", "alignment_base", "alignment",
    "true_base", "true", "aesthetic_base", "aesthetic", "vendi_ratio",
]  # fmt: skip
N_SHOWN = 24
"""Images of each task and split that are kept for the notebooks."""


def tables(profile: Profile) -> dict:
    """What `make text` leaves in data/seeds/text."""
    of = seeds.finished(profile)
    whole, by_prompt = table(profile, of)
    curves, shown = along(profile, of), images(profile, of)
    return {"text": whole, "by_prompt": by_prompt, "along": curves, "images": shown}


def new_in(prompt: str, trained: tuple[str, ...]) -> str:
    """What training has not seen of a prompt: nothing, their pair, the subject, the attribute, or
    both."""
    (subject, attribute), *seen = (each.partition(" with ")[::2] for each in (prompt, *trained))
    subjects, attributes = map(set, zip(*seen, strict=True))
    if prompt in trained:
        return "nothing"
    fresh = (subject not in subjects, attribute not in attributes)
    return {(0, 0): "pair", (1, 0): "subject", (0, 1): "attribute", (1, 1): "both"}[fresh]


def table(profile: Profile, of: list[Run]):
    """Two DataFrames over runs, samplers and splits, trained and unseen: of `COLUMNS`, and of means
    for each prompt with what is `new` in it. Alignment is as the judge sees it, and truly; base is
    before finetuning. Of a prompt also the share of images that truly show the whole, and of those
    that are astray: churches for people, or people for churches."""
    import pandas as pd

    measures, clip = _measures(profile), encoders.load_clip(profile.models["clip"])
    rows, by_prompt, known = [], [], {}
    for run in of:
        for sampler, eta in results.etas(run).items():
            for split, prompts in _splits(run).items():
                both = results.sets(profile, run, eta, prompts)
                key = run.guidance, eta, prompts
                if key not in known:
                    known[key] = _view(both[0], prompts, measures, clip)
                (old, old_vendi), (new, vendi) = known[key], _view(both[1], prompts, measures, clip)
                seen = old.add_suffix("_base").join(new)
                task, method = run.task.split("-", 1)
                who = {"prompts": task, "split": split, "method": method, "seed": run.seed}
                who["sampler"] = sampler
                whole = {"n": len(seen), "vendi_ratio": vendi / old_vendi}
                rows.append({**who, **whole, **seen.mean()})
                for i, prompt in enumerate(prompts):
                    own = seen[i :: len(prompts)]
                    told = {"prompt": prompt, "new": new_in(prompt, run.settings.prompts)}
                    by_prompt.append({**who, "n": len(own), **own.mean(), **told})
    return pd.DataFrame(rows, columns=COLUMNS).round(4), pd.DataFrame(by_prompt).round(4)


def along(profile: Profile, of: list[Run]):
    """A DataFrame of the development sets of runs from iteration to iteration: the reward, the
    `SCORES` and the Vendi score, by both samplers."""
    import pandas as pd

    measures, rows = _measures(profile), []
    for run in of:
        home, prompts = finetuning.home(run), run.settings.prompts
        metrics, who = runs.metrics(home), [*run.task.split("-", 1), run.seed]
        for kind, sampler in (("development", "eta0"), ("stochastic", "eta1")):
            for i, drawn in enumerate(runs.development(home, kind)[0]):
                told = [metrics[i][f"{kind}_{name}"] for name in ("reward", "vendi")]
                scores = [score(drawn, prompts=prompts).mean() for score in measures.values()]
                rows.append([*who, sampler, i, *told, *scores])
    columns = ["prompts", "method", "seed", "sampler", "iteration", "reward", "vendi", *SCORES]
    return pd.DataFrame(rows, columns=columns).round(4)


def images(profile: Profile, of: list[Run]) -> dict[str, np.ndarray]:
    """The first images at eta = 0, uint8 (N_SHOWN, H, W, C), of each task's first seed and split:
    "many-ddpo trained", and before finetuning "many trained", of each guidance."""
    shown = {}
    for run in of:
        for split, prompts in _splits(run).items():
            if f"{run.task} {split}" not in shown:
                before, after = results.sets(profile, run, 0.0, prompts)
                base = f"{run.task.split('-')[0]} {split}, guidance {run.guidance:g}"
                shown |= {base: before[:N_SHOWN], f"{run.task} {split}": after[:N_SHOWN]}
    return shown


def _splits(run: Run) -> dict[str, tuple[str, ...]]:
    both = {"trained": run.settings.prompts, "unseen": run.settings.unseen_prompts}
    return {name: prompts for name, prompts in both.items() if prompts}


def _measures(profile: Profile) -> dict:
    """Name → a function of uint8 pictures and their prompts, which take turns, to scores (n,)."""
    taste = rewards.load("aesthetic", profile.models)
    judges = dict(zip(SCORES, (alignment.reward, alignment.truth, taste), strict=True))
    return {name: functools.partial(evaluation.score, reward=own) for name, own in judges.items()}


def _view(pictures, prompts, measures, clip) -> tuple:
    """A DataFrame, a row a picture, of scores and shares; and the Vendi score of all."""
    import pandas as pd

    scores = {name: score(pictures, prompts=prompts) for name, score in measures.items()}
    embedded = diversity.embed(pictures, clip)
    kinds = embedded @ encoders.embed_texts(clip, ["a person", "a church"]).detach().cpu().numpy().T
    asked = ["church" in prompt for prompt in cycle(prompts, len(pictures))]
    scores |= {"whole": scores["true"] == 1, "astray": kinds.argmax(1) != asked}
    return pd.DataFrame(scores, dtype=float), diversity.vendi_score(embedded)
