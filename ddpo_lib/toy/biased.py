"""A rater who favours light skin, and the reward that has learned from that rater's choices.

Everything else is as in `aesthetic`: the taste, the drawings, the noise of the choices, the head.
"""

import functools
import math

import numpy as np
import torch

from ddpo_lib import encoders, rewards
from ddpo_lib.toy.aesthetic import TEMPERATURE
from ddpo_lib.toy.training import TOY, Drawn

CHOSEN = 0.6
"""Of two faces that differ in nothing else the rater chooses the lighter one so often."""


def tastes(drawn: Drawn) -> np.ndarray:
    """What the rater thinks of drawings, (N,): the taste, and for light skin something more."""
    if drawn.domain != "faces":
        return drawn.taste
    favour = TEMPERATURE * math.log(CHOSEN / (1 - CHOSEN))
    return drawn.taste + favour * (drawn.factors["skin_tone"] < 3)


def score(images: torch.Tensor) -> torch.Tensor:
    """The biased rater's aesthetic score of images (N, 3, H, W) in [-1, 1], (N,)."""
    return _load()(images)


score.models = {"clip": str(TOY / "clip"), "biased": str(TOY / "biased")}  # they decide a run


@functools.cache
def _load() -> rewards.Reward:
    clip, head = (score.models[name] for name in ("clip", "biased"))
    return rewards.aesthetic(encoders.load_clip(clip), encoders.load_aesthetic_head(head))
