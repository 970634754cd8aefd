"""Procedural landscapes with exact label, instance and edge maps: a data set that needs no download.

Owns the painter (`draw_scene`) and the writer of a sample data set (`write_sample_data`). numpy and OpenCV
only; every picture is a function of (seed, index, height, width), without global state.

How a picture is made: layers are painted one over the other on a canvas. Each layer has one mask, which paints
the colour and writes the class and instance ids, so that picture and labels agree. The light (time of day,
side of the sun) is one object read by every layer.
"""

from imaginaire_spade.scenes.classes import (
    CLASSES,
    CLOUD,
    GRASS,
    HOUSE,
    MOUNTAIN,
    ROAD,
    ROOF,
    SKY,
    SUN,
    TREE,
    WATER,
    WINDOW,
)
from imaginaire_spade.scenes.files import write_sample_data
from imaginaire_spade.scenes.scene import Scene, draw_scene, edge_map

__all__ = [
    "CLASSES",
    "CLOUD",
    "GRASS",
    "HOUSE",
    "MOUNTAIN",
    "ROAD",
    "ROOF",
    "SKY",
    "SUN",
    "TREE",
    "WATER",
    "WINDOW",
    "Scene",
    "draw_scene",
    "edge_map",
    "write_sample_data",
]
