"""Soft shapes on a batch of canvases: the few primitives from which faces and churches are drawn.

Coordinates: x and y run from -1 to 1 over the picture, y downward. Every shape parameter is a
scalar or an array (N,); every mask is (N, S, S) in [0, 1]. Pictures are drawn `SUPERSAMPLE` times
larger than asked and averaged down, so edges are smooth.
"""

import numpy as np
import torch

Factors = dict[str, np.ndarray]
"""What is in each of N pictures: name → (N,)."""

SIZE = 64
"""Height and width of the toy world's pictures."""
SUPERSAMPLE = 3


def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel-centre coordinates x, y of a supersampled canvas, each (1, S, S) with S = 3 * size."""
    ticks = (np.arange(size * SUPERSAMPLE, dtype=np.float32) + 0.5) / (size * SUPERSAMPLE) * 2 - 1
    return ticks[None, None, :], ticks[None, :, None]


def col(value) -> np.ndarray:
    """A scalar or (N,) parameter as (N, 1, 1), ready to broadcast over pixels."""
    return np.asarray(value, dtype=np.float32).reshape(-1, 1, 1)


def soft(distance: np.ndarray, width: float = 0.02) -> np.ndarray:
    """A mask from a signed distance: 1 inside (negative), 0 outside, a linear edge `width` wide."""
    return np.clip(0.5 - distance / width, 0.0, 1.0)


def ellipse(x, y, cx, cy, rx, ry, width: float = 0.02) -> np.ndarray:
    """Mask of an axis-aligned ellipse with centre (cx, cy) and radii (rx, ry)."""
    rx, ry = np.maximum(col(rx), 1e-3), np.maximum(col(ry), 1e-3)
    radius = np.sqrt(((x - col(cx)) / rx) ** 2 + ((y - col(cy)) / ry) ** 2)
    return soft((radius - 1) * np.minimum(rx, ry), width)


def box(x, y, left, right, top, bottom, width: float = 0.02) -> np.ndarray:
    """Mask of an axis-aligned rectangle."""
    distance = np.maximum(
        np.maximum(col(left) - x, x - col(right)), np.maximum(col(top) - y, y - col(bottom))
    )
    return soft(distance, width)


def triangle(x, y, cx, top, bottom, half_width, width: float = 0.02) -> np.ndarray:
    """Mask of an upright isosceles triangle: apex (cx, top), base 2 * half_width at `bottom`."""
    top, bottom = col(top), col(bottom)
    reach = col(half_width) * (y - top) / np.maximum(bottom - top, 1e-3)
    return soft(np.maximum(np.abs(x - col(cx)) - reach, np.maximum(top - y, y - bottom)), width)


def paint(canvas: np.ndarray, mask: np.ndarray, colour: np.ndarray) -> None:
    """Lay `colour` over `canvas` (N, S, S, 3) in place; colour is (3,), (N, 3) or (N, S, S, 3)."""
    colour = np.asarray(colour, dtype=np.float32)
    if colour.ndim < 4:
        colour = colour.reshape(-1, 1, 1, 3)
    canvas += mask[..., None] * (colour - canvas)


def mix(a, b, weight) -> np.ndarray:
    """Colours (1 - weight) * a + weight * b for a, b (3,) or (N, 3) and weight (N,)."""
    weight = np.asarray(weight, dtype=np.float32).reshape(-1, 1)
    return (1 - weight) * np.asarray(a, dtype=np.float32) + weight * np.asarray(b, dtype=np.float32)


def shrink(canvas: np.ndarray) -> np.ndarray:
    """Average a supersampled canvas (N, S, S, 3) in [0, 1] down to uint8 (N, size, size, 3)."""
    n, side = canvas.shape[:2]
    size = side // SUPERSAMPLE
    small = canvas.reshape(n, size, SUPERSAMPLE, size, SUPERSAMPLE, 3).mean(axis=(2, 4))
    return (np.clip(small, 0, 1) * 255 + 0.5).astype(np.uint8)


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 pictures (N, H, W, 3) as a float batch (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
