"""What the diagrams are drawn with: boxes, nodes, pictures and arrows on a canvas in inches."""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.layout_engine import PlaceHolderLayoutEngine
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch, Rectangle

from ddpo_lib.book.figures import interpolation

INK, FAINT = "#333333", "#848a94"
GREY, BLUE, ORANGE, GREEN = "#5e6472", "#0077bb", "#d95f02", "#117733"
FILL = {GREY: "#eef0f2", BLUE: "#ddecf6", ORANGE: "#fdeadb", GREEN: "#e0f0e4"}


@dataclass(frozen=True)
class Shape:
    """Something that arrows start from and end at: at the edge of its patch, or, if that is None,
    at its centre (x, y), in inches from the lower left."""

    patch: Patch | None
    x: float
    y: float


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
    corner, rounded = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.08"
    patch = ax.add_patch(FancyBboxPatch(corner, width, height, rounded, **look))
    write(ax, x, y, text, size)
    return Shape(patch, x, y)


def circle(ax, x, y, text="", color=GREY, radius=0.24, size=10) -> Shape:
    """A round node: a random variable."""
    patch = ax.add_patch(Circle((x, y), radius, fc=FILL[color], ec=color, lw=1.2))
    write(ax, x, y, text, size)
    return Shape(patch, x, y)


def picture(ax, x, y, image: np.ndarray, size: float = 0.7) -> Shape:
    """A framed uint8 picture (H, W, 3), `size` inches high, with its centre at (x, y)."""
    left, bottom = x - size / 2, y - size / 2
    extent = (left, left + size, bottom, bottom + size)
    ax.imshow(image, extent=extent, interpolation=interpolation(image), aspect="auto")
    patch = Rectangle((left, bottom), size, size, fill=False, ec=GREY, lw=1.2)
    return Shape(ax.add_patch(patch), x, y)


def arrow(ax, a: Shape, b: Shape, text="", at=(0, 0.14), bend=0.0, color=INK, **look) -> None:
    """An arrow from `a` to `b`, with a text `at` inches (right, up) from its middle.

    It is an arc whose control point is `bend` of its length off the straight line, to its right.
    """
    look = {"arrowstyle": "-|>", "mutation_scale": 11, "lw": 1.2, "shrinkA": 2, "shrinkB": 2} | look
    ends = {"posA": (a.x, a.y), "posB": (b.x, b.y), "patchA": a.patch, "patchB": b.patch}
    ax.add_patch(FancyArrowPatch(**ends, connectionstyle=f"arc3,rad={bend}", color=color, **look))
    x = (a.x + b.x + bend * (b.y - a.y)) / 2 + at[0]
    y = (a.y + b.y - bend * (b.x - a.x)) / 2 + at[1]
    write(ax, x, y, text, 8, color)


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


def states_row(ax, xs, y, pictures, labels="3210") -> list[Shape]:
    """x_t in a row, as pictures with their names below or, without pictures, as round nodes."""
    if pictures is None:
        return [circle(ax, x, y, f"$x_{t}$") for x, t in zip(xs, labels, strict=True)]
    for x, t in zip(xs, labels, strict=True):
        write(ax, x, y - 0.43, f"$x_{t}$")
    return [picture(ax, x, y, image, 0.62) for x, image in zip(xs, pictures, strict=False)]


def top(shape: Shape) -> Shape:
    """The middle of its upper edge, for arrows that pass over what is between."""
    edge = shape.patch.get_path().get_extents(shape.patch.get_patch_transform())
    return Shape(None, shape.x, edge.y1)


def dots(ax, a: Shape, b: Shape, arrows: bool = True) -> None:
    """Three dots half-way from `a` to `b`, for the steps between."""
    x = (a.x + b.x) / 2
    write(ax, x, a.y, r"$\cdots$", 14, FAINT)
    if arrows:
        arrow(ax, a, Shape(None, x - 0.16, a.y))
        arrow(ax, Shape(None, x + 0.16, a.y), b)
