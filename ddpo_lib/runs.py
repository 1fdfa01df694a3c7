"""A run's folder, which goes wherever its owner says:

settings.json         what decides the run, and the settings of memory and speed it last ran with
metrics.jsonl         one line before training and one an iteration, see `metrics`
development/NNN.npz   the development set after NNN iterations, by two samplers: see `development`
last/                 a DDPMPipeline folder with the optimizer and the position, to go on from
best/                 a DDPMPipeline folder of the highest reward; best.json says which
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from ddpo_lib.settings import Finetune


def iterations_done(home: Path) -> int:
    """Iterations that the run's last/ holds; 0 where there is none. ValueError if it is damaged."""
    if not (home / "last").exists():
        return 0
    with whole(home / "last"):
        return int(json.loads((home / "last" / "state.json").read_bytes())["iterations_done"])


def best(home: Path) -> dict:
    """best/'s record, written with its weights: `iteration` it is of, and the `reward` of the
    development set by which it was selected."""
    with whole(home / "best"):
        return read_json(home / "best" / "best.json")


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
    with (home / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
    _to_disk(home / "metrics.jsonl")


def development(home: Path, kind: str = "development") -> tuple[np.ndarray, np.ndarray]:
    """The development set, before training and after each iteration so far: pictures
    (n_iterations + 1, N, H, W, C) uint8 and rewards (n_iterations + 1, N); of the kind
    "development", drawn at eta = 0, or "stochastic", by the training sampler."""
    if kind not in (kinds := ("development", "stochastic")):
        raise ValueError(f"kind of development set {kind!r}: must be one of {kinds}")
    if not (files := _development_files(home)):
        raise ValueError(f"{home} holds no development set: finetune first")
    names = (f"{kind}_pictures", f"{kind}_rewards")
    sets = [[content[name] for name in names] for content in map(np.load, files)]
    return tuple(map(np.stack, zip(*sets, strict=True)))


def save_development(home: Path, iteration: int, sets: dict[str, tuple]) -> None:
    """Write development/NNN.npz, all or nothing; kind → its pictures and rewards."""
    file = home / "development" / f"{iteration:03d}.npz"
    named = {}
    for kind, (pictures, rewards) in sets.items():
        named |= {f"{kind}_pictures": pictures, f"{kind}_rewards": rewards}
    with replacing(file) as draft, draft.open("wb") as stream:
        np.savez_compressed(stream, **named)


def drop_after(home: Path, iteration: int) -> None:
    """Remove metrics and development sets of later iterations: a resumed run makes them again."""
    kept = [json.dumps(row) + "\n" for row in metrics(home) if row["iteration"] <= iteration]
    with replacing(home / "metrics.jsonl") as draft:
        draft.write_text("".join(kept), encoding="utf-8")
    for file in _development_files(home):
        if int(file.stem) > iteration:
            file.unlink()


def read_json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(file: Path, content: dict) -> None:
    """Write so that a reader, or a crash, sees the old file or the new one and nothing between."""
    with replacing(file) as draft:
        draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A draft's path; after its block, unless that raises, the draft takes the file's place. It is
    on the disk by then: a power cut leaves the old file or the new one, and none that is empty."""
    draft = file.with_name(f".{os.getpid()}-{file.name}")
    try:
        yield draft
        _to_disk(draft)
        os.replace(draft, file)
        _to_disk(file.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def hold(home: Path, wait: bool = True) -> Iterator[None]:
    """Own the run's folder: two processes never write to it, and a killed one frees it.
    RuntimeError if another process has it and `wait` is false."""
    from filelock import FileLock, Timeout

    with explained(home):
        home.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(home.with_name(f".{home.name}.lock"))
        try:
            held = lock.acquire(timeout=1)
        except Timeout:
            if not wait:
                raise RuntimeError(f"{home}: another process is at work on it") from None
            print(f"{home}: another process is at work on it; waiting for that to end")
            held = lock.acquire()
    with held:
        yield


def open_folder(home: Path, identity: dict, settings: Finetune) -> None:
    """Make the run's folder, or return to it. ValueError if it holds something else: another run,
    a longer one, or no run at all; OSError if it cannot be written."""
    file = home / "settings.json"
    with explained(home):
        home.mkdir(parents=True, exist_ok=True)
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
    with explained(home):
        write_json(file, {"identity": identity, "settings": dataclasses.asdict(settings)})
        (home / "development").mkdir(exist_ok=True)
        for name in (".*-settings.json", ".*-metrics.jsonl", "development/.*"):
            for draft in home.glob(name):  # of a process that was killed while it wrote
                draft.unlink()
        for target in (home / "last", home / "best"):
            old = target.with_name(target.name + ".previous")
            if old.exists() and not target.exists():  # a crash between `replacing_folder`'s renames
                old.rename(target)
            shutil.rmtree(old, ignore_errors=True)


def differences(old: dict, new: dict) -> list[str]:
    """What makes two identities different, "name old → new" each. A setting that `old` lacks is
    younger than that run, which had what is now its default."""
    after, defaults = _flat(new), _flat({"settings": dataclasses.asdict(Finetune())})
    before = {k: v for k, v in defaults.items() if k in after} | _flat(old)
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return [f"{name} {before.get(name)} → {after.get(name)}" for name in names]


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A draft folder; when its block ends without an error, it takes the target's place, as in
    `replacing`. Its files get the permissions of the user's umask, whoever wrote them."""
    draft, old = (target.with_name(target.name + end) for end in (".tmp", ".previous"))
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    yield draft
    os.umask(umask := os.umask(0))
    for path in (*draft.rglob("*"), draft):
        if path.is_file():
            path.chmod(0o666 & ~umask)
        _to_disk(path)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    draft.rename(target)  # `open_folder` mends a crash between these two renames
    _to_disk(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def explained(home: Path) -> Iterator[None]:
    """Turn an error of the disk into an OSError that says which folder it concerns, what is safe
    and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        advice = "Make it writable, free some space, or give another folder"
        safe = "what it holds is safe, and the next start goes on with it"
        raise OSError(f"cannot write the run's folder {home}: {error}. {advice}; {safe}") from error


def _to_disk(path: Path) -> None:
    """Wait until a file, or which files a folder has, would survive a power cut."""
    if path.is_file() or os.name == "posix":  # elsewhere folders cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def whole(folder: Path) -> Iterator[None]:
    """Turn whatever a damaged checkpoint raises into a ValueError that says what to do."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # the GPU is full, the files are all right
            raise
        said = f"the checkpoint {folder} is damaged ({type(error).__name__}: {error})"
        advice = f"To start the run again, move {folder.parent} elsewhere"
        raise ValueError(f"{said}. {advice}") from error


def _flat(content: dict, prefix: str = "") -> dict:
    flat = {}
    for k, v in content.items():
        v = list(v) if isinstance(v, tuple) else v  # as they come back from JSON
        flat |= _flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}
    return flat


def _development_files(home: Path) -> list[Path]:
    return sorted((home / "development").glob("[0-9]*.npz"), key=lambda file: int(file.stem))
