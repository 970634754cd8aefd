"""The classes of the sample scenes: their ids, names and legend colours."""

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
