"""What crosses the plain: water (lake, near shore, river, pond) and the road. Owns their course and how they are
painted."""

import cv2
import numpy as np

from imaginaire_spade.scenes.canvas import Canvas, lookup, mix, noise, profile, rgb, smoothstep
from imaginaire_spade.scenes.classes import GRASS, ROAD, WATER
from imaginaire_spade.scenes.light import Light


def _winding(canvas: Canvas, depth: np.ndarray) -> np.ndarray:
    """x of a path that vanishes at the horizon, for every depth."""
    rng = canvas.plan
    start = canvas.width * rng.uniform(0.25, 0.75)
    lean = rng.uniform(-0.6, 0.6) * canvas.width
    swing, phase = rng.uniform(0.1, 0.5) * canvas.unit, rng.uniform(0, 2 * np.pi)
    d = depth.clip(0)
    return start + lean * d + swing * np.sqrt(d) * np.sin(phase + rng.uniform(4, 9) * np.sqrt(d + 0.01)) * 0.6


def water_field(canvas: Canvas, kind: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(inside, mirror) or None for a dry scene. inside: float32 [h, w], > 0 in water, in units of the picture's
    height; mirror: float32 [1, w], the y at which the reflection starts."""
    rng, room = canvas.plan, 1 - canvas.horizon / canvas.height
    if kind == "none":
        return None
    line = profile(canvas.texture, canvas.width, canvas.unit * 0.35, octaves=5, gain=0.45)[None]
    level = np.full((1, canvas.width), canvas.horizon, np.float32)
    if kind == "far":
        inside = room * (rng.uniform(0.18, 0.6) + 0.06 * line) - canvas.depth
    elif kind == "near":
        depth = room * rng.uniform(0.3, 0.6) + 0.12 * room * (canvas.x / canvas.width - 0.5) * rng.uniform(-2, 2)
        level = (canvas.horizon + canvas.height * (depth + 0.025 * line)).astype(np.float32)
        inside = (canvas.y - level) / canvas.height
    elif kind == "river":
        half = rng.uniform(0.22, 0.4) * (canvas.depth + 0.012)
        ragged = 0.06 * canvas.depth * noise(canvas.texture, *canvas.labels.shape, canvas.unit * 0.06, octaves=3)
        inside = half + ragged - np.abs(canvas.x - _winding(canvas, canvas.depth)) / canvas.unit
    else:
        x, y = canvas.width * rng.uniform(0.1, 0.9), canvas.horizon + canvas.height * room * rng.uniform(0.3, 0.7)
        half_w = canvas.unit * rng.uniform(0.25, 0.55)
        half_h = canvas.height * room * rng.uniform(0.14, 0.26)
        radius = np.sqrt(((canvas.x - x) / half_w) ** 2 + ((canvas.y - y) / half_h) ** 2)
        ragged = 0.12 * noise(canvas.texture, *canvas.labels.shape, canvas.unit * 0.12, octaves=3, stretch=2)
        inside = (1 - radius + ragged) * half_h / canvas.height
    inside = np.where(canvas.depth > 0, inside, -1.0).astype(np.float32)
    return inside, level


def paint_water(canvas: Canvas, light: Light, shore, backdrop: np.ndarray) -> None:
    """shore: as from `water_field`; backdrop: float32 [h, w, 3], the picture without what stands on the bank. It is
    mirrored in the horizon (a flat bank hides nothing of the sky), trees and houses about their feet."""
    if shore is None:
        return
    window = canvas.band(canvas.horizon, canvas.height)
    inside, mirror, depth = shore[0][window[0]], shore[1], canvas.depth[window[0]].clip(0)
    shape = inside.shape
    beach = 0.006 + 0.035 * depth
    wet = smoothstep(-1.0, -0.1, inside / beach)[..., None] * (canvas.labels[window] == GRASS)[..., None]
    sand = mix(rgb(0.60, 0.53, 0.38), rgb(0.34, 0.29, 0.20), smoothstep(-0.6, 0.0, inside / beach)[..., None])
    canvas.rgb[window] = mix(canvas.rgb[window], light.on(sand, 0.55), 0.8 * wet)

    tile = noise(canvas.texture, 256, 256, 24, octaves=5, gain=0.62)
    distance = 1 / (depth + 0.04)
    across = (canvas.x - canvas.width / 2) / canvas.unit * distance
    ripples = lookup(tile, 9 * across + 128, np.broadcast_to(46 * distance, shape))
    ripples += 0.5 * lookup(tile, 26 * across + 20, np.broadcast_to(110 * distance, shape))
    sway = canvas.unit * (0.005 + 0.035 * depth)
    rows, columns = canvas.y[window[0]] - 0.5 - sway * ripples, canvas.x - 0.5 + 0.35 * sway * ripples
    above = _read(backdrop, columns, 2 * canvas.horizon - 1 - rows)
    if backdrop is not canvas.rgb:
        feet = np.array(canvas.feet)[canvas.instances]  # every object is turned over about the row on which it stands
        y, x = np.nonzero(feet)
        turned = 2 * feet[y, x] - y
        y, x, turned = (part[turned < canvas.height] for part in (y, x, turned))
        image = np.zeros((canvas.height, canvas.width, 4), np.float32)
        image[turned, x, :3], image[turned, x, 3] = canvas.rgb[y, x], 1
        image = _read(image, columns, rows)
        above = above * (1 - image[..., 3:]) + image[..., :3]
        bank = 0.8 * np.exp(-(rows - mirror).clip(0) / (0.018 * canvas.unit))[..., None]
        above = mix(above, _read(canvas.rgb, columns, 2 * mirror - 1 - rows), bank)
    deep = light.on(rgb(0.10, 0.24, 0.34), 0.5)
    steep = (0.30 + 0.55 * depth - 0.10 * ripples)[..., None].clip(0.12, 0.8)  # Fresnel: near water is deep
    colour = mix(0.94 * above, deep, steep) + (0.035 * ripples * (0.3 + light.contrast))[..., None]
    colour = mix(colour, light.skyline, 0.16 * np.exp(-np.abs(inside) / 0.004)[..., None])  # a bright waterline
    if light.sun is not None:
        column = np.exp(-(((canvas.x - light.sun[0]) / (canvas.unit * (0.05 + 0.16 * depth))) ** 2))
        colour += (0.75 * column * smoothstep(0.2, 0.9, ripples))[..., None] * light.direct
    canvas.put(window, inside > 0, colour, WATER, 0)


def _read(picture: np.ndarray, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return cv2.remap(picture, columns.astype(np.float32), rows.astype(np.float32), cv2.INTER_LINEAR,
                     borderMode=cv2.BORDER_REFLECT)  # fmt: skip


def paint_road(canvas: Canvas, light: Light) -> None:
    rng, paved = canvas.plan, canvas.plan.random() < 0.55
    window = canvas.band(canvas.horizon, canvas.height)
    depth = canvas.depth[window[0]].clip(1e-3)
    half = rng.uniform(0.16, 0.30) * (depth + 0.02)
    offset = (canvas.x - _winding(canvas, depth)) / canvas.unit / half  # -1 to 1 across the road
    height, width = offset.shape
    grain = noise(canvas.texture, height, width, canvas.unit * 0.012, octaves=2, gain=0.8, stretch=1.6)
    worn = noise(canvas.texture, height, width, canvas.unit * 0.08, octaves=3, stretch=3)
    free = canvas.labels[window] == GRASS
    ragged = np.abs(offset) + (0.03 if paved else 0.12) * worn
    verge = (1 - smoothstep(1.0, 1.4, ragged)) * free
    dust = light.on(rgb(0.50, 0.45, 0.31), 0.6 + 0.1 * grain)
    canvas.rgb[window] = mix(canvas.rgb[window], dust, 0.6 * verge[..., None])
    if paved:
        tracks = np.exp(-(((np.abs(offset) - 0.5) / 0.18) ** 2))
        colour = light.on(rgb(0.36, 0.36, 0.38), 0.62 + 0.06 * grain + 0.05 * worn - 0.05 * tracks)
        dashes = (np.abs(offset) < 0.035) & (np.mod(1.1 / (depth + 0.05) + 0.3, 1.0) < 0.5)
        lines = dashes | (np.abs(np.abs(offset) - 0.9) < 0.03)
        colour = mix(colour, light.on(rgb(0.92, 0.90, 0.84), 0.62), 0.85 * lines[..., None])
    else:
        tracks = np.exp(-(((np.abs(offset) - 0.45) / 0.2) ** 2))
        albedo = mix(rgb(0.50, 0.41, 0.29), rgb(0.68, 0.58, 0.43), (0.75 * tracks + 0.2 * worn)[..., None].clip(0, 1))
        colour = light.on(albedo, 0.6 + 0.10 * grain)
    colour = mix(colour, light.skyline, (0.25 * np.exp(-depth / 0.05))[..., None])
    canvas.put(window, (ragged < 1) & free, colour, ROAD, 0)
