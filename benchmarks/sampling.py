"""What the batch size costs when sampling on a CPU, and whether it changes the images.

    python benchmarks/sampling.py [--turns 3] [--images 100] [--steps 20]

Images of the toy faces at eta = 1, one thread; the batch sizes take turns. Prints one JSON
object, medians, and exits with 1 where an image differs by a bit.
"""

import argparse
import json
import statistics
import sys
import time

import torch

from ddpo_lib import policy, sampler
from ddpo_lib.book import paths

SIZES = (100, 50, 25, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20)
    told = parser.parse_args()
    torch.set_num_threads(1)
    faces, seeds = policy.load(paths.TOY / "faces", device="cpu"), sampler.seeds(0, told.images)
    x_T, took, first, same = sampler.noise(faces, seeds), {n: [] for n in SIZES}, None, True
    for _ in range(told.turns):
        for size in SIZES:
            start = time.perf_counter()
            x_0 = sampler.sample(faces, x_T, told.steps, 1.0, seeds, batch_size=size)
            took[size].append(time.perf_counter() - start)
            first = x_0 if first is None else first
            same &= x_0.equal(first)
    seconds = {size: round(statistics.median(own), 2) for size, own in took.items()}
    print(json.dumps({"seconds": seconds, "same_images": same}, indent=2))
    sys.exit(not same)


if __name__ == "__main__":
    main()
