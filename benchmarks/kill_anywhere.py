"""Kill a finetuning at random moments, let it go on each time, and compare with one left alone.

    python benchmarks/kill_anywhere.py [--kills 40] [--seed 0] [--iterations 60]

The finetuning is of a tiny policy with random weights, in a process of its own, on one thread. Each
kill is a SIGKILL after a random time from when the process has begun its work, so it falls
anywhere: rollout, update, development set, or any write. Every file that a run leaves must then be
equal, bit for bit, but for its seconds.

Prints one JSON object, and exits with 1 where something differs.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

from ddpo_lib import policy, runs
from ddpo_lib.finetune import finetune
from ddpo_lib.objectives import ddpo
from ddpo_lib.settings import Finetune


def finetune_tiny(home: Path, n_iterations: int) -> None:
    """Finetune a tiny policy with random weights, seconds; print "begun" first."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(
        8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **blocks
    )
    tiny = policy.Policy(unet.eval(), DDPMScheduler(1000))
    settings = Finetune(
        n_iterations=n_iterations, n_samples=8, minibatch_size=4, n_steps=5, n_development=4,
        learning_rate=1e-4, lr_schedule="warmup_cosine", peak_learning_rate=1e-3,
    )  # fmt: skip
    print("begun", flush=True)
    finetune(tiny, brightness, "ddpo", settings, home, seed=1,
             objective_settings=ddpo.Settings(clip_range=1e-2))  # fmt: skip


def brightness(images: torch.Tensor) -> torch.Tensor:
    return images.mean((1, 2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=60)
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        unbroken, killed = Path(folder) / "unbroken", Path(folder) / "killed"
        began = time.perf_counter()
        if start(unbroken, arguments.iterations).wait():
            sys.exit("the finetuning failed when left alone")
        duration = time.perf_counter() - began
        expected, kills, rounds = contents(unbroken), 0, 1
        done_at_kills = []
        while kills < arguments.kills:
            process = start(killed, arguments.iterations)
            try:
                # Long enough that all kills together get about once to the end, loading included.
                process.wait(moments.uniform(0, 4 * duration / arguments.kills))
                if process.returncode:
                    sys.exit(f"it failed by itself after {kills} kills")
                if contents(killed) != expected:
                    sys.exit(f"round {rounds} differs from the finetuning that was left alone")
                shutil.rmtree(killed)  # it was done before the next kill: another round
                rounds += 1
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                done_at_kills.append(runs.iterations_done(killed))
                print(f"kill {kills}: {done_at_kills[-1]} iterations done", file=sys.stderr)
        if start(killed, arguments.iterations).wait():
            sys.exit("it failed by itself after the last kill")
        same = contents(killed) == expected
    print(json.dumps({"kills": kills, "rounds": rounds, "iterations_done_at_kills": done_at_kills,
                      "bit_for_bit": same}))  # fmt: skip
    sys.exit(not same)


def start(home: Path, iterations: int) -> subprocess.Popen:
    """The process, once it has imported everything."""
    program = "import sys, kill_anywhere as k; k.finetune_tiny(sys.argv[1], int(sys.argv[2]))"
    process = subprocess.Popen(
        [sys.executable, "-c", program, home, str(iterations)], cwd=Path(__file__).parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.readline()
    return process


def contents(home: Path) -> dict:
    """All that a run leaves, by file."""
    found = {}
    for file in sorted(p for p in home.rglob("*") if p.is_file()):
        name = str(file.relative_to(home))
        if file.suffix == ".safetensors":
            found[name] = {k: v.numpy().tobytes() for k, v in load_file(file).items()}
        elif file.suffix == ".npz":
            found[name] = {k: v.tobytes() for k, v in np.load(file).items()}
        elif file.suffix == ".jsonl":
            found[name] = [row | {"seconds": 0} for row in runs.metrics(home)]
        else:
            found[name] = file.read_bytes()
    return found


if __name__ == "__main__":
    main()
