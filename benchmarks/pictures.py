"""``python -m benchmarks.pictures --data_root CAMVID --logdirs A B``: how good are trained generators' pictures?

For checkpoints of the log dirs, with raw and averaged weights: distances to the validation photos in
EfficientNet-Lite's features (Frechet, and kernel x 1000), the mIoU and accuracy of a segmenter that was trained on the
real training photos, mean absolute difference from the photos, sharpness beside theirs, how much fine structure all
pictures share (grids), stripes, and edges at fixed places. All at the size of the training images. Needs the extra
``pretrained``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaginaire_spade.data.label_files import read_labels
from imaginaire_spade.errors import positive_integer, run_command_line
from imaginaire_spade.evaluation.scores import FeatureStats, frechet_distance, kernel_distance
from imaginaire_spade.evaluation.segmentation import Confusion
from imaginaire_spade.files import resize_image
from imaginaire_spade.inference.synthesizer import Synthesizer
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.pretrained.backbones import backbone
from imaginaire_spade.pretrained.feature_networks import FeatureNetwork, feature_network
from imaginaire_spade.training.checkpoint import checkpoints_in

WEIGHTS = ("raw", "ema")


class Split:
    """Photos uint8 [N, 3, H, W] and train ids [N, H, W] of a raw folder with ``images/`` and ``seg_maps/``."""

    def __init__(self, root: Path, labels: LabelSpec, size: tuple[int, int], limit: int | None) -> None:
        self.maps = sorted((root / "seg_maps").glob("*.png"))[:limit]
        photos, ids = [], []
        for path in self.maps:
            photo = cv2.imread(str(next((root / "images").glob(f"{path.stem}.*"))))[..., ::-1]
            photos.append(torch.from_numpy(resize_image(np.ascontiguousarray(photo), *size)).permute(2, 0, 1))
            raw = read_labels(path.read_bytes(), str(path), labels)
            ids.append(
                cv2.resize(labels.to_train_ids(raw, str(path)), size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
            )
        self.photos, self.ids = torch.stack(photos), np.stack(ids)


class Segmenter(nn.Module):
    """A small head on the frozen feature maps of EfficientNet-Lite at twice the size."""

    def __init__(self, num_classes: int, features: str) -> None:
        super().__init__()
        self.features = backbone(features, None, "--features FILE")
        self.project = nn.ModuleList(nn.Conv2d(width, 48, 1) for width in self.features.levels().values())
        self.head = nn.Sequential(
            nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, num_classes, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> scores [N, classes, H, W]."""
        height, width = images.shape[2:]
        twice = F.interpolate(images.float(), (2 * height, 2 * width), mode="bicubic", antialias=True)
        with torch.no_grad():
            maps = self.features.maps(twice.clamp(0, 255))
        joined = [
            F.interpolate(project(one), (height, width), mode="bilinear")
            for project, one in zip(self.project, maps, strict=True)
        ]
        return self.head(torch.stack(joined).sum(0))

    def fit(self, train: Split, epochs: int) -> Segmenter:
        """Train on real photos, mirrored half of the time; don't care has no loss."""
        rng = np.random.default_rng(0)
        ids = torch.from_numpy(train.ids.astype(np.int64))
        ids[ids >= self.head[-1].out_channels] = -100
        optimizer = torch.optim.Adam([*self.project.parameters(), *self.head.parameters()], lr=2e-3)
        steps = epochs * (len(ids) // 8 or 1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        self.train()
        for step in range(steps):
            if step % (len(ids) // 8 or 1) == 0:
                order = rng.permutation(len(ids))
            picked = order[step * 8 % max(1, len(ids) - 7) :][:8] if len(ids) > 8 else order
            images, wanted = train.photos[picked], ids[picked]
            if rng.random() < 0.5:
                images, wanted = images.flip(-1), wanted.flip(-1)
            loss = F.cross_entropy(self(images), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return self.eval()

    @torch.no_grad()
    def score(self, images: Tensor, ids: np.ndarray, num_classes: int) -> dict[str, float]:
        total = Confusion.zero(num_classes)
        for start in range(0, len(images), 16):
            predicted = self(images[start : start + 16]).argmax(1).numpy()
            for truth, guess in zip(ids[start : start + 16], predicted, strict=True):
                total += Confusion.of(truth, guess, num_classes)
        return {"miou": total.mean_iou, "accuracy": total.pixel_accuracy}


def features_of(network: FeatureNetwork, images: Tensor) -> Tensor:
    return torch.cat([network(list(part)) for part in images.split(16)])


def sharpness(images: Tensor) -> float:
    """Mean absolute difference of neighbours."""
    x = images.float()
    return float((x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()) / 2)


def fine_structure(images: Tensor) -> Iterator[Tensor]:
    """Subtract the mean of 7x7 pixels from uint8 images [N, 3, H, W], 16 at a time: float."""
    for x in images.float().split(16):
        yield x - F.avg_pool2d(F.pad(x, (3, 3, 3, 3), "reflect"), 7, 1)


def fixed_pattern(images: Tensor) -> float:
    """Measure stripes and grids that all images share: the fine structure of their mean, beside what is left of as
    much fine structure by averaging independent images (1: nothing is shared)."""
    fine = torch.cat(list(fine_structure(images)))
    return float(fine.mean(0).square().mean().sqrt() / (fine.square().mean().sqrt() / len(fine) ** 0.5))


def stripes(images: Tensor, length: int = 16) -> float:
    """Measure lines along rows and columns: the fine structure's means over so many pixels, beside those of
    independent pixels (1: no lines), by image."""
    found = []
    for fine in fine_structure(images):
        lines = [F.avg_pool2d(fine, size, 1).square().mean((1, 2, 3)) for size in ((1, length), (length, 1))]
        found.append((length * (lines[0] + lines[1]) / 2 / fine.square().mean((1, 2, 3))).sqrt())
    return float(torch.cat(found).mean())


def seams(images: Tensor, length: int = 8) -> float:
    """Measure edges that lie at the same column or row of every image: steps between neighbours, summed over so many
    pixels along the line, at the five strongest places beside the median place; the mean of columns and rows."""
    grey, found = images.float().mean(1), []
    for x in (grey, grey.mT):
        steps = F.avg_pool2d(x.diff(dim=2), (length, 1)).abs().mean((0, 1))
        found.append(steps.topk(5).values.mean() / steps.median())
    return float(sum(found) / 2)


def _checkpoints(logdir: Path) -> dict[int, Path]:
    """Find the checkpoints of a log dir, by the images seen."""
    return {int(path.stem.split("_")[1]): path for path in checkpoints_in(logdir / "checkpoints")}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.add_argument("--data_root", type=Path, required=True, metavar="RAW", help="with train/ and val/")
    parser.add_argument("--logdirs", type=Path, nargs="+", required=True, metavar="LOGDIR")
    parser.add_argument("--images_seen", type=positive_integer, nargs="*", help="checkpoints (default: the last)")
    parser.add_argument(
        "--features", choices=("efficientnet_lite0", "efficientnet_lite2"), default="efficientnet_lite0",
        help="network of distances and segmenter: another one than a discriminator was trained on",
    )  # fmt: skip
    parser.add_argument("--epochs", type=positive_integer, default=18, help="of the segmenter")
    parser.add_argument("--limit", type=positive_integer, metavar="N", help="samples of each split")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures")
    arguments = parser.parse_args()
    checkpoints = {logdir: _checkpoints(logdir) for logdir in arguments.logdirs}
    for logdir, seen in checkpoints.items():
        if not seen:
            parser.error(f"--logdirs {logdir}: no checkpoints there; give the log dir of a training run")
        if missing := sorted(set(arguments.images_seen or ()) - seen.keys()):
            parser.error(
                f"--images_seen {missing}: {logdir} has checkpoints of {sorted(seen)} images; give some of them"
            )
    for folder in (arguments.data_root / split / kind for split in ("train", "val") for kind in ("images", "seg_maps")):
        if not folder.is_dir():
            parser.error(f"--data_root: {folder} is not there")
    first = Synthesizer.load(arguments.logdirs[0])
    labels, size = first.labels, first.size
    train, val = (Split(arguments.data_root / name, labels, size, arguments.limit) for name in ("train", "val"))
    torch.manual_seed(0)
    segmenter = Segmenter(labels.num_classes, arguments.features).fit(train, arguments.epochs)
    network = feature_network(features=arguments.features)
    real = features_of(network, val.photos)
    rows: list[dict[str, object]] = []

    def show(name: str, images: Tensor) -> None:
        found = features_of(network, images)
        distance = frechet_distance(FeatureStats.of(real).gaussian(), FeatureStats.of(found).gaussian())
        row = {"fd": distance, "kd x1000": 1000 * kernel_distance(real, found)[0]}
        row |= segmenter.score(images, val.ids[: len(images)], labels.num_classes)
        if len(images) == len(val.photos):
            row["l1"] = float((images.float() - val.photos.float()).abs().mean())
        row |= {"sharpness": sharpness(images) / sharpness(val.photos), "pattern": fixed_pattern(images)}
        row |= {"stripes": stripes(images), "seams": seams(images)}
        rows.append({"pictures": name} | row)
        print(f"{name:45}", *(f"{key} {value:8.3f}" for key, value in row.items()), flush=True)

    show("validation photos", val.photos)
    apart = np.linspace(0, len(train.photos) - 1, min(len(val.photos), len(train.photos))).astype(int)
    found = features_of(network, train.photos[apart])
    floor = frechet_distance(FeatureStats.of(real).gaussian(), FeatureStats.of(found).gaussian())
    print(f"{'training photos':45} fd {floor:8.3f} kd x1000 {1000 * kernel_distance(real, found)[0]:8.3f}", flush=True)
    for logdir, seen in checkpoints.items():
        for count in arguments.images_seen or [max(seen)]:
            for weights in WEIGHTS:
                paint = Synthesizer.load(seen[count], weights=weights, device="cpu", size="trained")
                images = [np.asarray(paint(path, seed=index)) for index, path in enumerate(val.maps)]
                show(f"{logdir.name} {count} {weights}", torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command_line(main)
