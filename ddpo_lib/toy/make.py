"""Rebuild the toy world in data/toy from seeds: `python -m ddpo_lib.toy.make [model ...]`.

Without arguments everything is built and measured. With names, only those models are: faces,
churches, clip, age, regressor, second-regressor, aesthetic, biased, text-to-image; or quality, the
measurement.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ddpo_lib import disk, encoders, policy
from ddpo_lib.toy import (
    aesthetic,
    biased,
    policies,
    quality,
    regressor,
    text_quality,
    text_to_image,
)
from ddpo_lib.toy import encoders as toy_encoders
from ddpo_lib.toy.training import DOMAINS, TOY, Drawn, draw

SHEETS = TOY.parents[1] / "figures" / "toy"
POLICY_STEPS = 6000
N_POLICY, N_ENCODER, N_SAMPLES = 30_000, 20_000, 2000
N_SHOWN = 200
MINUTES = 190
"""On two cores; a GPU needs a fraction. 130 were measured without the biased head and the
text-to-image policy, which takes an hour of one."""

LANES = (
    ("faces", "clip", "aesthetic", "biased", "text-to-image"),
    ("churches", "age", "regressor", "second-regressor"),
)
"""What two processes build beside each other, one thread each: as fast as one process with two."""


def build_policy(domain: str, folder: Path) -> None:
    pictures = draw(domain, N_POLICY, seed=1).pictures
    policies.train_policy(pictures, POLICY_STEPS, seed=1).save_pretrained(folder)


def build_clip(folder: Path) -> None:
    # Half of the faces have uniform age classes, for natural ones show too few old people.
    drawn = [
        draw("faces", N_ENCODER, seed=2, age_balanced=0.5),
        draw("churches", N_ENCODER, seed=2),
    ]
    toy_encoders.train_clip(drawn, folder, seed=2)


def build_age(folder: Path) -> None:
    drawn = draw("faces", N_ENCODER, seed=3, age_balanced=0.75)
    toy_encoders.train_age_classifier(drawn, folder, seed=3)


def build_regressor(folder: Path, seed: int) -> None:
    drawn = [
        draw("faces", N_ENCODER, seed, age_balanced=0.3),
        draw("churches", N_ENCODER, seed),
    ]
    regressor.train_regressor(drawn, folder, seed)


def build_aesthetic(folder: Path, rater: Callable[[Drawn], np.ndarray]) -> None:
    drawn = [draw(domain, N_ENCODER, seed=5) for domain in ("faces", "churches")]
    clip = encoders.load_clip(TOY / "clip")
    aesthetic.train_aesthetic_head(clip, drawn, [rater(part) for part in drawn], folder, seed=5)


def build_text_to_image(folder: Path) -> None:
    drawn = [
        draw("faces", N_ENCODER, seed=6, age_balanced=0.3),
        draw("churches", N_ENCODER, seed=6),
    ]
    text_to_image.train_text_to_image(drawn, folder, seed=6)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "faces": lambda folder: build_policy("faces", folder),
    "churches": lambda folder: build_policy("churches", folder),
    "clip": build_clip,
    "age": build_age,
    "regressor": lambda folder: build_regressor(folder, seed=4),
    "second-regressor": lambda folder: build_regressor(folder, seed=8),
    "aesthetic": lambda folder: build_aesthetic(folder, lambda drawn: drawn.taste),
    "biased": lambda folder: build_aesthetic(folder, biased.tastes),
    "text-to-image": build_text_to_image,
}


def build(name: str) -> None:
    """Build one model beside its place and move it there when it is whole. On one thread, for sums
    round by how many share them: the same seeds give the same bits, alone or beside another."""
    torch.set_num_threads(1)
    place, unfinished = TOY / name, TOY / f".{name}-unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    started = time.monotonic()
    BUILDERS[name](unfinished)
    disk.open_to_user(unfinished)
    shutil.rmtree(place, ignore_errors=True)
    unfinished.rename(place)
    print(f"{place}: built in {(time.monotonic() - started) / 60:.1f} min", flush=True)


def build_all() -> None:
    """Build all models in two single-threaded processes; stop both if either fails."""
    lanes = [
        subprocess.Popen([sys.executable, "-m", "ddpo_lib.toy.make", *names]) for names in LANES
    ]
    try:
        while any(lane.poll() is None for lane in lanes) and not any(lane.poll() for lane in lanes):
            time.sleep(1)
    finally:
        for lane in lanes:
            lane.terminate()
    if any(lane.wait() for lane in lanes):
        raise SystemExit("building a toy model failed; its error is above")


def write_quality() -> None:
    """Sample all policies, measure everything and write data/toy/quality.json; and contact sheets
    of the samples, figures/toy/samples_*.png."""
    agents = {domain: policy.load(TOY / domain) for domain in DOMAINS}
    samples = {name: quality.sample(agent, N_SAMPLES) for name, agent in agents.items()}
    for domain, drawn in samples.items():
        for eta, pictures in (("eta0", drawn.eta0), ("eta1", drawn.eta1)):
            quality.contact_sheet(pictures[:N_SHOWN]).save(SHEETS / f"samples_{domain}_{eta}.png")
    clip = encoders.load_clip(TOY / "clip")
    judges = [regressor.load_regressor(TOY / name) for name in ("regressor", "second-regressor")]
    result = quality.measure(
        samples,
        clip,
        encoders.load_age_classifier(TOY / "age"),
        encoders.load_aesthetic_head(TOY / "aesthetic"),
        judges,
    )
    result["text"] = text_quality.measure(TOY / "text-to-image", clip, judges[0])
    text = json.dumps(result, indent=2)
    with disk.replacing(TOY / "quality.json") as draft:
        draft.write_text(text + "\n", encoding="utf-8")
    print(text)


def main(names: list[str]) -> None:
    """Build the named models, or everything."""
    unknown = set(names) - {*BUILDERS, "quality"}
    if unknown:
        raise SystemExit(
            f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(BUILDERS)}, quality"
        )
    if not names:
        print(f"Rebuilding {TOY}: about {MINUTES} minutes on two cores.", flush=True)
        build_all()
    for name in names:
        write_quality() if name == "quality" else build(name)
    if not names:
        write_quality()


if __name__ == "__main__":
    main(sys.argv[1:])
