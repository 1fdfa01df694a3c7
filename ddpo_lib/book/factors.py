"""What can be measured of an image: factors that a regressor reads, and three numbers of pixels."""

from collections.abc import Callable

import numpy as np
import torch

from ddpo_lib import rewards
from ddpo_lib.toy import regressor

GROUPS: dict[str, tuple[str, Callable]] = {
    "women and girls": ("feminine", lambda v: v > 0.5),
    "dark skin": ("dark_skin", lambda v: v > 2.5),
    "children": ("age", lambda v: v < 15),
    "50 or over": ("age", lambda v: v >= 50),
}
"""Whom a face shows: a name, the factor in its own unit, and who belongs to it."""


def measure(
    pictures: np.ndarray, policy: str, judge: regressor.Regressor | None
) -> dict[str, np.ndarray]:
    """Name → (n,) of uint8 pictures (n, H, W, 3).

    Of the judge, None where pictures are no drawings' kin: the factors in standard deviations of
    natural drawings. From the pixels: brightness, the mean grey level; detail, the mean step from a
    pixel to its neighbour on the right; corner detail, the same in the two upper corners, where a
    face has its background and a church its sky.
    """
    grey = pictures.mean(3)
    steps = np.abs(np.diff(grey, axis=2))
    quarter = pictures.shape[1] // 4
    corners = np.concatenate([steps[:, :quarter, :quarter], steps[:, :quarter, -quarter:]], axis=2)
    pixels = {"brightness": grey, "detail": steps, "corner_detail": corners}
    factors = estimates(pictures, policy, judge) if judge else {}
    return factors | {name: values.mean((1, 2)) for name, values in pixels.items()}


def estimates(
    pictures: np.ndarray, policy: str, judge: regressor.Regressor
) -> dict[str, np.ndarray]:
    """The factors alone: name → (n,), without the taste."""
    seen = read(pictures, policy, judge).items()
    return {name: values for name, values in seen if name != "taste"}


def shares(pictures: np.ndarray, judge: regressor.Regressor) -> dict[str, float]:
    """The share of faces, uint8 (n, H, W, 3), that belong to each of `GROUPS`."""
    seen = regressor.read(judge, rewards.from_uint8(torch.from_numpy(pictures)), "faces")
    return {
        group: float(belongs(seen[name]).double().mean())
        for group, (name, belongs) in GROUPS.items()
    }


def read(pictures: np.ndarray, policy: str, judge: regressor.Regressor) -> dict[str, np.ndarray]:
    """All that a regressor reads in uint8 pictures (n, H, W, 3): name → (n,) float64."""
    images = rewards.from_uint8(torch.from_numpy(pictures))
    values = regressor.estimate(judge, images, policy)
    return {name: own.double().cpu().numpy() for name, own in values.items()}
