"""Files that are whole or not there, whatever ends the process; JSON; locks; errors of the disk."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
from safetensors import SafetensorError


def read_json(file: Path) -> dict:
    """ValueError for what is no longer as it was `sealed`."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if content.pop("seal", None) not in (None, sealed(content)["seal"]):
        raise ValueError(f"{file.name} is not what was written")
    return content


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(file: Path, content: dict) -> None:
    """Write so that a reader, or a crash, sees the old file or the new one and nothing between."""
    with replacing(file) as draft:
        draft.write_text(to_json(content, indent=1) + "\n", encoding="utf-8")


def to_json(content, indent: int | None = None) -> str:
    """JSON has no NaN and no infinity: they become null."""
    plain = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return json.dumps(plain, indent=indent, allow_nan=False)


def sealed(content: dict) -> dict:
    """The content with a checksum, at which `read_json` looks."""
    text = json.dumps(content, sort_keys=True)
    return content | {"seal": hashlib.sha256(text.encode()).hexdigest()}


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A draft's path; after its block, unless that raises, the draft takes the file's place. It is
    on the disk by then: a power cut leaves the old file or the new one, and none that is empty. The
    folder is made if need be."""
    draft = file.with_name(f".{os.getpid()}-{file.name}")
    with explained(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        _drop_drafts(file)
        try:
            yield draft
            to_disk(draft)
            os.replace(draft, file)
            to_disk(file.parent)
        finally:
            draft.unlink(missing_ok=True)


def _drop_drafts(file: Path) -> None:
    """Of processes that were killed while they wrote the file."""
    for draft in file.parent.glob(f".*-{file.name}"):
        pid = draft.name[1 : -len(file.name) - 1]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            draft.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A draft folder; when its block ends without an error, it takes the target's place, as in
    `replacing`. Its files get the permissions of the user's umask, whoever wrote them."""
    draft, old = (target.with_name(target.name + end) for end in (".tmp", ".previous"))
    with explained(target.parent):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        open_to_user(draft)
        for path in (*draft.rglob("*"), draft):
            to_disk(path)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        draft.rename(target)  # `open_folder` mends a crash between these two renames
        to_disk(target.parent)
        shutil.rmtree(old, ignore_errors=True)


def open_to_user(folder: Path) -> None:
    """Give the weights in a folder, which safetensors hides from others, the permissions of the
    user's umask."""
    os.umask(umask := os.umask(0))
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o666 & ~umask)


class NotWritten(OSError):
    """An error of the disk, explained."""


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn an error of the disk into one that says where it was, what is safe and what to do."""
    try:
        yield
    except NotWritten:
        raise
    except (OSError, SafetensorError) as error:
        advice = "Make it writable, free some space, or give another folder"
        safe = "what it holds is safe, and the next start goes on with it"
        raise NotWritten(f"cannot write {folder}: {error}. {advice}; {safe}") from error


def to_disk(path: Path) -> None:
    """Wait until a file, or which files a folder has, would survive a power cut."""
    if path.is_file() or os.name == "posix":  # elsewhere folders cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def locked(thing: Path, limit: float = math.inf) -> Iterator[None]:
    """Own a file or folder by a lock beside it, which a killed process frees: two processes never
    write to it. Says so where another has it; RuntimeError after `limit` seconds of that."""
    from filelock import FileLock, Timeout

    lock = FileLock(thing.with_name(f".{thing.name}.lock"))
    busy = f"{thing}: another process is at work on it"
    with explained(thing):
        thing.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = lock.acquire(timeout=1)
        except Timeout:
            if limit > 1:
                print(f"{busy}; waiting for that to end", flush=True)
            try:
                held = lock.acquire(timeout=limit - 1)
            except Timeout:
                raise RuntimeError(f"{busy}: wait until it has ended, and start again") from None
    with held:
        yield
