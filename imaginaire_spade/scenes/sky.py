"""The sky, the sun and the clouds. Owns how they are painted."""

import cv2
import numpy as np

from imaginaire_spade.scenes.canvas import Canvas, mix, noise, rgb, smoothstep
from imaginaire_spade.scenes.classes import CLOUD, SUN
from imaginaire_spade.scenes.light import Light


def paint_sky(canvas: Canvas, light: Light) -> None:
    fall = np.clip(canvas.y / canvas.horizon, 0, 1) ** (1.6 if light.name == "sunset" else 1.1)
    haze = noise(canvas.texture, canvas.height // 2, canvas.width // 2, canvas.unit * 0.08, octaves=3, stretch=4)
    haze = cv2.resize(haze, (canvas.width, canvas.height))
    canvas.rgb[:] = mix(light.zenith, light.skyline, (fall + 0.05 * haze).clip(0, 1)[..., None])
    if light.sun is None:
        return
    x, y, radius = light.sun
    distance = np.sqrt((canvas.x - x) ** 2 + (canvas.y - y) ** 2) / radius
    warm = rgb(1.0, 0.95, 0.80) if light.name == "noon" else rgb(1.0, 0.80, 0.45)
    glow = 0.75 * np.exp(-np.maximum(distance - 1, 0) / 1.1) + 0.35 * np.exp(-distance / 7)
    canvas.rgb[:] = mix(canvas.rgb, warm, np.minimum(glow, 0.92)[..., None])
    disc = distance < 1
    centre = mix(warm, rgb(1.0, 1.0, 0.94), (1 - 0.55 * distance.clip(0, 1) ** 2)[..., None])
    canvas.put((slice(None), slice(None)), disc, centre, SUN, canvas.new_instance())


def paint_clouds(canvas: Canvas, light: Light) -> None:
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
        rough = noise(canvas.texture, v.size, u.size, max(half_h * 0.55, 2), octaves=5, gain=0.55, stretch=1.3)
        density = np.full((v.size, u.size), -1.0, np.float32)
        for cx, cy, r in zip(blob_x.tolist(), blob_y.tolist(), blob_r.tolist(), strict=True):
            np.maximum(density, 1 - (((u - cx) * 1.3 / r) ** 2 + ((v - cy) / r) ** 2), out=density)
        density += 0.34 * rough - 1.6 * np.maximum(v - 0.35, 0)  # a ragged top over a flat base
        alpha = smoothstep(-0.12, 0.42, density)
        # lit where the cloud gets thinner towards the sun
        shift = np.array([[1, 0, -light.side * half_h * 0.3], [0, 1, half_h * 0.38]], np.float32)
        towards_sun = cv2.warpAffine(density, shift, (u.size, v.size), borderMode=cv2.BORDER_REPLICATE)
        lit = (0.62 - 0.34 * v + 0.3 * (density - towards_sun) + 0.10 * rough).clip(0, 1)
        if light.name == "noon":
            dark, bright = rgb(0.62, 0.69, 0.78), rgb(1.0, 0.99, 0.97)
        elif light.name == "sunset":
            dark, bright = rgb(0.56, 0.45, 0.55), rgb(1.0, 0.82, 0.64)
        else:
            dark, bright = rgb(0.53, 0.57, 0.62), rgb(0.88, 0.90, 0.91)
        colour = mix(mix(dark, bright, lit[..., None]), light.skyline, 0.25 * place)
        canvas.rgb[window] = mix(canvas.rgb[window], colour, (0.97 * alpha)[..., None])
        mask = alpha > 0.4
        canvas.labels[window][mask] = CLOUD
        canvas.instances[window][mask] = canvas.new_instance()
