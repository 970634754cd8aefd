"""The land, from far to near: mountains, hills and the grass plain. Owns how they are painted."""

import numpy as np

from imaginaire_spade.scenes.canvas import Canvas, lookup, mix, noise, profile, rgb, smoothstep
from imaginaire_spade.scenes.classes import GRASS, MOUNTAIN
from imaginaire_spade.scenes.light import Light


def paint_mountains(canvas: Canvas, light: Light) -> None:
    rng, width = canvas.plan, canvas.width
    ranges = int(rng.choice([0, 1, 2, 3], p=[0.22, 0.2, 0.33, 0.25]))
    summit = min(rng.uniform(0.14, 0.34) * canvas.unit, 0.62 * canvas.horizon)
    snow = rng.random() < 0.4
    tile = 1 - np.abs(noise(canvas.texture, 256, 256, 32, octaves=5, gain=0.6))  # ridges
    for layer in range(ranges):
        closeness = (layer + 1) / max(ranges, 1)
        scale = summit * (1 - 0.55 * layer / max(ranges, 1))
        cell = canvas.unit * rng.uniform(0.3, 0.55)
        line = profile(canvas.texture, width, cell, octaves=6, gain=0.42)
        line = (
            1.05
            - 0.75 * np.sqrt(line**2 + 0.012)
            + 0.30 * profile(canvas.texture, width, 2.2 * cell, octaves=1, gain=0.5)
        )
        foot = profile(canvas.texture, width, 0.4 * cell, octaves=4, gain=0.5).clip(-0.3, 0.6)
        top = canvas.horizon - scale * np.maximum(line, 0.16 + 0.3 * foot)
        window = canvas.band(top.min(), canvas.horizon + 1)
        y = canvas.y[window[0]]
        mask = y > top[None]
        below = (y - top[None]) / canvas.unit  # distance under the crest
        # spurs run down from the crest, so the relief is stretched along the slope
        fall = 0.45 * below + 0.55 * (y - canvas.horizon) / canvas.unit
        sway = 12 * lookup(tile, canvas.x / canvas.unit * 60 + 0 * y, fall * 100)
        u = canvas.x / canvas.unit * 130 + sway + 45 * layer
        relief = lookup(tile, u, 120 * fall + 15 * layer)
        slope = lookup(tile, u + light.side * 2.5, 120 * fall - 2.5 + 15 * layer) - relief
        slope -= float(np.sign(light.side)) * 0.45 * np.gradient(top) * np.exp(-below / 0.07)
        lit = (0.42 - 1.1 * slope * light.contrast).clip(0.03, 1.15)
        rock = mix(rgb(0.36, 0.38, 0.34), rgb(0.50, 0.46, 0.42), (0.5 + 0.5 * relief).clip(0, 1)[..., None])
        forest = smoothstep(0.06, 0.22, below + 0.05 * relief)[..., None]
        albedo = mix(rock, rgb(0.24, 0.33, 0.24), forest * 0.7)
        if snow:
            altitude = (canvas.horizon - y) / summit + 0.16 * relief
            albedo = mix(albedo, rgb(0.96, 0.97, 1.0), 0.95 * smoothstep(0.72, 0.86, altitude)[..., None])
        colour = light.on(albedo, lit)
        air = mix(light.skyline, light.zenith, 0.45) * rgb(0.94, 0.97, 1.02)
        haze = 0.74 - 0.48 * closeness + 0.25 * smoothstep(0.0, 0.3, below)
        canvas.put(window, mask, mix(colour, air, haze[..., None].clip(0, 0.85)), MOUNTAIN, 0)


def paint_hills(canvas: Canvas, light: Light) -> None:
    """Rolling grass beyond the plain, back to front; leaves its crest in canvas.crest."""
    rng, width = canvas.plan, canvas.width
    layers = int(rng.integers(0, 4))
    for layer in range(layers):
        scale = canvas.unit * rng.uniform(0.05, 0.13) * (1 - 0.6 * layer / layers)
        line = profile(canvas.texture, width, canvas.unit * rng.uniform(0.35, 0.7), octaves=3, gain=0.3)
        top = canvas.horizon - scale * (0.5 + 0.7 * line)
        canvas.crest = np.minimum(canvas.crest, top)
        window = canvas.band(top.min(), canvas.horizon + 1)
        y = canvas.y[window[0]]
        below = (y - top[None]) / scale
        patches = noise(canvas.texture, y.size, width, canvas.unit * 0.05, octaves=4, stretch=3)
        lit = 0.62 - 0.25 * light.contrast * below.clip(0, 1.5) + 0.16 * patches
        lit -= 1.4 * light.contrast * light.side * np.gradient(top)[None] * -1
        albedo = mix(rgb(0.30, 0.46, 0.17), rgb(0.44, 0.50, 0.20), (0.5 + 0.5 * patches).clip(0, 1)[..., None])
        colour = mix(light.on(albedo, lit.clip(0.05, 1.1)), light.skyline, 0.34 - 0.24 * layer / layers)
        canvas.put(window, y > top[None], colour, GRASS, 0)


def paint_ground(canvas: Canvas, light: Light) -> None:
    """The grass plain from the horizon to the viewer."""
    window = canvas.band(canvas.horizon, canvas.height)
    depth, y = canvas.depth[window[0]].clip(0), canvas.y[window[0]]
    shape = (y.size, canvas.width)
    distance = 1 / (depth + 0.03)
    tile = noise(canvas.texture, 256, 256, 32, octaves=5, gain=0.6)
    across = (canvas.x - canvas.width / 2) / canvas.unit * distance
    patches = lookup(tile, 24 * across + 128, np.broadcast_to(42 * distance, shape))
    meadow = lookup(tile, 5 * across + 40, np.broadcast_to(8 * distance, shape))
    blades = noise(canvas.texture, *shape, canvas.unit * 0.020, octaves=3, gain=0.7, stretch=0.45)
    near = smoothstep(0.0, 0.3, depth)
    lit = 0.66 + 0.13 * meadow + (0.06 + 0.10 * near) * patches + (0.03 + 0.09 * near) * blades - 0.10 * near
    dry = canvas.plan.uniform(0.1, 0.5)
    green = mix(rgb(0.29, 0.49, 0.15), rgb(0.27, 0.43, 0.13), near[..., None])
    albedo = mix(green, rgb(0.52, 0.52, 0.22), (dry + 0.4 * meadow + 0.18 * patches).clip(0, 1)[..., None])
    colour = light.on(albedo, lit.clip(0.08, 1.2))
    colour = mix(colour, light.skyline, (0.22 * np.exp(-depth / 0.05))[..., None])
    if canvas.plan.random() < 0.3:  # flowers
        seeds = noise(canvas.texture, *shape, min(canvas.unit * 0.012, 5), octaves=1)
        bloom = rgb(*((0.95, 0.93, 0.86), (0.95, 0.83, 0.30), (0.80, 0.25, 0.22))[canvas.plan.integers(3)])
        bloomed = 0.85 * smoothstep(1.5, 1.9, seeds + 0.3 * meadow) * smoothstep(0.01, 0.08, depth)
        colour = mix(colour, light.on(bloom, lit), bloomed[..., None])
    canvas.put(window, np.ones(shape, bool), colour, GRASS, 0)
