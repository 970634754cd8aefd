"""Procedural landscapes with exact label, instance and edge maps: a data set that needs no download.

Owns the painter (`draw_scene`) and the writer of a sample data set (`write_sample_data`). numpy and OpenCV
only; every picture is a function of (seed, index, height, width), without global state.

How a picture is made: a canvas of twice the resolution is painted from back to front (sky, sun, clouds,
mountains, hills, ground, road, water, then shadows, trees and houses). Each layer has one mask, which paints
the colour and writes the class and instance ids, so that picture and labels agree. The light (time of day,
side of the sun) is one object read by every layer. In the end the colours are averaged over 2x2 blocks and
the ids take the block's most frequent value.
"""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

CLASSES: tuple[tuple[str, tuple[int, int, int]], ...] = (  # id = position; (name, legend colour in RGB)
    ("sky", (135, 190, 235)),
    ("cloud", (236, 240, 244)),
    ("sun", (255, 214, 60)),
    ("mountain", (122, 118, 150)),
    ("grass", (110, 170, 70)),
    ("water", (40, 105, 180)),
    ("tree", (30, 100, 45)),
    ("house", (226, 190, 140)),
    ("roof", (180, 65, 45)),
    ("window", (85, 60, 120)),
    ("road", (128, 128, 128)),
)
SKY, CLOUD, SUN, MOUNTAIN, GRASS, WATER, TREE, HOUSE, ROOF, WINDOW, ROAD = range(len(CLASSES))
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
    edges = np.zeros(labels.shape, np.uint8)
    for ids in (labels, instances):
        across = ids[:, 1:] != ids[:, :-1]
        down = ids[1:] != ids[:-1]
        edges[:, 1:][across] = 255
        edges[:, :-1][across] = 255
        edges[1:][down] = 255
        edges[:-1][down] = 255
    return edges


def draw_scene(seed: int, index: int, height: int, width: int) -> Scene:
    """Scene `index` of the series `seed` (both >= 0). The layout hardly depends on the size, the textures do.

    Raises ValueError for a side below 32.
    """
    if min(height, width) < 32:
        raise ValueError(f"scene size {height}x{width}: height and width must be at least 32")
    rng, texture = np.random.default_rng((seed, index)).spawn(2)  # layout draws; noise draws
    canvas = _Canvas(rng, texture, height * SUPERSAMPLING, width * SUPERSAMPLING)
    light = _draw_light(rng, canvas)
    water = str(rng.choice(["none", "far", "near", "river", "pond"], p=[0.36, 0.20, 0.18, 0.13, 0.13]))
    has_road = rng.random() < 0.62 and water not in ("near", "river")

    _paint_sky(canvas, light)
    _paint_clouds(canvas, light)
    _paint_mountains(canvas, light)
    _paint_hills(canvas, light)
    _paint_ground(canvas, light)
    shore = _water_field(canvas, water)
    backdrop = canvas.rgb.copy()
    _paint_woods(canvas, light)
    if water == "near":  # what stands on the far bank is complete before it is mirrored
        _paint_objects(canvas, light, shore)
        _paint_water(canvas, light, shore, backdrop)
    else:
        _paint_water(canvas, light, shore, canvas.rgb)
        if has_road:
            _paint_road(canvas, light)
        _paint_objects(canvas, light, shore)
    return _finish(canvas, light)


# ---------------------------------------------------------------------------------------------- canvas and noise


class _Canvas:
    """What is painted on. rgb float32 [h, w, 3] in [0, 1]; labels uint8 and instances uint16 [h, w]; y points down.

    unit: pixels per unit of object size. horizon: y of eye level. x, y: float32 [1, w], [h, 1]. depth: float32
    [h, 1], (y - horizon) / height, which grows towards the viewer. plan, texture: random generators.
    """

    def __init__(self, plan: np.random.Generator, texture: np.random.Generator, height: int, width: int):
        self.plan, self.texture = plan, texture
        self.height, self.width = height, width
        self.unit = height * min(1.0, width / height) ** 0.7
        self.crowd = float(np.clip(width / self.unit, 0.8, 3.0))  # wide pictures hold more objects
        self.horizon = height * plan.uniform(0.36, 0.64)
        self.rgb = np.zeros((height, width, 3), np.float32)
        self.labels = np.zeros((height, width), np.uint8)
        self.instances = np.zeros((height, width), np.uint16)
        self.feet = [0]  # per instance, the row on which it stands; 0 for what is in the sky
        self.x = np.arange(width, dtype=np.float32)[None] + 0.5
        self.y = np.arange(height, dtype=np.float32)[:, None] + 0.5
        self.depth = (self.y - self.horizon) / height
        self.crest = np.full(width, self.horizon, np.float32)  # y of the hills' top, per column

    def new_instance(self, foot: float = 0) -> int:
        self.feet.append(round(foot))
        return len(self.feet) - 1

    def window(self, x0: float, y0: float, x1: float, y1: float) -> tuple[slice, slice] | None:
        """Row and column slices of the pixels that the rectangle touches, or None where it misses the canvas."""
        left, right = max(int(np.floor(x0)), 0), min(int(np.ceil(x1)), self.width)
        top, bottom = max(int(np.floor(y0)), 0), min(int(np.ceil(y1)), self.height)
        return (slice(top, bottom), slice(left, right)) if left < right and top < bottom else None

    def band(self, y0: float, y1: float) -> tuple[slice, slice]:
        """Row and column slices of the full-width rows from y0 to y1."""
        return slice(max(int(y0), 0), min(int(np.ceil(y1)), self.height)), slice(0, self.width)

    def put(self, window, mask: np.ndarray, colour: np.ndarray, label: int, instance: int) -> None:
        """Opaque paint. mask: bool [h', w'] of the window; colour: broadcastable to [h', w', 3]."""
        np.copyto(self.rgb[window], colour, where=mask[..., None])
        self.labels[window][mask] = label
        self.instances[window][mask] = instance

    def fill(self, points, colour: np.ndarray, label: int, instance: int, shade=None) -> None:
        """Opaque polygon. points: [N, 2] (x, y); shade: None or a function (x, y) -> factor [h', w']."""
        points = np.asarray(points, np.float32)
        window = self.window(*(points.min(0) - 1), *(points.max(0) + 1))
        if window is None:
            return
        mask = np.zeros(self.labels[window].shape, np.uint8)
        offset = np.array([window[1].start, window[0].start]) + 0.5
        cv2.fillPoly(mask, [np.round((points - offset) * 16).astype(np.int32)], 1, shift=4)
        if shade is not None:
            colour = colour * shade(self.x[:, window[1]], self.y[window[0]])[..., None]
        self.put(window, mask.astype(bool), colour, label, instance)


def _rgb(*channels: float) -> np.ndarray:
    return np.array(channels, np.float32)


def _mix(a, b, amount):
    return a + (b - a) * amount


def _smoothstep(low: float, high: float, value):
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _noise(rng: np.random.Generator, height: int, width: int, cell: float, *, octaves=4, gain=0.5, stretch=1.0):
    """Fractal noise, float32 [height, width], mean 0, deviation about 0.6. cell: pixels of the largest lump;
    stretch: its width over its height."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        step_y = cell * 0.5**octave
        if octave and step_y < 1:
            break
        step_y, step_x = max(step_y, 1.0), max(step_y * stretch, 1.0)
        grid = rng.standard_normal((int(height / step_y) + 3, int(width / step_x) + 3), dtype=np.float32)
        size = (round(grid.shape[1] * step_x), round(grid.shape[0] * step_y))
        top, left = int(step_y * rng.random()), int(step_x * rng.random())
        smooth = cv2.INTER_CUBIC if max(step_y, step_x) > 4 else cv2.INTER_LINEAR
        layer = cv2.resize(grid, size, interpolation=smooth)
        total += gain**octave * layer[top : top + height, left : left + width]
    return total


def _profile(rng: np.random.Generator, width: int, cell: float, *, octaves: int, gain: float) -> np.ndarray:
    """One line of fractal noise, float32 [width]."""
    lines = [_noise(rng, 1, width, 1.0, octaves=1, stretch=max(cell * 0.5**o, 2.0))[0] for o in range(octaves)]
    return np.sum([gain**o * line for o, line in enumerate(lines)], axis=0)


def _lookup(tile: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """tile [h, w] read at columns u and rows v (same shape), mirrored without end."""
    return cv2.remap(tile, u.astype(np.float32), v.astype(np.float32), cv2.INTER_LINEAR,
                     borderMode=cv2.BORDER_REFLECT)  # fmt: skip


# --------------------------------------------------------------------------------------------------------- light


_PALETTES = {  # zenith, skyline, direct light, ambient light
    "noon": ((0.24, 0.47, 0.80), (0.72, 0.85, 0.94), (0.86, 0.80, 0.66), (0.42, 0.47, 0.54)),
    "sunset": ((0.33, 0.40, 0.65), (0.99, 0.74, 0.50), (0.95, 0.62, 0.36), (0.38, 0.36, 0.44)),
    "overcast": ((0.56, 0.62, 0.69), (0.80, 0.83, 0.85), (0.28, 0.28, 0.28), (0.62, 0.65, 0.68)),
}


@dataclass(frozen=True)
class _Light:
    """Colours are float32 [3]. side: where the sun is, -1 left to 1 right. front: light on faces turned to the
    viewer. contrast: how sharp shadows are, 0 to 1. sun: (x, y, radius) in pixels, or None. clouds: their number."""

    name: str
    zenith: np.ndarray
    skyline: np.ndarray
    direct: np.ndarray
    ambient: np.ndarray
    side: float
    front: float
    contrast: float
    sun: tuple[float, float, float] | None
    clouds: int

    def on(self, albedo: np.ndarray, lit) -> np.ndarray:
        """Colour of a surface. lit: the share of direct light it receives, a number or float32 [...]."""
        lit = np.asarray(lit, np.float32)[..., None]
        return albedo * (self.ambient + self.direct * lit)


def _draw_light(rng: np.random.Generator, canvas: _Canvas) -> _Light:
    """The time of day can be read from the labels: a low sun is a sunset, a covered sky an overcast day."""
    name = str(rng.choice(["noon", "sunset", "overcast"], p=[0.55, 0.25, 0.20]))
    side = float(rng.choice([-1, 1]) * rng.uniform(0.45, 1.0))
    visible = rng.random() < {"noon": 0.6, "sunset": 0.9, "overcast": 0.0}[name]
    height = rng.uniform(0.16, 0.5) if name == "noon" else rng.uniform(0.62, 0.86)
    radius = canvas.unit * rng.uniform(0.04, 0.06)
    x = canvas.width * (0.5 + 0.42 * side)
    sun = (float(np.clip(x, 0, canvas.width)), canvas.horizon * height, radius) if visible else None
    jitter = rng.uniform(-0.02, 0.02, (2, 3)).astype(np.float32)
    zenith, skyline, direct, ambient = (_rgb(*colour) for colour in _PALETTES[name])
    return _Light(
        name=name,
        zenith=zenith + jitter[0],
        skyline=skyline + jitter[1],
        direct=direct,
        ambient=ambient,
        side=side,
        front=0.3 if visible else 0.6,
        contrast={"noon": 0.85, "sunset": 0.8, "overcast": 0.35}[name],
        sun=sun,
        clouds=int(rng.integers(5, 9) if name == "overcast" else rng.integers(0, 5)),
    )


# ----------------------------------------------------------------------------------------------------------- sky


def _paint_sky(canvas: _Canvas, light: _Light) -> None:
    fall = np.clip(canvas.y / canvas.horizon, 0, 1) ** (1.6 if light.name == "sunset" else 1.1)
    haze = _noise(canvas.texture, canvas.height // 2, canvas.width // 2, canvas.unit * 0.08, octaves=3, stretch=4)
    haze = cv2.resize(haze, (canvas.width, canvas.height))
    canvas.rgb[:] = _mix(light.zenith, light.skyline, (fall + 0.05 * haze).clip(0, 1)[..., None])
    if light.sun is None:
        return
    x, y, radius = light.sun
    distance = np.sqrt((canvas.x - x) ** 2 + (canvas.y - y) ** 2) / radius
    warm = _rgb(1.0, 0.95, 0.80) if light.name == "noon" else _rgb(1.0, 0.80, 0.45)
    glow = 0.75 * np.exp(-np.maximum(distance - 1, 0) / 1.1) + 0.35 * np.exp(-distance / 7)
    canvas.rgb[:] = _mix(canvas.rgb, warm, np.minimum(glow, 0.92)[..., None])
    disc = distance < 1
    centre = _mix(warm, _rgb(1.0, 1.0, 0.94), (1 - 0.55 * distance.clip(0, 1) ** 2)[..., None])
    canvas.put((slice(None), slice(None)), disc, centre, SUN, canvas.new_instance())


def _paint_clouds(canvas: _Canvas, light: _Light) -> None:
    rng, overcast = canvas.plan, light.name == "overcast"
    number = round(light.clouds * canvas.crowd ** (1.0 if overcast else 0.7))
    heights = np.sort(rng.uniform(0.05, 0.8, number))[::-1]  # low ones are far, hence first
    for place in heights.tolist():
        near = 1.15 - place  # clouds grow towards the zenith
        half_w = canvas.unit * near * rng.uniform(0.2, 0.42) * (1.35 if overcast else 1.0)
        half_h = half_w * rng.uniform(0.32, 0.5)
        x, y = rng.uniform(-0.05, 1.05) * canvas.width, place * canvas.horizon
        count = int(rng.integers(5, 9))
        blob_x, blob_r = rng.uniform(-0.75, 0.75, count), rng.uniform(0.35, 0.75, count)
        blob_y = 0.35 - rng.uniform(0.0, 0.75, count) * (1 - np.abs(blob_x))
        if light.sun is not None and np.hypot((x - light.sun[0]) / half_w, (y - light.sun[1]) / half_h) < 1.1:
            x += np.sign(canvas.width / 2 - light.sun[0]) * 1.5 * half_w  # the sun stays visible
        window = canvas.window(x - 1.5 * half_w, y - 1.6 * half_h, x + 1.5 * half_w, y + 1.2 * half_h)
        if window is None:
            continue
        u, v = (canvas.x[:, window[1]] - x) / half_w, (canvas.y[window[0]] - y) / half_h
        rough = _noise(canvas.texture, v.size, u.size, max(half_h * 0.55, 2), octaves=5, gain=0.55, stretch=1.3)
        density = np.full((v.size, u.size), -1.0, np.float32)
        for cx, cy, r in zip(blob_x.tolist(), blob_y.tolist(), blob_r.tolist(), strict=True):
            np.maximum(density, 1 - (((u - cx) * 1.3 / r) ** 2 + ((v - cy) / r) ** 2), out=density)
        density += 0.34 * rough - 1.6 * np.maximum(v - 0.35, 0)  # a ragged top over a flat base
        alpha = _smoothstep(-0.12, 0.42, density)
        # lit where the cloud gets thinner towards the sun
        shift = np.array([[1, 0, -light.side * half_h * 0.3], [0, 1, half_h * 0.38]], np.float32)
        towards_sun = cv2.warpAffine(density, shift, (u.size, v.size), borderMode=cv2.BORDER_REPLICATE)
        lit = (0.62 - 0.34 * v + 0.3 * (density - towards_sun) + 0.10 * rough).clip(0, 1)
        if light.name == "noon":
            dark, bright = _rgb(0.62, 0.69, 0.78), _rgb(1.0, 0.99, 0.97)
        elif light.name == "sunset":
            dark, bright = _rgb(0.56, 0.45, 0.55), _rgb(1.0, 0.82, 0.64)
        else:
            dark, bright = _rgb(0.53, 0.57, 0.62), _rgb(0.88, 0.90, 0.91)
        colour = _mix(_mix(dark, bright, lit[..., None]), light.skyline, 0.25 * place)
        canvas.rgb[window] = _mix(canvas.rgb[window], colour, (0.97 * alpha)[..., None])
        mask = alpha > 0.4
        canvas.labels[window][mask] = CLOUD
        canvas.instances[window][mask] = canvas.new_instance()


# ------------------------------------------------------------------------------------------------------- terrain


def _paint_mountains(canvas: _Canvas, light: _Light) -> None:
    rng, width = canvas.plan, canvas.width
    ranges = int(rng.choice([0, 1, 2, 3], p=[0.22, 0.2, 0.33, 0.25]))
    summit = min(rng.uniform(0.14, 0.34) * canvas.unit, 0.62 * canvas.horizon)
    snow = rng.random() < 0.4
    tile = 1 - np.abs(_noise(canvas.texture, 256, 256, 32, octaves=5, gain=0.6))  # ridges
    for layer in range(ranges):
        closeness = (layer + 1) / max(ranges, 1)
        scale = summit * (1 - 0.55 * layer / max(ranges, 1))
        cell = canvas.unit * rng.uniform(0.3, 0.55)
        line = _profile(canvas.texture, width, cell, octaves=6, gain=0.42)
        line = (
            1.05
            - 0.75 * np.sqrt(line**2 + 0.012)
            + 0.30 * _profile(canvas.texture, width, 2.2 * cell, octaves=1, gain=0.5)
        )
        foot = _profile(canvas.texture, width, 0.4 * cell, octaves=4, gain=0.5).clip(-0.3, 0.6)
        top = canvas.horizon - scale * np.maximum(line, 0.16 + 0.3 * foot)
        window = canvas.band(top.min(), canvas.horizon + 1)
        y = canvas.y[window[0]]
        mask = y > top[None]
        below = (y - top[None]) / canvas.unit  # distance under the crest
        # spurs run down from the crest, so the relief is stretched along the slope
        fall = 0.45 * below + 0.55 * (y - canvas.horizon) / canvas.unit
        sway = 12 * _lookup(tile, canvas.x / canvas.unit * 60 + 0 * y, fall * 100)
        u = canvas.x / canvas.unit * 130 + sway + 45 * layer
        relief = _lookup(tile, u, 120 * fall + 15 * layer)
        slope = _lookup(tile, u + light.side * 2.5, 120 * fall - 2.5 + 15 * layer) - relief
        slope -= float(np.sign(light.side)) * 0.45 * np.gradient(top) * np.exp(-below / 0.07)
        lit = (0.42 - 1.1 * slope * light.contrast).clip(0.03, 1.15)
        rock = _mix(_rgb(0.36, 0.38, 0.34), _rgb(0.50, 0.46, 0.42), (0.5 + 0.5 * relief).clip(0, 1)[..., None])
        forest = _smoothstep(0.06, 0.22, below + 0.05 * relief)[..., None]
        albedo = _mix(rock, _rgb(0.24, 0.33, 0.24), forest * 0.7)
        if snow:
            altitude = (canvas.horizon - y) / summit + 0.16 * relief
            albedo = _mix(albedo, _rgb(0.96, 0.97, 1.0), 0.95 * _smoothstep(0.72, 0.86, altitude)[..., None])
        colour = light.on(albedo, lit)
        air = _mix(light.skyline, light.zenith, 0.45) * _rgb(0.94, 0.97, 1.02)
        haze = 0.74 - 0.48 * closeness + 0.25 * _smoothstep(0.0, 0.3, below)
        canvas.put(window, mask, _mix(colour, air, haze[..., None].clip(0, 0.85)), MOUNTAIN, 0)


def _paint_hills(canvas: _Canvas, light: _Light) -> None:
    """Rolling grass beyond the plain, back to front; leaves its crest in canvas.crest."""
    rng, width = canvas.plan, canvas.width
    layers = int(rng.integers(0, 4))
    for layer in range(layers):
        scale = canvas.unit * rng.uniform(0.05, 0.13) * (1 - 0.6 * layer / layers)
        line = _profile(canvas.texture, width, canvas.unit * rng.uniform(0.35, 0.7), octaves=3, gain=0.3)
        top = canvas.horizon - scale * (0.5 + 0.7 * line)
        canvas.crest = np.minimum(canvas.crest, top)
        window = canvas.band(top.min(), canvas.horizon + 1)
        y = canvas.y[window[0]]
        below = (y - top[None]) / scale
        patches = _noise(canvas.texture, y.size, width, canvas.unit * 0.05, octaves=4, stretch=3)
        lit = 0.62 - 0.25 * light.contrast * below.clip(0, 1.5) + 0.16 * patches
        lit -= 1.4 * light.contrast * light.side * np.gradient(top)[None] * -1
        albedo = _mix(_rgb(0.30, 0.46, 0.17), _rgb(0.44, 0.50, 0.20), (0.5 + 0.5 * patches).clip(0, 1)[..., None])
        colour = _mix(light.on(albedo, lit.clip(0.05, 1.1)), light.skyline, 0.34 - 0.24 * layer / layers)
        canvas.put(window, y > top[None], colour, GRASS, 0)


def _paint_ground(canvas: _Canvas, light: _Light) -> None:
    """The grass plain from the horizon to the viewer."""
    window = canvas.band(canvas.horizon, canvas.height)
    depth, y = canvas.depth[window[0]].clip(0), canvas.y[window[0]]
    shape = (y.size, canvas.width)
    distance = 1 / (depth + 0.03)
    tile = _noise(canvas.texture, 256, 256, 32, octaves=5, gain=0.6)
    across = (canvas.x - canvas.width / 2) / canvas.unit * distance
    patches = _lookup(tile, 24 * across + 128, np.broadcast_to(42 * distance, shape))
    meadow = _lookup(tile, 5 * across + 40, np.broadcast_to(8 * distance, shape))
    blades = _noise(canvas.texture, *shape, canvas.unit * 0.020, octaves=3, gain=0.7, stretch=0.45)
    near = _smoothstep(0.0, 0.3, depth)
    lit = 0.66 + 0.13 * meadow + (0.06 + 0.10 * near) * patches + (0.03 + 0.09 * near) * blades - 0.10 * near
    dry = canvas.plan.uniform(0.1, 0.5)
    green = _mix(_rgb(0.29, 0.49, 0.15), _rgb(0.27, 0.43, 0.13), near[..., None])
    albedo = _mix(green, _rgb(0.52, 0.52, 0.22), (dry + 0.4 * meadow + 0.18 * patches).clip(0, 1)[..., None])
    colour = light.on(albedo, lit.clip(0.08, 1.2))
    colour = _mix(colour, light.skyline, (0.22 * np.exp(-depth / 0.05))[..., None])
    if canvas.plan.random() < 0.3:  # flowers
        seeds = _noise(canvas.texture, *shape, min(canvas.unit * 0.012, 5), octaves=1)
        bloom = _rgb(*((0.95, 0.93, 0.86), (0.95, 0.83, 0.30), (0.80, 0.25, 0.22))[canvas.plan.integers(3)])
        bloomed = 0.85 * _smoothstep(1.5, 1.9, seeds + 0.3 * meadow) * _smoothstep(0.01, 0.08, depth)
        colour = _mix(colour, light.on(bloom, lit), bloomed[..., None])
    canvas.put(window, np.ones(shape, bool), colour, GRASS, 0)


def _winding(canvas: _Canvas, depth: np.ndarray) -> np.ndarray:
    """x of a path that vanishes at the horizon, for every depth."""
    rng = canvas.plan
    start = canvas.width * rng.uniform(0.25, 0.75)
    lean = rng.uniform(-0.6, 0.6) * canvas.width
    swing, phase = rng.uniform(0.1, 0.5) * canvas.unit, rng.uniform(0, 2 * np.pi)
    d = depth.clip(0)
    return start + lean * d + swing * np.sqrt(d) * np.sin(phase + rng.uniform(4, 9) * np.sqrt(d + 0.01)) * 0.6


# ------------------------------------------------------------------------------------------------ water and road


def _water_field(canvas: _Canvas, kind: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(inside, mirror) or None for a dry scene. inside: float32 [h, w], > 0 in water, in units of the picture's
    height; mirror: float32 [1, w], the y at which the reflection starts."""
    rng, room = canvas.plan, 1 - canvas.horizon / canvas.height
    if kind == "none":
        return None
    line = _profile(canvas.texture, canvas.width, canvas.unit * 0.35, octaves=5, gain=0.45)[None]
    level = np.full((1, canvas.width), canvas.horizon, np.float32)
    if kind == "far":
        inside = room * (rng.uniform(0.18, 0.6) + 0.06 * line) - canvas.depth
    elif kind == "near":
        depth = room * rng.uniform(0.3, 0.6) + 0.12 * room * (canvas.x / canvas.width - 0.5) * rng.uniform(-2, 2)
        level = (canvas.horizon + canvas.height * (depth + 0.025 * line)).astype(np.float32)
        inside = (canvas.y - level) / canvas.height
    elif kind == "river":
        half = rng.uniform(0.22, 0.4) * (canvas.depth + 0.012)
        ragged = 0.06 * canvas.depth * _noise(canvas.texture, *canvas.labels.shape, canvas.unit * 0.06, octaves=3)
        inside = half + ragged - np.abs(canvas.x - _winding(canvas, canvas.depth)) / canvas.unit
    else:
        x, y = canvas.width * rng.uniform(0.1, 0.9), canvas.horizon + canvas.height * room * rng.uniform(0.3, 0.7)
        half_w = canvas.unit * rng.uniform(0.25, 0.55)
        half_h = canvas.height * room * rng.uniform(0.14, 0.26)
        radius = np.sqrt(((canvas.x - x) / half_w) ** 2 + ((canvas.y - y) / half_h) ** 2)
        ragged = 0.12 * _noise(canvas.texture, *canvas.labels.shape, canvas.unit * 0.12, octaves=3, stretch=2)
        inside = (1 - radius + ragged) * half_h / canvas.height
    inside = np.where(canvas.depth > 0, inside, -1.0).astype(np.float32)
    return inside, level


def _paint_water(canvas: _Canvas, light: _Light, shore, backdrop: np.ndarray) -> None:
    """shore: as from `_water_field`; backdrop: float32 [h, w, 3], the picture without what stands on the bank. It is
    mirrored in the horizon (a flat bank hides nothing of the sky), trees and houses about their feet."""
    if shore is None:
        return
    window = canvas.band(canvas.horizon, canvas.height)
    inside, mirror, depth = shore[0][window[0]], shore[1], canvas.depth[window[0]].clip(0)
    shape = inside.shape
    beach = 0.006 + 0.035 * depth
    wet = _smoothstep(-1.0, -0.1, inside / beach)[..., None] * (canvas.labels[window] == GRASS)[..., None]
    sand = _mix(_rgb(0.60, 0.53, 0.38), _rgb(0.34, 0.29, 0.20), _smoothstep(-0.6, 0.0, inside / beach)[..., None])
    canvas.rgb[window] = _mix(canvas.rgb[window], light.on(sand, 0.55), 0.8 * wet)

    tile = _noise(canvas.texture, 256, 256, 24, octaves=5, gain=0.62)
    distance = 1 / (depth + 0.04)
    across = (canvas.x - canvas.width / 2) / canvas.unit * distance
    ripples = _lookup(tile, 9 * across + 128, np.broadcast_to(46 * distance, shape))
    ripples += 0.5 * _lookup(tile, 26 * across + 20, np.broadcast_to(110 * distance, shape))
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
        above = _mix(above, _read(canvas.rgb, columns, 2 * mirror - 1 - rows), bank)
    deep = light.on(_rgb(0.10, 0.24, 0.34), 0.5)
    steep = (0.30 + 0.55 * depth - 0.10 * ripples)[..., None].clip(0.12, 0.8)  # Fresnel: near water is deep
    colour = _mix(0.94 * above, deep, steep) + (0.035 * ripples * (0.3 + light.contrast))[..., None]
    colour = _mix(colour, light.skyline, 0.16 * np.exp(-np.abs(inside) / 0.004)[..., None])  # a bright waterline
    if light.sun is not None:
        column = np.exp(-(((canvas.x - light.sun[0]) / (canvas.unit * (0.05 + 0.16 * depth))) ** 2))
        colour += (0.75 * column * _smoothstep(0.2, 0.9, ripples))[..., None] * light.direct
    canvas.put(window, inside > 0, colour, WATER, 0)


def _read(picture: np.ndarray, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return cv2.remap(picture, columns.astype(np.float32), rows.astype(np.float32), cv2.INTER_LINEAR,
                     borderMode=cv2.BORDER_REFLECT)  # fmt: skip


def _paint_road(canvas: _Canvas, light: _Light) -> None:
    rng, paved = canvas.plan, canvas.plan.random() < 0.55
    window = canvas.band(canvas.horizon, canvas.height)
    depth = canvas.depth[window[0]].clip(1e-3)
    half = rng.uniform(0.16, 0.30) * (depth + 0.02)
    offset = (canvas.x - _winding(canvas, depth)) / canvas.unit / half  # -1 to 1 across the road
    height, width = offset.shape
    grain = _noise(canvas.texture, height, width, canvas.unit * 0.012, octaves=2, gain=0.8, stretch=1.6)
    worn = _noise(canvas.texture, height, width, canvas.unit * 0.08, octaves=3, stretch=3)
    free = canvas.labels[window] == GRASS
    ragged = np.abs(offset) + (0.03 if paved else 0.12) * worn
    verge = (1 - _smoothstep(1.0, 1.4, ragged)) * free
    dust = light.on(_rgb(0.50, 0.45, 0.31), 0.6 + 0.1 * grain)
    canvas.rgb[window] = _mix(canvas.rgb[window], dust, 0.6 * verge[..., None])
    if paved:
        tracks = np.exp(-(((np.abs(offset) - 0.5) / 0.18) ** 2))
        colour = light.on(_rgb(0.36, 0.36, 0.38), 0.62 + 0.06 * grain + 0.05 * worn - 0.05 * tracks)
        dashes = (np.abs(offset) < 0.035) & (np.mod(1.1 / (depth + 0.05) + 0.3, 1.0) < 0.5)
        lines = dashes | (np.abs(np.abs(offset) - 0.9) < 0.03)
        colour = _mix(colour, light.on(_rgb(0.92, 0.90, 0.84), 0.62), 0.85 * lines[..., None])
    else:
        tracks = np.exp(-(((np.abs(offset) - 0.45) / 0.2) ** 2))
        albedo = _mix(
            _rgb(0.50, 0.41, 0.29), _rgb(0.68, 0.58, 0.43), (0.75 * tracks + 0.2 * worn)[..., None].clip(0, 1)
        )
        colour = light.on(albedo, 0.6 + 0.10 * grain)
    colour = _mix(colour, light.skyline, (0.25 * np.exp(-depth / 0.05))[..., None])
    canvas.put(window, (ragged < 1) & free, colour, ROAD, 0)


# ------------------------------------------------------------------------------------------------ trees and houses


def _paint_woods(canvas: _Canvas, light: _Light) -> None:
    """Distant rows of trees on the crest and at the foot of the hills; each row is one instance."""
    rng = canvas.plan
    for _ in range(int(rng.integers(0, 4))):
        x, half = rng.uniform(0, canvas.width), canvas.unit * rng.uniform(0.07, 0.2)
        size = canvas.unit * rng.uniform(0.022, 0.04)
        on_crest = rng.random() < 0.4
        count = int(2 * half / size * 1.6)
        blob_x = np.linspace(x - half, x + half, count) + rng.normal(0, 0.2, count) * size
        blob_r = size * rng.uniform(0.55, 1.0, count) * (0.6 + 0.4 * np.sin(np.linspace(0.2, 2.94, count)))
        base = np.full(count, canvas.horizon + 0.004 * canvas.height)
        if on_crest:
            base = canvas.crest[blob_x.clip(0, canvas.width - 1).astype(int)] + 0.5 * size
        _paint_crown(canvas, light, blob_x, base - 0.7 * blob_r, blob_r, base.max(), _rgb(0.16, 0.31, 0.12),
                     canvas.new_instance(base.max()), haze=0.28)  # fmt: skip


def _paint_objects(canvas: _Canvas, light: _Light, shore: tuple[np.ndarray, np.ndarray] | None) -> None:
    """Chooses places for houses and trees on dry grass, then paints shadows, then objects from far to near."""
    rng, room = canvas.plan, canvas.height - canvas.horizon

    def free(x: float, y: float, half: float) -> bool:
        row = min(int(y), canvas.height - 1)
        columns = slice(max(int(x - half), 0), max(int(x + half) + 1, 0))
        dry = shore is None or shore[0][row, columns].max(initial=-1) < -0.004
        ground = canvas.labels[row, columns]
        return bool(dry and ground.size and (ground == GRASS).all())

    objects: list[tuple[float, float, float, str]] = []  # base y, x, size, kind
    houses = int(rng.choice([0, 1, 2, 3, 5], p=[0.28, 0.26, 0.2, 0.16, 0.10]) * canvas.crowd**0.7)
    for _ in range(houses):
        for _ in range(10):
            x, y = rng.uniform(0.05, 0.95) * canvas.width, canvas.horizon + room * rng.uniform(0.10, 0.55)
            size = canvas.unit * (0.035 + 0.95 * (y - canvas.horizon) / canvas.height) * rng.uniform(0.8, 1.1)
            apart = all(abs(x - other[1]) > 0.95 * (size + other[2]) for other in objects)
            if apart and free(x, y, 0.6 * size):
                objects.append((y, x, size, "house"))
                break
    trees = int(rng.integers(1, 13) * canvas.crowd)
    main_kind = str(rng.choice(["round", "conifer", "poplar"], p=[0.5, 0.35, 0.15]))
    grove = rng.uniform(0, 1, 2) * canvas.width
    for _ in range(trees):
        kind = main_kind if rng.random() < 0.75 else str(rng.choice(["round", "conifer"]))
        for _ in range(6):
            y = canvas.horizon + room * rng.beta(1.1, 2.2) * 0.95 + 0.01 * room
            x = rng.uniform(0, 1) * canvas.width
            if rng.random() < 0.5:
                x = rng.normal(grove[rng.integers(2)], 0.12 * canvas.unit)
            size = canvas.unit * (0.06 + 1.15 * (y - canvas.horizon) / canvas.height) * rng.uniform(0.75, 1.25)
            size = min(size, 0.62 * canvas.unit)
            hides = any(o[3] == "house" and o[0] < y and abs(o[1] - x) < 0.5 * o[2] + 0.25 * size for o in objects)
            if not hides and free(x, y, 0.04 * size):
                objects.append((y, x, size, kind))
                break
    objects.sort()
    _paint_shadows(canvas, light, objects)
    for y, x, size, kind in objects:
        haze = 0.22 * float(np.exp(-(y - canvas.horizon) / canvas.height / 0.08))
        if kind == "house":
            _paint_house(canvas, light, x, y, size, haze)
        else:
            _paint_tree(canvas, light, x, y, size, kind, haze)


def _paint_shadows(canvas: _Canvas, light: _Light, objects: list[tuple[float, float, float, str]]) -> None:
    """Ground shadows fall away from the sun: towards the viewer if it stands in the picture, else aside."""
    shade = np.zeros(canvas.labels.shape, np.uint8)
    away, length = -np.sign(light.side), 0.9 if light.name == "sunset" else 0.5
    tilt = 0.30 if light.sun is not None else 0.06
    for y, x, size, kind in objects:
        step = np.array([away * length * size, tilt * length * size])
        foot = np.array([x, y])
        if kind == "house":
            half = 0.62 * size
            corners = foot + np.array([(-half, -0.03 * size), (half, -0.03 * size), (half, 0), (-half, 0)])
            outline = np.concatenate([corners, corners + 0.7 * step])
            cv2.fillConvexPoly(shade, cv2.convexHull(np.round(outline).astype(np.int32)), 255)
        else:
            axes = (0.30 * size * (1 + 0.5 * length), max(0.055 * size, 1.0))
            centre = foot + 0.45 * step
            angle = float(np.degrees(np.arctan2(step[1], step[0])))
            cv2.ellipse(shade, (tuple(centre.tolist()), (2 * axes[0], 2 * axes[1]), angle), 255, -1)
            cv2.ellipse(shade, (tuple(foot.tolist()), (0.3 * size, 0.05 * size), 0.0), 255, -1)
    soft = cv2.GaussianBlur(shade, (0, 0), max(canvas.unit * 0.006, 0.8)).astype(np.float32) / 255
    ground = (canvas.labels == GRASS) | (canvas.labels == ROAD)
    amount = (0.62 * (0.3 + 0.7 * light.contrast) * soft * ground)[..., None]
    canvas.rgb *= 1 - amount * _rgb(1.0, 0.94, 0.80)  # shadows are lit by the blue sky


def _paint_crown(canvas, light, blob_x, blob_y, blob_r, base, albedo, instance, *, haze) -> None:
    """A cluster of leafy balls, lit from the sun's side. blob_*: [B] centres and radii in pixels; nothing is painted
    below `base`."""
    window = canvas.window((blob_x - 1.2 * blob_r).min(), (blob_y - 1.2 * blob_r).min(),
                           (blob_x + 1.2 * blob_r).max(), min((blob_y + 1.2 * blob_r).max(), base))  # fmt: skip
    if window is None:
        return
    x, y = canvas.x[:, window[1]], canvas.y[window[0]]
    typical = float(blob_r.mean())
    leaves = _noise(canvas.texture, y.size, x.size, max(typical * 0.42, 1.5), octaves=3, gain=0.75)
    height = np.full((y.size, x.size), -1e9, np.float32)
    normal_x = np.zeros_like(height)
    normal_y = np.zeros_like(height)
    edge = 1 + 0.22 * leaves
    for cx, cy, r in zip(blob_x, blob_y, blob_r, strict=True):
        dx, dy = (x - np.float32(cx)) / np.float32(r), (y - np.float32(cy)) / np.float32(r)
        z = edge - dx * dx - dy * dy
        top = (z > 0) & (z * np.float32(r) > height)
        np.copyto(height, z * np.float32(r), where=top)
        np.copyto(normal_x, dx, where=top)
        np.copyto(normal_y, dy, where=top)
    mask = height > -1e8
    top_y, tall = float((blob_y - blob_r).min()), float(base - (blob_y - blob_r).min())
    lit = 0.42 + light.contrast * (0.40 * light.side * normal_x - 0.36 * normal_y) + 0.17 * leaves
    lit -= 0.34 * _smoothstep(0.3, 1.0, (y - top_y) / max(tall, 1.0))  # the underside is dark
    colour = light.on(albedo, lit.clip(-0.12, 1.1)) + np.maximum(lit - 0.6, 0)[..., None] * _rgb(0.10, 0.09, 0.0)
    canvas.put(window, mask, _mix(colour, light.skyline, haze), TREE, instance)


def _paint_conifer(canvas, light, x, y, size, albedo, instance, *, haze) -> None:
    half = 0.21 * size
    window = canvas.window(x - 1.3 * half, y - size, x + 1.3 * half, y - 0.06 * size)
    if window is None:
        return
    u, t = (canvas.x[:, window[1]] - x) / half, (canvas.y[window[0]] - (y - size)) / (0.94 * size)
    needles = _noise(canvas.texture, t.size, u.size, max(size * 0.05, 1.5), octaves=3, gain=0.8)
    tiers = np.mod(t * 6.5 + 0.25 * np.abs(u) + 0.12 * needles, 1.0)  # branches droop to the outside
    reach = t.clip(0) ** 0.85 * (0.66 + 0.34 * tiers) * (1 + 0.14 * needles)
    mask = (np.abs(u) < np.maximum(reach, 0.035)) & (t > 0) & (t < 1)
    across = (u / np.maximum(reach, 0.05)).clip(-1, 1)
    lit = 0.36 + 0.44 * light.contrast * light.side * across + 0.16 * needles - 0.34 * (tiers - 0.5) - 0.14 * t
    canvas.put(window, mask, _mix(light.on(albedo, lit.clip(-0.1, 1.1)), light.skyline, haze), TREE, instance)


def _paint_tree(canvas, light, x, y, size, kind, haze) -> None:
    """One tree whose trunk stands at (x, y); size is its height in pixels."""
    rng, instance = canvas.plan, canvas.new_instance(y)
    tone = rng.uniform(0, 1)
    thick = max(0.028 * size, 0.9)
    trunk = [(x - thick, y), (x - 0.6 * thick, y - 0.5 * size), (x + 0.6 * thick, y - 0.5 * size), (x + thick, y)]
    bark = _mix(light.on(_rgb(0.33, 0.24, 0.17), 0.35), light.skyline, haze)
    tilt = 0.45 * light.contrast * light.side / thick  # the trunk is lit from one side
    canvas.fill(trunk, bark, TREE, instance, lambda px, py: (1 + tilt * (px - x) + 0 * py).clip(0.5, 1.5))
    if kind == "conifer":
        green = _mix(_rgb(0.11, 0.27, 0.15), _rgb(0.17, 0.33, 0.13), tone)
        _paint_conifer(canvas, light, x, y, size, green, instance, haze=haze)
        return
    count = int(rng.integers(9, 15))
    angle, spread = rng.uniform(0, 2 * np.pi, count), np.sqrt(rng.uniform(0, 1, count))
    if kind == "poplar":
        half_w, half_h, centre, radius = 0.07, 0.36, 0.55, rng.uniform(0.08, 0.13, count)
    else:
        half_w, half_h, centre, radius = 0.23, 0.21, 0.62, rng.uniform(0.12, 0.20, count)
    blob_x = x + size * half_w * spread * np.cos(angle)
    blob_y = y - size * (centre + half_h * spread * np.sin(angle))
    green = _mix(_rgb(0.17, 0.35, 0.10), _rgb(0.31, 0.43, 0.12), tone)
    order = np.argsort(blob_y)
    _paint_crown(canvas, light, blob_x[order], blob_y[order], size * radius[order], y - 0.1 * size, green, instance,
                 haze=haze)  # fmt: skip


def _paint_house(canvas, light, x, y, size, haze) -> None:
    """A gabled house around (x, y): a front, a receding side, a roof slope, windows, a door and a chimney."""
    rng, instance = canvas.plan, canvas.new_instance(y)
    wall = _rgb(*[(0.86, 0.80, 0.68), (0.88, 0.86, 0.82), (0.80, 0.66, 0.46), (0.74, 0.56, 0.44)][rng.integers(4)])
    tile = _rgb(*[(0.64, 0.28, 0.18), (0.56, 0.25, 0.17), (0.45, 0.27, 0.20), (0.40, 0.36, 0.37)][rng.integers(4)])
    turn = float(rng.choice([-1, 1]))  # the side wall is seen on this side
    front, long = size * rng.uniform(0.46, 0.62), size * rng.uniform(0.5, 0.85)
    high, gable, rise = size * rng.uniform(0.36, 0.46), size * rng.uniform(0.24, 0.34), 0.06 * long
    grain = _noise(canvas.texture, 64, 64, 6, octaves=2, gain=0.8)
    left = x - turn * 0.5 * (front + long)  # the outer edge of the front

    def at(across: float, up: float, back: float = 0.0) -> tuple[float, float]:
        """Picture point: pixels along the front, above the ground and along the side wall."""
        return left + turn * (across + back), y - up - rise * back / long * (1 if up < high + 1 else 0.4)

    def rough(px, py):
        return 1 + 0.07 * _lookup(grain, (px * 96 / size) + 0 * py, (py * 96 / size) + 0 * px)

    def walls(px, py):  # darker at the foot and under the eaves
        up = (y - py) / high
        return rough(px, py) * (0.84 + 0.16 * _smoothstep(0, 0.25, up) - 0.13 * _smoothstep(0.75, 1.0, up) + 0 * px)

    def paint(points, albedo, lit, label, shade) -> None:
        colour = _mix(light.on(albedo, lit), light.skyline, haze)
        canvas.fill(points, colour, label, instance, shade)

    side_lit = 0.22 + 0.75 * light.contrast * max(0.0, light.side * turn)
    front_lit = 0.22 + light.contrast * (light.front * 0.8 + 0.25 * max(0.0, -light.side * turn))
    slope_lit = 0.34 + light.contrast * (0.12 + 0.5 * light.side * turn)
    paint([at(front, 0), at(front, 0, long), at(front, high, long), at(front, high)], wall, side_lit, HOUSE, walls)
    paint([at(0, 0), at(front, 0), at(front, high), at(front / 2, high + gable), at(0, high)], wall, front_lit,
          HOUSE, walls)  # fmt: skip

    def pane(points) -> None:
        points = np.array(points, np.float32)
        centre = points.mean(0)
        canvas.fill(centre + (points - centre) * 1.35, _mix(light.on(_rgb(0.86, 0.84, 0.80), 0.5), light.skyline, haze),
                    HOUSE, instance)  # fmt: skip
        low, tall = points[:, 1].max(), max(float(np.ptp(points[:, 1])), 1.0)
        dark = light.on(_rgb(0.14, 0.18, 0.25), 0.4)
        glass = _mix(dark, light.zenith, 0.30) if light.name != "sunset" else _mix(dark, _rgb(1.0, 0.72, 0.35), 0.35)

        def gleam(px, py):  # the sky in the upper corner of the pane
            return 0.7 + 0.75 * ((low - py) / tall + 0.25 * (px - centre[0]) / tall).clip(0, 1.2)

        canvas.fill(points, glass, WINDOW, instance, gleam)

    wide, up, tall = 0.115 * size, 0.14 * size, 0.145 * size

    def front_pane(middle: float, low: float, half: float, tall: float) -> None:
        left_x, right_x = middle - half, middle + half
        pane([at(left_x, low), at(right_x, low), at(right_x, low + tall), at(left_x, low + tall)])

    front_pane(0.27 * front, up, wide / 2, tall)
    front_pane(0.73 * front, up, wide / 2, tall)
    if rng.random() < 0.6:
        front_pane(front / 2, high + 0.1 * gable, 0.4 * wide, 0.4 * gable)
    number = int(rng.integers(2, 4))
    door = int(rng.integers(number))
    for k in range(number):
        back = long * (k + 0.5) / number
        if k == door:
            paint([at(front, 0, back - 0.06 * size), at(front, 0, back + 0.06 * size),
                   at(front, 0.26 * size, back + 0.06 * size), at(front, 0.26 * size, back - 0.06 * size)],
                  _rgb(0.36, 0.22, 0.14), side_lit, HOUSE, rough)  # fmt: skip
        else:
            pane([at(front, up, back - wide / 2), at(front, up, back + wide / 2),
                  at(front, up + tall, back + wide / 2), at(front, up + tall, back - wide / 2)])  # fmt: skip

    ridge, eaves = at(front / 2, high + gable), at(front * 1.05, high - 0.1 * gable)
    far_ridge, far_eaves = at(front / 2, high + gable, long), at(front * 1.05, high - 0.1 * gable, long * 1.04)
    run = np.array(far_ridge) - np.array(ridge)
    normal = np.array([-run[1], run[0]]) / np.hypot(*run)
    course = max(0.055 * size, 2.0)

    def tiles(px, py):
        row = ((px - ridge[0]) * normal[0] + (py - ridge[1]) * normal[1]) / course
        return rough(2.5 * px, py) * (0.88 + 0.2 * np.abs(np.mod(row, 1.0)))

    if rng.random() < 0.7:
        chimney = long * rng.uniform(0.3, 0.8)
        middle, top = at(front * 0.62, high + 0.7 * gable, chimney), 0.5 * gable
        half = 0.045 * size
        box = [(middle[0] - half, middle[1]), (middle[0] + half, middle[1]), (middle[0] + half, middle[1] - top),
               (middle[0] - half, middle[1] - top)]  # fmt: skip
        stack = lambda px, py: rough(px, py) * (1 + 0.4 * light.contrast * light.side * (px - middle[0]) / half)  # noqa: E731
        paint(box, _rgb(0.52, 0.33, 0.26), 0.45, HOUSE, stack)
    paint([ridge, far_ridge, far_eaves, eaves], tile, slope_lit, ROOF, tiles)
    verge = max(0.05 * size, 1.5)  # the roof's edge over the gable
    outer = at(-0.05 * front, high - 0.1 * gable)
    down = np.array([0.0, verge])
    peak = np.array(ridge)
    paint([peak, eaves, eaves + down, peak + 1.4 * down, outer + down, outer], 0.85 * tile, front_lit, ROOF, rough)


# ----------------------------------------------------------------------------------------------- finish and write


def _finish(canvas: _Canvas, light: _Light) -> Scene:
    """Reduces the canvas to the scene's size; grades the colours a little."""
    height, width = canvas.height // SUPERSAMPLING, canvas.width // SUPERSAMPLING
    rgb = cv2.resize(canvas.rgb.clip(0, 1), (width, height), interpolation=cv2.INTER_AREA)
    rgb = _mix(rgb, _smoothstep(0.0, 1.0, rgb), 0.30)
    rgb += 0.006 * canvas.texture.standard_normal((height, width, 1), dtype=np.float32)
    ids = canvas.labels.astype(np.int32) << 16 | canvas.instances
    a, b, c, d = ids[::2, ::2], ids[::2, 1::2], ids[1::2, ::2], ids[1::2, 1::2]
    mode = np.where((a == b) | (a == c) | (a == d), a, np.where((b == c) | (b == d), b, np.where(c == d, c, a)))
    labels, instances = (mode >> 16).astype(np.uint8), (mode & 0xFFFF).astype(np.uint16)
    image = np.round(rgb.clip(0, 1) * 255).astype(np.uint8)
    return Scene(image, labels, instances, edge_map(labels, instances))


def write_sample_data(
    output_root: str | Path,
    num_train: int,
    num_val: int,
    height: int,
    width: int,
    seed: int,
    num_workers: int,
    *,
    on_written: Callable[[], object] = lambda: None,
) -> None:
    """Writes `output_root/{train,val}/{images,seg_maps,inst_maps,edge_maps}/scene_NNNNN.{jpg,png}`.

    Scenes 0..num_train-1 are for training, the next num_val for validation; NNNNN is that index. The bytes do not
    depend on num_workers (0 or 1: this process). on_written is called after each scene. Files that are there are
    replaced; the folder is not cleaned.
    """
    root = Path(output_root)
    for split in ("train", "val"):
        for folder in ("images", "seg_maps", "inst_maps", "edge_maps"):
            (root / split / folder).mkdir(parents=True, exist_ok=True)
    jobs = [(root / ("train" if i < num_train else "val"), seed, i, height, width) for i in range(num_train + num_val)]
    if num_workers <= 1:
        for job in jobs:
            _write_scene(job)
            on_written()
        return
    # not fork: a forked child of a process with OpenCV or torch threads can hang; not spawn: importing torch takes
    # seconds, which a fork server pays once for all workers
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(num_workers, cv2.setNumThreads, (1,)) as pool:
        for _ in pool.imap_unordered(_write_scene, jobs, chunksize=4):
            on_written()


def _write_scene(job: tuple[Path, int, int, int, int]) -> None:
    split, seed, index, height, width = job
    scene = draw_scene(seed, index, height, width)
    name = f"scene_{index:05d}"
    jpeg = [cv2.IMWRITE_JPEG_QUALITY, 95]
    for path, pixels, options in (
        (split / "images" / f"{name}.jpg", scene.image[..., ::-1], jpeg),
        (split / "seg_maps" / f"{name}.png", scene.labels, []),
        (split / "inst_maps" / f"{name}.png", scene.instances, []),
        (split / "edge_maps" / f"{name}.png", scene.edges, []),
    ):
        _, encoded = cv2.imencode(path.suffix, pixels, options)
        partial = path.with_name(f".{path.name}.part")
        partial.write_bytes(encoded.tobytes())
        partial.replace(path)
