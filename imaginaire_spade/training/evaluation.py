"""Score a run's generator while it trains, and remember the best score so far.

Owns the fixed share of the validation samples, the statistics of its photos (kept in the log dir) and what a checkpoint
remembers of earlier scores. When it is time is asked of ``due``; what the scores are is for the room ``evaluation``.
Nothing here changes what is trained: no weight, no random number.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imaginaire_spade.config import EvaluationConfig, RunConfig
from imaginaire_spade.data.batch import Batch, denormalise
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.loader import default_num_workers
from imaginaire_spade.distributed import ProcessInfo, broadcast_object
from imaginaire_spade.evaluation.collection import Collection, collect
from imaginaire_spade.evaluation.report import Report, higher_is_better
from imaginaire_spade.evaluation.scores import (
    KEEP_FEATURES,
    NEED_FEATURES,
    NEIGHBOURS,
    evaluate_pictures,
    kernel_distance,
    precision_recall,
    score_name,
)
from imaginaire_spade.evaluation.segmentation import Confusion, SegmentationMetric, network_predictions
from imaginaire_spade.evaluation.sources import NOT_STORED, PIPELINE, EvaluatedPicture
from imaginaire_spade.models.generator import Generator
from imaginaire_spade.noise import style_noise
from imaginaire_spade.pretrained.inception import feature_network
from imaginaire_spade.training.reference import ValidationPictures, read_reference, spread, write_reference

FOLDER = "evaluation"
"""Of the log dir: the reference, and a report of every evaluation."""


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found; the same on every process."""

    scores: dict[str, float]
    is_best: bool


class Evaluation:
    """The evaluations of a run.

    Everything that can be missing is looked for when this is made.

    Args:
        dataset: the validation samples.
    Raises:
        ConfigError: weights or a segmenter are not there, or the samples do not suffice.
    """

    def __init__(self, config: RunConfig, dataset: LabelMapDataset, info: ProcessInfo, device: torch.device) -> None:
        assert config.trainer.evaluation is not None and config.data.val is not None, "checked by check_run"
        self.section: EvaluationConfig = config.trainer.evaluation
        self._dataset, self._info, self._device, self._seed = dataset, info, device, config.seed
        self._batch_size = config.data.val.batch_size
        workers = config.data.num_workers
        self._num_workers = default_num_workers(info.local_world_size) if workers is None else workers
        self._labels = config.data.labels
        self._indices = spread(len(dataset), self.section.num_images)
        _try_libraries(self.section.metrics)
        with torch.random.fork_rng(devices=[]):
            self._network = None
            if set(self.section.metrics) & set(NEED_FEATURES):
                self._network = feature_network(
                    self.section.inception_weights,
                    dim=self.section.feature_dim,
                    resize=self.section.resize,
                    device=device,
                )
            self._predictions = None
            if self.section.segmenter is not None:
                self._predictions = network_predictions(
                    self.section.segmenter,
                    self.section.segmenter_labels,
                    self._labels,
                    device,
                    "trainer.evaluation.segmenter:",
                )
        self._keep_features = bool(set(self.section.metrics) & set(KEEP_FEATURES))
        best = self.section.best
        named = self._network is not None and best in ("fid", "kid", "precision", "recall")
        self._deciding = score_name(best, self._network) if named and self._network else best
        self.identity = self._identity(config)
        self.evaluated_at = 0
        """Images seen at the last evaluation."""
        self.best: tuple[float, int] | None = None
        """The best of the deciding score so far, and the images seen then."""
        self._real: Collection | None = None
        self._real_confusion: Confusion | None = None

    def _identity(self, config: RunConfig) -> dict[str, Any]:
        """What scores of this run must share to be comparable, as JSON."""
        val, network = config.data.val, self._network
        assert val is not None
        keys = "\n".join(self._dataset.keys[index] for index in self._indices)
        return json.loads(
            json.dumps(
                {
                    "samples_sha256": hashlib.sha256(keys.encode()).hexdigest(),
                    "num_images": len(self._indices),
                    "augmentations": val.augmentations.model_dump(mode="json"),
                    "seed": config.seed,
                    "network": None
                    if network is None
                    else [network.name, network.sha256, network.dim, network.resize, network.size],
                    "features_kept": self._keep_features,
                    "segmentation": None if self._predictions is None else self._predictions.stamp,
                    "labels": config.data.labels.model_dump(mode="json"),
                }
            )
        )

    # -------------------------------------------------------------------------------------------- when, and what was

    def due(self, images_seen: int, finished: bool) -> bool:
        """Whether a multiple of ``every_images`` was passed since the last evaluation, or the run ends unevaluated."""
        every = self.section.every_images
        return images_seen // every > self.evaluated_at // every or (finished and images_seen > self.evaluated_at)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; plain types."""
        return {
            "identity": {**self.identity, "score": self._deciding}, "evaluated_at": self.evaluated_at, "best": self.best
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any] | None) -> str | None:
        """Go on from a checkpoint's scores. Says so where they are not comparable with those to come."""
        if state is None:
            return None
        self.evaluated_at = state["evaluated_at"]
        best = state["best"]
        if best is None:
            return None
        own = self.state_dict()["identity"]
        if changed := [key for key, value in own.items() if state["identity"].get(key) != value]:
            return f"evaluation: the protocol changed ({', '.join(changed)}), so the best score is reset"
        self.best = (best[0], best[1])
        return f"evaluation: the best {self._deciding} so far is {best[0]:.5g}, at {best[1]} images"

    # -------------------------------------------------------------------------------------------- the work

    def find_reference(self, logdir: Path, leave: Callable[[], bool]) -> str:
        """Get the statistics of the real photos ready, from the log dir or by computing them (a collective).

        Returns what was done. Raises LeaveAsked.
        """
        path = logdir / FOLDER / "real.npz"
        found = read_reference(path, self.identity) if self._info.is_main else None
        if broadcast_object(found is not None):
            self._real, self._real_confusion = found or (None, None)
            return f"evaluation: statistics of {len(self._indices)} real photos from {path}"
        metric = self._metric()
        source = self._source("photos", _images, PIPELINE, leave)
        self._real = self._collect(source, "real", metric)
        if metric is not None:
            self._real_confusion = metric.confusions["real"].summed_over_processes(self._device)
        if self._info.is_main:
            write_reference(path, self.identity, self._real, self._real_confusion)
        return f"evaluation: statistics of {len(self._indices)} real photos computed, kept in {path}"

    def __call__(
        self, generator: Generator, images_seen: int, logdir: Path, name: str, leave: Callable[[], bool]
    ) -> Outcome:
        """Evaluate (a collective).

        Args:
            generator: in evaluation mode.
            name: of the report.
        Raises:
            LeaveAsked: (on every process) ``leave`` said so; nothing has changed.
        """

        @torch.no_grad()
        def made(batch: Batch) -> Tensor:
            dims = generator.style_dims
            z = style_noise(self._seed, list(batch.keys), dims).to(self._device) if dims else None
            return denormalise(generator(batch.layout.to(self._device), z))

        metric = self._metric()
        fake = self._collect(self._source("generated", made, NOT_STORED, leave), "generated", metric)
        if metric is not None:
            metric.confusions["generated"] = metric.confusions["generated"].summed_over_processes(self._device)
        scores: dict[str, float] = {}
        if self._info.is_main:
            report = self._report(fake, metric, images_seen)
            report.save(logdir / FOLDER / f"{name}.json")
            scores = dict(report.scores)
        scores = broadcast_object(scores)
        self.evaluated_at = images_seen
        value = scores[self._deciding]
        is_best = math.isfinite(value) and (self.best is None or self._is_better(value, self.best[0]))
        if is_best:
            self.best = (value, images_seen)
        return Outcome(scores, is_best)

    def describe(self, outcome: Outcome) -> str:
        """A line for the log."""
        scores = " ".join(f"{name} {value:.5g}" for name, value in outcome.scores.items())
        if outcome.is_best:
            return f"{scores} | the best {self._deciding} so far: checkpoints/best.pt"
        return scores if self.best is None else f"{scores} | best {self._deciding} {self.best[0]:.5g}"

    def _is_better(self, value: float, than: float) -> bool:
        return value > than if higher_is_better(self._deciding) else value < than

    def _metric(self) -> SegmentationMetric | None:
        if self._predictions is None:
            return None
        return SegmentationMetric(self._labels, self._predictions, self._predictions)

    def _source(
        self, name: str, picture: Callable[[Batch], Tensor], format: str, leave: Callable[[], bool]
    ) -> ValidationPictures:
        return ValidationPictures(
            name, self._dataset, self._indices, picture, batch_size=self._batch_size, num_workers=self._num_workers,
            world_size=self._info.world_size, format=format, leave=leave,
        )  # fmt: skip

    def _collect(self, source: ValidationPictures, kind: str, metric: SegmentationMetric | None) -> Collection:
        def segment(picture: EvaluatedPicture) -> None:
            if metric is not None:
                pixels = picture.pixels.permute(1, 2, 0).cpu().numpy()
                truth = source.labels[picture.index].numpy()
                metric.add(kind, source.keys[picture.index], pixels, truth)

        # Loaders draw from torch's own random numbers, and a component of the user's may in training.
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            return collect(
                source, self._network, batch_size=self._batch_size, keep_features=self._keep_features, info=self._info,
                on_picture=segment,
            )  # fmt: skip

    def _report(self, fake: Collection, metric: SegmentationMetric | None, images_seen: int) -> Report:
        assert self._real is not None
        subject = {"images_seen": str(images_seen), "samples": f"{len(self._indices)} of data.val"}
        report = evaluate_pictures(
            self._real, fake, self._network, metrics=self.section.metrics, reference_split="val", subject=subject,
            geometry=self._dataset.augmentations,
        )  # fmt: skip
        if metric is None:
            return report
        assert self._real_confusion is not None
        metric.confusions["real"] = self._real_confusion
        return metric.added_to(report)


def _try_libraries(metrics: Sequence[str]) -> None:
    """Raises ConfigError where a metric's library is not installed."""
    if "kid" in metrics:
        kernel_distance(torch.ones(2, 1), torch.ones(2, 1))
    if "precision_recall" in metrics:
        precision_recall(torch.ones(NEIGHBOURS + 1, 1), torch.ones(NEIGHBOURS + 1, 1))


def _images(batch: Batch) -> Tensor:
    assert batch.images is not None
    return batch.images
