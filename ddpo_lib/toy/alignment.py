"""Does a toy image show what its prompt says? The judge's answer, and the true one.

A prompt is read as the captions' grammar writes it: each of `STATEMENTS` that occurs in it is held
against what a factor regressor sees. The reward looks through one regressor; the truth is read by a
second, which was trained from other drawings and another seed, so that a fooled judge shows.
"""

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ddpo_lib.toy import regressor
from ddpo_lib.toy.training import TOY

Holds = Callable[[torch.Tensor], torch.Tensor]

STATEMENTS: dict[str, dict[str, tuple[str, Holds]]] = {
    "faces": {
        "baby": ("age", lambda v: v < 5),
        "little": ("age", lambda v: v < 14),
        "teenage": ("age", lambda v: (v > 8) & (v < 24)),
        "young": ("age", lambda v: v < 42),
        "middle-aged": ("age", lambda v: (v > 36) & (v < 54)),
        "old": ("age", lambda v: v > 48),
        "boy": ("feminine", lambda v: v < 0.5),
        "man": ("feminine", lambda v: v < 0.5),
        "girl": ("feminine", lambda v: v > 0.5),
        "woman": ("feminine", lambda v: v > 0.5),
        "long": ("hair_length", lambda v: v > 0.5),
        "short": ("hair_length", lambda v: v < 0.5),
        "no glasses": ("glasses", lambda v: v < 0.5),
        "glasses": ("glasses", lambda v: v > 0.5),
        "no beard": ("beard", lambda v: v < 0.5),
        "beard": ("beard", lambda v: v > 0.5),
        "smiling": ("smile", lambda v: v > 0.5),
        "serious": ("smile", lambda v: v < 0.5),
        "dark skin": ("dark_skin", lambda v: v > 2.5),
        "light skin": ("dark_skin", lambda v: v < 2.5),
        "looking aside": ("direct_gaze", lambda v: v < 0.5),
        "looking at the camera": ("direct_gaze", lambda v: v > 0.5),
        "warm light": ("light_warmth", lambda v: v > 0),
        "cool light": ("light_warmth", lambda v: v < 0),
        "strong light": ("light_strength", lambda v: v > 0.5),
        "soft light": ("light_strength", lambda v: v < 0.5),
    },
    "churches": {
        "brick": ("brick", lambda v: v > 0.5),
        "dome": ("dome", lambda v: v > 0.5),
        "tower": ("dome", lambda v: v < 0.5),
        "at night": ("night", lambda v: v > 0.5),
        "in daylight": ("night", lambda v: v < 0.5),
        "sunset": ("sunset", lambda v: v > 0.5),
        "clear sky": ("light", lambda v: v > 0.55),
        "grey sky": ("light", lambda v: v < 0.45),
        "no clouds": ("clouds", lambda v: v < 0.5),
        "clouds": ("clouds", lambda v: v > 0.5),
        "no trees": ("trees", lambda v: v < 0.5),
        "few trees": ("trees", lambda v: (v > 0.5) & (v < 1.5)),
        "many trees": ("trees", lambda v: v > 2.5),
        "trees": ("trees", lambda v: v > 0.5),
        "few windows": ("windows", lambda v: v < 4),
        "many windows": ("windows", lambda v: v > 3),
        "lit windows": ("lit", lambda v: v > 0.5),
        "hills behind": ("hills", lambda v: v > 0.5),
        "flat horizon": ("hills", lambda v: v < 0.5),
    },
}
"""Domain → words of a caption → the factor that they are about, in its own unit, and when they are
true. Where words allow a range, half a step is granted to the regressor's error."""


def statements(prompt: str) -> tuple[str, list[str]]:
    """The domain of a prompt and what it states; a longer statement takes the words of a shorter
    one. ValueError where it states nothing."""
    domain, rest, found = "churches" if "church" in prompt else "faces", prompt, []
    for words in sorted(STATEMENTS[domain], key=len, reverse=True):
        pattern = r"\b" + re.sub(r"^(few|many) trees$", r"\1( \\w+)? trees", words) + r"\b"
        if re.search(pattern, rest):
            found.append(words)
            rest = re.sub(pattern, ";", rest)
    if not found:
        raise ValueError(f"prompt {prompt!r} states nothing that can be checked")
    return domain, found


def alignment(images: torch.Tensor, prompts: Sequence[str], judge) -> torch.Tensor:
    """The share of each prompt's statements that hold, (N,) float32, as a regressor sees it; images
    (N, 3, 64, 64) in [-1, 1]."""
    seen = {domain: regressor.read(judge, images, domain) for domain in STATEMENTS}
    shares = []
    for i, prompt in enumerate(prompts):
        domain, said = statements(prompt)
        of = [STATEMENTS[domain][words] for words in said]
        shares.append(np.mean([bool(holds(seen[domain][name][i])) for name, holds in of]))
    return torch.tensor(shares, dtype=torch.float32)


def reward(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """The judge: `alignment` as the first regressor sees it."""
    return alignment(images, prompts, _load("regressor"))


reward.models = {"regressor": str(TOY / "regressor")}  # it decides a run


def truth(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """`alignment` as the second regressor sees it, which no policy was rewarded by."""
    return alignment(images, prompts, _load("second-regressor"))


@functools.cache
def _load(name: str) -> regressor.Regressor:
    return regressor.load_regressor(TOY / name)
