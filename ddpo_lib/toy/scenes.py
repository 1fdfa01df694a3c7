"""Toy pictures of churches: from named factors to pixels, without any further randomness.

Below, `f` holds the factors of a batch, those of `churches`, `light` (N, 3) is the colour of the
light that falls on every object, and places are in the coordinates of `drawing`: -1 to 1, y
downward.
"""

import numpy as np

from ddpo_lib.toy.drawing import SUPERSAMPLE, Factors, box, col, ellipse, grid, mix, paint, soft

NIGHT = 3  # value of the factor "time"


def _palette(*rows) -> np.ndarray:
    return np.asarray(rows, dtype=np.float32) / 255


# Skies are (time, zenith / middle / horizon, RGB); objects are multiplied by the light (time, RGB).
CLEAR_SKY = _palette(
    [(128, 158, 208), (226, 190, 208), (255, 222, 184)],
    [(84, 154, 220), (150, 202, 238), (228, 241, 238)],
    [(104, 86, 152), (232, 132, 114), (255, 206, 118)],
    [(17, 24, 66), (40, 60, 120), (88, 112, 168)],
)
DULL_SKY = _palette(
    [(164, 168, 180), (186, 184, 190), (204, 198, 194)],
    [(150, 162, 172), (176, 184, 188), (200, 204, 204)],
    [(122, 114, 130), (162, 144, 144), (194, 170, 152)],
    [(30, 34, 52), (56, 62, 82), (86, 92, 112)],
)
CLEAR_LIGHT = _palette((255, 230, 222), (255, 253, 246), (255, 210, 164), (120, 138, 196))
DULL_LIGHT = _palette((206, 206, 212), (208, 214, 218), (192, 178, 176), (98, 108, 138))
CLOUD = _palette((255, 232, 226), (255, 255, 252), (255, 186, 150), (74, 86, 130))
ORB = _palette((255, 244, 206), (255, 246, 196), (255, 236, 166), (250, 244, 214))

WALL = _palette((248, 240, 222), (198, 182, 154), (202, 126, 98))
ROOF = _palette((164, 66, 52), (84, 102, 132), (92, 140, 120))
DOME = _palette((230, 176, 66), (70, 108, 170), (112, 172, 146))
GRASS = _palette((126, 172, 80), (190, 178, 92))
TREE = _palette((74, 128, 70), (44, 92, 68))
HILL, TOWN, PATH, WOOD, PANE, GLOW, STAR, CROSS = _palette(
    (86, 134, 120), (184, 132, 112), (222, 200, 156), (98, 62, 46),
    (46, 56, 80), (255, 200, 84), (250, 246, 222), (88, 74, 64),
)  # fmt: skip

HORIZON, GROUND = 0.36, 0.58  # heights of the skyline and of the church's foot
# Star (column, row) on a 32 x 32 raster, at its pixels' centres: four pixels of 64 x 64 each.
STARS = np.array(
    [(1, 2), (5, 0), (12, 8), (3, 9), (12, 1), (18, 4),
     (21, 0), (19, 9), (27, 2), (30, 6), (29, 11), (6, 12)]
) / 16 - 31 / 32  # fmt: skip
TREE_SPOTS = ((-0.84, 0.66), (0.85, 0.7), (-0.55, 0.78))  # x and foot, in order of planting


class _Scene:
    """A batch of canvases; each shape is worked out only where some picture of the batch has it."""

    def __init__(self, n: int, size: int):
        side = size * SUPERSAMPLE
        self.x, self.y = grid(size)
        # Colour planes apart in memory: numpy then runs along rows, not along three channels.
        self.canvas = np.zeros((n, 3, side, side), np.float32).transpose(0, 2, 3, 1)

    def lay(self, shape, left, right, top, bottom, colour, alpha=1.0) -> None:
        """Paint the mask shape(x, y), empty outside the bounds, times alpha (scalar or (N,))."""
        edge, side = 0.03, self.x.size
        span = np.array([np.min(left), np.max(right), np.min(top), np.max(bottom)])
        span += (-edge, edge, -edge, edge)
        c0, c1, r0, r1 = np.clip((span + 1) / 2 * side, 0, side).astype(int)
        x, y = self.x[:, :, c0 : c1 + 1], self.y[:, r0 : r1 + 1]
        paint(self.canvas[:, r0 : r1 + 1, c0 : c1 + 1], col(alpha) * shape(x, y), colour)

    def box(self, left, right, top, bottom, colour, alpha=1.0) -> None:
        self.lay(
            lambda x, y: box(x, y, left, right, top, bottom),
            left,
            right,
            top,
            bottom,
            colour,
            alpha,
        )

    def ellipse(self, cx, cy, rx, ry, colour, alpha=1.0, width=0.02) -> None:
        spread = 1 + width / 2 / np.minimum(rx, ry)  # the soft edge widens along the longer radius
        bounds = cx - spread * rx, cx + spread * rx, cy - spread * ry, cy + spread * ry
        self.lay(lambda x, y: ellipse(x, y, cx, cy, rx, ry, width), *bounds, colour, alpha)

    def taper(self, cx, top, bottom, half_top, half_bottom, colour, alpha=1.0) -> None:
        """A symmetric trapezoid: roof, spire or path."""
        slope = (half_bottom - half_top) / (bottom - top)

        def shape(x, y):
            reach = col(half_top) + col(slope) * (y - col(top))
            return soft(
                np.maximum(np.abs(x - col(cx)) - reach, np.maximum(col(top) - y, y - col(bottom)))
            )

        reach = np.maximum(half_top, half_bottom)
        self.lay(shape, cx - reach, cx + reach, top, bottom, colour, alpha)


def paint_scenes(f: Factors, size: int) -> np.ndarray:
    """Supersampled canvases (N, 3 * size, 3 * size, 3) in 0 to 1, painted back to front."""
    scene = _Scene(len(f["time"]), size)
    light = mix(DULL_LIGHT[f["time"]], CLEAR_LIGHT[f["time"]], f["light"])
    _sky(scene, f)
    _land(scene, f, light)
    _church(scene, f, light)
    _trees(scene, f, light)
    return scene.canvas


def _sky_colours(f: Factors) -> np.ndarray:
    """Zenith, middle and horizon colours, (N, 3, 3)."""
    weight = col(f["light"])
    return (1 - weight) * DULL_SKY[f["time"]] + weight * CLEAR_SKY[f["time"]]


def _sky(scene: _Scene, f: Factors) -> None:
    time, colours = f["time"], _sky_colours(f)
    depth = np.clip((scene.y[0] + 1) / (HORIZON + 1), 0, 1) * 2
    weights = np.maximum(0, 1 - np.abs(depth - np.arange(3)))  # (S, 3), a tent on each colour
    scene.canvas[:] = (weights.astype(np.float32) @ colours)[:, :, None]

    for x, y in STARS:
        scene.ellipse(x, y, 0.03, 0.03, STAR, 0.9 * f["stars"])
    orb_y = np.array([0.02, -0.62, 0.06, -0.6])[time]
    orb_x, visible = f["sky_x"], f["sun"] | f["moon"]

    def orb(x, y):  # the moon's crescent is a disc with a disc bitten out
        bite = ellipse(x, y, orb_x + 0.09, orb_y - 0.05, 0.14, 0.14)
        return ellipse(x, y, orb_x, orb_y, 0.16, 0.16) * (1 - col(f["moon"]) * bite)

    halo = visible * np.where(time == NIGHT, 0.15, 0.5)
    scene.ellipse(orb_x, orb_y, 0.3, 0.3, ORB[time], halo, width=0.3)
    scene.lay(orb, orb_x - 0.17, orb_x + 0.17, orb_y - 0.17, orb_y + 0.17, ORB[time], visible)

    cloud = mix(colours[:, 1] * 0.92, CLOUD[time], 0.25 + 0.75 * f["light"])
    for i, (x, y) in enumerate([(-0.5, -0.42), (0.45, -0.74)]):
        x = x * np.where(f["sky_x"] > 0, 1, -1) + 0.08 * f["shift"]
        for dx, dy, rx, ry in [
            (-0.16, 0.02, 0.16, 0.07),
            (0.02, -0.04, 0.17, 0.11),
            (0.2, 0.03, 0.17, 0.06),
        ]:
            scene.ellipse(x + dx, y + dy, rx, ry, cloud, 0.92 * (f["clouds"] > i))


def _land(scene: _Scene, f: Factors, light: np.ndarray) -> None:
    haze = _sky_colours(f)[:, 2]
    hills, town, night = f["backdrop"] == 1, f["backdrop"] == 2, f["time"] == NIGHT
    hill = HILL * light * np.where(night, 0.55, 1)[:, None]  # by night a silhouette, without haze
    phase = 2 * np.pi * col(f["hill_phase"])
    for base, rise, pace, fade in [(-0.18, 0.13, 2.6, 0.4), (0.1, 0.1, 4.1, 0.08)]:

        def ridge(x, y, base=base, rise=rise, pace=pace):
            return soft(base + rise * np.sin(pace * x + phase) - y)

        scene.lay(ridge, -1, 1, base - rise, HORIZON, mix(hill, haze, fade * ~night), hills)

    for i, x in enumerate([-0.93, -0.72, -0.52, 0.5, 0.7, 0.92]):
        top = (0.12, 0.2, 0.08, 0.18, 0.06, 0.16)[i]
        wall = mix((WALL[0], TOWN)[i % 2] * light, haze, 0.25)
        scene.box(x - 0.11, x + 0.11, top, HORIZON, wall, town)
        scene.taper(x, top - 0.12, top, 0.0, 0.13, mix(ROOF[i % 2] * light, haze, 0.25), town)

    grass = mix(*GRASS, f["grass"]) * light
    scene.box(-1.1, 1.1, HORIZON, 1.1, grass)
    nearness = np.clip((scene.y - HORIZON) / (1 - HORIZON), 0, 1)
    paint(scene.canvas, nearness, grass * 0.8)


def _church(scene: _Scene, f: Factors, light: np.ndarray) -> None:
    dome, side, ornament = f["dome"] == 1, f["side"], f["ornament"]
    half = 0.58 + 0.1 * f["nave_width"] + 0.04 * (side == 0)
    middle = f["shift"] / 16 - 0.15 * side
    eaves = GROUND - 0.4 - 0.12 * f["nave_height"]
    ridge = eaves - 0.27
    tower_half = np.where(dome, 0.24, 0.165)
    tower = middle + side * half
    tower_top = np.where(dome, -0.14, -0.22) - 0.16 * f["tower_height"]

    wall = np.clip(WALL[f["material"]] * (1 + 0.05 * f["wall_tone"][:, None]), 0, 1) * light
    shade, pale = mix(wall, wall * 0.6, 0.5), mix(wall, light, 0.6)
    roof, cap = (
        ROOF[f["roof"]] * light,
        np.where(dome[:, None], DOME[f["roof"]], ROOF[f["roof"]]) * light,
    )
    pane = np.where(f["lit"][:, None] == 1, GLOW, PANE * (0.4 + 0.6 * light))

    shadow = GRASS[0] * light * 0.55
    scene.ellipse(middle + 0.06 * side, GROUND + 0.01, half + 0.22, 0.05, shadow, 0.7, width=0.06)
    scene.taper(tower, GROUND, 1.02, 0.07, 0.2, PATH * light)

    scene.box(middle - half, middle + half, eaves, GROUND, wall)
    _masonry(scene, f, middle - half, middle + half, eaves, wall)
    scene.taper(middle, ridge, eaves, half - 0.12, half + 0.06, roof)
    scene.taper(middle, ridge, ridge + 0.08, half - 0.12, half - 0.07, mix(roof, light, 0.25))
    scene.box(middle - half, middle + half, eaves, eaves + 0.05, shade * 0.9)
    scene.box(middle - half, middle + half, eaves + 0.03, eaves + 0.09, pale, ornament >= 1)
    for grow, colour in (
        (0.028, mix(wall, wall * 0.6, 0.6)),
        (0.0, pane),
    ):  # a frame, then its pane
        _windows(scene, f, middle - side * tower_half / 2, half, tower_half, eaves, grow, colour)

    scene.box(tower - tower_half, tower + tower_half, tower_top, GROUND, wall)
    _masonry(scene, f, tower - tower_half, tower + tower_half, tower_top, wall)
    scene.box(tower + tower_half * 0.5, tower + tower_half, tower_top, GROUND, shade, 0.7)
    scene.box(tower - tower_half, tower - tower_half + 0.02, eaves, GROUND, shade, 0.6)

    scene.box(tower - 0.012, tower + 0.02, tower_top - 0.56, tower_top - 0.3, CROSS * light)
    scene.box(tower - 0.055, tower + 0.06, tower_top - 0.52, tower_top - 0.48, CROSS * light)
    scene.taper(tower, tower_top - 0.44, tower_top, 0.0, tower_half + 0.05, cap, ~dome)
    scene.taper(tower, tower_top - 0.44, tower_top - 0.16, 0.0, 0.12, cap, dome)
    scene.ellipse(tower, tower_top - 0.12, tower_half + 0.05, 0.2, cap, dome)
    scene.ellipse(
        tower - 0.1, tower_top - 0.17, 0.06, 0.1, mix(cap, light, 0.5), 0.8 * dome, width=0.06
    )
    scene.box(
        tower - tower_half - 0.03,
        tower + tower_half + 0.03,
        tower_top - 0.01,
        tower_top + 0.05,
        pale,
    )

    _arch(scene, tower, tower_top + 0.17, tower_top + 0.3, 0.05, pane)
    scene.ellipse(tower, eaves + 0.04, 0.11, 0.11, pale, ornament == 2)
    scene.ellipse(tower, eaves + 0.04, 0.07, 0.07, pane, ornament == 2)
    _arch(scene, tower, GROUND - 0.17, GROUND + 0.01, 0.08, WOOD * light)


def _arch(scene: _Scene, x, top, bottom, half, colour) -> None:
    """A round-headed opening, its arch springing at `top`."""
    scene.ellipse(x, top, half, half, colour)
    scene.box(x - half, x + half, top, bottom, colour)


def _masonry(scene: _Scene, f: Factors, left, right, top, wall: np.ndarray) -> None:
    """Brick courses or stone blocks, fixed to the wall's foot so that they always fall alike."""
    stone, brick = col(f["material"] == 1), col(f["material"] == 2)

    def shape(x, y):
        up, along = (GROUND - y) * 16, (x - col(left)) * 16  # in pixels of a 32 x 32 picture
        courses = (np.floor(up / 1.5) % 2) * 0.55
        blocks = ((np.floor(up / 2) + np.floor(along / 3)) % 2) * 0.5
        return box(x, y, left, right, top, GROUND) * (brick * courses + stone * blocks)

    scene.lay(shape, left, right, top, GROUND, wall * 0.72)


def _windows(scene: _Scene, f: Factors, middle, half, tower_half, eaves, grow, colour) -> None:
    """A row of arched windows, evenly spread over the wall that the tower leaves free."""
    central, each_side = f["side"] == 0, f["windows"] // 2
    gap = np.where(central, tower_half, 0.0)
    pitch = (half - np.where(central, 0, tower_half / 2) - gap - 0.04) / np.maximum(each_side, 1)
    top, bottom = eaves + 0.19, GROUND - 0.1

    def shape(x, y):
        # Fold the wall about its middle and then by the pitch, so one window paints them all.
        out = (np.abs(x - col(middle)) - col(gap)) / col(pitch)
        which = np.floor(out)
        across = np.abs(out - which - 0.5) * col(pitch)
        above = np.maximum(col(top) - y, 0)
        distance = np.maximum(np.hypot(across, above) - 0.042, y - col(bottom)) - grow
        return soft(distance) * ((which >= 0) & (which < col(each_side)))

    scene.lay(shape, middle - half, middle + half, top - 0.08, bottom + grow, colour)


def _trees(scene: _Scene, f: Factors, light: np.ndarray) -> None:
    cypress, tree_size = f["tree_kind"] == 1, f["tree_size"]
    leaf = TREE[f["tree_kind"]] * light
    rx, ry = np.where(cypress, 0.085, 0.17) * tree_size, np.where(cypress, 0.4, 0.2) * tree_size
    stem = np.where(cypress, 0.06, 0.16)
    away = np.where(f["side"] < 0, -1, 1)  # plant away from the tower
    for i, (x, foot) in enumerate(TREE_SPOTS):
        planted, x = f["trees"] > i, x * away + f["shift"] / 16
        crown = foot - stem - ry
        scene.ellipse(x, foot, rx + 0.03, 0.035, light * GRASS[0] * 0.5, 0.6 * planted, width=0.05)
        scene.box(x - 0.03, x + 0.03, crown, foot, WOOD * light, planted)
        scene.ellipse(x, crown, rx, ry, leaf, planted)
        x, y = x - 0.3 * rx, crown - 0.25 * ry  # the sunlit part of the crown
        scene.ellipse(x, y, 0.5 * rx, 0.55 * ry, mix(leaf, light, 0.25), planted, width=0.05)
