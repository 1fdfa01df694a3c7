"""Which compositions the toy text-to-image policy draws badly, and in which random order.

    python benchmarks/hard_prompts.py [--images 16]

Of every subject with every attribute the mean true alignment of images at eta = 0 with guidance 3,
from other noise than any evaluation set's. Those below 0.5 are badly drawn; they come in the order
of a shuffle with seed 0. The task lot-ddpo of config/text.yaml is trained on their first half, and
the other half is unseen. Prints one JSON object: prompt → alignment; two minutes and a half.
"""

import argparse
import json

import numpy as np

from ddpo_lib import evaluation, policy, prompts
from ddpo_lib.book import paths
from ddpo_lib.toy import alignment

PEOPLE = [
    "a baby", "a little boy", "a little girl", "a teenage boy", "a teenage girl", "a young man",
    "a young woman", "a middle-aged man", "a middle-aged woman", "an old man", "an old woman",
]  # fmt: skip
HAVE = [
    "glasses", "a beard", "long hair", "short hair", "glasses and a beard", "long hair and a beard",
    "short hair and a beard", "long hair and glasses", "short hair and glasses",
]  # fmt: skip
KINDS = ["white", "stone", "brick"]
HOURS = ["at night", "in daylight"]
STAND = ["many trees", "few trees", "no trees", "many windows", "few windows"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16)
    n = parser.parse_args().images
    said = prompts.load("{who} with {what}", who=PEOPLE, what=HAVE)
    said += prompts.load("a {kind} church {hour} with {what}", kind=KINDS, hour=HOURS, what=STAND)
    painter = policy.load(paths.TOY / "text-to-image", guidance=3.0)
    label = f"{len(said)} compositions"
    drawn = evaluation.draw(painter, n * len(said), 20, 1, progress=label, prompts=said)
    scores = evaluation.score(drawn, alignment.truth, prompts=said).reshape(n, -1).mean(0)
    hard = [(prompt, score) for prompt, score in zip(said, scores, strict=True) if score < 0.5]
    np.random.default_rng(0).shuffle(hard)
    print(json.dumps({prompt: round(float(score), 3) for prompt, score in hard}, indent=2))


if __name__ == "__main__":
    main()
