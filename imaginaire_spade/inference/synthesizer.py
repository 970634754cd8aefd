"""Generate images from label maps in Python: ``Synthesizer.load("model.pt")(label_map, seed=0)``.

Responsible for what a caller's label map, edges and style may be. ``synthesis`` owns how a label map goes through the
generator, ``sizes`` at which size.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from imaginaire_spade.config import ImageSpec
from imaginaire_spade.data.conditions import cut_conditions
from imaginaire_spade.data.label_files import read_labels
from imaginaire_spade.data.transforms import Geometry, apply_to_map
from imaginaire_spade.distributed import ProcessInfo, choose_device
from imaginaire_spade.errors import CheckpointError, ConfigError, DataError, LabelError
from imaginaire_spade.files import AnyImage
from imaginaire_spade.inference.local_noise import KINDS, LocalNoise, NoiseKind, check_takes_local_noise, read_parts
from imaginaire_spade.inference.model import Model, find_checkpoint
from imaginaire_spade.inference.sizes import Size, SizeRule, format_size, read_size
from imaginaire_spade.inference.synthesis import (
    EVERY_LABEL_MAP,
    Request,
    encode_style,
    read_style_image,
    style_of_seed,
    synthesise,
)
from imaginaire_spade.labels import MAX_RAW_ID, MIN_RAW_ID, LabelSpec, edges_from_ids
from imaginaire_spade.models.norms import ConditionalNorm

ImageLike = Image.Image | NDArray[Any]
MODES = ("1", "L", "P", "RGB", "I", "I;16")
"""Of PIL images of ids or colours. Of P the indices count, as in files."""
WHERE = "the label map"


class Synthesizer:
    """A trained generator as a function of label maps.

    The image of a label map is that of ``inference.py --style_seed SEED`` (or ``--style_image``), ``--size`` and
    ``--resize_back``.

    Args:
        model: what ``Model.load`` gives.
        size: at which label maps are generated: "trained" (the size of the training images), "own" (the label map's),
            or (height, width) or "HEIGHTxWIDTH". None: "trained" if a side of the label map differs from it by a factor
            of more than 1.5 (the first such label map causes a warning, as its image has another size), else "own".
            Any size can be generated; at one far from the trained, objects come out wrong.
        resize_back: resize images to the label map's own size (bicubic; areas averaged when shrinking).

    Attributes:
        labels: the checkpoint's label table: ``names``, ``palette``, ``num_classes``, ``colourise``.
        size: (height, width) of the images it was trained on; None: they were of many sizes.
        has_style_encoder: whether ``style`` may be an image.
        style_dims: length of a style code; 0: the generator takes none, and a label map has one image.
        wants_edges: whether the generator sees object borders besides labels.
        dense: ``data.conditions``: the dense conditions that it sees besides, each with name, channels and range.
        sizes: the rule of ``size``: (height, width) of a label map -> that at which it is generated.
        model: what was loaded (generator, encoder, config, ``notes`` for the user).
    """

    def __init__(self, model: Model, *, size: str | tuple[int, int] | None = None, resize_back: bool = False) -> None:
        self.model = model
        self.labels: LabelSpec = model.config.data.labels
        self.size = model.trained_size
        self.sizes = SizeRule(read_size(size, "size"), self.size)
        self.resize_back = resize_back
        self._warned_of_size = False
        self.has_style_encoder = model.encoder is not None
        self.style_dims = model.generator.style_dims
        self.wants_edges = model.layout_spec.has_edges
        self.dense = model.config.data.conditions

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        weights: Literal["ema", "raw"] = "ema",
        device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        size: str | tuple[int, int] | None = None,
        resize_back: bool = False,
    ) -> Synthesizer:
        """Load the generator of a checkpoint file, or of the newest one in a folder or log dir.

        Args:
            checkpoint: or ``hf://USER/REPO[/FILE]``, on the Hugging Face Hub.
            weights: "ema" (moving average, if the checkpoint has one) or "raw".
            device: "auto" (a GPU if there is one), "cpu", "cuda" or "mps".
            precision: arithmetic of the convolutions.
            size, resize_back: as above.
        Raises:
            CheckpointError: absent, damaged, foreign, or not of the architecture its config describes.
            ConfigError: no such size.
        """
        path = find_checkpoint(Path(checkpoint), None, None)
        where = choose_device(device, ProcessInfo())
        model = Model.load(path, weights=weights, device=where, precision=precision)
        return cls(model, size=size, resize_back=resize_back)

    def __call__(
        self,
        label_map: Any = None,
        *,
        seed: int = 0,
        style: ImageLike | str | Path | None = None,
        noise: NoiseKind = "image",
        anew: Mapping[str | int | tuple[int, int], int] | None = None,
        edges: ImageLike | None = None,
        instances: ImageLike | None = None,
        conditions: Mapping[str, ImageLike] | None = None,
        size: str | tuple[int, int] | None = None,
        resize_back: bool | None = None,
    ) -> Any:
        """Generate the image of one label map, or of several.

        Args:
            label_map: ids as the data set stores them, integer [H, W] or a PIL image of mode L, P, I or I;16; or
                colours of the table's palette, uint8 [H, W, 3] or a PIL image of mode RGB; or the file of either; or
                soft, float [C, H, W]: the share 0..1 of each class in each pixel, don't-care last where the table has
                it. Arrays may be tensors. None for a generator that was trained without label maps. Several: a list,
                or a batch [N, ...] of arrays of one size.
            seed: of the style code, if ``style`` is not given.
            style: an image (array uint8 [H, W, 3], PIL, or its file), whose style is taken, or a style code, float
                [style_dims].
            noise: for generators that take noise in parts of an image (OASIS): what has a noise vector of its own, the
                "image", each "class", each connected "region" of one class, or each "pixel".
            anew: for those too, parts of the image that get the noise of another seed, while the rest keeps its own:
                ``{"sky": 7, (120, 40): 8}``. A part is a class, by name or train id, or the region (with noise by
                class: the class) of a pixel (x, y) of the label map.
            edges: [H, W], not 0 where objects meet; only for a generator that wants edges. Without it they are drawn
                from ``instances``, and without these from the label map.
            instances: object ids, integer [H, W], from whose borders edges are drawn.
            conditions: name -> [H, W] or [H, W, C], of each of ``data.conditions``, with values as in its files.
            size, resize_back: as above, for this image; None: as the synthesizer was made.
        Returns:
            The kind that was given: a PIL image (RGB, of a file too), or uint8 [H, W, 3], of the size at which it was
            generated, or the label map's with ``resize_back``; of a list a list, of a batch a batch [N, ...]. If
            ``data.images`` says otherwise: [H, W, C] ([H, W] of one channel) in the values and the dtype of the data's
            files; a PIL image only if they are 8-bit grey or RGB.
        Raises:
            LabelError: values or colours that are not in the table.
            DataError: an array or image of the wrong kind.
            ConfigError: edges or conditions for a generator that takes none, or none for one that takes them; no such
                size or seed.
            CheckpointError: a style for a generator that takes none.
        """
        if not isinstance(seed, int | np.integer):
            raise ConfigError(f"seed: {seed!r}; give a whole number")
        conditions = dict(conditions or {})
        if isinstance(label_map, list | tuple) or _is_batch(label_map):
            if edges is not None or instances is not None or conditions:
                raise ConfigError("edges, instances and conditions belong to one label map: give these one by one")
            if not len(label_map):
                raise DataError("the label map: an empty list or batch; give at least one label map")
            same: dict[str, Any] = {"style": style, "noise": noise, "anew": anew, "resize_back": resize_back}
            made = [self(one, seed=seed, size=size, **same) for one in label_map]
            return made if isinstance(label_map, list | tuple) else np.stack(made)
        if is_file := isinstance(label_map, str | Path):
            label_map = self._read(Path(label_map))
        if isinstance(label_map, torch.Tensor) and not label_map.is_floating_point():
            label_map = label_map.cpu().numpy()
        shares = None
        if label_map is None or not self.labels.num_classes:
            train_ids = self._without_labels(label_map, [edges, instances, *conditions.values()])
        elif isinstance(label_map, torch.Tensor) or _is_soft(label_map):
            shares = self._shares(label_map)
            train_ids = shares.argmax(0).astype(self.labels.dtype)
        else:
            train_ids = self.train_ids(label_map)
        rule = self.sizes if size is None else SizeRule(read_size(size, "size"), self.size)
        resize_back = self.resize_back if resize_back is None else resize_back
        own = (train_ids.shape[0], train_ids.shape[1])
        geometry = Geometry.whole(own, rule(own))
        at = geometry.height, geometry.width
        if rule.asked is None and not resize_back and at != own and not self._warned_of_size:
            self._warned_of_size = True
            warnings.warn(
                f"the label map is {format_size(own)} (height x width); its image is generated at {format_size(at)},"
                " the size this generator was trained at, and has that size. Write resize_back=True to have it resized"
                ' to the label map\'s own size, size="own" to generate at that, size="trained" to keep it so (said'
                " once)",
                stacklevel=2,
            )
        request = Request(
            WHERE,
            torch.from_numpy(apply_to_map(train_ids, geometry)),
            self._edges(train_ids, edges, instances, geometry),
            self._noise(self._style(style, seed), style is not None, seed, noise, anew or {}, own, at),
            resize_to=own if resize_back else None,
            conditions=self._conditions(conditions, own, geometry),
            soft=None if shares is None else torch.stack([torch.from_numpy(apply_to_map(s, geometry)) for s in shares]),
        )
        image: AnyImage = next(iter(synthesise(self.model, [request])))[1]
        image = image[..., 0] if image.shape[2] == 1 else image
        is_picture = image.dtype == np.uint8 and image.shape[2:] in ((), (3,))
        first = next((given for given in (label_map, edges, *conditions.values()) if given is not None), None)
        return Image.fromarray(image) if is_picture and (is_file or isinstance(first, Image.Image)) else image

    def train_ids(self, label_map: ImageLike) -> NDArray[np.generic]:
        """Convert a label map of any accepted kind to train ids, uint8 or int16 [H, W].

        Raises:
            LabelError: values or colours that are not in the table.
            DataError: an array or image of the wrong kind.
        """
        raw = _to_array(label_map, WHERE)
        if raw.ndim == 2 and raw.dtype != np.uint8 and not MIN_RAW_ID <= raw.min() <= raw.max() <= MAX_RAW_ID:
            raise LabelError(f"{WHERE}: label values {raw.min()}..{raw.max()}; ids are {MIN_RAW_ID}..{MAX_RAW_ID}")
        return self.labels.to_train_ids(raw, WHERE)

    def encode(self, image: ImageLike | str | Path) -> NDArray[np.float32]:
        """Encode the style of an image, float32 [style_dims]: to mix, to store, to pass as ``style``.

        Raises:
            CheckpointError: trained without an encoder.
            DataError: no image.
        """
        spec = self.model.config.data.images
        if isinstance(image, str | Path):
            array = read_style_image(self.model, Path(image))
        else:
            is_rgb = isinstance(image, Image.Image) and spec == ImageSpec()
            array = np.asarray(image.convert("RGB") if is_rgb else image)  # type: ignore[union-attr]
        array = array[..., None] if array.ndim == 2 else array
        wrong_type = array.dtype != np.uint8 if spec.range is None else array.dtype.kind not in "uif"
        if wrong_type or array.ndim != 3 or array.shape[2] != spec.channels or not array.size:
            wanted = "uint8 [H, W, 3], RGB" if spec == ImageSpec() else f"{spec.dtype} [H, W, {spec.channels}]"
            raise DataError(f"style: an array of {array.dtype} {list(array.shape)}; give {wanted}")
        code: NDArray[np.float32] = encode_style(self.model, array)[0].numpy()
        return code

    def _read(self, path: Path) -> NDArray[np.generic]:
        try:
            return read_labels(path.read_bytes(), str(path), self.labels)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from None

    def _style(self, style: ImageLike | str | Path | None, seed: int) -> torch.Tensor | None:
        if style is None:
            return style_of_seed(seed, self.style_dims) if self.style_dims else None
        if isinstance(style, np.ndarray) and style.ndim == 1:
            if not self.style_dims:
                raise CheckpointError("style: this generator takes no style code; leave it out")
            if style.shape != (self.style_dims,):
                raise DataError(f"style: a code of {len(style)} numbers; this generator takes {self.style_dims}")
            if not np.isfinite(style).all():
                raise DataError("style: a code with numbers that are not finite (NaN or infinity)")
            return torch.from_numpy(style.astype(np.float32))
        return torch.from_numpy(self.encode(style))

    def _noise(
        self, code: torch.Tensor | None, has_style: bool, seed: int, kind: NoiseKind, anew: Mapping[Any, int],
        own: Size, at: Size,
    ) -> torch.Tensor | LocalNoise | None:  # fmt: skip
        """Return the style code, or noise that differs from place to place, if such is wanted."""
        if kind not in KINDS:
            raise ConfigError(f"noise {kind!r}: write one of {', '.join(KINDS)}")
        if kind == "image" and not anew:
            return code
        what = "anew" if kind == "image" else f"noise {kind!r}"
        check_takes_local_noise(self.model, what)
        if has_style and kind != "image":
            raise ConfigError(
                f"{what}: every vector is drawn from the seed, so there is no place for style: leave it out"
            )
        parts = read_parts(self.labels, anew)
        noise = LocalNoise(kind, self.style_dims, seed, EVERY_LABEL_MAP, code if kind == "image" else None, parts)
        return noise.at(own, at, WHERE)

    def _without_labels(self, label_map: object, others: Sequence[ImageLike | None]) -> NDArray[np.generic]:
        """Return ids of no class, [H, W] as large as the first of ``others`` that is given."""
        if self.labels.num_classes:
            raise ConfigError(f"{WHERE}: None; this generator was trained with label maps: give one")
        sizes = [np.asarray(given).shape[:2] for given in others if given is not None]
        if label_map is not None or not sizes:
            needed = ["edges"] * self.wants_edges + [f"conditions={{{c.name!r}: ...}}" for c in self.dense]
            raise ConfigError(f"{WHERE}: this generator was trained without label maps: give {', '.join(needed)} alone")
        return np.zeros(sizes[0], self.labels.dtype)

    def _shares(self, given: ImageLike | torch.Tensor) -> NDArray[np.float32]:
        """Return a soft label map, float32 [label channels, H, W]."""
        array = given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else np.asarray(given)
        channels, classes = self.model.layout_spec.num_label_channels, self.labels.num_classes
        if array.dtype.kind != "f" or array.ndim != 3 or array.shape[0] not in (channels, classes) or not array.size:
            wanted = f"{classes}" + (f" or {channels} (don't care last)" if channels > classes else "")
            raise DataError(
                f"{WHERE}: {array.dtype} {list(array.shape)}; a soft label map is float [C, H, W] with C = {wanted}"
            )
        if not 0 <= array.min() <= array.max() <= 1:  # NaN too
            raise DataError(f"{WHERE}: values {array.min():g}..{array.max():g}; a soft label map has shares, 0..1")
        if any(isinstance(norm, ConditionalNorm) and norm.needs_classes for norm in self.model.generator.modules()):
            raise ConfigError(f"{WHERE}: this generator (gen.norm: clade) takes one class per pixel; give their ids")
        missing = np.zeros((channels - len(array), *array.shape[1:]), np.float32)
        return np.concatenate([array.astype(np.float32), missing])

    def _conditions(self, given: Mapping[str, ImageLike], size: Size, geometry: Geometry) -> torch.Tensor | None:
        names = [condition.name for condition in self.dense]
        if set(given) != set(names):
            wanted = ", ".join(names) or "none"
            raise ConfigError(f"conditions: {', '.join(given) or 'none'} given; this generator takes {wanted}")

        def read(name: str) -> tuple[NDArray[Any], str]:
            array, where = np.asarray(given[name]), f"conditions[{name!r}]"
            if array.shape[:2] != size:
                raise DataError(f"{where} {list(array.shape[:2])} and the other inputs {list(size)} differ in size")
            return array, where

        return cut_conditions(self.dense, read, geometry)

    def _edges(
        self, train_ids: NDArray[np.generic], edges: ImageLike | None, instances: ImageLike | None, geometry: Geometry
    ) -> torch.Tensor | None:
        name, given = ("instances", instances) if edges is None else ("edges", edges)
        if given is not None and not self.wants_edges:
            raise ConfigError(f"{name}: this generator takes label maps alone (data.edges: none); leave {name} out")
        if edges is not None and instances is not None:
            raise ConfigError("edges and instances are both given: edges are drawn from instances; leave one out")
        if not self.wants_edges:
            return None
        if given is None and not self.labels.num_classes:
            raise ConfigError("edges: this generator was trained without label maps, from edges: give them")
        ids = train_ids if given is None else _to_array(given, name)
        if ids.shape != train_ids.shape:
            raise DataError(f"{name} {list(ids.shape)} and the label map {list(train_ids.shape)} differ in size")
        cut = apply_to_map(ids, geometry)
        return torch.from_numpy((cut != 0).astype(np.uint8) if edges is not None else edges_from_ids(cut))


def _is_batch(given: object) -> TypeGuard[NDArray[Any] | torch.Tensor]:
    if not isinstance(given, np.ndarray | torch.Tensor):
        return False
    is_soft = given.is_floating_point() if isinstance(given, torch.Tensor) else given.dtype.kind == "f"
    return given.ndim == 4 or (given.ndim == 3 and not is_soft and given.shape[2] > 4)


def _is_soft(given: ImageLike) -> bool:
    return isinstance(given, np.ndarray) and given.dtype.kind == "f" and given.ndim == 3


def _to_array(given: ImageLike, name: str) -> NDArray[np.generic]:
    """Return integers [H, W], or [H, W, 3] of colours.

    Raises:
        DataError: anything else was given.
    """
    if isinstance(given, Image.Image) and given.mode not in MODES:
        raise DataError(f"{name}: a PIL image of mode {given.mode}; give one of {', '.join(MODES)}")
    if not isinstance(given, Image.Image | np.ndarray):
        raise DataError(f"{name}: a {type(given).__name__}; give a numpy array, a PIL image or a file")
    array = np.asarray(given)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    if not np.issubdtype(array.dtype, np.integer) or array.ndim not in (2, 3) or not array.size:
        raise DataError(
            f"{name}: an array of {array.dtype} {list(array.shape)}; give integers [H, W], or RGB uint8 [H, W, 3]"
        )
    return array
