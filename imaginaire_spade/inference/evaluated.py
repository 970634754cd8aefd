"""Collect what evaluate.py scores: stored or generated images, with their photos and label maps."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from imaginaire_spade.build import build_split
from imaginaire_spade.config import AugmentationConfig
from imaginaire_spade.config_diff import check_fits
from imaginaire_spade.config_files import load_config, load_labels
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.errors import ConfigError
from imaginaire_spade.evaluation.label_maps import LabelMaps
from imaginaire_spade.evaluation.sources import DatasetPhotos, FolderPictures, PictureSource
from imaginaire_spade.evaluation.statistics import holds_statistics
from imaginaire_spade.inference.generated import GeneratedPictures
from imaginaire_spade.inference.model import Model, find_checkpoint
from imaginaire_spade.inference.sizes import Asked, SizeRule


@dataclass(frozen=True)
class Evaluated:
    """Two sets of pictures, and what belongs to them."""

    fake: PictureSource
    real: PictureSource | Path
    """Photos, or the place of their statistics."""
    photos: PictureSource | None
    """Photos of the generated pictures' label maps, where they are known; ``real`` itself, where it is these."""
    maps: LabelMaps | None
    subject: dict[str, str]
    """What the report says of it."""
    geometry: AugmentationConfig | None = None
    """How label maps, and photos of the data set, are cut and resized; None for stored pictures."""


def stored_pictures(
    fake: Path, real: Path, *, num_samples: int, label_maps: Path | None, label_table: Path | None
) -> Evaluated:
    """Folders or LMDBs of generated and of real pictures.

    Args:
        real: or statistics.
        label_maps, label_table: the label maps of the generated pictures and a config with their table; both or
            neither.
    Raises:
        DataError: nothing there, or a picture without a label map.
        ConfigError: no label table.
    """
    pictures, maps = FolderPictures(fake, num_samples), None
    if label_maps is not None:
        assert label_table is not None
        dataset = LabelMapDataset(label_maps, load_labels(label_table), with_images=False)
        maps = LabelMaps(dataset, str(label_maps))
        maps.check(pictures.keys, pictures.name)
    subject = {"real": str(real), "fake": str(fake)}
    if holds_statistics(real):
        return Evaluated(pictures, real, None, maps, subject)
    photos = FolderPictures(real)
    return Evaluated(pictures, photos, photos, maps, subject)


def checkpoint_pictures(
    checkpoint: Path | None,
    logdir: Path | None,
    config_file: Path | None,
    overrides: Sequence[str],
    *,
    weights: str,
    size: Asked = None,
    device: torch.device,
    real: Path | None,
    reference_split: str,
    num_samples: int,
    seed: int | None,
    batch_size: int,
    with_photos: bool,
) -> Evaluated:
    """Pictures of data.val that a checkpoint makes when they are asked for.

    Args:
        checkpoint, logdir, config_file: which, as ``find_checkpoint`` reads them.
        size: at which pictures are made, and photos of the data compared; None: through the geometry of data.val.
        real: photos or statistics to compare with; None: those of the data, of ``reference_split``.
        seed: of the style codes; None: the config's.
        with_photos: whether the photos of data.val are needed, whatever ``real`` is.
    Raises:
        CheckpointError, ConfigError, DataError.
    """
    given = load_config(config_file, overrides) if config_file else None
    path = find_checkpoint(checkpoint, logdir, given)
    model = Model.load(path, weights=weights, overrides=overrides, device=device)
    config = model.config
    if given is not None:
        check_fits(config, given, str(config_file))
    if given is not None and given.data.labels != config.data.labels:
        print(f"note: data.labels of {config_file} differs from the checkpoint's, which is used", file=sys.stderr)
    for note in model.notes:
        print(f"note: {note}", file=sys.stderr, flush=True)
    train, val = (given or config).data.train, (given or config).data.val
    if val is None:
        raise ConfigError(f"{config_file or path}: no data.val to evaluate on: write data: {{val: {{roots: [DIR]}}}}")
    if size is not None:
        resize_to = SizeRule(size, model.trained_size).one_size
        val = val.model_copy(update={"augmentations": AugmentationConfig(resize_h_w=resize_to)})
    if num_samples > 1 and not model.style_dims:
        raise ConfigError(
            f"--num_samples {num_samples}: this generator takes no style code, so that the samples of a label map are"
            " equal: leave the flag out"
        )
    seed = config.seed if seed is None else seed
    maps, of_val = build_split(config, val, with_images=False), ", ".join(val.roots)
    fake = GeneratedPictures(model, maps, str(path), num_samples=num_samples, seed=seed, batch_size=batch_size)
    subject = {
        "real": str(real), "fake": str(path), "weights": f"{model.weights} after {model.images_seen} images",
        "style_seed": str(seed), "label_maps": of_val,
    }  # fmt: skip
    compared: PictureSource | Path
    photos: PictureSource | None = None
    if real is not None:
        compared = real if holds_statistics(real) else FolderPictures(real)
    else:
        # Through the same geometry as the label maps, so that real and generated pictures are of one size.
        roots = train.roots if reference_split == "train" else val.roots
        compared = DatasetPhotos(build_split(config, val.model_copy(update={"roots": roots})), ", ".join(roots))
        subject["real"] = compared.name
        photos = compared if reference_split == "val" else None
    if photos is None and with_photos:
        photos = DatasetPhotos(build_split(config, val), of_val)
    return Evaluated(fake, compared, photos, LabelMaps(maps, of_val), subject, val.augmentations)
