"""What the diagrams are drawn with: boxes, nodes, pictures and arrows on a canvas in inches."""

from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.layout_engine import PlaceHolderLayoutEngine
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch, Rectangle

from ddpo_lib.book.figures import interpolation

INK, FAINT = "#333333", "#848a94"
GREY, BLUE, ORANGE, GREEN = "#555555", "#332288", "#d95f02", "#44aa99"
FILL = {GREY: "#eef0f2", BLUE: "#e6e3f4", ORANGE: "#fdeadb", GREEN: "#e0f0e4"}


class Shape(NamedTuple):
    """What arrows join: a centre, in inches from the lower left, and the patch that they touch."""

    x: float
    y: float
    patch: Patch | None = None


def canvas(width: float, height: float) -> tuple[plt.Figure, plt.Axes]:
    """An empty figure, in inches, with one axis that fills it and has inches as its unit."""
    # A figure without an engine gets the style's as soon as it has been saved once.
    fig = plt.figure(figsize=(width, height), layout=PlaceHolderLayoutEngine(True, False))
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.set_axis_off()
    return fig, ax


def write(ax, x: float, y: float, text: str, size: float = 9, color: str = INK, **look) -> None:
    """Text centred at (x, y)."""
    look = {"ha": "center", "va": "center", "math_fontfamily": "stix", "linespacing": 1.5} | look
    ax.text(x, y, text, fontsize=size, color=color, **look)


def box(ax, x, y, text="", color=GREY, width=1.7, height=0.66, size=9, **look) -> Shape:
    """A rounded rectangle around (x, y): something that acts, or a computed value."""
    look = {"fc": FILL[color], "ec": color, "lw": 1.2} | look
    corner, style = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.08"
    write(ax, x, y, text, size)
    return Shape(x, y, ax.add_patch(FancyBboxPatch(corner, width, height, style, **look)))


def circle(ax, x, y, text="", color=GREY, radius=0.24, size=10) -> Shape:
    """A round node: a random variable."""
    write(ax, x, y, text, size)
    return Shape(x, y, ax.add_patch(Circle((x, y), radius, fc=FILL[color], ec=color, lw=1.2)))


def picture(ax, x, y, image: np.ndarray, size: float = 0.7) -> Shape:
    """A framed uint8 picture (H, W, 3), `size` inches high, with its centre at (x, y)."""
    left, bottom = x - size / 2, y - size / 2
    extent = (left, left + size, bottom, bottom + size)
    ax.imshow(image, extent=extent, interpolation=interpolation(image), aspect="auto")
    frame = Rectangle((left, bottom), size, size, fill=False, ec=GREY, lw=1.2)
    return Shape(x, y, ax.add_patch(frame))


def state(ax, x, y, label: str, image: np.ndarray | None = None) -> Shape:
    """A state: a small picture with its name below or, without a picture, a round node."""
    if image is None:
        return circle(ax, x, y, label)
    write(ax, x, y - 0.43, label)
    return picture(ax, x, y, image, 0.62)


def arrow(ax, a, b, text="", at=(0, 0.14), bend=0.0, color=INK, **look) -> None:
    """An arrow between shapes or points, with a text `at` inches (right, up) from its middle.

    It is an arc whose control point is `bend` of its length off the straight line, to its right.
    """
    a, b = Shape(*a), Shape(*b)
    look = {"arrowstyle": "-|>", "mutation_scale": 11, "lw": 1.2, "shrinkA": 2, "shrinkB": 2} | look
    ends = {"posA": a[:2], "posB": b[:2], "patchA": a.patch, "patchB": b.patch}
    ax.add_patch(FancyArrowPatch(**ends, connectionstyle=f"arc3,rad={bend}", color=color, **look))
    x = (a.x + b.x + bend * (b.y - a.y)) / 2 + at[0]
    y = (a.y + b.y - bend * (b.x - a.x)) / 2 + at[1]
    write(ax, x, y, text, 8, color)


def dots(ax, a: Shape, b: Shape, arrows: bool = True) -> None:
    """Three dots half-way from `a` to `b`, for the steps between."""
    x = (a.x + b.x) / 2
    write(ax, x, a.y, r"$\cdots$", 14, FAINT)
    if arrows:
        arrow(ax, a, (x - 0.16, a.y))
        arrow(ax, (x + 0.16, a.y), b)


def check(pictures, shape: str, n: int, rewards=None) -> None:
    """Raise ValueError unless pictures, if given, are at least `n`, uint8, with a reward each."""
    if pictures is None:
        return
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
        raise ValueError(f"pictures {pictures.dtype} {pictures.shape}: must be uint8 {shape}")
    if len(pictures) < n:
        raise ValueError(f"{len(pictures)} pictures: this diagram shows at least {n}")
    if rewards is not None and len(rewards) != len(pictures):
        raise ValueError(f"{len(rewards)} rewards for {len(pictures)} pictures: give each one")
