"""Find the images that evaluate.py scores: stored ones, or those that a checkpoint generates; with their photos."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from imaginaire_spade.build import build_split
from imaginaire_spade.config import AugmentationConfig, ImageSpec, RunConfig
from imaginaire_spade.config_files import load_data
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.photos import to_preview
from imaginaire_spade.errors import ConfigError, DataError
from imaginaire_spade.evaluation.collection import Collection, holds_statistics, load_statistics
from imaginaire_spade.evaluation.images import NOT_STORED, DatasetImages, ImageSource, Made, Samples, StoredImages
from imaginaire_spade.inference.model import Model
from imaginaire_spade.inference.sizes import Asked, SizeRule
from imaginaire_spade.inference.synthesis import Request, StyleOf, drawn_styles, synthesise
from imaginaire_spade.pretrained.feature_networks import FeatureNetwork


@dataclass(frozen=True)
class ImagesToScore:
    """Generated and real images, and what belongs to them."""

    fake: ImageSource
    real: ImageSource | Collection
    """Photos, or statistics of them."""
    photos: ImageSource | None
    """Photos of the generated images' label maps, where they are known; ``real`` itself, where it is these."""
    subject: dict[str, str]
    """What the report says of them."""
    geometry: AugmentationConfig | None = None
    """How label maps, and photos of the data set, are cut and resized; None for stored images."""


def stored_images(
    fake: Path,
    real: Path,
    *,
    reference_split: str,
    network: FeatureNetwork | None,
    num_samples: int,
    label_maps: Path | None,
    label_table: Path | None,
    images: ImageSpec | None = None,
) -> ImagesToScore:
    """Open folders or LMDBs of generated and of real images.

    Args:
        real: or statistics, which must be of ``reference_split`` and ``network``.
        label_maps, label_table: the label maps of the generated images and a config with their table (and
            ``data.suffixes``); both or neither.
        images: what the numbers in all files mean; None: 8-bit pictures.
    Raises:
        DataError: nothing there, or an image without a label map.
        ConfigError: no label table.
    """
    maps = None
    if label_maps is not None:
        assert label_table is not None
        data = load_data(label_table)
        maps = LabelMapDataset(label_maps, data.labels, with_images=False, suffixes=data.suffixes)
    made = StoredImages(fake, num_samples, maps, images)
    if maps is not None and (missing := sorted(set(made.keys) - set(maps.keys))):
        raise DataError(
            f"{label_maps}: no label map for {len(missing)} of the {len(made.keys)} images of {fake}, such as"
            f" {missing[0]}: files are joined by name"
        )
    opened = _open_real(real, reference_split, network, maps, images)
    photos = opened if isinstance(opened, ImageSource) else None
    return ImagesToScore(made, opened, photos, {"real": str(real), "fake": str(fake)})


def _open_real(
    path: Path,
    split: str,
    network: FeatureNetwork | None,
    label_maps: LabelMapDataset | None = None,
    images: ImageSpec | None = None,
) -> ImageSource | Collection:
    if not holds_statistics(path):
        return StoredImages(path, label_maps=label_maps, images=images)
    assert network is not None, "statistics serve fid only"
    return load_statistics(path, network, split)


def checkpoint_images(
    path: Path,
    model: Model,
    given: RunConfig | None = None,
    *,
    size: Asked = None,
    real: Path | None,
    reference_split: str,
    network: FeatureNetwork | None = None,
    num_samples: int,
    seed: int | None,
    batch_size: int,
    with_photos: bool,
) -> ImagesToScore:
    """Prepare the images of data.val that a checkpoint generates when they are asked for.

    Args:
        path, model, given: the checkpoint and the config whose data is used, as ``load_named`` returns them.
        size: at which images are generated, and photos of the data compared; None: through the geometry of data.val.
        real: photos, or statistics of ``reference_split`` and ``network``; None: the photos of the data, of
            ``reference_split``.
        seed: of the style codes; None: the config's.
        with_photos: whether the photos of data.val are needed, whatever ``real`` is.
    Raises:
        ConfigError, DataError: what is named does not fit.
    """
    # The label maps.
    config, style_dims = model.config, model.generator.style_dims
    data = (given or config).data
    if data.val is None:
        where = "--config" if given else path
        raise ConfigError(f"{where}: no data.val to evaluate on: write data: {{val: {{roots: [DIR]}}}}")
    if config.data.images.channels not in (1, 3):
        raise ConfigError(
            f"{path}: its images have {config.data.images.channels} channels (data.images.channels), and scores are by"
            " networks that take RGB (or grey): they have no scores"
        )
    if num_samples > 1 and not style_dims:
        raise ConfigError(
            f"--num_samples {num_samples}: this generator takes no style code, so that the samples of a label map are"
            " equal: leave the flag out"
        )
    val = data.val
    if size is not None:
        resize_to = SizeRule(size, model.trained_size).one_size
        val = val.model_copy(update={"augmentations": AugmentationConfig(resize_h_w=resize_to)})
    maps, of_val = build_split(config, val, with_images=False), ", ".join(val.roots)
    # Their images.
    seed = config.seed if seed is None else seed
    make = partial(_generate, model, drawn_styles(seed, style_dims, num_samples), num_samples, batch_size)
    fake = DatasetImages(maps, str(path), make, format=NOT_STORED, num_samples=num_samples)
    subject = {
        "real": str(real), "fake": str(path),
        "weights": f"{model.weights} after {model.images_seen} images", "style_seed": str(seed), "label_maps": of_val,
    }  # fmt: skip
    # Photos: of the data through the same geometry, so that real and generated images are of one size.
    photos: ImageSource | None = None
    if real is not None:
        compared = _open_real(real, reference_split, network)
    else:
        roots = data.train.roots if reference_split == "train" else val.roots
        compared = DatasetImages(build_split(config, val.model_copy(update={"roots": roots})), ", ".join(roots))
        subject["real"] = compared.name
        photos = compared if reference_split == "val" else None
    if photos is None and with_photos:
        photos = DatasetImages(build_split(config, val), of_val)
    return ImagesToScore(fake, compared, photos, subject, val.augmentations)


def _generate(model: Model, style_of: StyleOf, num_samples: int, batch_size: int, samples: Samples) -> Made:
    """Generate the images of label maps: the pixels that inference.py writes."""
    asked: dict[str, tuple[int, int]] = {}

    def requests() -> Iterator[Request]:
        for index, sample in samples:
            for j in range(num_samples):
                name = f"{sample.key}#{j}"
                asked[name] = index, j
                z = style_of(sample.key, j)
                yield Request(name, sample.labels, sample.edges, z, sample.distances, conditions=sample.conditions)

    for name, image in synthesise(model, requests(), batch_size, convert=to_preview):
        yield *asked.pop(name), torch.from_numpy(image).permute(2, 0, 1)
