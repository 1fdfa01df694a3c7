"""Run the batch: `python -m ddpo_lib.book.reproduce toy --cores 2`, what `make reproduce` does.

With --seeds the finetunings of all seeds and their tables instead, as `make seeds`. Whatever ends
this process, or make that has started it, ends all that the batch has started too.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from ddpo_lib.book import batch, paths

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
PATIENCE = 15
"""Seconds in which what was asked to end may save what it has done."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ddpo_lib.book.reproduce")
    parser.add_argument("profile")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--seeds", action="store_true")
    given = parser.parse_args()
    try:
        print(batch.plan(given.profile, given.cores, given.seeds), flush=True)
        failed = run(snakemake(given.profile, given.cores, *["--", "seeds"] * given.seeds))
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"Nothing was done: {error}")
    except KeyboardInterrupt:
        print("Stopped. What is done is kept; start it again, and it goes on.", flush=True)
        sys.exit(130)
    if not given.seeds:
        print(batch.missing(given.profile) if failed else batch.report(given.profile))
    sys.exit(failed)


def snakemake(profile: str, cores: int, *target: str) -> list[str]:
    """The batch's command. Snakemake's own lock outlives a kill and would block the next start, so
    it is off. What must never happen twice at once, the finetuning of one run, takes a lock that
    dies with its process. With every job that ends, Snakemake asks once a second more whether
    another may start: 4 % of a core after fifty jobs. With 5s it asks every five seconds."""
    options = ["--nolock", "--rerun-incomplete", "--keep-going", "--quiet", "host"]
    options += ["--max-jobs-per-timespan", "100/5s"]
    settings = ["--cores", str(cores), "--config", f"profile={profile}"]
    return [sys.executable, "-m", "snakemake", *settings, *options, *target]


def run(command: list[str]) -> int:
    """Its exit status. KeyboardInterrupt, after all that it has started was ended, when a signal
    comes or the process that has started this one is gone."""
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    parent = os.getppid()
    # In a session of its own, so that a Ctrl-C reaches it once, and from here.
    process = subprocess.Popen(
        command, cwd=paths.ROOT, env=os.environ | {"PATH": path}, start_new_session=True
    )
    try:
        while process.poll() is None:
            if os.getppid() != parent:
                raise KeyboardInterrupt
            time.sleep(0.2)
        return process.returncode
    finally:
        end(process.pid)


def end(pid: int) -> None:
    """End a process and all that it has started, kernels in sessions of their own among them."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
        for ask in (psutil.Process.terminate, psutil.Process.kill):
            for each in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    ask(each)
            _, family = psutil.wait_procs(family, PATIENCE)


def _interrupt(number, frame) -> None:
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # once is enough
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
