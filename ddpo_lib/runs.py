"""A run's folder, data/runs/<profile>/<policy>-<task>-s<seed>/:

settings.json         everything that decided the run, with sha256 of its models or, from the Hub,
                      their commits
metrics.csv           one row per optimizer step, see `ppo.UpdateMetrics`
iterations.csv        one row per iteration: training and development rewards, seconds
rewards.csv           every sampled picture's reward
development/NNN.npz   the development set after NNN iterations: pictures and rewards
last/, best/          DDPMPipeline folders; last/ also has the optimizer and the position, best/ a
                      model card
evaluation.npz        the evaluation set's pictures
evaluation.json       their scores, written when everything is done
"""

import contextlib
import csv
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file

from ddpo_lib import config, hub, model_card, paths, policy
from ddpo_lib.config import Run


def folder(run: Run) -> Path:
    """Where the run lives, whether or not it exists yet."""
    return paths.RUNS / run.profile / run.name


@contextlib.contextmanager
def hold(run: Run) -> Iterator[None]:
    """Own the run's folder: two processes never write to it, and a killed one frees it.

    Waits while another process has it, for instance one that outlived a batch that was killed.

    Raises:
        OSError: the folder cannot be written; says which and what to do.
    """
    with _explained(folder(run)):
        folder(run).parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder(run).with_name(f".{run.name}.lock"))
        try:
            lock.acquire(timeout=1)
        except Timeout:
            print(f"{run.name}: another process is at work on it; waiting for that to end")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def open_folder(run: Run) -> Path:
    """Make the run's folder, or return to it.

    A folder made under other settings (or from other pretrained weights) is set aside under a new
    name, never overwritten.

    Raises:
        OSError: the folder cannot be written; says which and what to do.
    """
    home = folder(run)
    settings = _as_json(run)
    with _explained(home):
        file = home / "settings.json"
        if file.exists():
            stored = json.loads(file.read_text())
            changes = config.differences(stored, settings)
            if not changes:
                write_json(file, settings)  # memory settings may be others now
                _finish_replacement(home / "last")
                _finish_replacement(home / "best")
                return home
            n = 1
            while (aside := home.with_name(f"{home.name}.old{n}")).exists():
                n += 1
            home.rename(aside)
            print(
                f"{run.name}: settings changed ({', '.join(changes)}); "
                f"the earlier run is kept in {aside}"
            )
        (home / "development").mkdir(parents=True, exist_ok=True)
        write_json(file, settings)
    return home


def write_json(file: Path, content: dict) -> None:
    """Write so that a reader, or a crash, sees the old file or the new one and nothing between."""
    draft = file.with_name(file.name + ".tmp")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(draft, file)


def append_rows(file: Path, rows: list[dict]) -> None:
    """Append rows to a CSV, with a header if it is new."""
    new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        if new:
            writer.writeheader()
        writer.writerows(rows)


def drop_rows(file: Path, from_iteration: int) -> None:
    """Remove the rows of iterations that a resumed run will make again."""
    if not file.exists():
        return
    with file.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if int(row["iteration"]) < from_iteration]
    draft = file.with_name(file.name + ".tmp")
    draft.unlink(missing_ok=True)
    if rows:
        append_rows(draft, rows)
        os.replace(draft, file)
    else:
        file.unlink()


def development(home: Path) -> tuple[np.ndarray, np.ndarray]:
    """The development set before the first and after every iteration so far.

    Returns:
        Pictures (n_iterations + 1, N, H, W, C) uint8 and rewards (n_iterations + 1, N).
    """
    sets = [np.load(file) for file in sorted((home / "development").glob("*.npz"))]
    return np.stack([s["pictures"] for s in sets]), np.stack([s["rewards"] for s in sets])


def save_checkpoint(
    home: Path, model: policy.Policy, optimizer: torch.optim.Optimizer, state: dict
) -> None:
    """Write last/: the policy, the optimizer's moments and `state` (JSON), all or nothing."""
    draft = _draft(home / "last")
    policy.save(model, draft)
    moments = {
        f"{i}.{key}": value.contiguous()  # they are channels_last, as the weights are
        for i, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }
    save_file(moments, draft / "optimizer.safetensors")
    write_json(draft / "state.json", state)
    _replace_folder(draft, home / "last")


def load_learner(home: Path, bf16: bool) -> policy.Policy:
    """The policy in last/. Raises ValueError if last/ is damaged."""
    with _whole(home / "last"):
        return policy.load(home / "last", bf16=bf16)


def load_checkpoint(home: Path, optimizer: torch.optim.Optimizer) -> dict:
    """Restore the optimizer from last/ and return the state. Raises ValueError if it is damaged."""
    with _whole(home / "last"):
        state = json.loads((home / "last" / "state.json").read_text())
        moments = load_file(home / "last" / "optimizer.safetensors")
    restored: dict[int, dict] = {}
    for name, value in moments.items():
        i, key = name.split(".")
        restored.setdefault(int(i), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": restored})
    return state


def save_best(home: Path, model: policy.Policy) -> None:
    """Write best/, a plain DDPMPipeline folder with a model card, all or nothing."""
    draft = _draft(home / "best")
    policy.save(model, draft)
    (draft / "README.md").write_text(model_card.write(home))
    _replace_folder(draft, home / "best")


def fingerprint(source: str) -> str | None:
    """What tells a source's weights from others, so that retrained weights are other settings.

    sha256 of a local folder's or file's weights; the commit of a model on the Hub; None for a
    folder without weights.
    """
    path = Path(source)
    kinds = (".safetensors", ".bin", ".pth")
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in kinds)
    if not files:
        return hub.commit(source)
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _explained(home: Path) -> Iterator[None]:
    """Say of an error of the disk which folder it concerns and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write the run's folder {home}: {error}. Make it writable, free some space, or "
            "set DDPO_ROOT to a folder that is"
        ) from error


def _as_json(run: Run) -> dict:
    content = dataclasses.asdict(run)
    local, remote = {}, {}
    for name, source in run.sources.items():
        source = paths.resolve(source)
        (remote if hub.locate(source) else local)[name] = fingerprint(source)
    content["sha256"] = local
    if remote:
        content["commits"] = remote
    return json.loads(json.dumps(content))


@contextlib.contextmanager
def _whole(last: Path) -> Iterator[None]:
    """Turn whatever a damaged checkpoint raises into a ValueError that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError:  # the GPU is full, and nothing is wrong with the files
        raise
    except Exception as error:
        raise ValueError(
            f"the checkpoint {last} is damaged ({type(error).__name__}: {error}). To start the run "
            f"again, move {last.parent} elsewhere: its best/ is a whole policy, and its CSVs and "
            "development pictures are as they were"
        ) from error


def _draft(target: Path) -> Path:
    draft = target.with_name(target.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    return draft


def _replace_folder(draft: Path, target: Path) -> None:
    """Put `draft` in the place of `target`; `_finish_replacement` mends a crash in between."""
    old = target.with_name(target.name + ".previous")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    draft.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _finish_replacement(target: Path) -> None:
    old = target.with_name(target.name + ".previous")
    if old.exists() and not target.exists():
        old.rename(target)
