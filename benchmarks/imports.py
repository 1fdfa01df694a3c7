"""What importing costs: CPU seconds of one thread, over what torch alone costs.

    python benchmarks/imports.py [--repeats 3]

Prints one JSON object: seconds of the two baselines, and for each module what it adds to its own
(medians). A module that pulls in diffusers, transformers or open_clip shows here at once.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

BASELINES = {"torch": "import torch", "torch and pyplot": "import torch, matplotlib.pyplot"}
MODULES = {
    "ddpo_lib.policy": "torch",
    "ddpo_lib.objectives.ddpo": "torch",
    "ddpo_lib.finetune": "torch",
    "ddpo_lib.rewards": "torch",
    "ddpo_lib.book.figures": "torch and pyplot",
    # All that a notebook imports which loads no model.
    "ddpo_lib.book.notebook, ddpo_lib.book.figures, ddpo_lib.book.profiles": "torch and pyplot",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    base = {name: median(code, repeats) for name, code in BASELINES.items()}
    added = {
        modules: round(median(f"{BASELINES[on]}; import {modules}", repeats) - base[on], 2)
        for modules, on in MODULES.items()
    }
    print(json.dumps({"baseline_s": {k: round(v, 2) for k, v in base.items()}, "added_s": added}))


def median(code: str, repeats: int) -> float:
    return statistics.median(cpu_seconds(code) for _ in range(repeats))


def cpu_seconds(code: str) -> float:
    code = f"{code}\nimport time; print(time.process_time())"
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=one_thread, capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
