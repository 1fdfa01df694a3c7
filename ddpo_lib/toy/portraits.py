"""Toy portraits: from named factors to pixels, without any further randomness.

The factors are those of `faces`, arrays (N,). Lengths are in half-pictures (0.0625 is one pixel of
32), in the coordinates of `drawing`: -1 to 1, y downward.
"""

import numpy as np

from ddpo_lib.toy.drawing import Factors, col, ellipse, grid, mix, paint, soft

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


def apparent_age(factors: Factors) -> np.ndarray:
    """Age as it shows, in years (N,): the true one, up to 4 % more or less."""
    return factors["age"] * (1 + 0.025 * factors["weathering"])


def paint_portraits(factors: Factors, size: int) -> np.ndarray:
    """Supersampled canvases (N, 3 * size, 3 * size, 3) in about 0 to 1, painted back to front."""
    portrait = _Portrait(factors, size)
    for paint_part in (_background, _body, _head, _mouth, _eyes, _hair, _glasses, _light):
        paint_part(portrait)
    return portrait.canvas


class _Portrait:
    """A batch of canvases, the coordinates of what is on them, and what the factors say of it."""

    def __init__(self, factors: Factors, size: int):
        self.x, self.y = grid(size)
        self.factors, n, side = factors, len(factors["age"]), self.x.shape[-1]
        # Channels outermost in memory: numpy's inner loops then run along rows of pixels.
        self.canvas = np.empty((3, n, side, side), dtype=np.float32).transpose(1, 2, 3, 0)

        self.looks = apparent_age(factors)
        self.body = {name: np.interp(self.looks, KNOTS, values) for name, values in AGEING.items()}
        self.feminine = np.asarray(factors["feminine"], float)
        self.bald = self.body["bald"] * factors["balding"]
        self.width = self.body["head_width"] * (1 - 0.04 * self.feminine)
        self.height = self.body["head_height"]

        self.skin = mix(SKIN[factors["skin_tone"]], (204, 189, 184), 0.12 * self.body["wrinkles"])
        self.shadow, self.crease = self.skin * (0.80, 0.74, 0.72), self.skin * (0.62, 0.55, 0.54)
        grey = self.body["grey"]
        hair = mix(HAIR[factors["hair_colour"]], GREY, np.minimum(grey / 0.6, 1))
        self.hair = mix(hair, WHITE, np.maximum(grey - 0.6, 0) / 0.4)

        # u, v are coordinates of the head; f those of its features, which turn with the gaze.
        self.u = self.x / ZOOM - col(0.05 * factors["pose_x"])
        self.v = self.y / ZOOM - col(self.body["head_y"] + 0.05 * factors["pose_y"])
        self.f = self.u - col(0.045 * factors["gaze"])

        # Hair around the head, as far as it is seen from the front: the painter comes back to it.
        length, thickness = factors["hair_length"], self.body["hair"]
        volume = col(self.width + 0.02 + 0.02 * thickness + 0.08 * length - 0.02 * self.bald)
        crown = col(self.height - 0.09 + 0.06 * thickness - 0.08 * self.bald)
        tips = self.v - col(0.06 + 1.05 * length) + 0.6 * self.u**2
        radius = np.sqrt((self.u / volume) ** 2 + (np.minimum(self.v + 0.12, 0) / crown) ** 2)
        self.mane = soft(np.maximum((radius - 1) * 0.5, tips), 0.04) * col(thickness)

    def window(self, across: np.ndarray, top: float, bottom: float, reach: float = 0.7):
        """Views of the canvas, of `across` and of v, limited to top < y < bottom and |x| < reach,
        to save time."""
        side = self.canvas.shape[1]
        rows = slice(*(int(np.clip(ZOOM * edge + 1, 0, 2) / 2 * side) for edge in (top, bottom)))
        margin = int(max(1 - ZOOM * reach, 0) / 2 * side)
        columns = slice(margin, side - margin)
        return self.canvas[:, rows, columns], across[:, :, columns], self.v[:, rows]


def _background(p: _Portrait) -> None:
    factors = p.factors
    pattern = _textures(p.x, p.y)[factors["texture"], factors["texture_phase"]]
    tint = 1 + 0.05 * factors["background_tint"][:, None]
    p.canvas[:] = (BACKGROUNDS[factors["background"]] * tint).reshape(-1, 1, 1, 3)
    p.canvas *= 1 + 0.11 * pattern[..., None]


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


def _body(p: _Portrait) -> None:
    """Clothes, then long hair over them, then the neck over both."""
    part, a, b = p.window(p.u, 0.3, 1, 1)
    broad = p.body["shoulders"] * (1 - 0.12 * p.feminine)
    paint(part, ellipse(a, b, 0, p.height + 0.62, broad, 0.52), CLOTHES[p.factors["clothing"]])
    paint(p.canvas, p.mane, p.hair * 0.82)
    part, a, b = p.window(p.u, 0.2, 1)
    chin = col(p.height)
    collar = np.maximum(np.abs(a) + 0.75 * (b - chin - 0.02) - 0.25, chin - 0.1 - b)
    paint(part, soft(collar) * col(p.body["collar"]), CREAM)
    paint(part, ellipse(a, b, 0, p.height, 0.42 * p.width, 0.17), p.shadow)


def _head(p: _Portrait) -> None:
    """Ears, then an ellipse whose sides draw in towards the chin, with its beard."""
    part, a, b = p.window(p.u, -0.2, 0.5)
    ears = ellipse(np.abs(a), b, p.width, p.body["eye_y"] + 0.07, 0.07, 0.10)
    paint(part, ears, p.shadow)
    part, a, b = p.window(p.u, -0.75, 0.75)
    chin = col(p.height)
    slim = a / (1 - col(p.body["taper"]) * np.clip(b / chin, -0.5, 1))
    radius = np.sqrt((slim / col(p.width)) ** 2 + (b / chin) ** 2)
    face = soft((radius - 1) * 0.45)
    paint(part, face, p.skin)
    paint(part, face * np.clip(radius - 0.62, 0, 1), p.shadow)
    _age(p)
    _beard(p, face)


def _age(p: _Portrait) -> None:
    """Rosy cheeks of children, then creases that deepen."""
    part, a, b = p.window(p.f, -0.6, 0.6, 0.55)
    pair, eye_y = np.abs(a), p.body["eye_y"]
    cheeks = ellipse(pair, b, 0.62 * p.width, eye_y + 0.20, 0.13, 0.10, 0.12)
    paint(part, cheeks * col(p.body["blush"]), p.skin * (1.0, 0.66, 0.62))
    folds = np.maximum(np.abs(pair - 0.10 - 0.45 * (b - 0.14)) - 0.016, np.abs(b - 0.24) - 0.10)
    brow = np.minimum(np.abs(b + 0.25), np.abs(b + 0.34)) - 0.012
    creases = np.maximum(soft(folds, 0.03), 0.8 * soft(np.maximum(brow, pair - 0.20), 0.03))
    bags = ellipse(pair, b, p.body["eye_gap"], eye_y + 0.085, 0.095, 0.03, 0.04)
    paint(part, np.maximum(creases, bags) * col(0.8 * p.body["wrinkles"]), p.crease)


def _beard(p: _Portrait, face: np.ndarray) -> None:
    """It grows from the ears down over the mask of the face, and leaves the mouth to be painted."""
    part, a, b = p.window(p.u, -0.1, 0.75)
    cover = soft(col(p.body["mouth_y"] - 0.08) - 0.38 * (a / col(p.width)) ** 4 - b, 0.05)
    strength = col(0.92 * p.factors["beard"])
    paint(part, face[:, -b.shape[1] :] * cover * strength, p.hair * 0.88)


def _mouth(p: _Portrait) -> None:
    """A gently curved line of lips that a smile opens into a crescent of teeth."""
    body, smile = p.body, p.factors["smile"]
    rouge = 0.45 * p.feminine * (p.looks > 14)
    lips = mix(p.skin * (0.86, 0.62, 0.60), (184, 56, 66), rouge)
    part, a, b = p.window(p.f, 0, 0.65, 0.45)
    bow = 1 - (a / col(body["mouth_width"] * (1 + 0.15 * smile))) ** 2
    upper = col(body["mouth_y"] - 0.02) + 0.02 * bow
    lower = upper + col(0.09 * smile) * bow
    lip = col(0.020 + 0.012 * body["lips"] * (1 + 0.4 * p.feminine))
    mouth = np.maximum(np.maximum(upper - 0.8 * lip - b, b - lower - lip), -0.2 * bow)
    paint(part, soft(mouth), lips)
    teeth = np.maximum(np.maximum(upper - b, b - lower + 0.01), 0.04 - 0.2 * bow)
    paint(part, soft(teeth) * col(smile), CREAM)


def _eyes(p: _Portrait) -> None:
    """Nose, eyes and brows."""
    eye_y, eye_gap, eye = (p.body[name] for name in ("eye_y", "eye_gap", "eye_size"))
    part, a, b = p.window(p.f, -0.35, 0.4, 0.5)
    pair = np.abs(a)
    nose = ellipse(a, b, 0, 0.5 * (eye_y + p.body["mouth_y"]) + 0.02, 0.055, 0.03)
    paint(part, nose * col(0.7 * p.body["nose"]), p.crease)
    lids = ellipse(pair, b, eye_gap, eye_y - 0.02 * eye, 0.105 * eye, 0.065 * eye)
    paint(part, lids * col(0.55 + 0.3 * p.feminine), p.crease * 0.6)
    paint(part, ellipse(pair, b, eye_gap, eye_y, 0.095 * eye, 0.06 * eye), CREAM)
    for eye_x in (-eye_gap, eye_gap):
        iris = ellipse(a, b, eye_x + 0.058 * p.factors["gaze"], eye_y, 0.05 * eye, 0.062 * eye)
        paint(part, iris, INK)
    across = pair - col(eye_gap)
    arch = np.abs(b - col(eye_y - 0.085 - 0.055 * eye) - 0.8 * across**2)
    brow = np.maximum(arch - col(0.024 - 0.008 * p.feminine), np.abs(across) - 0.10)
    paint(part, soft(brow, 0.03) * col(np.minimum(p.body["brow"], 1)), p.hair * 0.8)


def _hair(p: _Portrait) -> None:
    """Front hair ends at a line that is highest at the parting and runs down the temples."""
    factors, bald = p.factors, p.bald
    fringe = factors["fringe"] * (1 - bald)
    line = p.height * (0.30 * fringe - 0.70 * (1 + bald)) - 0.1 * (1 - p.body["hair"])
    parting = col(0.26 * factors["hair_part"] * (1 - fringe) * (1 - bald))
    spread = p.u / col(p.width)
    spread = np.abs(spread - parting * (1 - spread**2))
    falls = col(0.25 + 0.9 * factors["hair_length"]) * spread**6
    line = col(line) + col(0.22 * (1 - bald)) * spread**2 + falls
    cap = p.mane * soft(p.v - line, 0.05)
    paint(p.canvas, cap, p.hair)
    paint(p.canvas, cap * np.clip(0.45 * spread**2, 0, 0.6), p.hair * 0.7)
    gloss = ellipse(p.u, p.v, 0.2 * factors["light_side"], 0.04 - p.height, 0.26, 0.10, 0.16)
    paint(p.canvas, 0.3 * cap * gloss, mix(p.hair, CREAM, 0.55))


def _glasses(p: _Portrait) -> None:
    """Their lenses are a little bright, so that they show on dark skin too."""
    eye_y, worn = p.body["eye_y"], p.factors["glasses"]
    part, a, b = p.window(p.f, -0.3, 0.4, 0.6)
    across = np.abs(a) - col(p.body["eye_gap"] + 0.01)
    rings = np.sqrt(across**2 + (b - col(eye_y + 0.01)) ** 2) - 0.155
    bridge = np.maximum(np.abs(a) - 0.05, np.abs(b - col(eye_y)) - 0.02)
    paint(part, soft(rings) * col(0.2 * worn), CREAM)
    paint(part, soft(np.minimum(np.abs(rings) - 0.02, bridge)) * col(worn), INK)


def _light(p: _Portrait) -> None:
    factors = p.factors
    sideways = np.clip(p.u * col(factors["light_side"]), -0.38, 0.38)
    slope = sideways - 0.25 * np.clip(p.v, -0.6, 0.6)
    p.canvas *= (0.98 + col(0.06 + 0.44 * factors["light_strength"]) * slope)[..., None] / 255
    # A little warm even at its coolest, lest fair skin turn grey.
    warmth = np.multiply.outer(factors["light_warmth"], (0.05, 0, -0.10))
    p.canvas *= (warmth + (1.01, 1, 0.97)).reshape(-1, 1, 1, 3)
