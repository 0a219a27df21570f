"""Pictures with and without a prohibited emblem, drawn from nothing but a seed.

The emblems are our own invention, a category each: on a dark disc a bright ring, and in it three bright
blades, a five-pointed star, or a bolt. A look-alike shares their two colours, their size and their share
of bright area, and differs only in shape, so that no colour statistic can tell the two apart.
Everything is drawn in units of the picture, so the same seed gives the same scene at any resolution.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

PATCH = 320
"""Side in pixels of the square on which a sign is drawn before it is warped into the picture."""

# Share of the picture's geometric mean side that a sign's diameter takes. The lower end is 28 px at
# a net input of 112 px: small, but three blades are still three blades.
SIGN_DIAMETER = (0.25, 0.65)

Rgb = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Palette:
    dark: Rgb
    bright: Rgb


def draw_palette(rng: np.random.Generator) -> Palette:
    """Two colours of one family, for emblem and look-alikes alike."""
    dark = colorsys.hsv_to_rgb(rng.uniform(0, 1), rng.uniform(0, 0.6), rng.uniform(0.04, 0.28))
    bright = colorsys.hsv_to_rgb(rng.uniform(0.07, 0.18), rng.uniform(0.45, 1), rng.uniform(0.75, 1))
    return Palette(dark=_rgb(dark), bright=_rgb(bright))


def _rgb(colour: tuple[float, float, float]) -> Rgb:
    red, green, blue = (round(255 * part) for part in colour)
    return red, green, blue


class Sign:
    """A canvas in polar units: radius 1 is the edge of the dark disc."""

    def __init__(self, palette: Palette) -> None:
        self.palette = palette
        self.image = Image.new("RGBA", (PATCH, PATCH), (*palette.dark, 0))
        self.draw = ImageDraw.Draw(self.image)

    def box(self, radius: float, centre: Point = (0, 0)) -> list[float]:
        middle, unit = PATCH / 2, PATCH / 2 - 2
        x, y = middle + centre[0] * unit, middle + centre[1] * unit
        return [x - radius * unit, y - radius * unit, x + radius * unit, y + radius * unit]

    def disc(self, radius: float, *, bright: bool, centre: Point = (0, 0)) -> None:
        self.draw.ellipse(self.box(radius, centre), fill=self._fill(bright))

    def ring(self, outer: float, inner: float) -> None:
        self.disc(outer, bright=True)
        self.disc(inner, bright=False)

    def blades(self, count: int, outer: float = 0.7, inner: float = 0.2, share: float = 0.5) -> None:
        """``count`` sectors that together cover ``share`` of the circle, whatever their number."""
        width = 360 * share / count
        for blade in range(count):
            start = 360 * blade / count - 90 - width / 2
            self.draw.pieslice(self.box(outer), start, start + width, fill=self._fill(True))
        self.disc(inner, bright=False)
        self.disc(inner * 0.55, bright=True)

    def polygon(self, corners: int, radius: float, *, bright: bool, waist: float | None = None) -> None:
        """A regular polygon, or with ``waist`` a star whose inner corners lie at that radius."""
        radii = [radius] if waist is None else [radius, waist]
        steps = corners * len(radii)
        turns = [(radii[i % len(radii)], 2 * math.pi * i / steps) for i in range(steps)]
        self.outline([(r * math.sin(angle), -r * math.cos(angle)) for r, angle in turns], bright=bright)

    def outline(self, points: list[Point], *, bright: bool) -> None:
        middle, unit = PATCH / 2, PATCH / 2 - 2
        self.draw.polygon([(middle + x * unit, middle + y * unit) for x, y in points], fill=self._fill(bright))

    def _fill(self, bright: bool) -> tuple[int, int, int, int]:
        return (*(self.palette.bright if bright else self.palette.dark), 255)


Draw = Callable[[Sign], None]


def _ringed(fill: Draw) -> Draw:
    def draw(sign: Sign) -> None:
        sign.disc(1, bright=False)
        sign.ring(0.95, 0.8)
        fill(sign)

    return draw


def _ringed_blades(count: int) -> Draw:
    return _ringed(lambda sign: sign.blades(count))


def _ringed_polygon(corners: int, radius: float, waist: float | None = None) -> Draw:
    return _ringed(lambda sign: sign.polygon(corners, radius, bright=True, waist=waist))


def _ringed_outline(*points: Point) -> Draw:
    return _ringed(lambda sign: sign.outline(list(points), bright=True))


def _bare_blades(sign: Sign) -> None:
    sign.disc(1, bright=False)
    sign.blades(3, outer=0.95, inner=0.15, share=0.6)


def _square_frame(sign: Sign) -> None:
    sign.polygon(4, 1.0, bright=False)
    sign.polygon(4, 0.95, bright=True)
    sign.polygon(4, 0.78, bright=False)
    sign.blades(4, outer=0.5, inner=0.15)


def _target(sign: Sign) -> None:
    sign.ring(0.6, 0.35)
    sign.disc(0.15, bright=True)


def _dots(sign: Sign) -> None:
    for corner in range(4):
        angle = math.pi * corner / 2
        sign.disc(0.22, bright=True, centre=(0.42 * math.cos(angle), 0.42 * math.sin(angle)))


def _empty_ring(sign: Sign) -> None:
    sign.disc(1, bright=False)
    sign.ring(0.95, 0.62)


EMBLEMS: dict[str, Draw] = {
    "trefoil": _ringed_blades(3),
    "star": _ringed_polygon(5, 0.72, 0.33),
    "bolt": _ringed_outline((0.2, -0.72), (-0.46, 0.14), (-0.06, 0.14), (-0.2, 0.72), (0.46, -0.14), (0.06, -0.14)),
}

LOOK_ALIKES: dict[str, Draw] = {
    "two blades": _ringed_blades(2),
    "four blades": _ringed_blades(4),
    "five blades": _ringed_blades(5),
    "six blades": _ringed_blades(6),
    "blades without ring": _bare_blades,
    "square frame": _square_frame,
    "ringed square": _ringed_polygon(4, 0.6),
    "ringed triangle": _ringed_polygon(3, 0.62),
    "four-pointed star": _ringed_polygon(4, 0.74, 0.33),
    "six-pointed star": _ringed_polygon(6, 0.7, 0.36),
    "bar": _ringed_outline((0.2, -0.72), (-0.28, -0.6), (-0.2, 0.72), (0.28, 0.6)),
    "arrow": _ringed_outline(
        (0, -0.74), (0.5, -0.05), (0.17, -0.05), (0.17, 0.7), (-0.17, 0.7), (-0.17, -0.05), (-0.5, -0.05)
    ),
    "target": _ringed(_target),
    "four dots": _ringed(_dots),
    "empty ring": _empty_ring,
}


def stamp(
    canvas: Image.Image, rng: np.random.Generator, draw: Draw, region: tuple[float, float, float, float] | None = None
) -> None:
    """Draws one sign into ``canvas``: rotated, in perspective, lit, worn, partly covered, blurred.

    ``region`` (left, top, right, bottom, in shares of the canvas) is where it may lie; without it, anywhere.
    """
    sign = Sign(draw_palette(rng))
    draw(sign)
    patch = sign.image
    _light(patch, rng)
    if rng.random() < 0.35:
        _cover(patch, rng)
    shares = region or (0, 0, 1, 1)
    x0, y0, x1, y1 = (share * side for share, side in zip(shares, canvas.size * 2, strict=True))
    width, height = x1 - x0, y1 - y0
    low, high = np.log(SIGN_DIAMETER)
    scale = math.sqrt(canvas.size[0] * canvas.size[1])
    diameter = min(math.exp(rng.uniform(low, high)) * scale, 0.95 * width, 0.95 * height)
    corners = _perspective_corners(rng, diameter)
    left, top = corners.min(axis=0)
    right, bottom = corners.max(axis=0)
    offset_x = x0 + rng.uniform(0, max(0.0, width - (right - left)))
    offset_y = y0 + rng.uniform(0, max(0.0, height - (bottom - top)))
    box_width, box_height = math.ceil(right - left), math.ceil(bottom - top)
    # Minifying by more than two at once would alias: shrink the patch first.
    if diameter < PATCH / 2:
        side = max(16, round(diameter * 1.5))
        patch = patch.resize((side, side), Image.Resampling.BOX)
    warped = patch.transform(
        (box_width, box_height),
        Image.Transform.PERSPECTIVE,
        _perspective_coefficients(corners - [left, top], patch.size[0]),
        Image.Resampling.BICUBIC,
    )
    if rng.random() < 0.5:
        warped = warped.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.022) * diameter))
    opacity = rng.uniform(0.8, 1)
    alpha = warped.getchannel("A").point(lambda value: round(value * opacity))
    canvas.paste(warped.convert("RGB"), (round(offset_x), round(offset_y)), alpha)


def _light(patch: Image.Image, rng: np.random.Generator) -> None:
    """A linear shade across the sign, as of a lamp at one side."""
    angle, depth = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.35)
    axis = np.linspace(-1, 1, 16)
    slope = np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]
    shade = Image.fromarray((255 * depth * (slope + 1.5) / 3).astype(np.uint8)).resize(patch.size)
    colour = Image.new("RGBA", patch.size, (0, 0, 0, 255) if rng.random() < 0.5 else (255, 255, 255, 255))
    lit = Image.composite(colour, patch, shade)
    lit.putalpha(patch.getchannel("A"))
    patch.paste(lit)


def _cover(patch: Image.Image, rng: np.random.Generator) -> None:
    """Something in front of the sign: a bar or a blob over at most a fifth of it."""
    draw = ImageDraw.Draw(patch)
    fill = (*(int(part) for part in rng.integers(0, 256, 3)), 255)
    if rng.random() < 0.5:
        angle, half = rng.uniform(0, math.pi), rng.uniform(0.02, 0.07) * PATCH
        middle = PATCH / 2 + rng.uniform(-0.4, 0.4, 2) * PATCH
        along = np.array([math.cos(angle), math.sin(angle)])
        start, end = middle - 2 * PATCH * along, middle + 2 * PATCH * along
        draw.line([tuple(start), tuple(end)], fill=fill, width=round(2 * half))
        return
    radius = rng.uniform(0.08, 0.2) * PATCH
    angle = rng.uniform(0, 2 * math.pi)
    centre = PATCH / 2 + 0.42 * PATCH * np.array([math.cos(angle), math.sin(angle)])
    draw.ellipse([*(centre - radius), *(centre + radius)], fill=fill)


def _perspective_corners(rng: np.random.Generator, diameter: float) -> np.ndarray:
    """The four corners (4, 2) onto which the patch is mapped: any rotation, some perspective."""
    angle = rng.uniform(0, 2 * math.pi)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    square = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * diameter / 2
    squeeze = np.diag(rng.uniform(0.75, 1, 2))
    return (square @ turn.T) @ squeeze + rng.uniform(-0.09, 0.09, (4, 2)) * diameter


def _perspective_coefficients(corners: np.ndarray, side: int) -> list[float]:
    """The eight numbers Pillow wants: they map output pixels back to the patch."""
    source = np.array([[0, 0], [side, 0], [side, side], [0, side]], dtype=float)
    rows, right = [], []
    for (x, y), (u, v) in zip(corners, source, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        right += [u, v]
    return [float(value) for value in np.linalg.solve(np.array(rows), np.array(right))]


def draw_background(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A scene of soft colour fields, shapes, strokes and grain."""
    cells = int(rng.integers(2, 9))
    field = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    canvas = Image.fromarray(field).resize(size, Image.Resampling.BICUBIC)
    if rng.random() < 0.6:
        cells = int(rng.integers(12, 90))
        fine = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        texture = Image.fromarray(fine).resize(size, Image.Resampling.BILINEAR)
        canvas = Image.blend(canvas, texture, rng.uniform(0.05, 0.45))
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(2, 22))):
        _draw_clutter(draw, rng, size)
    if rng.random() < 0.4:
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.006) * max(size)))
    return _add_grain(canvas, rng)


def _draw_clutter(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: tuple[int, int]) -> None:
    """One shape; a third take the sign's own colours, so that colour alone says nothing."""
    palette = draw_palette(rng)
    if rng.random() < 0.33:
        colour = palette.bright if rng.random() < 0.5 else palette.dark
    else:
        red, green, blue = (int(part) for part in rng.integers(0, 256, 3))
        colour = (red, green, blue)
    extent = math.sqrt(size[0] * size[1]) * math.exp(rng.uniform(math.log(0.03), math.log(0.4)))
    centre = rng.uniform(0, 1, 2) * size
    kind = rng.integers(0, 6)
    box = [*(centre - extent / 2 * rng.uniform(0.4, 1, 2)), *(centre + extent / 2 * rng.uniform(0.4, 1, 2))]
    width = max(1, round(extent * rng.uniform(0.03, 0.2)))
    if kind == 0:
        draw.ellipse(box, fill=colour)
    elif kind == 1:
        draw.ellipse(box, outline=colour, width=width)
    elif kind == 2:
        draw.rectangle(box, fill=colour)
    elif kind == 3:
        points = centre + rng.uniform(-0.5, 0.5, (int(rng.integers(3, 8)), 2)) * extent
        draw.polygon([tuple(point) for point in points], fill=colour)
    elif kind == 4:
        points = centre + rng.uniform(-1, 1, (int(rng.integers(2, 6)), 2)) * extent
        draw.line([tuple(point) for point in points], fill=colour, width=width)
    else:
        start = rng.uniform(0, 360)
        draw.pieslice(box, start, start + rng.uniform(30, 300), fill=colour)


def _add_grain(canvas: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Film grain from one small tile: noise per pixel would cost more than the rest of the scene."""
    strength = rng.uniform(0, 0.12)
    tile = Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8))
    grain = Image.new("RGB", canvas.size)
    for left in range(0, canvas.size[0], 256):
        for top in range(0, canvas.size[1], 256):
            grain.paste(tile, (left, top))
    return Image.blend(canvas, grain, strength)


def photo_background(rng: np.random.Generator, photo: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A random crop of at least 60 % of each side of a photograph, perhaps mirrored, at ``size``."""
    width, height = photo.size
    share = rng.uniform(0.6, 1, 2)
    left, top = rng.uniform(0, 1 - share) * (width, height)
    box = (left, top, left + share[0] * width, top + share[1] * height)
    crop = photo.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop
