"""A run's folder, which goes wherever its owner says:

settings.json         what decides the run, and the settings of memory and speed it last ran with
metrics.jsonl         one line before training and one an iteration, see `metrics`
development/NNN.npz   the development set after NNN iterations, by two samplers: see `development`
last/                 a DDPMPipeline folder with the optimizer and the position, to go on from
best/                 a DDPMPipeline folder, see `select_by`; best.json says of which iteration
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ddpo_lib import disk
from ddpo_lib.settings import Finetune


def iterations_done(home: Path) -> int:
    """Iterations that the run's last/ holds; 0 where there is none. ValueError if it is damaged."""
    if not (home / "last").exists():
        return 0
    with whole(home / "last", home):
        return int(disk.read_json(home / "last" / "state.json")["iterations_done"])


def best(home: Path) -> dict:
    """best/'s record, written with its weights: `iteration` it is of, and the `reward` of the
    development set then; see `settings.Finetune.select_by`."""
    with whole(home / "best", home):
        return disk.read_json(home / "best" / "best.json")


def metrics(home: Path) -> list[dict]:
    """The lines of metrics.jsonl, less a last one that a crash cut short.

    Each has iteration (how many are done; 0 is before training) and of the development set at
    eta = 0 the rewards' mean and sd, development_reward and development_sd, development_spread, see
    `diversity.spread`, and, of a run with `embed`, development_vendi; and as much of it by the
    training sampler, stochastic_reward ….
    Others than the first also have reward_mean, reward_sd, seconds; the means over
    the iteration's updates of grad_norm, learning_rate and what the objective logs (for DDPO loss,
    mean_ratio, clip_fraction, kl in nats per trajectory); and the lists `rewards`, one a sample,
    and `updates`, one dict an optimizer step.
    """
    file, rows = home / "metrics.jsonl", []
    # A whole line ends with a newline.
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{file}, line {number} is damaged: {error}") from error
    return rows


def append_metrics(home: Path, row: dict) -> None:
    """Add one line, after whatever whole lines there are."""
    with disk.explained(home):
        with (home / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(disk.to_json(row) + "\n")
        disk.to_disk(home / "metrics.jsonl")


def development(home: Path, kind: str = "development") -> tuple[np.ndarray, np.ndarray]:
    """The development set, before training and after each iteration so far: pictures
    (n_iterations + 1, N, H, W, C) uint8 and rewards (n_iterations + 1, N); of the kind
    "development", drawn at eta = 0, or "stochastic", by the training sampler."""
    if kind not in (kinds := ("development", "stochastic")):
        raise ValueError(f"kind of development set {kind!r}: must be one of {kinds}")
    if not (files := _development_files(home)):
        raise ValueError(f"{home} holds no development set: finetune first")
    names, sets = (f"{kind}_pictures", f"{kind}_rewards"), []
    for file in files:
        with whole(file, home), np.load(file) as content:
            sets.append([content[name] for name in names])
    return tuple(map(np.stack, zip(*sets, strict=True)))


def save_development(home: Path, iteration: int, sets: dict[str, tuple]) -> None:
    """Write development/NNN.npz, all or nothing; kind → its pictures and rewards."""
    file = home / "development" / f"{iteration:03d}.npz"
    named = {}
    for kind, (pictures, rewards) in sets.items():
        named |= {f"{kind}_pictures": pictures, f"{kind}_rewards": rewards}
    with disk.replacing(file) as draft, draft.open("wb") as stream:
        np.savez_compressed(stream, **named)


def drop_after(home: Path, iteration: int) -> None:
    """Remove metrics and development sets of later iterations: a resumed run makes them again."""
    kept = [disk.to_json(row) + "\n" for row in metrics(home) if row["iteration"] <= iteration]
    with disk.replacing(home / "metrics.jsonl") as draft:
        draft.write_text("".join(kept), encoding="utf-8")
    with disk.explained(home):
        for file in _development_files(home):
            if int(file.stem) > iteration:
                file.unlink()


def open_folder(home: Path, identity: dict, settings: Finetune) -> None:
    """Make the run's folder, or return to it. ValueError if it holds something else: another run,
    a longer one, or no run at all, or is damaged; OSError if it cannot be written."""
    file, replaced = home / "settings.json", (home / "last", home / "best")
    with disk.explained(home):
        home.mkdir(parents=True, exist_ok=True)
    if links := [str(folder) for folder in replaced if folder.is_symlink()]:
        advice = f"put the folder itself there, or make a link of {home}"
        raise ValueError(f"{links} are links, which the next checkpoint would replace: {advice}")
    if file.exists():
        try:
            stored = dict(json.loads(file.read_bytes())["identity"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error!r}): move {home} elsewhere") from error
        if changes := differences(stored, identity):
            other = f"{home} holds a run with other settings: {'; '.join(changes)}"
            raise ValueError(f"{other}. Give another folder, or return to that run's settings")
        if (done := iterations_done(home)) > settings.n_iterations:
            more = f"{home} holds {done} iterations, more than n_iterations={settings.n_iterations}"
            raise ValueError(f"{more}: give another folder")
    elif any(not entry.name.startswith(".") for entry in home.iterdir()):
        raise ValueError(f"{home} is not empty, and no run: settings.json is missing")
    with disk.explained(home):
        disk.write_json(file, {"identity": identity, "settings": dataclasses.asdict(settings)})
        for target in replaced:
            old = target.with_name(target.name + ".previous")
            if old.exists() and not target.exists():  # a crash between `replacing_folder`'s renames
                old.rename(target)
            shutil.rmtree(old, ignore_errors=True)
    _check_whole(home)


def _check_whole(home: Path) -> None:
    """ValueError for a run that lacks some of what its checkpoint says was done."""
    done, iterations = iterations_done(home), [row["iteration"] for row in metrics(home)]
    begun = (home / "last").exists()
    # A crash may leave one line more than the checkpoint knows, and two before there is one.
    if iterations != [*range(len(iterations))] or not done + begun <= len(iterations) <= done + 2:
        lines = f"lines of iterations {iterations}, and last/ holds {done} iterations"
        advice = f"put back what is missing, or start again: move {home} elsewhere"
        raise ValueError(f"{home / 'metrics.jsonl'} is damaged: it has {lines}; {advice}")
    if begun:
        best(home)


def forget(home: Path) -> None:
    """Free the folder of a run that failed before it had drawn anything, such as by its reward: the
    mended reward makes another run."""
    made = {"development", "metrics.jsonl", "settings.json"}
    if not metrics(home) and {entry.name for entry in home.iterdir()} <= made:
        shutil.rmtree(home, ignore_errors=True)


def differences(old: dict, new: dict) -> list[str]:
    """What makes two identities different, "name old → new" each. A setting that `old` lacks is
    younger than that run, which had what is now its default."""
    after, defaults = _flat(new), _flat({"settings": dataclasses.asdict(Finetune())})
    before = {k: v for k, v in defaults.items() if k in after} | _flat(old)
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return [f"{name} {before.get(name)} → {after.get(name)}" for name in names]


@contextlib.contextmanager
def whole(part: Path, home: Path) -> Iterator[None]:
    """Turn whatever a damaged part of a run raises into a ValueError that says what to do."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # the GPU is full, the files are all right
            raise
        said = f"{part} is damaged ({type(error).__name__}: {error})"
        advice = f"Put back a copy of it or, to start the run again, move {home} elsewhere"
        raise ValueError(f"{said}. {advice}") from error


def _flat(content: dict, prefix: str = "") -> dict:
    flat = {}
    for k, v in content.items():
        v = list(v) if isinstance(v, tuple) else v  # as they come back from JSON
        flat |= _flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}
    return flat


def _development_files(home: Path) -> list[Path]:
    return sorted((home / "development").glob("[0-9]*.npz"), key=lambda file: int(file.stem))
