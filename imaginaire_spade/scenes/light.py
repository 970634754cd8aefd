"""The light of a scene, which every layer reads: time of day, side of the sun, colours. Owns the palettes."""

from dataclasses import dataclass

import numpy as np

from imaginaire_spade.scenes.canvas import Canvas, rgb

_PALETTES = {  # zenith, skyline, direct light, ambient light
    "noon": ((0.24, 0.47, 0.80), (0.72, 0.85, 0.94), (0.86, 0.80, 0.66), (0.42, 0.47, 0.54)),
    "sunset": ((0.33, 0.40, 0.65), (0.99, 0.74, 0.50), (0.95, 0.62, 0.36), (0.38, 0.36, 0.44)),
    "overcast": ((0.56, 0.62, 0.69), (0.80, 0.83, 0.85), (0.28, 0.28, 0.28), (0.62, 0.65, 0.68)),
}


@dataclass(frozen=True)
class Light:
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


def draw_light(rng: np.random.Generator, canvas: Canvas) -> Light:
    """The time of day can be read from the labels: a low sun is a sunset, a covered sky an overcast day."""
    name = str(rng.choice(["noon", "sunset", "overcast"], p=[0.55, 0.25, 0.20]))
    side = float(rng.choice([-1, 1]) * rng.uniform(0.45, 1.0))
    visible = rng.random() < {"noon": 0.6, "sunset": 0.9, "overcast": 0.0}[name]
    height = rng.uniform(0.16, 0.5) if name == "noon" else rng.uniform(0.62, 0.86)
    radius = canvas.unit * rng.uniform(0.04, 0.06)
    x = canvas.width * (0.5 + 0.42 * side)
    sun = (float(np.clip(x, 0, canvas.width)), canvas.horizon * height, radius) if visible else None
    jitter = rng.uniform(-0.02, 0.02, (2, 3)).astype(np.float32)
    zenith, skyline, direct, ambient = (rgb(*colour) for colour in _PALETTES[name])
    return Light(
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
