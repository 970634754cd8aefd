"""Choose the size at which a label map is generated (``--size``), and word the note to the user.

Responsible for the rule and its words alone: the data set's geometry resizes label maps, ``files.resize_image`` images.
A generator knows objects at the scale at which it has seen them: a street learned at 96x128 and generated at 360x480
has black walls and a white road.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from imaginaire_spade.errors import ConfigError

Size = tuple[int, int]
"""(height, width)."""
Asked = Literal["trained", "own"] | Size | None
"""What ``--size`` says; None: it is left out."""

SIZE_HELP = "size at which label maps are generated: the training images', their own, or HEIGHTxWIDTH, such as 256x512"
FAR = 1.5
"""Sides that differ from the trained ones by more than this factor, either way, are far from what training showed."""
SAME_ASPECT = 1.02
"""Aspect ratios that differ by less look the same."""
MAX_PIXELS = 2**24
"""4096 squared: what is larger by mistake would take all memory."""


def read_size(given: str | tuple[int, int] | None, name: str, *, max_pixels: int | None = None) -> Asked:
    """Parse a size from the command line's text or a caller's (height, width).

    Args:
        name: of the flag or argument, for messages.
        max_pixels: what --max_pixels says, where there is such a flag; None: ``MAX_PIXELS``.
    Raises:
        ConfigError: no such size, or too many pixels.
    """
    if given is None or given == "trained" or given == "own":
        return given  # type: ignore[return-value]
    text = "x".join(map(str, given)) if isinstance(given, tuple | list) else str(given)
    found = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text, re.IGNORECASE)
    size = (int(found[1]), int(found[2])) if found else (0, 0)
    if min(size) < 1:
        raise ConfigError(f"{name} {given}: write trained, own, or HEIGHTxWIDTH in pixels, such as 256x512")
    pixels, most = size[0] * size[1], max_pixels or MAX_PIXELS
    if pixels > most:
        more = f", or --max_pixels {pixels} if the memory is there" if max_pixels else ""
        raise ConfigError(
            f"{name} {format_size(size)}: {pixels:,} pixels, and an image is made in one piece: write a size of at most"
            f" {most:,} pixels{more}"
        )
    return size


def format_size(size: Size) -> str:
    """Format a size as HEIGHTxWIDTH."""
    return f"{size[0]}x{size[1]}"


@dataclass(frozen=True)
class SizeRule:
    """The rule: (height, width) of a label map -> that at which it is generated.

    Raises:
        ConfigError: the trained size is asked for, and there is none.
    """

    asked: Asked = None
    """None: the trained size for label maps that are far from it (``FAR``), all others their own."""
    trained: Size | None = None
    """(height, width) of the training images; None: they were of many sizes."""

    def __post_init__(self) -> None:
        if self.asked == "trained" and self.trained is None:
            raise ConfigError(
                "size trained: this generator was trained on images of many sizes (data.train.augmentations leaves each"
                " its own): write own, or HEIGHTxWIDTH"
            )

    @property
    def one_size(self) -> Size | None:
        """The size of every image, if the label map's own does not matter."""
        return self.trained if self.asked == "trained" else self.asked if isinstance(self.asked, tuple) else None

    def __call__(self, own: Size) -> Size:
        if self.asked is None and self.trained is not None and self.is_far(own):
            return self.trained
        return self.one_size or own

    def is_far(self, size: Size) -> bool:
        """Check whether a size is far from the trained one."""
        return self.trained is not None and any(
            max(side, trained) > FAR * min(side, trained) for side, trained in zip(size, self.trained, strict=True)
        )

    def note(self, label_maps: Mapping[Size, int], *, resize_back: bool) -> str | None:
        """Describe in one line how label maps are resized; None if they are not.

        Args:
            label_maps: own size -> how many have it.
            resize_back: whether images are resized to the label maps' own size.
        """
        total = sum(label_maps.values())
        resized = {size: number for size, number in label_maps.items() if self(size) != size}
        far = {size: number for size, number in label_maps.items() if self.is_far(size)}
        if not resized and far and self.trained is not None:
            return (
                f"{_count(far, total)} generated at their own size; this generator was trained at"
                f" {format_size(self.trained)} and has never seen such sizes (--size trained generates at that one)"
            )
        if not resized:
            return None
        target = self(next(iter(resized)))
        at_trained = "the size this generator was trained at"
        facts, hints = [f"{_count(resized, total)} generated at {format_size(target)}"], []
        if target == self.trained:
            facts[0] += f", {at_trained}"
        else:
            facts[0] += ", as --size says"
            facts += [f"{format_size(self.trained)} is {at_trained}"] if self.trained else []
        squeezed = {size: number for size, number in resized.items() if not _same_aspect(size, target)}
        if squeezed:
            some = f" of {sum(squeezed.values())} of them" if squeezed != resized else ""
            ratios = sorted({f"{size[1] / size[0]:.2f}" for size in squeezed}, key=float)
            before = ratios[0] if len(ratios) == 1 else f"{ratios[0]} to {ratios[-1]}"
            facts.append(f"the aspect ratio{some} changes, width / height {before} becomes {target[1] / target[0]:.2f}")
            if len(resized) == 1:
                hints.append(f"--size {format_size(scale(next(iter(resized)), min(target)))} keeps it")
        if self.asked is None:
            hints.append("--size own generates at their own size")
        if resize_back:
            facts.append("the images are resized back to the label maps' own size")
        else:
            hints.append("--resize_back resizes the images to the label maps' own size")
        return "; ".join(facts) + (f" ({'; '.join(hints)})" if hints else "")


def scale(size: Size, smaller_side: int) -> Size:
    """Return the size of this aspect ratio whose smaller side is ``smaller_side``."""
    factor = smaller_side / min(size)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _same_aspect(a: Size, b: Size) -> bool:
    one, other = a[0] * b[1], b[0] * a[1]
    return max(one, other) < SAME_ASPECT * min(one, other)


def _count(sizes: Mapping[Size, int], total: int) -> str:
    """Begin a sentence: ``3 of 5 label maps of 33x31 to 360x480 are``."""
    number = sum(sizes.values())
    smallest, largest = (choose(sizes, key=lambda size: size[0] * size[1]) for choose in (min, max))
    low, high = format_size(smallest), format_size(largest)
    span = low if len(sizes) == 1 else f"{len(sizes)} sizes ({low} to {high})"
    several = f"{number} of {total}" if number < total else str(number)
    return f"{several} label map{'s' * (total > 1)} of {span} {'is' if number == 1 else 'are'}"
