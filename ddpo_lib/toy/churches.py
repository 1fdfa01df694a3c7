"""Toy pictures of churches: small gouache-like scenes drawn from named factors, with captions.

`sample_factors` draws what is in each picture, `draw` paints it, `captions` describes it, and
`taste` is the aesthetic judgement of a simulated rater, known exactly because we wrote it down.
Factors are arrays (N,); what paints them is in `scenes`.
"""

from collections.abc import Callable

import numpy as np

from ddpo_lib.toy.drawing import SIZE, Factors, shrink
from ddpo_lib.toy.scenes import NIGHT, paint_scenes


def sample_factors(n: int, rng: np.random.Generator) -> Factors:
    """Draw what is in each of n pictures: every factor an array (N,), its meaning noted below."""
    time, side, light = rng.integers(0, 4, n), rng.integers(-1, 2, n), rng.random(n)
    night, chance = time == NIGHT, lambda p: rng.random(n) < p
    # The sun or moon keeps clear of the tower, as a painter would have it.
    sky_side = np.where(side == 0, rng.choice([-1, 1], n), -side)
    return {
        "time": time,  # 0 dawn, 1 day, 2 sunset, 3 night
        "light": light,  # 0 dull and grey .. 1 clear and glowing
        "sun": ~night & (light > 0.4) & chance(0.75),
        "moon": night & chance(0.6),
        "stars": night & chance(0.3 + 0.5 * light),
        "sky_x": sky_side * rng.uniform(0.5, 0.7, n),  # of sun or moon
        "clouds": rng.integers(0, 3, n),
        "backdrop": rng.choice(3, n, p=[0.3, 0.45, 0.25]),  # 0 flat horizon, 1 hills, 2 town
        "hill_phase": rng.random(n),  # which stretch of the hills, in periods
        "grass": rng.random(n),  # 0 spring green .. 1 dry gold
        "shift": rng.uniform(-1, 1, n),  # of the camera, in pixels of a 32 x 32 picture
        "side": side,  # of the tower: -1 left, 0 centre, 1 right
        "dome": rng.integers(0, 2, n),  # 0 a tower with a spire, 1 a dome
        "tower_height": rng.random(n),  # this and the nave's sizes: 0 least .. 1 most
        "nave_width": rng.random(n),
        "nave_height": rng.random(n),
        "material": rng.integers(0, 3, n),  # 0 white plaster, 1 stone, 2 brick
        "wall_tone": rng.uniform(-1, 1, n),  # -1 darker .. 1 lighter
        "roof": rng.integers(0, 3, n),  # 0 red, 1 grey, 2 green; a dome is then gold, blue, green
        "windows": 2 * rng.integers(0, 4, n),  # along the nave
        "lit": chance(np.array([0.4, 0.0, 0.5, 0.75])[time]),  # glowing panes
        "ornament": rng.integers(0, 3, n),  # 0 none, 1 cornice, 2 cornice and rose window
        "trees": rng.integers(0, 4, n),
        "tree_kind": rng.integers(0, 2, n),  # 0 round, 1 cypress
        "tree_size": rng.uniform(0.8, 1.2, n),
    }


FACTORS = tuple(sample_factors(0, np.random.default_rng(0)))


def draw(factors: Factors, size: int = SIZE) -> np.ndarray:
    """Paint the pictures: uint8 (N, size, size, 3)."""
    n, chunk = len(factors["time"]), 64  # a chunk's masks stay within the processor's cache
    pictures = np.empty((n, size, size, 3), np.uint8)
    for start in range(0, n, chunk):
        part = {name: values[start : start + chunk] for name, values in factors.items()}
        pictures[start : start + chunk] = shrink(paint_scenes(part, size))
    return pictures


def captions(factors: Factors, rng: np.random.Generator) -> list[str]:
    """One lower-case caption per picture, from 49 words; each attribute has probability 0.85."""
    rows = zip(*factors.values(), strict=True)
    return [_caption(dict(zip(factors, row, strict=True)), rng) for row in rows]


def _caption(f: dict, rng: np.random.Generator) -> str:
    def told(phrase: str, probability: float = 0.85) -> str:
        return phrase if rng.random() < probability else ""

    def join(*phrases: str, by: str = " ") -> str:
        return by.join(filter(None, phrases))

    colours, crown = (
        (("gold", "blue", "green"), "dome") if f["dome"] else (("red", "grey", "green"), "tower")
    )
    hour = (
        "at night"
        if f["time"] == NIGHT
        else "in daylight at " + ("dawn", "noon", "sunset")[f["time"]]
    )
    place = ("on the left", "in the centre", "on the right")[f["side"] + 1]
    return join(
        join(
            "a", told(("white", "stone", "brick")[f["material"]]), "church",
            told(join("with a", told(colours[f["roof"]], 0.5), crown, told(place, 0.5))),
            told(hour),
        ),
        told(" and ".join(name for name in ("stars", "moon", "sun") if f[name])),
        told("clear sky" if f["light"] > 0.6 else "grey sky" if f["light"] < 0.4 else ""),
        told("clouds" if f["clouds"] else "no clouds"),
        # Without number and kind the phrase is just "trees": the plain word is learned as well.
        told(
            join(
                told(("few", "", "many")[f["trees"] - 1], 0.5),
                told(("round", "cypress")[f["tree_kind"]], 0.5),
                "trees",
            )
            if f["trees"]
            else "no trees"
        ),
        told(
            ("plain walls, few windows", "few windows", "many windows", "many windows")[
                f["windows"] // 2
            ]
        ),
        told("lit windows" if f["lit"] else ""),
        told("rose window" if f["ornament"] == 2 else ""),
        told(("flat horizon", "hills behind", "houses, flat horizon")[f["backdrop"]]),
        by=", ",
    )  # fmt: skip


# name: (positive prompt, negative prompt, where it is true as bool (N,))
ATTRIBUTES: dict[str, tuple[str, str, Callable[[Factors], np.ndarray]]] = {
    "night": ("a church at night", "a church in daylight", lambda f: f["time"] == NIGHT),
    "dome": ("a church with a dome", "a church with a tower", lambda f: f["dome"] == 1),
    "trees": ("a church, trees", "a church, no trees", lambda f: f["trees"] > 0),
    "many_windows": (
        "a church, many windows",
        "a church, few windows",
        lambda f: f["windows"] >= 4,
    ),
    "hills": ("a church, hills behind", "a church, flat horizon", lambda f: f["backdrop"] == 1),
}

# Score: (weight, then its mean and deviation under `sample_factors`); squared weights sum to 1.
TASTE = {"detail": (0.6, 0.782, 0.427), "light": (0.6, 0.5, 0.262), "trees": (0.53, 1.505, 1.117)}


def taste(factors: Factors) -> np.ndarray:
    """The simulated rater's true liking (N,), of mean about 0 and standard deviation about 1.

    A weighted sum of three standardised scores: detail (windows and masonry), light (warm clear
    day and golden sunset above dull grey and night) and the number of trees.
    """
    f, time = factors, factors["time"]
    dull, clear = np.array([0.3, 0.35, 0.35, 0.0])[time], np.array([0.7, 1.0, 1.0, 0.3])[time]
    scores = {
        "detail": f["windows"] / 6 + np.array([0.0, 0.35, 0.5])[f["material"]],
        "light": dull + (clear - dull) * f["light"],
        "trees": f["trees"],
    }
    return sum(weight * (scores[name] - mean) / sd for name, (weight, mean, sd) in TASTE.items())
