"""The arithmetic of feature scores, against the libraries people compare with, on the same features and pictures."""

import json

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pytorch_fid import fid_score
from pytorch_fid.inception import InceptionV3
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.kid import KernelInceptionDistance

from imaginaire_spade.errors import ConfigError, DataError, UserError
from imaginaire_spade.evaluation.collection import Collection, load_statistics
from imaginaire_spade.evaluation.scores import (
    FeatureStats,
    Gaussian,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from imaginaire_spade.evaluation.segmentation import Confusion
from imaginaire_spade.files import file_sha256
from imaginaire_spade.pretrained.feature_networks import (
    FEATURE_DIMS,
    feature_network,
    perceptual_network,
    resize_for_network,
)


def correlated(count: int, dim: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Features as networks make them: not negative, correlated, of unequal variances. float32 [count, dim]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99)) / dim**0.5
    scales = torch.logspace(0, -3, dim)
    return ((torch.randn(count, dim, generator=generator) * scales) @ mixing + 0.3 + shift).relu()


class Picked(torch.nn.Module):
    """A feature network for torchmetrics: the first ``dim`` numbers of the picture are its features."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table, self.num_features = table, table.shape[1]

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.table[pictures[:, 0, 0, 0].long() * 256 + pictures[:, 1, 0, 0].long()]


def numbered(count: int, first: int = 0) -> torch.Tensor:
    """Pictures that carry a number: uint8 [count, 3, 8, 8]."""
    pictures = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    numbers = torch.arange(first, first + count)
    pictures[:, 0], pictures[:, 1] = (numbers // 256)[:, None, None], (numbers % 256)[:, None, None]
    return pictures


# ------------------------------------------------------------------------------------------------ statistics


@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(0, 300), max_size=8), order=st.randoms(use_true_random=False))
def test_sums_of_batches_in_any_split_and_order_are_those_of_the_whole(cuts, order):
    features = correlated(300, 12, seed=1)
    batches = [features[a:b] for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 300], strict=True)]
    order.shuffle(batches)
    stats = FeatureStats.zeros(12)
    for batch in batches:
        stats += FeatureStats.of(batch)
    gaussian = stats.gaussian()
    assert stats.count == 300
    exact = features.double().numpy()
    np.testing.assert_allclose(gaussian.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(gaussian.covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("dim", [16, 192])
def test_distance_equals_that_of_torchmetrics_and_of_pytorch_fid(dim):
    real, fake = correlated(700, dim, 1), correlated(600, dim, 2, shift=0.02)
    ours = frechet_distance(FeatureStats.of(real).gaussian(), FeatureStats.of(fake).gaussian())

    a, b = real.double().numpy(), fake.double().numpy()
    theirs = fid_score.calculate_frechet_distance(
        a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)
    )
    assert ours == pytest.approx(theirs, rel=1e-6)

    metric = FrechetInceptionDistance(feature=Picked(torch.cat([real, fake]).double()))
    metric.set_dtype(torch.float64)
    metric.update(numbered(700), real=True)
    metric.update(numbered(600, first=700), real=False)
    assert ours == pytest.approx(metric.compute().item(), rel=1e-6)


def test_distance_is_exact_where_covariances_are_singular():
    features = correlated(20, 64, 3)
    here = FeatureStats.of(features).gaussian()
    assert frechet_distance(here, here) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(here, FeatureStats.of(features + 0.5).gaussian()) == pytest.approx(64 * 0.25, rel=1e-6)
    # In one dimension: (m1 - m2)^2 + (s1 - s2)^2.
    one, other = (Gaussian(torch.tensor([m]).double(), torch.tensor([[s**2]]).double()) for m, s in ((1, 2), (4, 6)))
    assert frechet_distance(one, other) == pytest.approx(9 + 16)
    nothing = Gaussian(torch.zeros(3).double(), torch.zeros(3, 3).double())
    assert frechet_distance(nothing, nothing) == 0


def test_kernel_distance_equals_that_of_torchmetrics():
    real, fake = correlated(90, 32, 1), correlated(90, 32, 2, shift=0.05)
    metric = KernelInceptionDistance(feature=Picked(torch.cat([real, fake]).double()), subsets=1, subset_size=90)
    metric.set_dtype(torch.float64)
    metric.update(numbered(90), real=True)
    metric.update(numbered(90, first=90), real=False)
    mean, spread, rule = kernel_distance(real, fake)
    assert mean == pytest.approx(metric.compute()[0].item(), rel=1e-6)
    assert (spread, rule) == (None, "1 subset(s) of 90, kernel (x.y/D + 1)^3, seed 0")
    _, spread, rule = kernel_distance(real, correlated(60, 32, 2, shift=0.05))
    assert rule.startswith("100 subset(s) of 60") and (spread or 0) > 0
    with pytest.raises(DataError, match="at least 2 images on each side, not 90 and 1"):
        kernel_distance(real, fake[:1])


def test_precision_and_recall_of_known_sets():
    spread = torch.arange(20.0)[:, None] @ torch.ones(1, 2)
    assert precision_recall(spread, spread + 0.1) == (1, 1)
    assert precision_recall(spread, spread + 1000) == (0, 0)
    one_place = 3 + torch.linspace(0, 0.01, 20)[:, None] @ torch.ones(1, 2)  # good pictures, little variety
    precision, recall = precision_recall(spread, one_place)
    assert precision == 1 and recall < 0.2
    with pytest.raises(DataError, match="more than 3 images on each side, not 3 and 20"):
        precision_recall(spread[:3], spread)


# ------------------------------------------------------------------------------------------------ files


def test_statistics_come_back_and_pytorch_fid_reads_them(tmp_path):
    features = correlated(50, 8, 1)
    stats, confusion = FeatureStats.of(features), Confusion.of(np.eye(3, dtype=int), np.ones((3, 3), int), 2)
    described = {"count": 50, "size": "4x4", "format": "png", "digest": "0" * 64, "warnings": ("w",)}
    written = Collection(
        "here", **described, gaussian=stats.gaussian(), stats=stats, features=features, confusion=confusion
    )
    written.save(tmp_path / "s.npz", {"network": "n"})
    stored = Collection.load(tmp_path / "s.npz")
    assert stored.origin["network"] == "n"
    assert torch.equal(stored.gaussian.covariance, written.gaussian.covariance)
    with np.load(tmp_path / "s.npz") as arrays:
        assert np.array_equal(arrays["outer"], stats.outer) and np.array_equal(arrays["sum"], stats.sum)
    assert torch.equal(stored.features, features) and vars(stored).items() >= described.items()
    assert np.array_equal(stored.confusion.counts, confusion.counts)
    assert (stored.confusion.ignored, stored.confusion.images) == (confusion.ignored, 1)
    mu, sigma = fid_score.compute_statistics_of_path(str(tmp_path / "s.npz"), None, 1, 8, "cpu")
    np.testing.assert_array_equal(mu, stats.gaussian().mean)
    np.testing.assert_array_equal(sigma, stats.gaussian().covariance)


def test_statistics_of_other_systems_are_read(tmp_path):
    exact = FeatureStats.of(correlated(50, 8, 1)).gaussian()
    np.savez(tmp_path / "pytorch_fid.npz", mu=exact.mean.numpy(), sigma=exact.covariance.numpy())
    (tmp_path / "clade").mkdir()
    np.save(tmp_path / "clade/m.npy", exact.mean.numpy())
    np.save(tmp_path / "clade/s.npy", exact.covariance.numpy())
    for place in ("pytorch_fid.npz", "clade"):
        stored = Collection.load(tmp_path / place)
        assert stored.count is None and stored.origin is None
        assert frechet_distance(stored.gaussian, exact) == pytest.approx(0, abs=1e-12)


def test_statistics_that_earlier_versions_wrote_are_read(tmp_path):
    stats, network = FeatureStats.of(correlated(50, 64, 1)), feature_network("random:0", dim=64)
    origin = {
        "network": {"name": "random:0", "sha256": network.sha256, "resize": "legacy", "resized_to": 64},
        "reference_split": "val", "description": {"count": 50, "size": "4x4", "format": "png", "digest": "0" * 64},
    }  # fmt: skip
    np.savez(
        tmp_path / "s.npz", count=np.int64(50), sum=stats.sum.numpy(), outer=stats.outer.numpy(),
        mu=stats.gaussian().mean.numpy(), sigma=stats.gaussian().covariance.numpy(), origin=json.dumps(origin),
    )  # fmt: skip
    stored = load_statistics(tmp_path / "s.npz", network, "val")
    assert vars(stored).items() >= {**origin["description"], "warnings": ()}.items()
    assert torch.equal(stored.gaussian.covariance, stats.gaussian().covariance)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": np.zeros(3)}, r"no feature statistics \(weights in it\)"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"mu is \[3\] and sigma \[2, 2\]"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "not finite"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "not finite"),
        ({"mu": np.array([{}, {}]), "sigma": np.eye(2)}, "not readable as feature statistics"),
        ({"count": 5, "mu": np.zeros(1), "sigma": np.eye(1), "origin": "{}"}, "damaged statistics .'description'"),
        ({"count": 5, "mu": np.zeros(1), "sigma": np.eye(1), "origin": "[]"}, "damaged statistics"),
        (b"PK no archive", "not readable as feature statistics"),
        (b"", "not readable as feature statistics"),
    ],
)
def test_files_that_are_no_statistics_are_refused(tmp_path, content, message):
    path = tmp_path / "s.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(DataError, match=message):
        Collection.load(path)


# ------------------------------------------------------------------------------------------------ networks


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """A file of Inception weights as the published one is built, with seeded numbers."""
    torch.manual_seed(0)
    network = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    state = network.state_dict()
    for name, value in state.items():
        if name.endswith("running_mean"):
            value.normal_(std=0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


def test_inception_features_are_those_of_pytorch_fid_and_of_torchmetrics(inception_file, monkeypatch):
    monkeypatch.setattr(
        "pytorch_fid.inception.load_state_dict_from_url", lambda *_, **__: torch.load(inception_file, weights_only=True)
    )
    rng = np.random.default_rng(0)
    picture = torch.from_numpy(rng.integers(0, 256, (3, 120, 200), dtype=np.uint8))
    theirs = InceptionV3([0, 1, 2, 3], resize_input=True).eval()(picture[None] / 255)
    for dim, expected in list(zip(FEATURE_DIMS, theirs, strict=True))[1::2]:
        expected = torch.nn.functional.adaptive_avg_pool2d(expected, 1).flatten(1)
        ours = feature_network(str(inception_file), dim=dim)
        torch.testing.assert_close(ours([picture]), expected, rtol=1e-4, atol=1e-5)
    assert ours.sha256 == file_sha256(inception_file) and not ours.is_random
    assert ours.name == "inception-v3 with other weights"

    # torchmetrics resizes in a third way: on a picture of 299 x 299 there is nothing to resize.
    picture = torch.from_numpy(rng.integers(0, 256, (3, 299, 299), dtype=np.uint8))
    their_network = NoTrainInceptionV3("inception", ["64"], str(inception_file))
    ours = feature_network(str(inception_file), dim=64, resize="clean")
    torch.testing.assert_close(ours([picture]), their_network(picture[None]), rtol=1e-4, atol=1e-5)


def test_clean_resizing_is_pils_in_float_and_legacy_aliases():
    picture = np.random.default_rng(0).integers(0, 256, (3, 97, 140), dtype=np.uint8)
    for size in (48, 299):
        theirs = [
            np.asarray(Image.fromarray(c.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC))
            for c in picture
        ]
        ours = resize_for_network(torch.from_numpy(picture), size, "clean")
        torch.testing.assert_close(ours, torch.from_numpy(np.stack(theirs)).clamp(0, 255), rtol=0, atol=5e-3)
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, :, ::4] = 255  # a quarter of the columns
    clean, legacy = (resize_for_network(stripes, 8, method).mean().item() for method in ("clean", "legacy"))
    assert clean == pytest.approx(255 / 4, rel=0.1) and abs(legacy - 255 / 4) > 30


def test_pictures_of_several_sizes_are_resized_one_by_one():
    network = feature_network("random:1", dim=64)
    pictures = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((20, 30), (64, 64), (90, 31))]
    together = network(pictures)
    for picture, features in zip(pictures, together, strict=True):
        torch.testing.assert_close(network([picture])[0], features, rtol=1e-5, atol=1e-6)
    assert together.dtype == torch.float32 and not torch.equal(together[0], together[1])


def test_untrained_networks_are_named_by_their_seed():
    one, again, other = (feature_network(name, dim=64) for name in ("random:1", "random:1", "random:2"))
    assert one.is_random and one.sha256 == again.sha256 != other.sha256
    for name in ("random:", "random:x", "random:-1"):
        with pytest.raises(ConfigError, match="write random: and a seed"):
            feature_network(name)


def test_missing_and_foreign_weights_are_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for build, flag, file in (
        (feature_network, "--inception_weights", "weights-inception-2015-12-05-6726825d.pth"),
        (perceptual_network, "--lpips_weights", "alexnet-owt-7be5be79.pth"),
    ):
        with pytest.raises(ConfigError, match=f"{flag}: no weights at .*{file}.*put it at .*hub/checkpoints/{file}"):
            build()
        with pytest.raises(ConfigError, match=f"no weights at {tmp_path}/nothing"):
            build(str(tmp_path / "nothing"))
        path = tmp_path / "foreign.pth"
        for content in ({"a": torch.zeros(1)}, [1], None):
            if content:
                torch.save(content, path)
            else:
                path.write_text("no pickle")
            with pytest.raises(ConfigError, match=r"foreign.pth: not the weights of"):
                build(str(path))


def test_weights_that_would_run_code_do_not(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").write_text, ("x",))

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match="not the weights of"):
        feature_network(str(tmp_path / "evil.pth"))
    assert not (tmp_path / "ran").exists()


def test_weights_in_torchs_cache_are_found(inception_file, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/pt_inception-2015-12-05-6726825d.pth").symlink_to(inception_file)
    assert feature_network(dim=64).sha256 == file_sha256(inception_file)


def test_lpips_with_given_weights_is_that_of_torchmetrics(tmp_path):
    torch.manual_seed(0)
    backbone = torchvision.models.alexnet(weights=None)
    torch.save(backbone.state_dict(), tmp_path / "alexnet.pth")
    network = perceptual_network(str(tmp_path / "alexnet.pth"))
    assert torch.equal(network.layers.state_dict()["net.slice3.6.weight"], backbone.features[6].weight)
    pictures = [torch.randint(0, 256, (3, 40, 48), dtype=torch.uint8) for _ in range(3)]
    pairs = [(0, 1), (0, 2), (1, 2)]
    scaled = [picture[None] / 127.5 - 1 for picture in pictures]
    expected = sum(network.layers(scaled[a], scaled[b]).item() for a, b in pairs) / 3
    assert network.diversity(pictures, "here") == pytest.approx(expected, rel=1e-5)
    assert network.diversity([pictures[0]] * 2, "here") == 0
    for wrong, message in (
        ([pictures[0], pictures[1][:, :36]], "different sizes"),
        ([p[:, :20] for p in pictures], "at least 32 x 32"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=f"here: .*{message}"):
            network.diversity(wrong, "here")
    network.layers.lin0.model[1].weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        network.diversity(pictures, "here")
