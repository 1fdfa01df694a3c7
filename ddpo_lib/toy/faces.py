"""Toy portraits drawn from named factors, with captions, visible attributes and a simulated taste.

`sample_factors` draws the causes of a picture, `draw` turns them into pixels without any further
randomness, and `captions`, `ATTRIBUTES` and `taste` describe the same causes in words and numbers.
Factors are arrays (N,); lengths inside `draw` are in half-pictures (0.0625 is one pixel of 32).
"""

from collections.abc import Callable

import numpy as np

from ddpo_lib.toy.drawing import SIZE, col, ellipse, grid, mix, paint, shrink, soft

Factors = dict[str, np.ndarray]

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

# Palettes, RGB of 255. Skin: three light and three dark tones, with a clear step between them.
SKIN = np.array(
    [(248, 214, 186), (238, 195, 160), (220, 170, 130),
     (160, 110, 78), (135, 89, 62), (112, 72, 51)]
)  # fmt: skip
HAIR_NAMES = np.array(["black", "brown", "brown", "red", "blond", "blond"])
HAIR = np.array(
    [(34, 28, 30), (66, 42, 32), (106, 68, 43), (148, 74, 40), (168, 124, 74), (226, 186, 112)]
)
BACKGROUND_NAMES = np.array(["red", "orange", "yellow", "pink", "purple", "green", "teal", "blue"])
BACKGROUND_WARMTH = np.array([0.9, 1.0, 0.8, 0.6, -0.5, -0.7, -0.9, -1.0])
BACKGROUNDS = np.array(
    [(203, 116, 102), (233, 168, 116), (238, 208, 140), (230, 178, 178),
     (167, 148, 196), (150, 184, 150), (104, 163, 167), (128, 170, 210)]
)  # fmt: skip
CLOTHES_NAMES = np.array(["blue", "red", "green", "yellow", "white", "black"])
CLOTHES = np.array(
    [(52, 72, 112), (142, 56, 62), (72, 104, 82), (214, 166, 76), (235, 226, 210), (56, 54, 62)]
)
GREY, WHITE, CREAM, INK = (150, 150, 153), (236, 235, 233), (248, 244, 238), (34, 26, 28)
TEXTURES = np.array(["plain", "shaded", "dotted", "striped"])

# How a face changes with age: values at the ages of KNOTS, straight lines between them.
KNOTS = np.array([0, 3, 8, 15, 24, 36, 50, 65, 85])
AGEING = {
    "head_width": (0.54, 0.53, 0.49, 0.42, 0.41, 0.43, 0.45, 0.45, 0.44),
    "head_height": (0.51, 0.51, 0.52, 0.54, 0.56, 0.57, 0.58, 0.59, 0.60),
    "head_y": (0.10, 0.07, 0.02, -0.04, -0.07, -0.07, -0.07, -0.06, -0.05),
    "taper": (-0.10, -0.06, 0.04, 0.16, 0.17, 0.13, 0.09, 0.05, 0.02),  # of the jaw
    "shoulders": (0.42, 0.46, 0.54, 0.64, 0.74, 0.78, 0.80, 0.77, 0.72),
    "eye_y": (0.13, 0.11, 0.06, 0.01, -0.02, -0.02, -0.02, -0.02, -0.02),
    "eye_gap": (0.24, 0.24, 0.22, 0.19, 0.185, 0.19, 0.195, 0.195, 0.195),
    "eye_size": (1.40, 1.36, 1.22, 1.06, 1.0, 0.96, 0.92, 0.88, 0.82),
    "brow": (0.05, 0.25, 0.50, 0.75, 0.85, 1.0, 1.1, 1.15, 1.2),
    "nose": (0.35, 0.4, 0.55, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3),
    "mouth_y": (0.33, 0.32, 0.31, 0.31, 0.31, 0.32, 0.33, 0.34, 0.35),
    "mouth_width": (0.11, 0.13, 0.16, 0.17, 0.18, 0.19, 0.19, 0.19, 0.18),
    "lips": (0.9, 0.9, 0.9, 1.0, 1.0, 0.95, 0.8, 0.6, 0.45),
    "blush": (0.75, 0.65, 0.4, 0.12, 0.08, 0.04, 0, 0, 0),
    "hair": (0.30, 0.85, 1, 1, 1, 1, 1, 1, 1),  # opacity
    "collar": (0, 0, 0, 0, 0.1, 0.9, 1, 1, 1),
    "wrinkles": (0, 0, 0, 0, 0, 0.14, 0.42, 0.78, 1.0),
    "grey": (0, 0, 0, 0, 0, 0.02, 0.40, 0.85, 1.0),
    "bald": (0, 0, 0, 0, 0, 0.12, 0.45, 0.8, 1.0),
}

# Heads are drawn this much larger than their measures, to fill the picture.
ZOOM = 1.1

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


def apparent_age(factors: Factors) -> np.ndarray:
    """Age as it shows, in years (N,): the true one, up to 4 % more or less."""
    return factors["age"] * (1 + 0.025 * factors["weathering"])


def draw(factors: Factors, size: int = SIZE) -> np.ndarray:
    """Pictures (N, size, size, 3), uint8, of N people; the same factors give the same pixels."""
    n = len(factors["age"])
    pictures = np.empty((n, size, size, 3), dtype=np.uint8)
    # Small chunks keep the supersampled canvases inside the processor's cache.
    for start in range(0, n, 32):
        chunk = {name: np.asarray(values)[start : start + 32] for name, values in factors.items()}
        pictures[start : start + 32] = shrink(_portraits(chunk, size))
    return pictures


def _window(canvas, u, v, top: float, bottom: float, reach: float = 0.7):
    """Views of the canvas, u and v limited to top < y < bottom and |x| < reach, to save time."""
    side = canvas.shape[1]
    rows = slice(*(int(np.clip(ZOOM * edge + 1, 0, 2) / 2 * side) for edge in (top, bottom)))
    margin = int(max(1 - ZOOM * reach, 0) / 2 * side)
    columns = slice(margin, side - margin)
    return canvas[:, rows, columns], u[:, :, columns], v[:, rows]


def _textures(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Brightness patterns (kind, phase, S, S) in -1 to 1, in the order of TEXTURES."""
    flat = np.zeros_like(x + y)[0]
    bank = []
    for phase in (0, 1):
        slope = (1 - 2 * phase) * y[0] + flat
        waves_x, waves_y = (np.cos(4 * np.pi * (t[0] - 0.25 * phase)) for t in (x, y))
        dots = 2 * soft(1.1 - waves_x - waves_y, 0.3) - 0.4
        stripes = 2 * soft(-np.cos(4 * np.pi * (x[0] + y[0] - 0.25 * phase)), 0.5) - 1
        bank.append([flat, slope, dots, 0.7 * stripes])
    return np.array(bank, dtype=np.float32).swapaxes(0, 1)


def _portraits(factors: Factors, size: int) -> np.ndarray:
    """Supersampled canvases (N, 3 * size, 3 * size, 3) in about 0 to 1, painted back to front."""
    x, y = grid(size)
    n, side = len(factors["age"]), x.shape[-1]
    # Channels outermost in memory: numpy's inner loops then run along rows of pixels.
    canvas = np.empty((3, n, side, side), dtype=np.float32).transpose(1, 2, 3, 0)

    looks = apparent_age(factors)
    body = {name: np.interp(looks, KNOTS, values) for name, values in AGEING.items()}
    feminine, length = np.asarray(factors["feminine"], float), factors["hair_length"]
    smile, bald = factors["smile"], body["bald"] * factors["balding"]
    width, height = body["head_width"] * (1 - 0.04 * feminine), body["head_height"]
    eye_y, eye_gap, eye = body["eye_y"], body["eye_gap"], body["eye_size"]
    mouth_y, wrinkles, thickness = body["mouth_y"], body["wrinkles"], body["hair"]

    skin = mix(SKIN[factors["skin_tone"]], (204, 189, 184), 0.12 * wrinkles)
    shadow, crease = skin * (0.80, 0.74, 0.72), skin * (0.62, 0.55, 0.54)
    rouge = 0.45 * feminine * (looks > 14)
    lips = mix(skin * (0.86, 0.62, 0.60), (184, 56, 66), rouge)
    hair = mix(HAIR[factors["hair_colour"]], GREY, np.minimum(body["grey"] / 0.6, 1))
    hair = mix(hair, WHITE, np.maximum(body["grey"] - 0.6, 0) / 0.4)

    pattern = _textures(x, y)[factors["texture"], factors["texture_phase"]]
    tint = 1 + 0.05 * factors["background_tint"][:, None]
    canvas[:] = (BACKGROUNDS[factors["background"]] * tint).reshape(n, 1, 1, 3)
    canvas *= 1 + 0.11 * pattern[..., None]

    # u, v are coordinates of the head; f those of its features, which turn with the gaze.
    u = x / ZOOM - col(0.05 * factors["pose_x"])
    v = y / ZOOM - col(body["head_y"] + 0.05 * factors["pose_y"])
    f = u - col(0.045 * factors["gaze"])

    # Clothes, then long hair over them, then the neck over both.
    part, a, b = _window(canvas, u, v, 0.3, 1, 1)
    shoulders = ellipse(a, b, 0, height + 0.62, body["shoulders"] * (1 - 0.12 * feminine), 0.52)
    paint(part, shoulders, CLOTHES[factors["clothing"]])
    volume = col(width + 0.02 + 0.02 * thickness + 0.08 * length - 0.02 * bald)
    dome = np.minimum(v + 0.12, 0) / col(height - 0.09 + 0.06 * thickness - 0.08 * bald)
    tips = v - col(0.06 + 1.05 * length) + 0.6 * u**2
    mane = np.maximum((np.sqrt((u / volume) ** 2 + dome**2) - 1) * 0.5, tips)
    mane = soft(mane, 0.04) * col(thickness)
    paint(canvas, mane, hair * 0.82)
    part, a, b = _window(canvas, u, v, 0.2, 1)
    chin = col(height)
    collar = np.maximum(np.abs(a) + 0.75 * (b - chin - 0.02) - 0.25, chin - 0.1 - b)
    paint(part, soft(collar) * col(body["collar"]), CREAM)
    paint(part, ellipse(a, b, 0, height, 0.42 * width, 0.17), shadow)

    # The head: an ellipse whose sides draw in towards the chin.
    part, a, b = _window(canvas, u, v, -0.2, 0.5)
    paint(part, ellipse(np.abs(a), b, width, eye_y + 0.07, 0.07, 0.10), shadow)
    part, a, b = _window(canvas, u, v, -0.75, 0.75)
    slim = a / (1 - col(body["taper"]) * np.clip(b / chin, -0.5, 1))
    radius = np.sqrt((slim / col(width)) ** 2 + (b / chin) ** 2)
    face = soft((radius - 1) * 0.45)
    paint(part, face, skin)
    paint(part, face * np.clip(radius - 0.62, 0, 1), shadow)

    # Age in the skin: rosy cheeks of children, then creases that deepen.
    part, a, b = _window(canvas, f, v, -0.6, 0.6, 0.55)
    pair = np.abs(a)
    cheeks = ellipse(pair, b, 0.62 * width, eye_y + 0.20, 0.13, 0.10, 0.12)
    paint(part, cheeks * col(body["blush"]), skin * (1.0, 0.66, 0.62))
    folds = np.maximum(np.abs(pair - 0.10 - 0.45 * (b - 0.14)) - 0.016, np.abs(b - 0.24) - 0.10)
    brow = np.minimum(np.abs(b + 0.25), np.abs(b + 0.34)) - 0.012
    creases = np.maximum(soft(folds, 0.03), 0.8 * soft(np.maximum(brow, pair - 0.20), 0.03))
    bags = ellipse(pair, b, eye_gap, eye_y + 0.085, 0.095, 0.03, 0.04)
    paint(part, np.maximum(creases, bags) * col(0.8 * wrinkles), crease)

    # A full beard grows from the ears down and leaves the mouth to be painted over it.
    part, a, b = _window(canvas, u, v, -0.1, 0.75)
    cover = soft(col(mouth_y - 0.08) - 0.38 * (a / col(width)) ** 4 - b, 0.05)
    paint(part, face[:, -b.shape[1] :] * cover * col(0.92 * factors["beard"]), hair * 0.88)

    # Mouth: a gently curved line of lips that a smile opens into a crescent of teeth.
    part, a, b = _window(canvas, f, v, 0, 0.65, 0.45)
    bow = 1 - (a / col(body["mouth_width"] * (1 + 0.15 * smile))) ** 2
    upper = col(mouth_y - 0.02) + 0.02 * bow
    lower = upper + col(0.09 * smile) * bow
    lip = col(0.020 + 0.012 * body["lips"] * (1 + 0.4 * feminine))
    mouth = np.maximum(np.maximum(upper - 0.8 * lip - b, b - lower - lip), -0.2 * bow)
    paint(part, soft(mouth), lips)
    teeth = np.maximum(np.maximum(upper - b, b - lower + 0.01), 0.04 - 0.2 * bow)
    paint(part, soft(teeth) * col(smile), CREAM)

    # Nose, eyes and brows.
    part, a, b = _window(canvas, f, v, -0.35, 0.4, 0.5)
    pair = np.abs(a)
    nose = ellipse(a, b, 0, 0.5 * (eye_y + mouth_y) + 0.02, 0.055, 0.03)
    paint(part, nose * col(0.7 * body["nose"]), crease)
    lids = ellipse(pair, b, eye_gap, eye_y - 0.02 * eye, 0.105 * eye, 0.065 * eye)
    paint(part, lids * col(0.55 + 0.3 * feminine), crease * 0.6)
    paint(part, ellipse(pair, b, eye_gap, eye_y, 0.095 * eye, 0.06 * eye), CREAM)
    for eye_x in (-eye_gap, eye_gap):
        iris = ellipse(a, b, eye_x + 0.058 * factors["gaze"], eye_y, 0.05 * eye, 0.062 * eye)
        paint(part, iris, INK)
    across = pair - col(eye_gap)
    arch = np.abs(b - col(eye_y - 0.085 - 0.055 * eye) - 0.8 * across**2)
    brow = np.maximum(arch - col(0.024 - 0.008 * feminine), np.abs(across) - 0.10)
    paint(part, soft(brow, 0.03) * col(np.minimum(body["brow"], 1)), hair * 0.8)

    # Front hair ends at a line that is highest at the parting and runs down the temples.
    fringe = factors["fringe"] * (1 - bald)
    line = height * (0.30 * fringe - 0.70 * (1 + bald)) - 0.1 * (1 - thickness)
    parting = col(0.26 * factors["hair_part"] * (1 - fringe) * (1 - bald))
    spread = u / col(width)
    spread = np.abs(spread - parting * (1 - spread**2))
    line = col(line) + col(0.22 * (1 - bald)) * spread**2 + col(0.25 + 0.9 * length) * spread**6
    cap = mane * soft(v - line, 0.05)
    paint(canvas, cap, hair)
    paint(canvas, cap * np.clip(0.45 * spread**2, 0, 0.6), hair * 0.7)
    gloss = ellipse(u, v, 0.2 * factors["light_side"], 0.04 - height, 0.26, 0.10, 0.16)
    paint(canvas, 0.3 * cap * gloss, mix(hair, CREAM, 0.55))

    # Glasses, their lenses a little bright so that they show on dark skin too.
    part, a, b = _window(canvas, f, v, -0.3, 0.4, 0.6)
    rings = np.sqrt((np.abs(a) - col(eye_gap + 0.01)) ** 2 + (b - col(eye_y + 0.01)) ** 2) - 0.155
    bridge = np.maximum(np.abs(a) - 0.05, np.abs(b - col(eye_y)) - 0.02)
    paint(part, soft(rings) * col(0.2 * factors["glasses"]), CREAM)
    paint(part, soft(np.minimum(np.abs(rings) - 0.02, bridge)) * col(factors["glasses"]), INK)

    slope = np.clip(u * col(factors["light_side"]), -0.38, 0.38) - 0.25 * np.clip(v, -0.6, 0.6)
    canvas *= (0.98 + col(0.06 + 0.44 * factors["light_strength"]) * slope)[..., None] / 255
    # A little warm even at its coolest, lest fair skin turn grey.
    warmth = np.multiply.outer(factors["light_warmth"], (0.05, 0, -0.10))
    canvas *= (warmth + (1.01, 1, 0.97)).reshape(n, 1, 1, 3)
    return canvas


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
