# ruff: noqa: F811 (the fixture tiny_run is imported)
"""OASIS: training in both forms, its promises about processes and restarts, and what does not fit it."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from fork_server import TORCHRUN
from test_layout import random_layout
from test_training import assert_same, losses_in, tensors_of, tiny_run  # noqa: F401

from imaginaire_spade.build import build_discriminator, build_losses, check_run
from imaginaire_spade.config_files import load_config
from imaginaire_spade.distributed import ProcessInfo
from imaginaire_spade.errors import CheckpointError, ConfigError
from imaginaire_spade.inference.model import Model
from imaginaire_spade.layout import LayoutSpec
from imaginaire_spade.losses import SegmentationGANLoss
from imaginaire_spade.models import unet
from imaginaire_spade.models.discriminator import Scores, split_scores
from imaginaire_spade.models.norms import SPADE
from imaginaire_spade.models.oasis import OASISGenerator
from imaginaire_spade.models.spectral_norm import SpectralNorm, conv2d
from imaginaire_spade.models.unet import OASISDiscriminator
from imaginaire_spade.training import checkpoint
from imaginaire_spade.training.setup import prepare

GEN = {"type": "oasis", "num_filters": 2, "style_dims": 3, "norm": {"type": "spade", "hidden_channels": 8}}
DIS = {"type": "oasis_unet", "num_filters": 4, "middle_num_filters": 5, "max_num_filters": 6, "last_num_filters": 4}
OASIS = (
    f"gen={json.dumps(GEN)}", f"dis={json.dumps(DIS)}", "losses={segmentation_gan: 1.0, gan: 0, feature_matching: 0}",
    "data.edges=none", "data.train.augmentations.resize_smallest_side=68",
    "data.train.augmentations.random_crop_h_w=[64, 128]", "trainer.image_rows=1",
)  # fmt: skip
CPU = torch.device("cpu")


def config_of(path: Path, *overrides: str):
    return load_config(path, (*OASIS, *overrides))


@pytest.fixture
def made(tiny_run):
    """Makes a run of OASIS that has not begun."""
    return lambda *overrides: prepare(
        config := config_of(tiny_run[0], *overrides), build_losses(config), ProcessInfo(), CPU
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer.iteration=reference", "trainer.model_average={form: state, start_iteration: 0, beta: 0.5}"),
        ("trainer.precision=bf16", "trainer.gradient_accumulation=2", "trainer.activation_checkpointing=true"),
    ],
)
def test_stopping_and_starting_again_changes_nothing(tiny_run, overrides):
    _, run = tiny_run
    overrides = (*OASIS, *overrides, "trainer.max_iterations=3")
    straight = run("straight", *overrides)
    for stop in (1, 2):
        run("broken", *overrides, stop_after=stop)
    assert_same(run("broken", *overrides), straight)


def test_discriminators_vectors_advance_three_times_and_once(made):
    for form in ("shared", "reference"):
        run = made(f"trainer.iteration={form}")
        counts = dict.fromkeys(("generator", "discriminator"), 0)

        def count(name, layer, counts=counts):
            counts[name] += 1
            return SpectralNorm.iterate(layer)

        for name in counts:
            layer = next(m for m in getattr(run.state, name).modules() if isinstance(m, SpectralNorm))
            layer.iterate = partial(count, name, layer)
        losses = run.step(next(run.batches(0)))
        assert counts == {"generator": 2 if form == "reference" else 1, "discriminator": 4}
        assert {"segmentation_gan", "d_fake", "d_real", "d_labelmix"} <= losses.keys()
        assert 0 <= losses["health/d_accuracy"] <= 1


def test_reference_draws_new_noise_for_the_discriminators_images_and_shared_none(made):
    for form, expected in (("shared", 1), ("reference", 2)):
        run, seen = made(f"trainer.iteration={form}"), []
        run.state.generator.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[1]))
        run.step(next(run.batches(0)))
        assert len(seen) == expected and not (expected == 2 and torch.equal(*seen))


def test_no_gradient_is_kept_while_images_are_made_and_the_average_takes_one_weight_at_a_time(made, monkeypatch):
    run, kept, weights = made("trainer.iteration=shared"), [], []
    run.state.generator.register_forward_pre_hook(
        lambda network, _: kept.append([p for p in network.parameters() if p.grad is not None])
    )
    divide = SpectralNorm.effective_weight

    def noted(layer):
        assert all(one() is None for one in weights)
        weights.append(ref(weight := divide(layer)))
        return weight

    monkeypatch.setattr(SpectralNorm, "effective_weight", noted)
    batches = run.batches(0)
    for _ in range(2):
        run.step(next(batches))
    assert kept == [[], []] and len(weights) > 2


def test_pieces_of_a_batch_share_class_weights_and_draws(made):
    """The gradients of D are those of the whole batch. (Batch statistics and power iterations are a piece's own.)"""
    norm = "gen.norm={type: spade, hidden_channels: 8, normalization: instance}"
    gradients = []
    for pieces in (1, 4):
        plain = ("gen.spectral_norm=false", "dis.spectral_norm=false", "dis_opt.lr=1e-12")
        run = made(norm, f"trainer.gradient_accumulation={pieces}", *plain)
        run.step(next(run.batches(0)))
        gradients.append([parameter.grad for parameter in run.state.discriminator.parameters()])
    for whole, parts in zip(*gradients, strict=True):
        assert (parts - whole).norm() <= 2e-3 * whole.norm()


def test_two_processes_train_as_one(tiny_run, tmp_path, commands):
    """Class weights and LabelMix's draws span the batches of all."""
    path, run = tiny_run
    shared = (
        *OASIS, "trainer.max_iterations=2", "trainer.iteration=reference", "trainer.log_every=1",
        "trainer.init.gain=1.0", "gen_opt={lr: 0.01, adam_eps: 1.0}", "dis_opt={lr: 0.01, adam_eps: 1.0}",
    )  # fmt: skip
    one = run("one", *shared)
    arguments = [f"--set={item}" for item in (*shared, "data.train.batch_size=2")]
    launcher = (*TORCHRUN, "--standalone", "--nproc_per_node=2")
    result = commands.run(
        *launcher, "train.py", "--config", path, "--logdir", tmp_path / "two", *arguments, NO_CURVES="1"
    )
    assert result.returncode == 0, result.stderr
    two = checkpoint.load_checkpoint(checkpoint.newest_checkpoint(tmp_path / "two"))
    for ours, theirs in zip(losses_in(tmp_path / "two"), losses_in(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    for part in ("generator", "discriminator"):
        theirs = tensors_of(two[part])
        for name, tensor in tensors_of(one[part]).items():
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_both_forms_of_the_average_are_loaded_by_inference(tiny_run, tmp_path):
    _, run = tiny_run
    for form in ("folded", "state"):
        average = f"trainer.model_average={{form: {form}, start_iteration: 0, beta: 0.9, batch_norm_images: 8}}"
        content = run(form, *OASIS, average, "trainer.max_iterations=2")
        assert any(key.endswith("weight_u") for key in content["generator_ema"]) == (form == "state")
        model = Model.load(checkpoint.newest_checkpoint(tmp_path / form), for_inference=False)
        assert model.weights == "ema"
        layout, z = random_layout(model.layout_spec, 1, 64, 64), torch.randn(2, 1, 3)
        images = [model.generator(layout, noise) for noise in z]
        assert images[0].isfinite().all() and not torch.equal(*images)
    with pytest.raises(CheckpointError, match=r"its EMA has trainer\.model_average\.form: folded, this config state"):
        run("folded", *OASIS, average, "trainer.max_iterations=3")
    # Noise has no size, so weights serve at any.
    larger = ("data.train.augmentations={resize_h_w: [128, 64]}", "trainer.max_iterations=1")
    run("larger", *OASIS, average, *larger, init_from=tmp_path / "folded")


def plain_halving(conv, x):
    return F.avg_pool2d(conv(x), 2)


def plain_doubling(conv, x):
    return conv(F.interpolate(x, scale_factor=2, mode="nearest"))


RESIZING = [(unet.convolve_and_halve, plain_halving), (unet.enlarge_and_convolve, plain_doubling)]


def forward_and_gradients(function, conv, x, direction=None):
    state = copy.deepcopy(conv.state_dict())
    y = function(conv, x)
    direction = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape) if direction is None else direction
    gradients = torch.autograd.grad((y * direction).sum(), [x, *conv.parameters()])
    conv.load_state_dict(state)  # spectral norm has iterated
    return [y.detach(), *gradients]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("spectral", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("fused", "plain"), RESIZING)
def test_a_convolution_that_also_resizes_is_the_two_steps(fused, plain, bias, spectral, memory_format):
    torch.manual_seed(0)
    for n, channels, out, height, width in ((1, 3, 5, 2, 2), (2, 7, 1, 6, 10), (3, 5, 3, 12, 4)):
        conv = conv2d(channels, out, 3, padding=1, bias=bias, spectral=spectral)
        x = torch.randn(n, channels, height, width).to(memory_format=memory_format)
        ours, theirs = (forward_and_gradients(f, conv, x.requires_grad_())[0] for f in (fused, plain))
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        conv, x = conv.double(), x.detach().double().requires_grad_()
        for a, b in zip(*(forward_and_gradients(f, conv, x) for f in (fused, plain)), strict=True):
            assert (a - b).abs().max() <= 1e-9 * b.abs().max()


@pytest.mark.parametrize(("fused", "plain"), RESIZING)
def test_a_convolution_that_also_resizes_has_second_derivatives(fused, plain):
    torch.manual_seed(0)
    conv, x = torch.nn.Conv2d(3, 2, 3, padding=1).double(), torch.randn(1, 3, 4, 6).double().requires_grad_()
    penalties = []
    for function in (fused, plain):
        (gradient,) = torch.autograd.grad(function(conv, x).pow(3).sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(gradient.square().sum(), [x, conv.weight, conv.bias]))
    for a, b in zip(*penalties, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("fused", "plain"), RESIZING)
def test_a_convolution_that_also_resizes_takes_autocast(fused, plain, dtype):
    torch.manual_seed(0)
    conv, x = conv2d(8, 8, 3, padding=1, spectral=True), torch.randn(1, 8, 8, 8, requires_grad=True)
    exact = forward_and_gradients(plain, conv, x)
    for function in (fused, plain):
        with torch.autocast("cpu", dtype=dtype):
            found = forward_and_gradients(function, conv, x)
        assert found[0].dtype == dtype and found[1].dtype == torch.float32
        torch.testing.assert_close(found[0].float(), exact[0], atol=0.05, rtol=0.05)


def test_groups_of_images_are_scored_as_one_after_the_other(monkeypatch):
    """At any resolution: with power iterations before each, the same outputs, gradients and buffers."""
    torch.manual_seed(0)
    network = OASISDiscriminator(LayoutSpec(4), num_filters=4, middle_num_filters=5, max_num_filters=6).double()
    images = torch.rand(6, 3, 64, 128, dtype=torch.float64, requires_grad=True)
    state, results = copy.deepcopy(network.state_dict()), []

    def together():
        return network.decoder(network.encoder(images, 3), 3)

    def one_by_one():
        return torch.cat([network.decoder(network.encoder(group)) for group in images.chunk(3)])

    for large, run in ((0, one_by_one), (10**9, together), (unet.LARGE, together), (0, together)):
        monkeypatch.setattr(unet, "LARGE", large)
        network.load_state_dict(state)
        network.zero_grad()
        y = run()
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        gradients = {name: value.grad for name, value in network.named_parameters() if value.grad is not None}
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        results.append({"y": y.detach(), "images": images.grad.clone()} | gradients | buffers)
        images.grad = None
    for found in results[1:]:
        for name, expected in results[0].items():
            assert (found[name] - expected).abs().max() <= 1e-9 * expected.abs().max().clamp(min=1e-6), name
    network.eval()
    torch.testing.assert_close(together(), one_by_one(), rtol=1e-9, atol=1e-12)


def test_losses_of_classes_do_not_depend_on_the_memory_format():
    torch.manual_seed(0)
    spec, loss = LayoutSpec(4), SegmentationGANLoss()
    layout = random_layout(spec, 2, 8, 12)
    plan, results = loss.plan(layout, 0, 0), []
    logits = torch.randn(6, 1 + spec.num_label_channels, 8, 12)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = logits.contiguous(memory_format=memory_format).requires_grad_()
        terms = loss.discriminator(split_scores([Scores(x, [])], 3), layout, plan)
        gradients = torch.autograd.grad(sum(value * k for k, value in enumerate(terms.values(), 1)), x)
        results.append([*terms.values(), *gradients])
    assert len(results[0]) == 4
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_the_discriminator_makes_activations_again(monkeypatch):
    torch.manual_seed(0)
    network = OASISDiscriminator(LayoutSpec(4), num_filters=4, middle_num_filters=5, max_num_filters=6)
    state, layout = copy.deepcopy(network.state_dict()), random_layout(LayoutSpec(4), 1, 64, 128)
    image, convolved, results = torch.rand(1, 3, 64, 128, requires_grad=True), [], []
    for block in network.encoder.blocks[1:]:
        block.conv_1.register_forward_pre_hook(lambda module, inputs: convolved.append(ref(inputs[0])))
    for forgets in (True, False):
        if not forgets:
            monkeypatch.setattr(unet, "forgotten", lambda tensor, again: nullcontext())
        network.load_state_dict(state)
        convolved.clear()
        (scores,) = network(layout, image)
        assert [one() is None for one in convolved] == [forgets] * 5
        gradients = torch.autograd.grad(scores.logits.square().sum(), [image, *network.parameters()])
        results.append([scores.logits.detach(), *gradients])
    assert all(map(torch.equal, *results))


def test_noise_comes_first_in_every_layer_that_sees_labels():
    spec = LayoutSpec(4, has_dont_care=True)
    generator = OASISGenerator(spec, (64, 64), num_filters=2, norm=partial(SPADE, hidden_channels=4), style_dims=3)
    seen = [generator.fc, *(module.shared for module in generator.modules() if isinstance(module, SPADE))]
    assert {conv.weight.shape[1] for conv in seen} == {3 + 5}
    layout, z = random_layout(spec, 2, 64, 96), torch.randn(2, 3)
    everywhere = z[:, :, None, None].expand(-1, -1, 64, 96)
    generator.eval()
    torch.testing.assert_close(generator(layout, z), generator(layout, everywhere), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="style code missing, but style_dims is 3"):
        generator(layout)


WRONG = {
    ("losses={gan: 1, segmentation_gan: 1, feature_matching: 0}",):
        r"losses must contain one term that states the discriminator's loss, not gan and segmentation_gan",
    ("losses={gan: 1, segmentation_gan: 0, feature_matching: 0}",):
        r"losses\.gan does not fit dis \(oasis_unet\), which scores each pixel's class: write"
        r" losses\.segmentation_gan: 1 \(and losses\.gan: 0\)",
    ("dis={type: multiscale_patch}",):
        r"losses\.segmentation_gan does not fit dis \(multiscale_patch\), which scores whether patches are real, and no"
        r" classes: write dis\.type: oasis_unet",
    ("losses={segmentation_gan: 1, gan: 0, feature_matching: 10}",):
        r"losses\.feature_matching compares features, and dis \(oasis_unet\) gives none",
    ("data.train.augmentations={resize_h_w: [96, 160]}",):
        r"gives images of 96x160, but dis \(oasis_unet\) needs at least 64, and multiples of 64: such as"
        r" \[128, 128\]; or lower dis\.encoder\.num_blocks",
    ("data.train.augmentations={resize_h_w: [32, 128]}",): r"multiples of 64: such as \[64, 128\]",
    ("trainer.freeze_discriminator_layers=7",): r"dis \(oasis_unet\) has 6 layers that it can freeze",
    ("dis={type: multiscale_patch}", "losses={gan: 1, segmentation_gan: 0}", "trainer.freeze_discriminator_layers=40"):
        r"dis \(multiscale_patch\) has \d layers that it can freeze",
    ("data.labels=null", "data.edges=file"): r"oasis_unet scores classes, and data\.labels is null",
}  # fmt: skip


@pytest.mark.parametrize("overrides", WRONG)
def test_what_does_not_fit_is_one_message(tiny_run, overrides):
    with pytest.raises(ConfigError, match=WRONG[overrides]):
        check_run(config_of(tiny_run[0], *overrides), 1)


def test_a_discriminator_of_fewer_blocks_takes_other_sizes(tiny_run):
    size = "data.train.augmentations={resize_h_w: [96, 160]}"
    config = config_of(tiny_run[0], size, "dis.encoder={type: oasis, num_blocks: 5}")
    check_run(config, 1)
    discriminator = build_discriminator(config)
    assert discriminator.size_multiple == 32
    (scores,) = discriminator(random_layout(LayoutSpec(5, True), 1, 96, 160), torch.rand(1, 3, 96, 160))
    assert scores.logits.shape == (1, 7, 96, 160)


def test_perceptual_without_weights_is_refused_before_training(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "nothing"))
    config = config_of(tiny_run[0], "losses={segmentation_gan: 1, gan: 0, feature_matching: 0, perceptual: 10}")
    with pytest.raises(ConfigError, match="no weights at"):
        build_losses(config)


def test_the_samples_recipe_is_valid():
    config = load_config("configs/projects/oasis/sample/small64.yaml")
    check_run(config, 1)
    assert config.adversarial_loss == "segmentation_gan"
