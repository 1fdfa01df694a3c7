"""Toy faces as named factors, with captions, visible attributes and a simulated taste.

`sample_factors` draws the causes of a picture, `draw` turns them into pixels without any further
randomness, and `captions`, `ATTRIBUTES` and `taste` describe the same causes in words and numbers.
Factors are arrays (N,); what paints them is in `portraits`.
"""

from collections.abc import Callable

import numpy as np

from ddpo_lib.toy.drawing import SIZE, Factors, shrink
from ddpo_lib.toy.portraits import (
    AGEING,
    BACKGROUND_NAMES,
    BACKGROUND_WARMTH,
    BACKGROUNDS,
    CLOTHES,
    CLOTHES_NAMES,
    HAIR,
    HAIR_NAMES,
    KNOTS,
    SKIN,
    TEXTURES,
    apparent_age,
    paint_portraits,
)

FACTORS = (
    "age",  # years, 0 to 85
    "feminine",  # bool
    "skin_tone",  # row of SKIN, light to dark
    "hair_colour",  # row of HAIR: the colour of youth, before greying
    "hair_length",  # short 0 to 0.3, long 0.65 to 1
    "hair_part",  # side of the parting, -1 or 1
    "fringe",  # bool
    "balding",  # 0 to 1, how far a masculine hairline recedes with age
    "weathering",  # -1.5 to 1.5, how much older or younger than their age someone looks
    "glasses",  # bool
    "beard",  # bool
    "smile",  # serious 0 to 0.15, smiling 0.8 to 1
    "gaze",  # near 0 at the camera, near -1 or 1 aside
    "background",  # row of BACKGROUNDS
    "background_tint",  # -1 to 1, small change of brightness
    "texture",  # row of TEXTURES
    "texture_phase",  # 0 or 1
    "clothing",  # row of CLOTHES
    "light_side",  # -1 from the left, 1 from the right
    "light_strength",  # 0 soft to 1 strong
    "light_warmth",  # -1 cool to 1 warm
    "pose_x",  # -1 to 1, about one pixel of 32
    "pose_y",
)

# Bounds of the FairFace classes 0-2, 3-9, 10-19, ..., 60-69, 70-85, in years.
AGE_BOUNDS = np.array([0, 3, 10, 20, 30, 40, 50, 60, 70, 86])
# Share of people younger than each bound from 3 on: 6.5 % are 50 or over.
AGE_SHARES = np.array([0, 0.11, 0.26, 0.58, 0.83, 0.935, 0.97, 0.99, 1])

# The rater's taste: weight of each quality, and its mean and sd over natural factors.
TASTE = {
    "light_warmth": (0.45, 0.0, 0.577),
    "background_warmth": (0.45, 0.025, 0.82),
    "hair_length": (0.42, 0.44, 0.35),
    "youth": (0.42, 0.73, 0.26),
    "light_strength": (0.42, 0.5, 0.289),
    "direct_gaze": (0.25, 0.625, 0.45),
}


def sample_factors(
    n: int, rng: np.random.Generator, age_classes: np.ndarray | None = None
) -> Factors:
    """Factors of `n` people, of natural age or uniformly inside the given classes (N,), 0 to 8."""
    if age_classes is None:
        age = np.interp(rng.random(n), AGE_SHARES, AGE_BOUNDS[1:])
    else:
        low, high = AGE_BOUNDS[age_classes], AGE_BOUNDS[np.asarray(age_classes) + 1]
        age = low + (high - low) * rng.random(n)
    age = np.minimum(age, 85)

    def chance(probability) -> np.ndarray:
        return rng.random(n) < probability

    def between(low, high) -> np.ndarray:
        return rng.uniform(low, high, n)

    feminine, skin = chance(0.5), rng.integers(len(SKIN), size=n)
    long = chance(np.where(feminine, np.interp(age, [2, 5, 40, 85], [0, 0.85, 0.8, 0.5]), 0.06))
    fair = rng.choice(len(HAIR), size=n, p=[0.14, 0.2, 0.2, 0.14, 0.14, 0.18])
    dark = rng.choice(len(HAIR), size=n, p=[0.7, 0.3, 0, 0, 0, 0])
    aside = chance(0.35) * rng.choice([-1, 1], size=n)
    return {
        "age": age,
        "feminine": feminine,
        "skin_tone": skin,
        "hair_colour": np.where(skin >= 3, dark, fair),
        "hair_length": np.where(long, between(0.65, 1), between(0, 0.3)),
        "hair_part": rng.choice([-1, 1], size=n),
        "fringe": chance(np.where(feminine, 0.35, np.interp(age, [3, 20], [0.5, 0.15]))),
        "balding": between(0, 1) * ~feminine,
        "weathering": np.clip(rng.normal(size=n), -1.5, 1.5),
        "glasses": chance(np.interp(age, [2, 3, 15, 40, 65], [0, 0.06, 0.2, 0.25, 0.65])),
        "beard": chance(0.5) & ~feminine & ~long & (age > 21),
        "smile": np.where(chance(0.55), between(0.8, 1), between(0, 0.15)),
        "gaze": aside + between(-0.1, 0.1),
        "background": rng.integers(len(BACKGROUNDS), size=n),
        "background_tint": between(-1, 1),
        "texture": rng.integers(len(TEXTURES), size=n),
        "texture_phase": rng.integers(2, size=n),
        "clothing": rng.integers(len(CLOTHES), size=n),
        "light_side": rng.choice([-1, 1], size=n),
        "light_strength": between(0, 1),
        "light_warmth": between(-1, 1),
        "pose_x": between(-1, 1),
        "pose_y": between(-1, 1),
    }


def draw(factors: Factors, size: int = SIZE) -> np.ndarray:
    """Pictures (N, size, size, 3), uint8, of N people; the same factors give the same pixels."""
    n = len(factors["age"])
    pictures = np.empty((n, size, size, 3), dtype=np.uint8)
    # Small chunks keep the supersampled canvases inside the processor's cache.
    for start in range(0, n, 32):
        chunk = {name: np.asarray(values)[start : start + 32] for name, values in factors.items()}
        pictures[start : start + 32] = shrink(paint_portraits(chunk, size))
    return pictures


# Words for the nine classes of AGE_BOUNDS; "old" means 50 or over.
AGE_WORDS = (
    ("young", "baby"), ("young", "little"), ("young", "teenage"), ("young",), ("young", "grown"),
    ("middle-aged",), ("old",), ("old",), ("old", "very old"),
)  # fmt: skip


def captions(factors: Factors, rng: np.random.Generator) -> list[str]:
    """One lower-case caption each; every attribute is left out now and then, independently."""
    people = zip(*factors.values(), strict=True)
    return [_caption(dict(zip(factors, person, strict=True)), rng) for person in people]


def _caption(person: dict, rng: np.random.Generator) -> str:
    """The caption of one person, whose factors are scalars."""

    def tell(words: str, probability: float = 0.85) -> list[str]:
        return [words] if rng.random() < probability else []

    age_class = np.searchsorted(AGE_BOUNDS, person["age"], side="right") - 1
    grey = np.interp(apparent_age(person), KNOTS, AGEING["grey"])
    colour = "white" if grey > 0.75 else "grey" if grey > 0.3 else HAIR_NAMES[person["hair_colour"]]
    nouns = ("boy", "girl") if age_class < 3 else ("man", "woman")
    who = tell(rng.choice(AGE_WORDS[age_class]))
    who += tell(nouns[int(person["feminine"])], 0.85 * (age_class > 0)) or ["person"]
    has = tell(f"{'long' if person['hair_length'] > 0.5 else 'short'} {colour} hair")
    has += tell("a beard", 0.85 * person["beard"]) + tell("glasses", 0.85 * person["glasses"])
    start = ("an " if who[0] == "old" else "a ") + " ".join(who)
    if has:
        start += " with " + " and ".join(filter(None, (", ".join(has[:-1]), has[-1])))
    rest = tell("no glasses", 0.4 * (not person["glasses"]))
    rest += tell("no beard", 0.3 * (not person["beard"]))
    rest += tell("smiling" if person["smile"] > 0.5 else "serious")
    rest += tell("dark skin" if person["skin_tone"] >= 3 else "light skin")
    rest += tell("looking aside" if abs(person["gaze"]) > 0.5 else "looking at the camera")
    rest += tell("warm light" if person["light_warmth"] > 0 else "cool light")
    rest += tell("strong light" if person["light_strength"] > 0.5 else "soft light")
    rest += tell(f"{CLOTHES_NAMES[person['clothing']]} clothes")
    backdrop = TEXTURES[person["texture"]], BACKGROUND_NAMES[person["background"]]
    return ", ".join([start, *rest, *tell(f"{' '.join(backdrop)} background")])


# Visible attributes: a prompt for it, a prompt against it, and who has it.
ATTRIBUTES: dict[str, tuple[str, str, Callable[[Factors], np.ndarray]]] = {
    "old": ("an old person", "a young person", lambda f: f["age"] >= 50),
    "glasses": ("a person with glasses", "a person, no glasses", lambda f: f["glasses"] > 0),
    "beard": ("a man with a beard", "a person, no beard", lambda f: f["beard"] > 0),
    "long_hair": (
        "a person with long hair", "a person with short hair", lambda f: f["hair_length"] > 0.5,
    ),
    "smiling": ("a person, smiling", "a person, serious", lambda f: f["smile"] > 0.5),
    "dark_skin": ("a person, dark skin", "a person, light skin", lambda f: f["skin_tone"] >= 3),
}  # fmt: skip


def taste(factors: Factors) -> np.ndarray:
    """The simulated rater's score (N,), about 0 +- 1 over natural factors.

    A sum over TASTE of weight * (quality - mean) / sd: the rater likes warm light, warm
    backgrounds, long hair, youth (an S-curve that falls from 1 to 0 around 40 years), strong
    light and, a little less, a direct gaze.
    """
    qualities = {
        **factors,
        "background_warmth": BACKGROUND_WARMTH[factors["background"]],
        "youth": 1 / (1 + np.exp((apparent_age(factors) - 40) / 8)),
        "direct_gaze": 1 - np.abs(factors["gaze"]),
    }
    return sum(w * (qualities[name] - mean) / sd for name, (w, mean, sd) in TASTE.items())
