"""Evaluate generated images: collect from them and from real ones, compute the scores, state the protocol."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from imaginaire_spade.config import AugmentationConfig
from imaginaire_spade.distributed import ProcessInfo, broadcast_object
from imaginaire_spade.errors import DataError, UserError, catch_error
from imaginaire_spade.evaluation import scores
from imaginaire_spade.evaluation.collection import Collection, collect
from imaginaire_spade.evaluation.images import ImageSource, SourceImage
from imaginaire_spade.evaluation.report import Protocol, Report, geometry_stamp
from imaginaire_spade.evaluation.segmentation import Confusion, Segmentation
from imaginaire_spade.pretrained.feature_networks import INCEPTION_SHA256, FeatureNetwork, PerceptualNetwork
from imaginaire_spade.version import __version__

FEW_IMAGES = 2048


def evaluate(
    fake: ImageSource,
    real: ImageSource | Collection,
    network: FeatureNetwork | None,
    *,
    metrics: Sequence[str],
    reference_split: str,
    perceptual: PerceptualNetwork | None = None,
    segmentation: Segmentation | None = None,
    photos: ImageSource | Collection | None = None,
    subject: Mapping[str, str] | None = None,
    geometry: AugmentationConfig | None = None,
    batch_size: int = 32,
    skip_bad: bool = False,
    info: ProcessInfo | None = None,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Score generated images against real ones (a collective: every process takes its share, all get the report).

    Args:
        real: or what was collected of them, in an earlier evaluation or by scripts/compute_fid_stats.py.
        network: of the scores of features; None: none of these is among ``metrics``.
        perceptual: for the diversity of the samples of each label map.
        segmentation: judges ``fake`` and ``photos``.
        photos: of the label maps of ``fake``; ``real`` itself, where it is these.
        subject: what the report says of the images.
        geometry: through which the label maps of generated images went, for the protocol; None for stored ones.
        batch_size, skip_bad, on_image: see ``collect``.
    Raises:
        ConfigError: a library is missing.
        DataError: an image that cannot be used, too few of them, or no label map, photo or prediction for one.
        UserError: a network's output is not finite, or memory ran out.
    """
    info = info or ProcessInfo()
    keep_features = bool(set(metrics) & set(scores.KEEP_FEATURES))
    if segmentation is not None:
        if isinstance(photos, ImageSource) and (missing := sorted(set(fake.keys) - set(photos.keys))):
            raise DataError(
                f"{photos.name}: no photo for {len(missing)} of the {len(fake.keys)} images of {fake.name}, such as"
                f" {missing[0]}. A segmentation score means little without that of the photos of the same label maps"
            )
        segmentation.check(fake.keys)

    # Collect.
    gather = partial(
        collect, batch_size=batch_size, keep_features=keep_features, skip_bad=skip_bad, info=info, on_image=on_image
    )

    def judge_photo(key: str, image: SourceImage) -> Confusion | None:
        # At the size of the generated image, or the larger one would score higher.
        size = made.sizes.get(key)
        return segmentation.judge("real", key, image, size) if segmentation and size else None

    judge_made = partial(segmentation.judge, "generated") if segmentation else None
    made = gather(fake, network, judge=judge_made, perceptual=perceptual)
    judged = None
    if segmentation is not None and isinstance(photos, ImageSource) and photos is not real:
        judged = gather(photos, None, judge=judge_photo)
    measured = real if isinstance(real, Collection) else gather(real, network, judge=None if judged else judge_photo)

    # Scores and protocol, on one process.
    def score(_: None) -> Report:
        values, stated = _scores_of_features(measured, made, network, metrics) if network is not None else ({}, {})
        if perceptual is not None and made.diversity is not None:
            values["random_feature_diversity" if perceptual.is_random else "lpips_diversity"] = made.diversity
            rule = f"{perceptual.name} (sha256 {perceptual.sha256}), {fake.num_samples} samples per label map"
            stated["diversity"] = rule
        assert made.count and made.size and made.format
        protocol = Protocol(
            version=__version__, reference_split=reference_split, reference=measured.digest, num_real=measured.count,
            num_fake=made.count, real_size=measured.size, fake_size=made.size, real_format=measured.format,
            fake_format=made.format, geometry=None if geometry is None else geometry_stamp(geometry), **stated,
        )  # fmt: skip
        warnings = [*measured.warnings, *made.warnings]
        warnings += [] if network is None else _warnings(measured, made, network, metrics)
        problems = (*measured.problems, *made.problems)
        return Report(values, protocol, subject or {}, tuple(warnings), problems, examples=made.examples)

    scored = broadcast_object(catch_error(UserError, score)(None) if info.is_main else None)
    if isinstance(scored, UserError):
        raise scored
    report: Report = scored
    if segmentation is not None:
        report = segmentation.add_to(report, made.confusion, (judged or measured).confusion)
    return report


def _scores_of_features(
    real: Collection, fake: Collection, network: FeatureNetwork, metrics: Sequence[str]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Compute the scores of two collections' features, and what the protocol states of them."""
    assert real.gaussian is not None and fake.gaussian is not None
    values: dict[str, float] = {}
    stated: dict[str, Any] = {
        "feature_network": network.name, "weights_sha256": network.sha256, "feature_dim": network.dim,
        "resize": network.resize, "resized_to": network.size, "normalisation": network.normalisation,
    }  # fmt: skip
    if "fid" in metrics:
        values[scores.score_name("fid", network)] = scores.frechet_distance(real.gaussian, fake.gaussian)
    features = [side.features for side in (real, fake) if side.features is not None]
    assert len(features) == 2 or not set(metrics) & set(scores.KEEP_FEATURES), "statistics serve fid only"
    if "kid" in metrics:
        kid, spread, stated["kid"] = scores.kernel_distance(*features)
        values[scores.score_name("kid", network)] = kid
        if spread is not None:
            values[scores.score_name("kid", network) + "_std"] = spread
    if "cmmd" in metrics:
        values[scores.score_name("cmmd", network)] = scores.cmmd(*features)
    if "precision_recall" in metrics:
        found = scores.precision_recall(*features)
        values |= {scores.score_name(n, network): v for n, v in zip(("precision", "recall"), found, strict=True)}
        stated["precision_recall"] = f"{scores.NEIGHBOURS} nearest neighbours"
    return values, stated


def _warnings(real: Collection, fake: Collection, network: FeatureNetwork, metrics: Sequence[str]) -> list[str]:
    found = []
    if network.is_random:
        found.append(
            f"{network.name} is an untrained network: its scores say nothing about the images, and are no FID or KID"
        )
    elif not network.ending and network.sha256 != INCEPTION_SHA256:
        found.append(
            f"these Inception weights (sha256 {network.sha256}) are not those that FID and KID are defined with"
            f" ({INCEPTION_SHA256}): no published score compares with these"
        )
    counts = [side.count for side in (real, fake) if side.count]
    if "fid" in metrics and min(counts) < FEW_IMAGES:
        singular = f". With features of {network.dim} dimensions their covariance is also singular"
        kid = "; KID has no such bias" if "kid" in metrics else ". KID (--metrics kid) has no such bias: report it"
        found.append(
            f"only {min(counts)} images: a Frechet distance of fewer than {FEW_IMAGES} is too high, by how much depends"
            f" on their number. Compare equal numbers only{kid}{singular if min(counts) <= network.dim else ''}"
        )
    if real.size and real.size != fake.size:
        found.append(
            f"real images are {real.size}, generated ones {fake.size} (height x width): part"
            " of the distance is that of the sizes"
        )
    return found
