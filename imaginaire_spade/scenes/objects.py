"""Where houses and trees stand. Owns the choice of their places, their shadows and the order of painting."""

import cv2
import numpy as np

from imaginaire_spade.scenes.canvas import Canvas, rgb
from imaginaire_spade.scenes.classes import GRASS, ROAD
from imaginaire_spade.scenes.house import paint_house
from imaginaire_spade.scenes.light import Light
from imaginaire_spade.scenes.trees import paint_tree


def paint_objects(canvas: Canvas, light: Light, shore: tuple[np.ndarray, np.ndarray] | None) -> None:
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
            paint_house(canvas, light, x, y, size, haze)
        else:
            paint_tree(canvas, light, x, y, size, kind, haze)


def _paint_shadows(canvas: Canvas, light: Light, objects: list[tuple[float, float, float, str]]) -> None:
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
    canvas.rgb *= 1 - amount * rgb(1.0, 0.94, 0.80)  # shadows are lit by the blue sky
