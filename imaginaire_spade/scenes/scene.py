"""One scene: a picture and its annotations. Owns the order of the layers and the way from canvas to picture.

A canvas of twice the resolution is painted from back to front (sky, sun, clouds, mountains, hills, ground, road,
water, then shadows, trees and houses). In the end the colours are averaged over 2x2 blocks and the ids take the
block's most frequent value.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from imaginaire_spade.labels import edges_from_ids
from imaginaire_spade.scenes.canvas import Canvas, mix, smoothstep
from imaginaire_spade.scenes.light import Light, draw_light
from imaginaire_spade.scenes.objects import paint_objects
from imaginaire_spade.scenes.sky import paint_clouds, paint_sky
from imaginaire_spade.scenes.terrain import paint_ground, paint_hills, paint_mountains
from imaginaire_spade.scenes.trees import paint_woods
from imaginaire_spade.scenes.water_and_road import paint_road, paint_water, water_field

SUPERSAMPLING = 2


@dataclass(frozen=True)
class Scene:
    """A picture and its annotations, all of one height and width.

    image: uint8 [H, W, 3], RGB.
    labels: uint8 [H, W], positions in CLASSES.
    instances: uint16 [H, W]; 0 for sky, mountain, grass, water and road; the sun, every cloud, tree (a distant
        wood counts as one tree) and house has its own id from 1 on; a house's roof and windows share its id.
    edges: uint8 [H, W], 0 or 255, as `edge_map` defines.
    """

    image: np.ndarray
    labels: np.ndarray
    instances: np.ndarray
    edges: np.ndarray


def edge_map(labels: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """uint8 [H, W]: 255 where class or instance differs from the left, right, upper or lower neighbour, else 0."""
    return 255 * (edges_from_ids(labels) | edges_from_ids(instances))


def draw_scene(seed: int, index: int, height: int, width: int) -> Scene:
    """Scene `index` of the series `seed` (both >= 0). The layout hardly depends on the size, the textures do.

    Raises ValueError for a side below 32.
    """
    if min(height, width) < 32:
        raise ValueError(f"scene size {height}x{width}: height and width must be at least 32")
    rng, texture = np.random.default_rng((seed, index)).spawn(2)  # layout draws; noise draws
    canvas = Canvas(rng, texture, height * SUPERSAMPLING, width * SUPERSAMPLING)
    light = draw_light(rng, canvas)
    water = str(rng.choice(["none", "far", "near", "river", "pond"], p=[0.36, 0.20, 0.18, 0.13, 0.13]))
    has_road = rng.random() < 0.62 and water not in ("near", "river")

    paint_sky(canvas, light)
    paint_clouds(canvas, light)
    paint_mountains(canvas, light)
    paint_hills(canvas, light)
    paint_ground(canvas, light)
    shore = water_field(canvas, water)
    backdrop = canvas.rgb.copy()
    paint_woods(canvas, light)
    if water == "near":  # what stands on the far bank is complete before it is mirrored
        paint_objects(canvas, light, shore)
        paint_water(canvas, light, shore, backdrop)
    else:
        paint_water(canvas, light, shore, canvas.rgb)
        if has_road:
            paint_road(canvas, light)
        paint_objects(canvas, light, shore)
    return _finish(canvas, light)


def _finish(canvas: Canvas, light: Light) -> Scene:
    """Reduces the canvas to the scene's size; grades the colours a little."""
    height, width = canvas.height // SUPERSAMPLING, canvas.width // SUPERSAMPLING
    rgb = cv2.resize(canvas.rgb.clip(0, 1), (width, height), interpolation=cv2.INTER_AREA)
    rgb = mix(rgb, smoothstep(0.0, 1.0, rgb), 0.30)
    rgb += 0.006 * canvas.texture.standard_normal((height, width, 1), dtype=np.float32)
    ids = canvas.labels.astype(np.int32) << 16 | canvas.instances
    a, b, c, d = ids[::2, ::2], ids[::2, 1::2], ids[1::2, ::2], ids[1::2, 1::2]
    mode = np.where((a == b) | (a == c) | (a == d), a, np.where((b == c) | (b == d), b, np.where(c == d, c, a)))
    labels, instances = (mode >> 16).astype(np.uint8), (mode & 0xFFFF).astype(np.uint16)
    image = np.round(rgb.clip(0, 1) * 255).astype(np.uint8)
    return Scene(image, labels, instances, edge_map(labels, instances))
