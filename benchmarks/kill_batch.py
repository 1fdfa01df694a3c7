"""Kill the smoke batch three times, let it go on each time, and compare with one left alone.

    python benchmarks/kill_batch.py [--kills 3] [--seed 0]

Each kill is a SIGKILL of the batch and of all that it has started, after a random share of the time
that the batch takes when left alone. Every figure, table and finetuned policy must then be equal,
byte for byte, but for the minutes in Table A.1. Prints one JSON object, and exits with 1
where something differs.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import psutil

KEPT = ("figures/smoke/*.png", "figures/smoke/*.csv", "data/runs/smoke/*/*/unet/*.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        unbroken, killed = Path(folder) / "unbroken", Path(folder) / "killed"
        began = time.perf_counter()
        if start(unbroken).wait():
            log = (unbroken / "batch.log").read_text(encoding="utf-8")
            sys.exit(f"{log[-3000:]}\nthe batch failed when left alone")
        duration, done = time.perf_counter() - began, []
        for _ in range(arguments.kills):
            process = start(killed)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moments.uniform(0.05, 0.3) * duration)
                break  # the machine has become faster: it has come to its end
            kill(process)
            done.append(len(contents(killed)))
        failed = start(killed).wait()
        expected, found = contents(unbroken), contents(killed)
        differ = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    told = {"seconds_alone": round(duration), "files": len(expected), "files_at_each_kill": done}
    print(json.dumps(told | {"status_at_the_end": failed, "differ": differ}, indent=2))
    sys.exit(bool(failed or differ))


def start(root: Path) -> subprocess.Popen:
    """The batch, which writes under `root`."""
    root.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "ddpo_lib.book.reproduce", "smoke", "--cores", "2"]
    with open(root / "batch.log", "a") as log:
        output = {"stdout": log, "stderr": log}
        return subprocess.Popen(command, env=os.environ | {"DDPO_ROOT": str(root)}, **output)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for a process and all that it has started."""
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    psutil.wait_procs(family)


def contents(root: Path) -> dict[str, bytes]:
    """File name → bytes, of what must be equal."""
    files = (file for pattern in KEPT for file in root.glob(pattern))
    found = {str(file.relative_to(root)): file.read_bytes() for file in files}
    if (table := root / "figures/smoke/table_a_1.csv").exists():
        timeless = pd.read_csv(table).drop(columns="minutes").to_csv()
        found[str(table.relative_to(root))] = timeless.encode()
    return found


if __name__ == "__main__":
    main()
