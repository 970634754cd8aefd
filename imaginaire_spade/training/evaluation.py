"""Score a run's generator while it trains, and remember the best score so far.

Responsible for when an evaluation is due, the fixed share of the validation samples, the statistics of their photos
(kept in the log dir) and what a checkpoint remembers of earlier scores; the package ``evaluation`` computes the scores.
Nothing here changes what is trained: no weight, no random number.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imaginaire_spade.config import RunConfig
from imaginaire_spade.config_trainer import EvaluationConfig
from imaginaire_spade.data.batch import Batch
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.photos import photo_preview, to_preview
from imaginaire_spade.distributed import ProcessInfo, broadcast_object
from imaginaire_spade.errors import CheckpointError, ConfigError, DataError
from imaginaire_spade.evaluation import NEED_FEATURES, check_metrics, scores
from imaginaire_spade.evaluation.collection import Collection, collect
from imaginaire_spade.evaluation.evaluate import evaluate
from imaginaire_spade.evaluation.images import NOT_STORED, PIPELINE, DatasetImages, Made, Samples
from imaginaire_spade.evaluation.report import higher_is_better
from imaginaire_spade.evaluation.segmentation import load_segmentation
from imaginaire_spade.models.generator import Generator
from imaginaire_spade.noise import style_codes
from imaginaire_spade.pretrained.feature_networks import feature_network
from imaginaire_spade.training.checkpoint import BEST, check_counter

FOLDER = "evaluation"
"""Of the log dir: the statistics of the photos, and a report of every evaluation."""

CheckStop = Callable[[], None]
"""Called before each batch, equally often on every process: raises to stop, on all of them."""


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
        self._indices = evenly_spaced(len(dataset), self.section.num_images)
        # What computes the scores.
        _try_libraries(self.section.metrics)
        check_metrics(self.section.metrics, self.section.features, "trainer.evaluation.features:")
        self._network = self._segmentation = None
        with torch.random.fork_rng(devices=[]):
            if set(self.section.metrics) & set(NEED_FEATURES):
                self._network = feature_network(
                    self.section.inception_weights, features=self.section.features, dim=self.section.feature_dim,
                    resize=self.section.resize, device=device, setting="trainer.evaluation.inception_weights: FILE",
                    features_setting="trainer.evaluation.features:",
                )  # fmt: skip
            if self.section.segmenter is not None:
                self._segmentation = load_segmentation(
                    self.section.segmenter, self.section.segmenter_labels, config.data.labels, device,
                    "trainer.evaluation.segmenter:",
                )  # fmt: skip
        self._keep_features = bool(set(self.section.metrics) & set(scores.KEEP_FEATURES))
        best, of_features = self.section.best, ("fid", "kid", "precision", "recall", "cmmd")
        self._deciding = scores.score_name(best, self._network) if self._network and best in of_features else best
        # Identity and memory.
        keys = "\n".join(dataset.keys[index] for index in self._indices)
        network, segmentation = self._network, self._segmentation
        identity = {
            "samples_sha256": hashlib.sha256(keys.encode()).hexdigest(),
            "num_images": len(self._indices),
            "augmentations": dataset.augmentations.model_dump(mode="json"),
            "seed": config.seed,
            "network": network and [network.name, network.sha256, network.dim, network.resize, network.size],
            "features_kept": self._keep_features,
            "segmentation": segmentation and segmentation.stamp,
            "labels": config.data.labels.model_dump(mode="json"),
        }
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        """What scores of this run must share to be comparable, as JSON."""
        self.evaluated_at = 0
        """Images seen at the last evaluation."""
        self.best: tuple[float, int] | None = None
        """The best of the deciding score so far, and the images seen then."""
        self.in_vain = 0
        """Evaluations since then."""
        self._real: Collection | None = None

    # -------------------------------------------------------------------------------------------- when, and what was

    def due(self, images_seen: int, finished: bool) -> bool:
        """Tell whether a multiple of ``every_images`` was passed since the last evaluation, or the run ends
        unevaluated."""
        every = self.section.every_images
        return images_seen // every > self.evaluated_at // every or (finished and images_seen > self.evaluated_at)

    @property
    def stalled(self) -> str:
        """Say that ``patience`` is at its end, and with it the run; empty: it is not."""
        if self.section.patience is None or self.in_vain < self.section.patience:
            return ""
        best = (
            ""
            if self.best is None
            else f"; the best is {self.best[0]:.5g}, at {self.best[1]} images: checkpoints/{BEST}"
        )
        return (
            f"{self.in_vain} evaluation(s) in a row did not improve {self._deciding} (trainer.evaluation.patience:"
            f" {self.section.patience}){best}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; plain types."""
        return {
            "identity": {**self.identity, "score": self._deciding}, "evaluated_at": self.evaluated_at,
            "best": self.best, "in_vain": self.in_vain,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any] | None) -> str | None:
        """Go on from a checkpoint's scores; return a line for the log, which says if they are not comparable with those
        to come."""
        if state is None:
            return None
        best, identity = state.get("best"), state.get("identity")
        is_score = best is None or (isinstance(best, list | tuple) and [*map(type, best)] == [float, int])
        if not is_score or not isinstance(identity, Mapping):
            raise CheckpointError(f"evaluation: {dict(state)} in the checkpoint is not what an evaluation leaves there")
        where = "evaluation in the checkpoint"
        self.evaluated_at = check_counter(state.get("evaluated_at"), where)
        own = self.state_dict()["identity"]
        changed = [key for key, value in own.items() if identity.get(key) != value]
        # (Older checkpoints lack it.)
        self.in_vain = 0 if changed else check_counter(state.get("in_vain", 0), where)
        if best is None:
            return None
        if changed:
            return f"evaluation: the protocol changed ({', '.join(changed)}), so the best score is reset"
        self.best = (best[0], best[1])
        return f"evaluation: the best {self._deciding} so far is {best[0]:.5g}, at {best[1]} images"

    # -------------------------------------------------------------------------------------------- the work

    def find_reference(self, logdir: Path, check_stop: CheckStop) -> str:
        """Get the statistics of the real photos ready, from the log dir or by computing them (a collective).

        Returns:
            What was done, for the log.
        """
        path = logdir / FOLDER / "real.npz"
        self._real = broadcast_object(self._stored(path) if self._info.is_main else None)
        if self._real is not None:
            return f"evaluation: statistics of {len(self._indices)} real photos from {path}"
        source = self._images("photos", self._show_photos, PIPELINE, check_stop)
        segmentation = self._segmentation
        with self._random_numbers_kept():
            self._real = collect(
                source, self._network, batch_size=self._batch_size, keep_features=self._keep_features, info=self._info,
                judge=None if segmentation is None else partial(segmentation.judge, "real"),
            )  # fmt: skip
        if self._info.is_main:
            network = self._network and self._network.identity
            self._real.save(path, {"network": network, "reference_split": "val", "run": self.identity})
        return f"evaluation: statistics of {len(self._indices)} real photos computed, kept in {path}"

    def _stored(self, path: Path) -> Collection | None:
        """Read the statistics of the photos; None where there are none of this identity, or they are damaged."""
        try:
            stored = Collection.load(path)
        except DataError:
            return None
        return stored if stored.origin is not None and stored.origin.get("run") == self.identity else None

    @torch.no_grad()
    def __call__(
        self, generator: Generator, images_seen: int, logdir: Path, name: str, check_stop: CheckStop
    ) -> tuple[dict[str, float], bool]:
        """Evaluate (a collective). Return the scores, and whether they are the best so far: the same on every process.

        Args:
            generator: in evaluation mode.
            name: of the report.
            check_stop: if it raises, nothing has changed.
        """
        assert self._real is not None

        def generate(batch: Batch) -> Tensor:
            z = style_codes(self._seed, batch.keys, generator.style_dims, self._device)
            return to_preview(generator(batch.layout.to(self._device), z), self._dataset.images)

        subject = {"images_seen": str(images_seen), "samples": f"{len(self._indices)} of data.val"}
        with self._random_numbers_kept():
            report = evaluate(
                self._images("generated", generate, NOT_STORED, check_stop), self._real, self._network,
                metrics=self.section.metrics, reference_split="val", segmentation=self._segmentation,
                photos=self._real, subject=subject, geometry=self._dataset.augmentations,
                batch_size=self._batch_size, info=self._info,
            )  # fmt: skip
        if self._info.is_main:
            report.save(logdir / FOLDER / f"{name}.json")
        self.evaluated_at = images_seen
        value, sign = report.scores[self._deciding], 1 if higher_is_better(self._deciding) else -1
        is_best = math.isfinite(value) and (self.best is None or sign * value > sign * self.best[0])
        self.in_vain += 1
        if is_best:
            self.best, self.in_vain = (value, images_seen), 0
        return dict(report.scores), is_best

    def describe(self, found: Mapping[str, float], is_best: bool) -> str:
        """Return a line for the log: of the scores ``found``."""
        text = " ".join(f"{name} {value:.5g}" for name, value in found.items())
        if is_best:
            return f"{text} | the best {self._deciding} so far: checkpoints/{BEST}"
        return text if self.best is None else f"{text} | best {self._deciding} {self.best[0]:.5g}"

    def _show_photos(self, batch: Batch) -> Tensor:
        assert batch.images is not None
        return photo_preview(batch.images, self._dataset.images)

    def _images(self, name: str, make: Callable[[Batch], Tensor], format: str, check_stop: CheckStop) -> DatasetImages:
        """Return what ``make`` makes, uint8 [N, 3, H, W], of batches of the run's validation samples."""
        share = math.ceil(len(self._indices) / self._info.world_size)

        def batch_by_batch(samples: Samples) -> Made:
            remaining = iter(samples)
            for _ in range(math.ceil(share / self._batch_size)):
                check_stop()
                if taken := list(islice(remaining, self._batch_size)):
                    batch = Batch.collate(self._dataset.spec, [sample for _, sample in taken])
                    for (index, _), pixels in zip(taken, make(batch), strict=True):
                        yield index, 0, pixels

        return DatasetImages(self._dataset, name, batch_by_batch, format=format, indices=self._indices, strict=True)

    def _random_numbers_kept(self) -> AbstractContextManager[None]:
        """Keep torch's random numbers for the training: a component of the user's may draw from them."""
        return torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else [])


def evenly_spaced(count: int, wanted: int | None) -> list[int]:
    """Return ``wanted`` evenly spaced positions out of ``count``; None: all.

    Raises:
        ConfigError: ``count`` is too small.
    """
    if count <= scores.NEIGHBOURS:
        raise ConfigError(
            f"trainer.evaluation: data.val has {count} samples, and scores need {scores.NEIGHBOURS + 1} at least"
        )
    if wanted is None:
        return list(range(count))
    if wanted > count:
        raise ConfigError(
            f"trainer.evaluation.num_images: {wanted}, but data.val has {count} samples: write a smaller number, or"
            " null for all of them"
        )
    return [i * count // wanted for i in range(wanted)]


def _try_libraries(metrics: Sequence[str]) -> None:
    """Raise ConfigError if a metric's library is not installed."""
    if "kid" in metrics:
        scores.kernel_distance(torch.ones(2, 1), torch.ones(2, 1))
    if "precision_recall" in metrics:
        scores.precision_recall(torch.ones(scores.NEIGHBOURS + 1, 1), torch.ones(scores.NEIGHBOURS + 1, 1))
