"""What several seeds say: `python -m ddpo_lib.book.seeds toy`, which ends `make seeds`.

Tables go to data/seeds/<profile>/, from where the notebooks read them: table_5_1_seeds.csv, a row a
finished run; factor_shifts.csv, what else changed in its images; and, in the toy world, fooled.csv,
the long runs from iteration to iteration, refitted.csv, what other reward models make of their last
images, and shares.csv, whom the faces show. Those of profiles methods and text are made by the
modules of these names.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from tqdm.auto import tqdm

from ddpo_lib import disk, encoders, evaluation, runs
from ddpo_lib.book import factors, finetuning, paths, profiles, results
from ddpo_lib.book.profiles import Profile, Run
from ddpo_lib.toy import refit, regressor, training

COLUMNS = [
    "policy", "task", "seed", "effect_size", "effect_size_eta1", "vendi_ratio", "vendi_ratio_eta1",
    "share_over_50",
]  # fmt: skip
FOOLED_COLUMNS = [
    "policy", "task", "seed", "sampler", "iteration", "proxy", "truth", "second_truth", "vendi",
]  # fmt: skip
FOOLED = "aesthetic-fooled"
"""The task that is driven on until the learned reward and the true one part."""


def tables(profile: Profile) -> dict:
    """Name of a file → its DataFrame."""
    made = {"table_5_1_seeds": table(profile), "factor_shifts": factor_shifts(profile)}
    if FOOLED in profile.tasks:
        made["fooled"] = fooled(profile, finished(profile, FOOLED))
        made["refitted"] = refitted(profile, finished(profile, FOOLED))
    return made | ({"shares": shares(profile)} if profile.is_toy else {})


def table(profile: Profile):
    """A DataFrame of `COLUMNS`, a row for every finished run of the batch and its other seeds;
    effect sizes and Vendi ratios as in `results.table_5_1`, share_over_50 of faces alone."""
    import pandas as pd

    rows = []
    for run in finished(profile):
        told = disk.read_json(finetuning.home(run) / "evaluation.json")
        still, noisy = told["eta0"], told["eta1"]
        rows.append([
            run.policy, run.task, run.seed, still["effect_size"], noisy["effect_size"],
            still["vendi_ratio"], noisy["vendi_ratio"], still.get("share_over_50", np.nan),
        ])  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS).round(4)


def factor_shifts(profile: Profile):
    """A DataFrame, a row a finished run, sampler and measure of `factors.measure`: its change by
    finetuning, in standard deviations of the pretrained policy's evaluation set."""
    import pandas as pd

    judge = regressor.load_regressor(paths.TOY / "regressor") if profile.is_toy else None
    rows = []
    for run, sampler, old, new in _before_and_after(
        profile, finished(profile), lambda images, policy: factors.measure(images, policy, judge)
    ):
        shifts = {name: float(evaluation.change(old[name], new[name])) for name in old}
        rows += [[run.policy, run.task, run.seed, sampler, *each] for each in shifts.items()]
    return pd.DataFrame(rows, columns=["policy", "task", "seed", "sampler", "factor", "d"]).round(4)


def shares(profile: Profile):
    """A DataFrame, a row a finished run of faces, sampler and group of `factors.GROUPS`: the share
    of the evaluation set that belongs to it, before finetuning and after."""
    import pandas as pd

    judge, rows = regressor.load_regressor(paths.TOY / "regressor"), []
    faces = [run for run in finished(profile) if run.policy == "faces"]
    for run, sampler, old, new in _before_and_after(
        profile, faces, lambda images, _: factors.shares(images, judge)
    ):
        rows += [[run.task, run.seed, sampler, name, old[name], new[name]] for name in old]
    columns = ["task", "seed", "sampler", "group", "before", "after"]
    return pd.DataFrame(rows, columns=columns).round(4)


def _before_and_after(profile: Profile, of: list[Run], view: Callable) -> Iterator[tuple]:
    """(run, sampler, before, after) of each run and sampler: what the view, a function of images
    and the policy's name, makes of the evaluation set; of a pretrained policy's once."""
    pretrained = {}
    for run in of:
        for sampler, eta in results.etas(run).items():
            before, after = results.sets(profile, run, eta)
            key = run.policy, run.settings.bf16, eta
            if key not in pretrained:
                pretrained[key] = view(before, run.policy)
            yield run, sampler, pretrained[key], view(after, run.policy)


def intervals(seeds, column: str, by=("policy", "task"), n_together: int = 1):
    """Of a table of seeds, the mean of a column over each task's seeds with its 95 % interval by
    Student's t: a DataFrame of mean, low, high and n by (policy, task); NaN for one seed. With
    n_together the intervals hold for so many of them at once (Bonferroni)."""
    found = seeds.groupby(list(by), sort=False)[column].agg(mean="mean", sd="std", n="count")
    reach = found.sd * [t_factor(n, n_together) for n in found.n]
    return found.assign(low=found["mean"] - reach, high=found["mean"] + reach).drop(columns="sd")


def t_factor(n: int, n_together: int = 1) -> float:
    """Half the width of the 95 % interval of a mean of n, in standard deviations of the n."""
    from scipy.stats import t

    return t.ppf(1 - 0.025 / n_together, n - 1) / n**0.5 if n > 1 else np.nan


def fooled(profile: Profile, of: list[Run]):
    """A DataFrame of `FOOLED_COLUMNS`: means over the development sets of runs, the proxy (the
    reward that is optimised) and the rater's true taste, as two regressors of different seeds read
    it, in standard deviations of the pretrained policy's evaluation set from that set's mean."""
    import pandas as pd

    rows = sum(each(functools.partial(_fooled, profile), of, "curves"), [])
    return pd.DataFrame(rows, columns=FOOLED_COLUMNS).round(4)


def _fooled(profile: Profile, run: Run) -> list[list]:
    """The rows of one run."""
    home, reward, rows = finetuning.home(run), finetuning.load_reward(run), []
    metrics = runs.metrics(home)
    views = [functools.partial(evaluation.score, reward=reward)]
    views += [functools.partial(taste, policy=run.policy, judge=judge) for judge in _judges()]
    for kind, eta in (("development", 0.0), ("stochastic", run.settings.eta)):
        base = results.pretrained_pictures(profile, run.policy, run.settings.bf16, eta)
        origin = [(values.mean(), values.std(ddof=1)) for values in (v(base) for v in views)]
        for i, drawn in enumerate(runs.development(home, kind)[0]):
            seen = zip(views, origin, strict=True)
            means = [(view(drawn).mean() - mean) / sd for view, (mean, sd) in seen]
            vendi = metrics[i][f"{kind}_vendi"]
            rows.append([run.policy, run.task, run.seed, f"eta{eta:g}", i, *means, vendi])
    return rows


def refitted(profile: Profile, of: list[Run]):
    """A DataFrame, a row a run of faces and sampler: `refit.promises` of every fourth set."""
    import pandas as pd

    judges = [functools.partial(taste, policy="faces", judge=judge) for judge in _judges()]
    drawings, rows = training.draw("faces", 1000, seed=100), []
    clip = encoders.load_clip(profile.models["clip"])
    for run in of:
        score = functools.partial(evaluation.score, reward=finetuning.load_reward(run))
        for kind, eta in (("development", 0.0), ("stochastic", run.settings.eta)):
            base = results.pretrained_pictures(profile, run.policy, run.settings.bf16, eta)
            images = runs.development(finetuning.home(run), kind)[0][::4]
            told = refit.promises(images, base, drawings, clip, score, judges, run.seed)
            rows.append({"task": run.task, "seed": run.seed, "sampler": f"eta{eta:g}", **told})
    return pd.DataFrame(rows).round(4)


def _judges() -> list[regressor.Regressor]:
    """Two, of different seeds."""
    return [regressor.load_regressor(paths.TOY / n) for n in ("regressor", "second-regressor")]


def taste(pictures: np.ndarray, policy: str, judge: regressor.Regressor) -> np.ndarray:
    """The rater's true score of uint8 pictures (n, H, W, C), as a regressor reads it, (n,)."""
    return factors.read(pictures, policy, judge)["taste"]


def each(view: Callable[[Run], object], of: Iterable[Run], title: str) -> list:
    """What the view makes of each run. As many processes work as torch has threads, of one thread
    each: together they are faster than one process with all the threads."""
    of = list(of)
    return list(tqdm(_processes().map(view, of), title, len(of)))


@functools.cache  # to import what they need takes each several seconds
def _processes() -> ProcessPoolExecutor:
    one_thread = (torch.set_num_threads, (1,))
    return ProcessPoolExecutor(torch.get_num_threads(), get_context("spawn"), *one_thread)


def finished(profile: Profile, task: str | None = None) -> list[Run]:
    """The runs of the batch, all seeds, that are complete; of one task, or of all."""
    wanted = [run for run in profile.batch(every_seed=True) if task in (None, run.task)]
    return [run for run in wanted if finetuning.is_complete(run)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ddpo_lib.book.seeds")
    parser.add_argument("profile")
    name = parser.parse_args().profile
    from ddpo_lib.book import methods, text  # which build on this module

    chapters = {"methods": methods.tables, "text": text.tables}
    folder = paths.OUTPUT / "data" / "seeds" / name
    try:
        profile = profiles.load(name)
        if not finished(profile):  # empty tables would replace those that are there
            raise ValueError(f"no run of profile {name} is finished: `make seeds PROFILE={name}`")
        for title, rows in chapters.get(name, tables)(profile).items():
            file = folder / f"{title}.{'npz' if isinstance(rows, dict) else 'csv'}"
            with disk.replacing(file) as draft:
                if isinstance(rows, dict):
                    np.savez_compressed(draft, **rows)
                else:
                    rows.to_csv(draft, index=False)
            print(f"{file}: {len(rows)} entries")
    except (OSError, ValueError) as error:
        sys.exit(f"Not done: {error}")


if __name__ == "__main__":
    main()
