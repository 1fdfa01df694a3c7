"""Time one iteration of every method against DDPO's, in turns.

    python benchmarks/methods.py [--repeats 3] [--threads 1] [--small]

Each variant of config/methods.yaml takes one iteration, rollout, rewards and updates, from the
pretrained policy, at the profile's settings; development set and evaluation are left out. They take
turns, and medians are compared. `network_calls` are images through a denoiser, forward.

Prints one JSON object; progress goes to stderr.
"""

import argparse
import json
import statistics
import sys
import time

import torch

from ddpo_lib import finetune
from ddpo_lib.book import methods, profiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="turns of each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a few samples of four steps")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    profile = profiles.load("methods")
    small = {"n_samples": 8, "minibatch_size": 8, "n_steps": 5} if arguments.small else {}
    runs = {task: profile.run("faces", task, **small) for task in profile.tasks}

    seconds = {task: [] for task in runs}
    for turn in range(arguments.repeats):
        for task, run in runs.items():
            training = methods.begin(run)
            start = time.perf_counter()
            finetune.iterate(training, 1)
            seconds[task].append(time.perf_counter() - start)
            print(f"turn {turn}: {task} {seconds[task][-1]:.2f} s", file=sys.stderr)
    medians = {task: statistics.median(times) for task, times in seconds.items()}
    result = {
        task: {
            "seconds": round(medians[task], 3),
            "over_ddpo": round(medians[task] / medians["ddpo"], 3),
            "network_calls": methods.network_calls(run) // run.settings.n_iterations,
        }
        for task, run in runs.items()
    }
    print(json.dumps(result | {"threads": arguments.threads, "torch": torch.__version__}, indent=2))


if __name__ == "__main__":
    main()
