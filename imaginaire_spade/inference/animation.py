"""Write images of one size as an animated GIF or an MP4 that plays forwards and backwards."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from imaginaire_spade.errors import UserError
from imaginaire_spade.files import RgbImage, write_bytes

FRAMES_PER_SECOND = 10


def write_animation(path: Path, frames: Sequence[RgbImage]) -> None:
    """Write ``frames`` and their way back as GIF or MP4, by suffix; complete or not at all.

    An MP4 of odd height or width repeats the last row or column, for its codec.

    Raises:
        UserError: it cannot be written.
    """
    encode = _encode_gif if path.suffix == ".gif" else _encode_mp4
    write_bytes(path, encode([*frames, *frames[-2:0:-1]]))


def check_animation(suffix: str) -> None:
    """Check that files of this suffix can be made here.

    Raises:
        UserError: they cannot.
    """
    if suffix == ".mp4":
        _encode_mp4([np.zeros((64, 64, 3), np.uint8)] * 2)


def _encode_gif(frames: Sequence[RgbImage]) -> bytes:
    first, *others = (Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE) for frame in frames)
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=others, duration=1000 // FRAMES_PER_SECOND, loop=0)
    return file.getvalue()


def _encode_mp4(frames: Sequence[RgbImage]) -> bytes:
    height, width = frames[0].shape[:2]
    to_even = ((0, height % 2), (0, width % 2), (0, 0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "animation.mp4")
        video = cv2.VideoWriter(
            str(path), cv2.VideoWriter.fourcc(*"mp4v"), FRAMES_PER_SECOND, (width + width % 2, height + height % 2)
        )
        for frame in frames:
            video.write(np.ascontiguousarray(np.pad(frame, to_even, "edge")[..., ::-1]))
        video.release()
        if not path.is_file() or not path.stat().st_size:
            raise UserError("--animation mp4: this build of OpenCV writes no MP4; write --animation gif")
        return path.read_bytes()
