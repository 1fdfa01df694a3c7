"""One finetuning of a profile: the folder where it lives, what it is made of, and the run itself.

A run's folder is the library's, see `ddpo_lib.runs`. The book adds profile.json, which tells this
run from others of its name; evaluation.npz and evaluation.json, see `results`; and a model card.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ddpo_lib import disk, diversity, encoders, hub, objectives, parallel, policy, rewards, runs
from ddpo_lib import finetune as loop
from ddpo_lib.book import model_cards, paths, profiles
from ddpo_lib.book.profiles import Run
from ddpo_lib.identity import fingerprint

DECISIVE = (".safetensors", ".bin", ".pth", ".json", ".txt")
"""A model's files that decide what it does: weights and configurations."""


def home(run: Run) -> Path:
    """Where the run lives: data/runs/<profile>/<run.name>, or the same with -2, -3, … at its end.

    It is the first of these that is free or holds this very run, or a shorter one to go on from. So
    runs of one name under other settings live beside each other. Nothing is changed by asking.
    """
    for n in itertools.count(1):
        folder = paths.RUNS / run.profile / (run.name if n == 1 else f"{run.name}-{n}")
        record = _recorded(folder)
        if record is None:
            fits = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        else:
            fits = not runs.differences(record, _record(run, record))
        if fits and runs.iterations_done(folder) <= run.settings.n_iterations:
            return folder


def begun(run: Run) -> bool:
    """Whether there is anything of the run."""
    return _recorded(home(run)) is not None


def iterations_done(run: Run) -> int:
    """Iterations that the run's folder holds."""
    return runs.iterations_done(home(run))


def is_complete(run: Run) -> bool:
    """Trained to the end, and evaluated then."""
    file, n = home(run) / "evaluation.json", run.settings.n_iterations
    evaluated = file.exists() and disk.read_json(file)["iterations"]
    return evaluated == iterations_done(run) == n


def load_policy(run: Run) -> policy.Policy:
    """The pretrained policy."""
    source = _sources(run)["policy"]
    return policy.load(source, bf16=run.settings.bf16, guidance=run.guidance)


def load_reward(run: Run) -> rewards.Reward:
    """The run's reward."""
    if callable(run.reward):
        return run.reward
    return rewards.load(run.reward, _sources(run), jpeg_encoding=run.jpeg_encoding)


def finetune(run: Run, on_iteration: Callable | None = None) -> Path:
    """Finetune, or go on with, or return, the run: `ddpo_lib.finetune.finetune` in its `home`, and
    a model card. Nothing is written before everything is loaded and checked. Returns the home."""
    unfinished = iterations_done(run) < run.settings.n_iterations
    if unfinished:
        base, reward = load_policy(run), load_reward(run)
        with _claimed(run) if parallel.is_main() else contextlib.nullcontext():
            parallel.wait()
            channels, *size = base.image_shape
            seen = encoders.can_see(3 if base.text else channels, *size)
            clip = encoders.load_clip(run.models["clip"]) if seen else None  # for the Vendi scores
            loop.finetune(
                base, reward, run.objective, run.settings, home(run), seed=run.seed,
                objective_settings=run.objective_settings, on_iteration=on_iteration,
                embed=functools.partial(diversity.embed, clip=clip) if seen else None,
            )  # fmt: skip
    folder = home(run)
    if parallel.is_main() and (unfinished or not (folder / "best" / "README.md").exists()):
        model_cards.save(folder)
    return folder


def identify(source: str, recorded: str | None = None) -> str:
    """What tells a model from others: a sha256 of a local one's files; "<repository>@<commit>" of
    the Hub's, which, if the source has no commit's 40 digits, is as recorded, else the newest."""
    path, digest = Path(source), hashlib.sha256()
    if not path.is_absolute():
        repository, _, revision = source.partition("@")
        if re.fullmatch("[0-9a-f]{40}", revision):
            return source
        if recorded is not None:
            return recorded if recorded.startswith(f"{repository}@") else source
        return f"{repository}@{hub.commit(source)}"
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.suffix in DECISIVE]
    for file in sorted(files):
        digest.update(f"{file.relative_to(path)} {_sha256(file, file.stat().st_mtime_ns)}".encode())
    return digest.hexdigest()


@functools.cache
def _sha256(file: Path, modified: int) -> str:
    return disk.sha256(file)


def _models(run: Run) -> dict[str, str]:
    """The models that decide the run → their sources: the profile's, and those that a reward of
    one's own names, name → source, in its attribute `models`."""
    if run.reward in rewards.REWARDS:
        needed = {name: run.models[name] for name in rewards.MODELS.get(run.reward, ())}
    else:
        reward = run.reward if callable(run.reward) else rewards.load(run.reward)
        needed = getattr(reward, "models", {})
    return {"policy": run.source} | needed


def _sources(run: Run) -> dict[str, str]:
    """As `_models`, but the Hub's at the commit that the run begins, or began, with."""
    recorded = (_recorded(home(run)) or _record(run))["models"]
    return _models(run) | {name: model for name, model in recorded.items() if "@" in model}


def _record(run: Run, old: dict | None = None) -> dict:
    """What decides the run; or would, if it were the one whose record is given."""
    objective, reward, own = objectives.load(run.objective), run.reward, []
    if not objective.__name__.startswith("ddpo_lib."):
        own = [getattr(objective, name, None) for name in objectives.PARTS]
    if reward not in rewards.REWARDS:
        own.append(reward if callable(reward) else rewards.load(reward))
        reward = f"own:{rewards.name(reward)}" if callable(reward) else reward
    record = {
        "policy": run.policy, "task": run.task, "seed": run.seed, "reward": reward,
        "jpeg_encoding": run.jpeg_encoding if reward in rewards.JPEG else None,
        "settings": run.settings.decisive, "objective": run.objective,
        "guidance": run.guidance if run.settings.prompts else None,
        "objective_settings": dataclasses.asdict(run.objective_settings),
        "own_code": fingerprint(own) if own else None,
        "models": {
            name: identify(source, old and old["models"].get(name, ""))
            for name, source in _models(run).items()
            if not old or name in old["models"]  # a run that is older than an entry has the same
        },
        "base": old["base"] if old else paths.shown(run.source),  # for people
    }  # fmt: skip
    return json.loads(json.dumps(record))


def _recorded(folder: Path) -> dict | None:
    """The record of the run that has the folder."""
    for file in (folder / "profile.json", _claim(folder)):
        if file.is_file():
            try:
                return dict(json.loads(file.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{file} is damaged: move {folder} elsewhere") from error
    return None


def _claim(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.json")


@contextlib.contextmanager
def _claimed(run: Run) -> Iterator[None]:
    """Keep other runs out of the run's folder. Until the library has checked everything, and made
    the folder, the record lies beside it."""
    record, place = _recorded(home(run)) or _record(run), paths.RUNS / run.profile
    try:
        with disk.locked(place / "homes", limit=60):
            folder = home(run)
            if _recorded(folder) is None:
                disk.write_json(_claim(folder), record)
    except OSError as error:
        advice = "Make it writable, free some space, or set DDPO_ROOT to another folder"
        cause = error.__cause__ or error  # of `disk.explained`, which gives other advice
        raise OSError(f"cannot write runs to {place}: {cause}. {advice}") from error
    try:
        yield
    finally:
        if (folder / "settings.json").exists():
            disk.write_json(folder / "profile.json", record)
        _claim(folder).unlink(missing_ok=True)


def main() -> None:
    from ddpo_lib.book import results

    description = "Finetune and evaluate, in as many processes as `accelerate launch` starts."
    parser = argparse.ArgumentParser(description=description)
    for name in ("profile", "policy", "task", "--reward"):
        parser.add_argument(name)
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args())
    try:
        profile = profiles.load(given.pop("profile"))
        run = profile.run(**given)
    except ValueError as error:
        sys.exit(f"Nothing was run: {error}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        finetune(run)
        if parallel.is_main():
            results.finish(profile, run)
    except (OSError, ValueError, RuntimeError, FloatingPointError) as error:
        sys.exit(f"{run.name} stopped: {error}")
    except KeyboardInterrupt:
        sys.exit(130)  # what is kept has been said


if __name__ == "__main__":
    main()
