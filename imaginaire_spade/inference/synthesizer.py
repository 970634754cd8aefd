"""Label maps -> pictures, in Python: ``Synthesizer.load("model.pt")(label_map, seed=0)``.

Owns what a caller's label map, edges and style may be. How a label map goes through the generator, sizes included, is
``synthesis``'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from imaginaire_spade.build import layout_spec
from imaginaire_spade.data.transforms import edges_from_ids
from imaginaire_spade.distributed import ProcessInfo, choose_device
from imaginaire_spade.errors import CheckpointError, ConfigError, DataError, LabelError
from imaginaire_spade.inference.style import encode_style, read_style_picture, style_of_seed
from imaginaire_spade.inference.synthesis import Request, synthesise
from imaginaire_spade.inference.weights import LoadedModel, find_checkpoint, load_generator
from imaginaire_spade.labels import MAX_RAW_ID, LabelSpec
from imaginaire_spade.pictures import Picture

ImageLike = Image.Image | NDArray[Any]
MODES = ("1", "L", "P", "RGB", "I", "I;16")
"""Of PIL pictures of ids or colours. Of P the indices count, as in files."""
WHERE = "the label map"


class Synthesizer:
    """A trained generator as a function of label maps.

    The picture of a label map is that of ``inference.py --style_seed SEED`` (or ``--style_image``): of the label map's
    own size, which may be any (it is filled up with don't-care to a multiple of the generator's, and cut off again).

    Attributes:
        labels: the checkpoint's label table: ``names``, ``palette``, ``num_classes``, ``colourise``.
        size: (height, width) of the pictures it was trained on, None where they were of many sizes.
        has_style_encoder: whether ``style`` may be a picture.
        style_dims: length of a style code; 0: the generator takes none, and a label map has one picture.
        wants_edges: whether the generator sees object borders besides labels.
        model: what was loaded (generator, encoder, config, ``notes`` for the user).
    """

    def __init__(self, model: LoadedModel) -> None:
        config = model.config
        self.model = model
        self.labels: LabelSpec = config.data.labels
        self.size = config.data.train.augmentations.output_h_w
        self.has_style_encoder = model.encoder is not None
        self.style_dims = model.style_dims
        self.wants_edges = layout_spec(config).has_edges

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        weights: Literal["ema", "raw"] = "ema",
        device: Literal["auto", "cpu", "cuda"] = "auto",
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    ) -> Synthesizer:
        """The generator of a checkpoint file, or of the newest one in a folder or log dir.

        Args:
            weights: "ema" (moving average, where the checkpoint has one) or "raw".
            device: "auto" (a GPU where there is one), "cpu" or "cuda".
            precision: arithmetic of the convolutions.
        Raises:
            CheckpointError: absent, damaged, foreign, or not of the architecture its config describes.
        """
        path = find_checkpoint(Path(checkpoint), None, None)
        where = choose_device(device, ProcessInfo())
        return cls(load_generator(path, weights=weights, device=where, precision=precision, frozen=True))

    def __call__(
        self,
        label_map: ImageLike,
        *,
        seed: int = 0,
        style: ImageLike | str | Path | None = None,
        edges: ImageLike | None = None,
        instances: ImageLike | None = None,
    ) -> Any:
        """The picture of one label map.

        Args:
            label_map: ids as the data set stores them, integer [H, W] or a PIL picture of mode L, P, I or I;16; or
                colours of the table's palette, uint8 [H, W, 3] or a PIL picture of mode RGB.
            seed: of the style code, where ``style`` is not given.
            style: a picture (array uint8 [H, W, 3], PIL, or its file), whose style is taken, or a style code, float
                [style_dims].
            edges: [H, W], not 0 where objects meet; only for a generator that wants edges. Without it they are drawn
                from ``instances``, and without these from the label map.
            instances: object ids, integer [H, W], from whose borders edges are drawn.
        Returns:
            The kind that was given: a PIL picture (RGB), or uint8 [H, W, 3].
        Raises:
            LabelError: values or colours that are not in the table; DataError: an array or picture of the wrong kind;
            ConfigError: edges for a generator that takes none; CheckpointError: a style for one that takes none.
        """
        train_ids = self.train_ids(label_map)
        request = Request(
            WHERE, torch.from_numpy(train_ids), self._edges(train_ids, edges, instances), self._style(style, seed)
        )
        picture: Picture = next(iter(synthesise(self.model, [request])))[1]
        return Image.fromarray(picture) if isinstance(label_map, Image.Image) else picture

    def train_ids(self, label_map: ImageLike) -> NDArray[np.generic]:
        """A label map of any accepted kind -> train ids uint8 or int16 [H, W]. Raises LabelError, DataError."""
        raw = _array(label_map, WHERE)
        if raw.ndim == 2 and raw.dtype != np.uint8 and not 0 <= raw.min() <= raw.max() <= MAX_RAW_ID:
            raise LabelError(f"{WHERE}: label values {raw.min()}..{raw.max()}; ids are 0..{MAX_RAW_ID}")
        return self.labels.to_train_ids(raw, WHERE)

    def encode(self, picture: ImageLike | str | Path) -> NDArray[np.float32]:
        """The style code of a picture, float32 [style_dims]: to mix, to keep, to give as ``style``.

        Raises:
            CheckpointError: trained without an encoder. DataError: no picture.
        """
        if isinstance(picture, str | Path):
            array = read_style_picture(Path(picture))
        else:
            array = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
            raise DataError(f"style: an array of {array.dtype} {list(array.shape)}; give uint8 [H, W, 3], RGB")
        code: NDArray[np.float32] = encode_style(self.model, array)[0].numpy()
        return code

    def _style(self, style: ImageLike | str | Path | None, seed: int) -> torch.Tensor | None:
        if style is None:
            return style_of_seed(seed, self.style_dims) if self.style_dims else None
        if isinstance(style, np.ndarray) and style.ndim == 1:
            if not self.style_dims:
                raise CheckpointError("style: this generator takes no style code; leave it out")
            if style.shape != (self.style_dims,):
                raise DataError(f"style: a code of {len(style)} numbers; this generator takes {self.style_dims}")
            return torch.from_numpy(style.astype(np.float32))
        return torch.from_numpy(self.encode(style))

    def _edges(
        self, train_ids: NDArray[np.generic], edges: ImageLike | None, instances: ImageLike | None
    ) -> torch.Tensor | None:
        given = instances if edges is None else edges
        name = "instances" if edges is None else "edges"
        if given is not None and not self.wants_edges:
            raise ConfigError(f"{name}: this generator takes label maps alone (data.edges: none); leave {name} out")
        if edges is not None and instances is not None:
            raise ConfigError("edges and instances are both given: edges are drawn from instances; leave one out")
        if not self.wants_edges:
            return None
        ids = train_ids if given is None else _array(given, name)
        if ids.shape != train_ids.shape:
            raise DataError(f"{name} {list(ids.shape)} and the label map {list(train_ids.shape)} differ in size")
        return torch.from_numpy((ids != 0).astype(np.uint8) if edges is not None else edges_from_ids(ids))


def _array(given: ImageLike, name: str) -> NDArray[np.generic]:
    """Integers [H, W], or [H, W, 3] of colours. Raises DataError."""
    if isinstance(given, Image.Image) and given.mode not in MODES:
        raise DataError(f"{name}: a PIL picture of mode {given.mode}; give one of {', '.join(MODES)}")
    if not isinstance(given, Image.Image | np.ndarray):
        raise DataError(f"{name}: a {type(given).__name__}; give a numpy array or a PIL picture")
    array = np.asarray(given)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    if not np.issubdtype(array.dtype, np.integer) or array.ndim not in (2, 3) or not array.size:
        raise DataError(
            f"{name}: an array of {array.dtype} {list(array.shape)}; give integers [H, W], or RGB uint8 [H, W, 3]"
        )
    return array
