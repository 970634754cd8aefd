"""Trees near and far. Owns how a tree of each kind (round, conifer, poplar) and a distant wood are painted."""

import numpy as np

from imaginaire_spade.scenes.canvas import Canvas, mix, noise, rgb, smoothstep
from imaginaire_spade.scenes.classes import TREE
from imaginaire_spade.scenes.light import Light


def paint_woods(canvas: Canvas, light: Light) -> None:
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
        _paint_crown(canvas, light, blob_x, base - 0.7 * blob_r, blob_r, base.max(), rgb(0.16, 0.31, 0.12),
                     canvas.new_instance(base.max()), haze=0.28)  # fmt: skip


def _paint_crown(canvas, light, blob_x, blob_y, blob_r, base, albedo, instance, *, haze) -> None:
    """A cluster of leafy balls, lit from the sun's side. blob_*: [B] centres and radii in pixels; nothing is painted
    below `base`."""
    window = canvas.window((blob_x - 1.2 * blob_r).min(), (blob_y - 1.2 * blob_r).min(),
                           (blob_x + 1.2 * blob_r).max(), min((blob_y + 1.2 * blob_r).max(), base))  # fmt: skip
    if window is None:
        return
    x, y = canvas.x[:, window[1]], canvas.y[window[0]]
    typical = float(blob_r.mean())
    leaves = noise(canvas.texture, y.size, x.size, max(typical * 0.42, 1.5), octaves=3, gain=0.75)
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
    lit -= 0.34 * smoothstep(0.3, 1.0, (y - top_y) / max(tall, 1.0))  # the underside is dark
    colour = light.on(albedo, lit.clip(-0.12, 1.1)) + np.maximum(lit - 0.6, 0)[..., None] * rgb(0.10, 0.09, 0.0)
    canvas.put(window, mask, mix(colour, light.skyline, haze), TREE, instance)


def _paint_conifer(canvas, light, x, y, size, albedo, instance, *, haze) -> None:
    half = 0.21 * size
    window = canvas.window(x - 1.3 * half, y - size, x + 1.3 * half, y - 0.06 * size)
    if window is None:
        return
    u, t = (canvas.x[:, window[1]] - x) / half, (canvas.y[window[0]] - (y - size)) / (0.94 * size)
    needles = noise(canvas.texture, t.size, u.size, max(size * 0.05, 1.5), octaves=3, gain=0.8)
    tiers = np.mod(t * 6.5 + 0.25 * np.abs(u) + 0.12 * needles, 1.0)  # branches droop to the outside
    reach = t.clip(0) ** 0.85 * (0.66 + 0.34 * tiers) * (1 + 0.14 * needles)
    mask = (np.abs(u) < np.maximum(reach, 0.035)) & (t > 0) & (t < 1)
    across = (u / np.maximum(reach, 0.05)).clip(-1, 1)
    lit = 0.36 + 0.44 * light.contrast * light.side * across + 0.16 * needles - 0.34 * (tiers - 0.5) - 0.14 * t
    canvas.put(window, mask, mix(light.on(albedo, lit.clip(-0.1, 1.1)), light.skyline, haze), TREE, instance)


def paint_tree(canvas, light, x, y, size, kind, haze) -> None:
    """One tree whose trunk stands at (x, y); size is its height in pixels."""
    rng, instance = canvas.plan, canvas.new_instance(y)
    tone = rng.uniform(0, 1)
    thick = max(0.028 * size, 0.9)
    trunk = [(x - thick, y), (x - 0.6 * thick, y - 0.5 * size), (x + 0.6 * thick, y - 0.5 * size), (x + thick, y)]
    bark = mix(light.on(rgb(0.33, 0.24, 0.17), 0.35), light.skyline, haze)
    tilt = 0.45 * light.contrast * light.side / thick  # the trunk is lit from one side
    canvas.fill(trunk, bark, TREE, instance, lambda px, py: (1 + tilt * (px - x) + 0 * py).clip(0.5, 1.5))
    if kind == "conifer":
        green = mix(rgb(0.11, 0.27, 0.15), rgb(0.17, 0.33, 0.13), tone)
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
    green = mix(rgb(0.17, 0.35, 0.10), rgb(0.31, 0.43, 0.12), tone)
    order = np.argsort(blob_y)
    _paint_crown(canvas, light, blob_x[order], blob_y[order], size * radius[order], y - 0.1 * size, green, instance,
                 haze=haze)  # fmt: skip
