# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""A small fine-grained data set drawn by code: aircraft seen from the side.

Four families have silhouettes that are easy to tell apart. Within a family, three variants share every part but one:
the engines of an airliner, the landing gear of a biplane, the canopy of a fighter and the tail of a glider.
Pose, colours, background, light and occlusion change from image to image and say nothing about the class;
every aircraft flies to the right.
"""

import colorsys
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw


Colour = tuple[int, ...]
Range = tuple[float, float]

SUPERSAMPLING = 3


class Part(NamedTuple):
    """One filled shape of an aircraft.

    Attributes:
        paint: key into the image's paints: "body", "trim", "shade", "glass" or "dark".
        outline: corners of the shape, float array `(n, 2)` of (x, y). The unit is half the length of the aircraft,
            whose nose points to x = 1 and whose top points to y > 0.
    """

    paint: str
    outline: np.ndarray


def _sharp(paint: str, *corners: tuple[float, float]) -> Part:
    return Part(paint, np.array(corners))


def _smooth(paint: str, *corners: tuple[float, float]) -> Part:
    """Rounds the closed polygon by cutting its corners twice (Chaikin's algorithm)."""
    outline = np.array(corners)
    for _ in range(2):
        following = np.roll(outline, -1, axis=0)
        outline = np.stack([0.75 * outline + 0.25 * following, 0.25 * outline + 0.75 * following], axis=1)
        outline = outline.reshape(-1, 2)
    return Part(paint, outline)


def _ellipse(paint: str, x: float, y: float, half_width: float, half_height: float) -> Part:
    angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    return Part(paint, np.stack([x + half_width * np.cos(angle), y + half_height * np.sin(angle)], axis=1))


def _jet_engine(x: float, y: float) -> list[Part]:
    pod = [(0.18, 0.10), (0.18, -0.10), (-0.08, -0.10), (-0.22, -0.04), (-0.22, 0.05), (-0.08, 0.10)]
    return [
        _sharp("shade", *((x + dx, y + dy) for dx, dy in pod)),
        _ellipse("dark", x + 0.18, y, 0.04, 0.10),
    ]


def _fin_and_tailplane(y: float) -> list[Part]:
    return [
        _sharp("trim", (-0.80, 0.0), (-0.92, 0.50), (-1.08, 0.50), (-1.04, -0.04)),
        _sharp("body", (-0.58, y - 0.04), (-0.90, y + 0.09), (-1.24, y + 0.09), (-1.10, y - 0.08)),
    ]


AIRLINER = [
    _sharp("trim", (-0.56, 0.08), (-0.84, 0.52), (-1.02, 0.52), (-0.92, 0.06)),
    _smooth(
        "body",
        *[(1.04, -0.04), (0.92, 0.10), (0.76, 0.14), (-0.60, 0.14), (-1.08, 0.10)],
        *[(-1.06, 0.04), (-0.56, -0.13), (0.78, -0.14), (0.98, -0.12)],
    ),
    _sharp("shade", (-0.66, 0.06), (-0.96, -0.08), (-1.06, -0.08), (-0.90, 0.06)),
    *[_sharp("dark", (x, 0.07), (x + 0.04, 0.07), (x + 0.04, 0.02), (x, 0.02)) for x in np.arange(-0.45, 0.7, 0.095)],
    _sharp("glass", (0.93, 0.055), (0.84, 0.10), (0.80, 0.02), (0.92, 0.0)),
    _sharp("shade", (0.28, -0.06), (-0.20, -0.44), (-0.36, -0.44), (-0.12, -0.06)),
]
BIPLANE = [
    _smooth("trim", (-0.66, 0.0), (-0.78, 0.36), (-1.06, 0.40), (-1.02, -0.04)),
    _sharp("dark", (0.82, 0.40), (0.86, 0.40), (0.86, -0.40), (0.82, -0.40)),
    _sharp("shade", (0.38, 0.44), (0.43, 0.44), (0.33, -0.14), (0.28, -0.14)),
    _sharp("shade", (0.02, 0.44), (0.07, 0.44), (-0.03, -0.14), (-0.08, -0.14)),
    _sharp("dark", (0.44, -0.16), (0.49, -0.16), (0.37, -0.42), (0.32, -0.42)),
    _sharp("dark", (0.16, -0.16), (0.21, -0.16), (0.33, -0.42), (0.28, -0.42)),
    _smooth("body", (0.72, 0.18), (0.72, -0.20), (0.40, -0.20), (-1.0, -0.04), (-1.0, 0.07), (-0.10, 0.16)),
    _sharp("dark", (0.66, 0.14), (0.80, 0.09), (0.80, -0.11), (0.66, -0.16)),
    _ellipse("dark", -0.12, 0.18, 0.07, 0.08),
    _sharp("shade", (-0.70, 0.04), (-1.04, 0.04), (-1.06, -0.02), (-0.76, -0.02)),
    _smooth("trim", (0.60, 0.50), (0.60, 0.40), (-0.16, 0.40), (-0.16, 0.50)),
    _smooth("trim", (0.48, -0.08), (0.48, -0.18), (-0.28, -0.18), (-0.28, -0.08)),
]
FIGHTER = [
    _sharp("trim", (-0.36, 0.08), (-0.78, 0.52), (-0.98, 0.52), (-0.88, 0.06)),
    _sharp("dark", (-0.88, 0.10), (-1.04, 0.07), (-1.04, -0.05), (-0.88, -0.09)),
    _smooth(
        "body",
        *[(1.12, -0.02), (0.62, 0.08), (0.20, 0.13), (-0.40, 0.14), (-0.96, 0.12)],
        *[(-0.96, -0.10), (-0.10, -0.16), (0.32, -0.14), (0.72, -0.08)],
    ),
    _sharp("dark", (0.30, -0.03), (0.22, -0.20), (-0.10, -0.18), (0.02, -0.06)),
    _sharp("shade", (0.22, 0.0), (-0.46, -0.30), (-0.62, -0.30), (-0.60, 0.0)),
    _sharp("shade", (-0.68, 0.02), (-1.00, -0.12), (-1.12, -0.12), (-0.94, 0.02)),
]
GLIDER = [
    _sharp("shade", (0.34, 0.06), (0.26, 0.62), (0.20, 0.62), (0.12, 0.06)),
    _smooth(
        "body",
        *[(1.06, -0.02), (0.90, 0.10), (0.56, 0.16), (0.20, 0.12), (-0.14, 0.05)],
        *[(-1.06, 0.03), (-1.06, -0.03), (-0.10, -0.06), (0.30, -0.14), (0.86, -0.12)],
    ),
    _smooth("glass", (0.92, 0.05), (0.74, 0.16), (0.48, 0.16), (0.38, 0.03)),
    _sharp("shade", (0.30, 0.04), (-0.32, -0.64), (-0.40, -0.64), (0.06, 0.04)),
]

# The parts that the variants of a family share, and those that only one variant has; later parts cover earlier ones.
FAMILIES: dict[str, tuple[list[Part], dict[str, list[Part]]]] = {
    "airliner": (
        AIRLINER,
        {
            "two-engines": _jet_engine(0.12, -0.24),
            "four-engines": [*_jet_engine(-0.10, -0.42), *_jet_engine(0.26, -0.20)],
            "tail-engines": _jet_engine(-0.58, 0.10),
        },
    ),
    "biplane": (
        BIPLANE,
        {
            "wheels": [_ellipse("dark", 0.33, -0.43, 0.15, 0.15)],
            "skis": [_sharp("trim", (0.72, -0.34), (0.60, -0.50), (-0.08, -0.50), (-0.08, -0.41), (0.56, -0.41))],
            "floats": [_smooth("body", (0.86, -0.34), (0.60, -0.52), (0.0, -0.52), (-0.56, -0.38), (-0.4, -0.34))],
        },
    ),
    "fighter": (
        FIGHTER,
        {
            "one-seat": [_smooth("glass", (0.66, 0.05), (0.50, 0.30), (0.26, 0.30), (0.10, 0.09))],
            "two-seats": [_smooth("glass", (0.66, 0.05), (0.50, 0.30), (-0.16, 0.30), (-0.34, 0.09))],
            "uncrewed": [_smooth("body", (0.66, 0.05), (0.50, 0.30), (0.26, 0.30), (0.10, 0.09))],
        },
    ),
    "glider": (
        GLIDER,
        {
            "low-tail": _fin_and_tailplane(-0.02),
            "t-tail": _fin_and_tailplane(0.50),
            "v-tail": [
                _sharp("trim", (-0.74, 0.02), (-0.62, 0.48), (-0.78, 0.48), (-0.96, 0.02)),
                _sharp("trim", (-0.84, 0.02), (-1.10, 0.50), (-1.26, 0.50), (-1.06, -0.03)),
            ],
        },
    ),
}
AIRCRAFT: dict[str, list[Part]] = {
    f"{family}-{variant}": shared + own
    for family, (shared, variants) in FAMILIES.items()
    for variant, own in variants.items()
}
CLASS_NAMES: tuple[str, ...] = tuple(AIRCRAFT)


def _colour(rng: np.random.Generator, hue: Range, saturation: Range, value: Range) -> Colour:
    rgb = colorsys.hsv_to_rgb(rng.uniform(*hue) % 1.0, rng.uniform(*saturation), rng.uniform(*value))
    return tuple(round(255 * channel) for channel in rgb)


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    return tuple(round((1 - share) * a + share * b) for a, b in zip(first, second, strict=True))


def _cloud(
    draw: ImageDraw.ImageDraw, rng: np.random.Generator, x: float, y: float, radius: float, colour: Colour
) -> None:
    for offset in (-0.9, -0.1, 0.8):
        across, up = radius * rng.uniform(0.6, 1.0), radius * rng.uniform(0.4, 0.7)
        centre = x + radius * offset, y + radius * rng.uniform(-0.2, 0.2)
        draw.ellipse([centre[0] - across, centre[1] - up, centre[0] + across, centre[1] + up], fill=colour)


def _background(rng: np.random.Generator, side: int) -> tuple[Image.Image, Colour]:
    """Draws sky, clouds and, in most images, ground; returns the image and the colour of its clouds."""
    zenith = _colour(rng, (0.53, 0.68), (0.10, 0.65), (0.40, 0.70))
    horizon = _colour(rng, (0.0, 1.0), (0.0, 0.25), (0.55, 0.80))
    sky = Image.fromarray(np.array([[zenith], [horizon]], dtype=np.uint8))
    image = sky.resize((side, side), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    cloud_colour = _mix(horizon, (255, 255, 255), rng.uniform(0.3, 0.9))
    for _ in range(rng.integers(0, 4)):
        x, y = rng.uniform(0, side, size=2)
        _cloud(draw, rng, x, y, side * rng.uniform(0.06, 0.16), cloud_colour)
    heights = side * (rng.uniform(0.80, 1.05) + rng.uniform(-0.05, 0.05, size=5))
    ground = _colour(rng, (0.08, 0.40), (0.15, 0.60), (0.25, 0.65))
    ridge = list(zip(np.linspace(0, side, 5), heights, strict=True))
    draw.polygon([*ridge, (side, 1.2 * side), (0, 1.2 * side)], fill=ground)
    return image, cloud_colour


def _paints(rng: np.random.Generator) -> dict[str, Colour]:
    body = _colour(rng, (0.0, 1.0), (0.0, 0.50), (0.85, 1.0))
    return {
        "body": body,
        "trim": _colour(rng, (-0.08, 0.16), (0.65, 0.95), (0.75, 1.0)),
        "shade": _mix(body, (20, 20, 35), rng.uniform(0.55, 0.70)),
        "glass": _colour(rng, (0.50, 0.62), (0.20, 0.60), (0.10, 0.30)),
        "dark": _colour(rng, (0.0, 1.0), (0.0, 0.20), (0.05, 0.25)),
    }


def _pose(rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the matrix and the shift, in pixels, that carry an outline into an image whose y axis points down."""
    angle = np.deg2rad(rng.uniform(-7, 7))
    scale = side * rng.uniform(0.34, 0.375)
    height = rng.uniform(0.95, 1.10)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shift = side * ((0.52, 0.5) + rng.uniform(-0.02, 0.02, size=2))
    return scale * rotation @ np.diag([1, -height]), shift


def _occlude(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int, cloud_colour: Colour) -> None:
    """Puts a cloud, a pole or a tree in front of a part of the aircraft, or nothing in most images."""
    kind = rng.choice(["cloud", "pole", "tree", "nothing"], p=[0.16, 0.12, 0.12, 0.6])
    x, y = side * rng.uniform(0.1, 0.9), side * rng.uniform(0.3, 0.7)
    if kind == "cloud":
        _cloud(draw, rng, x, y, side * rng.uniform(0.06, 0.11), cloud_colour)
    elif kind == "pole":
        width = side * rng.uniform(0.01, 0.03)
        brown = _colour(rng, (0.05, 0.12), (0.0, 0.4), (0.2, 0.5))
        draw.rectangle([x - width, 0.4 * y, x + width, side], fill=brown)
    elif kind == "tree":
        width = side * rng.uniform(0.07, 0.14)
        green = _colour(rng, (0.25, 0.42), (0.4, 0.8), (0.15, 0.4))
        draw.polygon([(x, y), (x - width, side), (x + width, side)], fill=green)


def draw_aircraft(label: int, rng: np.random.Generator, size: int = 96) -> Image.Image:
    """Draws one image of a class.

    Generators in the same state give two labels the same pose, paints, background, light and occlusion.

    Args:
        label: index into `CLASS_NAMES`.
        rng: source of all that varies within the class.
        size: width and height of the image, in pixels.

    Returns:
        An RGB image of `size` x `size` pixels.
    """
    side = SUPERSAMPLING * size
    image, cloud_colour = _background(rng, side)
    draw = ImageDraw.Draw(image)
    paints = _paints(rng)
    matrix, shift = _pose(rng, side)
    for part in AIRCRAFT[CLASS_NAMES[label]]:
        corners = part.outline @ matrix.T + shift
        draw.polygon(corners.ravel().tolist(), fill=paints[part.paint])
    _occlude(draw, rng, side, cloud_colour)

    pixels = np.asarray(image.reduce(SUPERSAMPLING), dtype=np.float32)
    contrast, brightness = rng.uniform(0.75, 1.15), rng.uniform(-25, 25)
    noise = rng.normal(0, 2, size=pixels.shape)
    lit = 128 + contrast * (pixels - 128) + brightness + noise
    return Image.fromarray(lit.clip(0, 255).astype(np.uint8))


def demo_images(samples_per_class: int, seed: int, size: int = 96) -> tuple[list[Image.Image], list[int]]:
    """Draws a balanced data set, ordered by class.

    An image depends only on the seed, its label and its index within the class: the same arguments give the same
    bytes, and a larger data set begins each class with the images of a smaller one.

    Args:
        samples_per_class: images of each class.
        seed: non-negative seed; train and test sets need different ones.
        size: width and height of the images, in pixels.

    Returns:
        `samples_per_class * len(CLASS_NAMES)` RGB images and as many labels, indices into `CLASS_NAMES`.
    """
    labels = [label for label in range(len(CLASS_NAMES)) for _ in range(samples_per_class)]
    images = [
        draw_aircraft(label, np.random.default_rng([seed, label, index]), size)
        for label in range(len(CLASS_NAMES))
        for index in range(samples_per_class)
    ]
    return images, labels
