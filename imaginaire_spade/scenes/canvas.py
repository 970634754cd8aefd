"""What a scene is painted on, and the painter's arithmetic.

Owns the pixels with their class and instance ids (`Canvas`), colour mixing, and the noise that every texture is made
of.
"""

import cv2
import numpy as np


class Canvas:
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


def rgb(*channels: float) -> np.ndarray:
    return np.array(channels, np.float32)


def mix(a, b, amount):
    return a + (b - a) * amount


def smoothstep(low: float, high: float, value):
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def noise(rng: np.random.Generator, height: int, width: int, cell: float, *, octaves=4, gain=0.5, stretch=1.0):
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


def profile(rng: np.random.Generator, width: int, cell: float, *, octaves: int, gain: float) -> np.ndarray:
    """One line of fractal noise, float32 [width]."""
    lines = [noise(rng, 1, width, 1.0, octaves=1, stretch=max(cell * 0.5**o, 2.0))[0] for o in range(octaves)]
    return np.sum([gain**o * line for o, line in enumerate(lines)], axis=0)


def lookup(tile: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """tile [h, w] read at columns u and rows v (same shape), mirrored without end."""
    return cv2.remap(tile, u.astype(np.float32), v.astype(np.float32), cv2.INTER_LINEAR,
                     borderMode=cv2.BORDER_REFLECT)  # fmt: skip
