"""Draws the clips of the built-in world as pixels: a sprite in motion on a quiet background.

A shape is defined once, as a boolean stencil of 256 x 256 points. A clip samples its stencil at
four points per pixel and axis, averages them to antialiased coverage for every quarter-pixel
offset that the motion needs, and blends that small patch into each frame.
"""

import colorsys
import math
from functools import lru_cache

import numpy as np

from g4v_jax.data.world.attributes import HUES, SCALES, SHAPES, STEPS, Scene

STENCIL = 256  # points along each side of a stencil
FINE = 4  # samples per pixel and axis

TILT = 3.0  # largest rotation, degrees
TRAVEL = (0.26, 0.32)  # path length of a moving sprite / frame extent along the motion
SCATTER = 0.02  # largest offset of the path's centre / frame extent

Array = np.ndarray


def render(scene: Scene, rng: np.random.Generator, frames: int, height: int, width: int) -> Array:
    """Draw one clip: uint8 RGB of shape [frames, height, width, 3].

    `rng` chooses what the scene leaves open: background, exact hue, scale, tilt and path. The
    sprite moves at constant speed and stays fully inside every frame. Raises ValueError when
    there are no frames or the frame is smaller than 16 pixels.
    """
    if frames < 1 or min(height, width) < 16:
        raise ValueError(f"cannot draw {frames} frames of {height} x {width} pixels")
    background = _background(rng, height, width)
    colour = _colour(scene.colour, rng)
    side = SCALES[scene.size] * rng.uniform(0.96, 1.04) * min(height, width)
    angle = rng.uniform(-TILT, TILT)
    path = _path(scene.motion, rng, frames, height, width, side)
    return _blend(background, colour, _samples(scene.shape, side, angle), path)


def blocked_card(frames: int, height: int, width: int) -> Array:
    """The still image shown instead of a hazardous clip: uint8 RGB [frames, height, width, 3].

    A white no-entry sign, a ring with a diagonal bar, on dark grey. It has no colour at all, so
    it cannot be mistaken for a sprite.
    """
    fine_y, fine_x = FINE * height, FINE * width
    y = ((np.arange(fine_y) + 0.5) / fine_y - 0.5)[:, None]
    x = ((np.arange(fine_x) + 0.5) / fine_x - 0.5)[None, :]
    radius = np.hypot(x, y)
    sign = (abs(radius - 0.36) < 0.065) | ((abs(x - y) < 0.09) & (radius < 0.36))
    coverage = sign.reshape(height, FINE, width, FINE).mean((1, 3))
    grey = np.rint(48 + coverage * (255 - 48)).astype(np.uint8)
    return np.broadcast_to(grey[None, :, :, None], (frames, height, width, 3)).copy()


@lru_cache
def stencil(shape: str) -> Array:
    """Boolean silhouette [256, 256] of a shape, upright, its longest side filling the square."""
    axis = (np.arange(STENCIL) + 0.5) / STENCIL - 0.5
    inside = _SILHOUETTES[shape](axis[None, :], axis[:, None])
    inside = np.broadcast_to(inside, (STENCIL, STENCIL)).copy()
    inside.flags.writeable = False  # the cache hands the same array to every caller
    return inside


def _samples(shape: str, side: float, angle: float) -> Array:
    """Stencil sampled FINE times per pixel on a square patch with one pixel to spare."""
    reach = math.ceil(side * 1.1) + 1  # a tilted square is 1.09 sides wide
    axis = ((np.arange(FINE * (reach + 1)) + 0.5) / FINE - (reach / 2 + 1)) / side
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    x, y = axis[None, :], axis[:, None]
    column = np.floor((cos * x + sin * y + 0.5) * STENCIL).astype(int)
    row = np.floor((cos * y - sin * x + 0.5) * STENCIL).astype(int)
    inside = (column >= 0) & (column < STENCIL) & (row >= 0) & (row < STENCIL)
    return inside & stencil(shape)[row % STENCIL, column % STENCIL]


def _blend(background: Array, colour: Array, samples: Array, path: Array) -> Array:
    """Composite the sprite over the background at each centre (x, y) of the path, in pixels."""
    height, width = background.shape[:2]
    reach = len(samples) // FINE - 1
    under = background * 255 + 0.5  # the cast to uint8 below rounds down
    video = np.repeat(under.astype(np.uint8)[None], len(path), axis=0)
    patches: dict[tuple[int, int], tuple[Array, Array]] = {}
    for frame, corner in zip(video, np.rint((path - reach / 2) * FINE).astype(int)):
        (left, shift_x), (top, shift_y) = (divmod(int(value), FINE) for value in corner)
        if (shift_x, shift_y) not in patches:
            window = samples[FINE - shift_y :, FINE - shift_x :][: FINE * reach, : FINE * reach]
            alpha = window.reshape(reach, FINE, reach, FINE, 1).mean((1, 3), dtype=np.float32)
            patches[shift_x, shift_y] = 1 - alpha, alpha * (colour * 255 + 0.5)
        keep, paint = patches[shift_x, shift_y]
        rows = slice(max(top, 0), min(top + reach, height))
        columns = slice(max(left, 0), min(left + reach, width))
        inner = (
            slice(rows.start - top, rows.stop - top),
            slice(columns.start - left, columns.stop - left),
        )
        frame[rows, columns] = under[rows, columns] * keep[inner] + paint[inner]
    return video


def _path(
    motion: str, rng: np.random.Generator, frames: int, height: int, width: int, side: float
) -> Array:
    """Centres [frames, 2] of the sprite as (x, y) in pixels."""
    extent = np.array([width, height], float)
    room = extent - 1.09 * side - 1  # length that the centre may cover with the sprite inside
    travel = np.minimum(rng.uniform(*TRAVEL) * extent, room) * STEPS[motion]
    slack = np.minimum(SCATTER * extent, (room - abs(travel)) / 2)
    middle = extent / 2 + rng.uniform(-1, 1, 2) * slack
    return middle + np.linspace(-0.5, 0.5, frames)[:, None] * travel


def _colour(name: str, rng: np.random.Generator) -> Array:
    hue = (HUES[name] + rng.uniform(-8, 8)) / 360 % 1
    rgb = colorsys.hsv_to_rgb(hue, rng.uniform(0.88, 1.0), rng.uniform(0.85, 1.0))
    return np.array(rgb, np.float32)


def _background(rng: np.random.Generator, height: int, width: int) -> Array:
    """Almost grey picture [height, width, 3] in 0..1: one of four patterns with a faint tint."""
    level = rng.choice([rng.uniform(0.08, 0.25), rng.uniform(0.4, 0.6), rng.uniform(0.75, 0.9)])
    contrast = rng.uniform(0.03, 0.08)
    y, x = np.mgrid[:height, :width] / min(height, width)
    cells = rng.integers(3, 6)
    direction = rng.uniform(0, 2 * math.pi)
    along = (x - 0.5) * math.cos(direction) + (y - 0.5) * math.sin(direction)
    pattern = rng.choice(["plain", "gradient", "stripes", "checks"])
    if pattern == "gradient":
        texture = 2 * along
    elif pattern == "stripes":
        texture = np.sign(np.sin(2 * math.pi * cells * along))
    elif pattern == "checks":
        texture = np.where((np.floor(cells * x) + np.floor(cells * y)) % 2, 1.0, -1.0)
    else:
        texture = np.zeros((height, width))
    tint = rng.uniform(-0.025, 0.025, 3)
    return np.clip((level + contrast * texture)[..., None] + tint, 0, 1).astype(np.float32)


# Silhouettes: functions of x (to the right) and y (downwards), both in -0.5 .. 0.5.


def _disc(x: Array, y: Array, cx: float, cy: float, rx: float, ry: float) -> Array:
    return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1


def _box(x: Array, y: Array, left: float, top: float, right: float, bottom: float) -> Array:
    return (x >= left) & (x <= right) & (y >= top) & (y <= bottom)


def _stroke(x: Array, y: Array, start: tuple, end: tuple, thickness: float) -> Array:
    """A thick line with flat ends from one point to another."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = math.hypot(dx, dy)
    along = ((x - start[0]) * dx + (y - start[1]) * dy) / length
    across = ((x - start[0]) * dy - (y - start[1]) * dx) / length
    return (along >= 0) & (along <= length) & (abs(across) <= thickness / 2)


def _polygon(x: Array, y: Array, *corners: tuple[float, float]) -> Array:
    """Even-odd rule: inside where a ray to the right crosses an odd number of edges."""
    inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]):
        if y0 != y1:
            crosses = (y0 > y) != (y1 > y)
            inside ^= crosses & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


def _star(x: Array, y: Array) -> Array:
    turns = np.arange(10) * math.pi / 5
    radii = np.where(np.arange(10) % 2, 0.24, 0.525)
    corners = np.stack([radii * np.sin(turns), 0.05 - radii * np.cos(turns)], 1)
    return _polygon(x, y, *map(tuple, corners))


def _cross(x: Array, y: Array) -> Array:
    return _box(x, y, -0.5, -0.16, 0.5, 0.16) | _box(x, y, -0.16, -0.5, 0.16, 0.5)


def _hammer(x: Array, y: Array) -> Array:
    head = _box(x, y, -0.42, -0.5, 0.2, -0.16)
    claw = _polygon(x, y, (0.2, -0.5), (0.45, -0.3), (0.45, -0.14), (0.2, -0.24))
    return head | claw | _box(x, y, -0.14, -0.2, 0.08, 0.5)


def _gun(x: Array, y: Array) -> Array:
    barrel = _box(x, y, -0.5, -0.36, 0.5, -0.06)
    grip = _polygon(x, y, (-0.44, -0.1), (-0.12, -0.1), (-0.2, 0.38), (-0.5, 0.38))
    guard = _box(x, y, -0.16, -0.1, 0.14, 0.16) & ~_box(x, y, -0.1, -0.06, 0.07, 0.09)
    return barrel | grip | guard


def _spoon(x: Array, y: Array) -> Array:
    # The bowl is an ellipse along the diagonal handle.
    along, across = (x - y) / math.sqrt(2), (x + y) / math.sqrt(2)
    bowl = _disc(along, across, 0.33, 0.0, 0.27, 0.2)
    return bowl | _stroke(x, y, (-0.45, 0.45), (0.1, -0.1), 0.13)


def _knife(x: Array, y: Array) -> Array:
    along, across = (x - y) / math.sqrt(2), (x + y) / math.sqrt(2)
    blade = _polygon(along, across, (-0.18, -0.16), (0.3, -0.16), (0.68, 0.12), (-0.18, 0.12))
    guard = _box(along, across, -0.25, -0.25, -0.13, 0.25)
    return blade | guard | _box(along, across, -0.62, -0.09, -0.2, 0.09)


def _balloon(x: Array, y: Array) -> Array:
    knot = _polygon(x, y, (0.0, 0.1), (0.15, 0.33), (-0.15, 0.33))
    return _disc(x, y, 0.0, -0.14, 0.34, 0.36) | knot | _box(x, y, -0.05, 0.25, 0.05, 0.5)


def _bomb(x: Array, y: Array) -> Array:
    collar = _stroke(x, y, (0.08, -0.1), (0.27, -0.29), 0.26)
    fuse = _stroke(x, y, (0.2, -0.22), (0.45, -0.47), 0.1)
    return _disc(x, y, -0.11, 0.11, 0.38, 0.38) | collar | fuse


_SILHOUETTES = {
    "circle": lambda x, y: _disc(x, y, 0.0, 0.0, 0.5, 0.5),
    "square": lambda x, y: _box(x, y, -0.5, -0.5, 0.5, 0.5),
    "triangle": lambda x, y: _polygon(x, y, (0.0, -0.45), (0.5, 0.45), (-0.5, 0.45)),
    "star": _star,
    "cross": _cross,
    "hammer": _hammer,
    "spoon": _spoon,
    "balloon": _balloon,
    "gun": _gun,
    "knife": _knife,
    "bomb": _bomb,
}
assert tuple(_SILHOUETTES) == SHAPES
