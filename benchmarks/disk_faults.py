"""Meet a fault of the disk at every change that a finetuning makes, go on, and compare.

    python benchmarks/disk_faults.py [--kinds kill torn full read_only] [--every 1]

kill       SIGKILL before the change
torn       SIGKILL in the middle of a write
full       from this change on, whatever needs space fails with ENOSPC
read_only  from this change on, everything fails with EROFS
power_cut  the disk is an image that is copied at ten moments; root alone may mount it

The finetuning is kill_anywhere.py's, of two iterations. A library that is loaded before all others
(disk_faults.c, built by cc) counts its changes under one folder, those of safetensors' Rust code
too. After the fault the finetuning is started again on the same folder, and every file that it
leaves must equal, bit for bit but for seconds, what a finetuning without a fault leaves.

Prints one JSON object a kind, and exits with 1 where something differs. Linux only.
"""

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from kill_anywhere import contents, finetune_tiny, start

KINDS = ("kill", "torn", "full", "read_only")
"""As disk_faults.c numbers them, from 1."""
N_ITERATIONS = 2
CUTS, CUT_ITERATIONS = 10, 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = (*KINDS, "power_cut")
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=KINDS)
    parser.add_argument("--every", type=int, default=1, help="only every so many changes")
    arguments = parser.parse_args()
    if "LD_PRELOAD" not in os.environ:
        preload(sys.argv)
    faults = ctypes.CDLL(os.environ["LD_PRELOAD"])
    with tempfile.TemporaryDirectory() as folder:
        unbroken = Path(folder) / "unbroken" / "run"
        status, n_changes, _ = attempt(faults, unbroken)
        if status:
            sys.exit("the finetuning failed when left alone")
        expected = contents(unbroken)
        results = [
            try_all(faults, Path(folder), kind, range(1, n_changes + 1, arguments.every), expected)
            for kind in arguments.kinds if kind != "power_cut"
        ]  # fmt: skip
        if "power_cut" in arguments.kinds:
            results.append(cut_power(Path(folder)))
            print(json.dumps(results[-1]), flush=True)
    sys.exit(any(result["wrong"] for result in results))


def preload(argv: list[str]) -> None:
    """Start this script again with the library of faults loaded before all others."""
    source, library = Path(__file__).with_suffix(".c"), Path(tempfile.mkdtemp()) / "disk_faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    own = {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    os.execve(sys.executable, [sys.executable, *argv], os.environ | own)


def try_all(faults, folder: Path, kind: str, moments: range, expected: dict) -> dict:
    """A fault of a kind at each of the moments: how many ended the process, what was wrong."""
    ended, wrong, said = 0, [], Counter()
    for at in moments:
        home = folder / f"{kind}-{at}" / "run"
        status, _, message = attempt(faults, home, kind, at)
        ended += status != 0
        if status == 1:
            said[message.replace(str(home), "HOME")] += 1
            if "\n" in message or str(home) not in message:
                wrong.append(f"at {at}: {message}")
        status, _, message = attempt(faults, home)
        if status or contents(home) != expected:
            wrong.append(f"at {at}, going on: {message or 'another result'}")
        shutil.rmtree(home.parent)
    result = {"kind": kind, "faults": len(moments), "ended_it": ended, "wrong": wrong}
    print(json.dumps(result | {"said": said.most_common(8)}), flush=True)
    return result


def attempt(faults, home: Path, kind: str | None = None, at: int = 0) -> tuple[int, int, str]:
    """The finetuning in a process of its own, with a fault at one of its changes, or with none:
    exit status (1 after an error, negative after a signal), changes counted, the error."""
    home.parent.mkdir(parents=True, exist_ok=True)
    told, tell = os.pipe()
    if (child := os.fork()) == 0:
        os.close(told)
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        root, number = str(home.parent).encode(), KINDS.index(kind) + 1 if kind else 0
        faults.faults_arm(root, ctypes.c_long(at), number)
        status, message = 0, ""
        try:
            finetune_tiny(home, N_ITERATIONS)
        except Exception as error:
            status, message = 1, f"{type(error).__name__}: {error}"
        os.write(tell, json.dumps([faults.faults_seen(), message]).encode())
        os._exit(status)
    os.close(tell)
    with os.fdopen(told) as stream:
        seen, message = json.loads(stream.read() or '[0, ""]')
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), seen, message


def cut_power(folder: Path) -> dict:
    """A finetuning on a disk that is an image: copies of it, made while the process stands still,
    are what a power cut leaves. Each is mounted, looked at for files that are empty, and used."""
    image, disk, wrong, done = folder / "disk.img", folder / "disk", [], []
    subprocess.run(["truncate", "--size=64M", image], check=True)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    unbroken = folder / "unbroken-long"
    start(unbroken, CUT_ITERATIONS).wait()
    expected = contents(unbroken)
    with mounted(image, disk):
        process = start(disk / "run", CUT_ITERATIONS)
        copies = []
        for i in range(CUTS):
            time.sleep(0.8)
            process.send_signal(signal.SIGSTOP)
            copies.append(shutil.copy(image, folder / f"cut-{i}.img"))
            process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
    for copy in copies:
        with mounted(copy, disk):
            home = disk / "run"
            files = [p for p in home.rglob("*") if p.is_file() and not is_draft(p, home)]
            wrong += [f"{copy}: {p} is empty" for p in files if not p.stat().st_size]
            done.append(len(files))
            if start(home, CUT_ITERATIONS).wait() or contents(home) != expected:
                wrong.append(f"{copy}: another result")
    return {"kind": "power_cut", "faults": CUTS, "files_found": done, "wrong": wrong}


@contextlib.contextmanager
def mounted(image: Path, disk: Path) -> Iterator[None]:
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, disk], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", disk], check=True)


def is_draft(file: Path, home: Path) -> bool:
    """Whether a file has no final name yet: see `disk.replacing` and `disk.replacing_folder`."""
    return any(p.startswith(".") or p.endswith(".tmp") for p in file.relative_to(home).parts)


if __name__ == "__main__":
    main()
