"""A house. Owns its proportions and how its walls, roof, windows, door and chimney are painted."""

import numpy as np

from imaginaire_spade.scenes.canvas import lookup, mix, noise, rgb, smoothstep
from imaginaire_spade.scenes.classes import HOUSE, ROOF, WINDOW


def paint_house(canvas, light, x, y, size, haze) -> None:
    """A gabled house around (x, y): a front, a receding side, a roof slope, windows, a door and a chimney."""
    rng, instance = canvas.plan, canvas.new_instance(y)
    wall = rgb(*[(0.86, 0.80, 0.68), (0.88, 0.86, 0.82), (0.80, 0.66, 0.46), (0.74, 0.56, 0.44)][rng.integers(4)])
    tile = rgb(*[(0.64, 0.28, 0.18), (0.56, 0.25, 0.17), (0.45, 0.27, 0.20), (0.40, 0.36, 0.37)][rng.integers(4)])
    turn = float(rng.choice([-1, 1]))  # the side wall is seen on this side
    front, long = size * rng.uniform(0.46, 0.62), size * rng.uniform(0.5, 0.85)
    high, gable, rise = size * rng.uniform(0.36, 0.46), size * rng.uniform(0.24, 0.34), 0.06 * long
    grain = noise(canvas.texture, 64, 64, 6, octaves=2, gain=0.8)
    left = x - turn * 0.5 * (front + long)  # the outer edge of the front

    def at(across: float, up: float, back: float = 0.0) -> tuple[float, float]:
        """Picture point: pixels along the front, above the ground and along the side wall."""
        return left + turn * (across + back), y - up - rise * back / long * (1 if up < high + 1 else 0.4)

    def rough(px, py):
        return 1 + 0.07 * lookup(grain, (px * 96 / size) + 0 * py, (py * 96 / size) + 0 * px)

    def walls(px, py):  # darker at the foot and under the eaves
        up = (y - py) / high
        return rough(px, py) * (0.84 + 0.16 * smoothstep(0, 0.25, up) - 0.13 * smoothstep(0.75, 1.0, up) + 0 * px)

    def paint(points, albedo, lit, label, shade) -> None:
        colour = mix(light.on(albedo, lit), light.skyline, haze)
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
        canvas.fill(centre + (points - centre) * 1.35, mix(light.on(rgb(0.86, 0.84, 0.80), 0.5), light.skyline, haze),
                    HOUSE, instance)  # fmt: skip
        low, tall = points[:, 1].max(), max(float(np.ptp(points[:, 1])), 1.0)
        dark = light.on(rgb(0.14, 0.18, 0.25), 0.4)
        glass = mix(dark, light.zenith, 0.30) if light.name != "sunset" else mix(dark, rgb(1.0, 0.72, 0.35), 0.35)

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
                  rgb(0.36, 0.22, 0.14), side_lit, HOUSE, rough)  # fmt: skip
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
        paint(box, rgb(0.52, 0.33, 0.26), 0.45, HOUSE, stack)
    paint([ridge, far_ridge, far_eaves, eaves], tile, slope_lit, ROOF, tiles)
    verge = max(0.05 * size, 1.5)  # the roof's edge over the gable
    outer = at(-0.05 * front, high - 0.1 * gable)
    down = np.array([0.0, verge])
    peak = np.array(ridge)
    paint([peak, eaves, eaves + down, peak + 1.4 * down, outer + down, outer], 0.85 * tile, front_lit, ROOF, rough)
