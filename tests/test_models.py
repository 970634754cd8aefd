"""Every registered component runs; layers equal plain computations."""

import copy
import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layout import random_layout
from torch import nn

from imaginaire_spade.errors import ConfigError
from imaginaire_spade.layout import LayoutSpec, NoiseRegions
from imaginaire_spade.losses import AdversarialLoss, GeneratorOutputs
from imaginaire_spade.models import convolution
from imaginaire_spade.models import generator as generator_module
from imaginaire_spade.models.convolution import convolve_pixels, measure_choices, products_of_windows
from imaginaire_spade.models.discriminator import split_scores
from imaginaire_spade.models.for_inference import WinogradConv2d
from imaginaire_spade.models.generator import Pix2pixHDGenerator, SPADEGenerator, StyleSPADEGenerator
from imaginaire_spade.models.layers import InstanceNorm2d, enlarge_smoothly, initialise
from imaginaire_spade.models.noise_injection import PixelNoise
from imaginaire_spade.models.norms import SPADE
from imaginaire_spade.models.products import HAS_ONEDNN, Choices
from imaginaire_spade.models.spectral_norm import (
    SpectralConv2d,
    SpectralConvTranspose2d,
    SpectralLinear,
    fold_spectral_norm,
)
from imaginaire_spade.registry import DISCRIMINATORS, ENCODERS, GENERATORS, LOSSES, NORMS, Registry
from imaginaire_spade.training.state import reestimate_batch_norm, update_average

SPEC = LayoutSpec(5, has_dont_care=True, has_edges=True)
SMALL_NORM = partial(SPADE, hidden_channels=8)


@pytest.mark.parametrize("name", NORMS.names())
def test_every_norm_gives_the_channels_it_says_and_passes_gradients(name):
    spec = replace(SPEC, has_distances=NORMS[name].needs_distances)
    norm = NORMS[name](6, spec)
    x = torch.randn(2, 6, 8, 10, requires_grad=True)
    y = norm(x, random_layout(spec, 2, 32, 40))
    assert y.shape == (2, norm.out_channels, 8, 10)
    y.square().sum().backward()
    assert all(p.grad is not None for p in norm.parameters())


@pytest.mark.parametrize("name", NORMS.names())
@pytest.mark.parametrize("training", [True, False])
def test_every_norm_enlarges_before_and_activates_after(name, training):
    spec = replace(SPEC, has_distances=NORMS[name].needs_distances)
    norm = NORMS[name](6, spec).double().train(training)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    layout = random_layout(spec, 2, 16, 20)
    x = torch.randn(2, 6, 8, 10, dtype=torch.float64, requires_grad=True)
    plain = F.leaky_relu(copy.deepcopy(norm)(F.interpolate(x, scale_factor=2), layout), 0.2)
    y = norm(x, layout, upsample=2, slope=0.2)
    torch.testing.assert_close(y, plain)
    weights = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad((out * weights).sum(), x) for out in (y, plain)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", GENERATORS.names())
@pytest.mark.parametrize("style_dims", [0, 8])
def test_every_generator_makes_pictures_of_the_layouts_size(name, style_dims):
    if name == "style_spade" and not style_dims:
        with pytest.raises(ConfigError, match=r"gen\.style_dims: this generator needs a style code"):
            GENERATORS[name](SPEC, (64, 64), style_dims=0)
        return
    if "style_dims" in GENERATORS.schema(name).model_fields:
        generator = GENERATORS[name](SPEC, (64, 64), num_filters=2, style_dims=style_dims)
    else:
        generator, style_dims = GENERATORS[name](SPEC, (64, 64), num_filters=2), 0
    multiple = generator.size_multiple
    for height, width in ((64, 64), (2 * multiple, 3 * multiple)):
        z = torch.randn(2, style_dims) if style_dims else None
        image = generator(random_layout(SPEC, 2, height, width), z)
        assert image.shape == (2, 3, height, width) and image.abs().max() <= 1 and image.dtype == torch.float32
    with pytest.raises(ValueError, match="multiples of"):
        generator(random_layout(SPEC, 1, multiple + 1, multiple), z)
    with pytest.raises(ValueError, match="style code"):
        generator(random_layout(SPEC, 1, multiple, multiple), None if style_dims else torch.randn(1, 8))


def test_clade_looks_up_scale_and_shift_by_class_without_one_plus():
    norm = NORMS["clade"](3, LayoutSpec(4))
    with torch.no_grad():
        norm.bias.copy_(torch.randn(4, 3))
    layout = random_layout(LayoutSpec(4), 2, 12, 12)
    x = torch.randn(2, 3, 12, 12)
    normal = F.batch_norm(x, None, None, training=True)
    y = norm(x, layout)
    for n, h, w in ((0, 3, 4), (1, 11, 0), (1, 5, 5)):
        c = int(layout.labels[n, h, w]) % 4  # a pixel without a class counts as class 0
        torch.testing.assert_close(y[n, :, h, w], normal[n, :, h, w] * norm.weight[c] + norm.bias[c])


def test_clade_gives_the_same_for_either_memory_order_with_the_same_gradients():
    spec = LayoutSpec(4, True, False, True)
    norm, layout = NORMS["clade_icpe"](3, spec), random_layout(spec, 2, 12, 10)
    x = torch.randn(2, 3, 12, 10)
    found = []
    for order in (torch.contiguous_format, torch.channels_last):
        norm.zero_grad()
        y = norm(x.contiguous(memory_format=order), layout)
        assert y.is_contiguous(memory_format=torch.channels_last)
        y.square().sum().backward()
        found.append([y, *(p.grad for p in norm.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_clade_icpe_modulates_scale_and_shift_by_position_but_not_where_ids_are_skipped():
    spec = LayoutSpec(4, True, False, True)
    norm = NORMS["clade_icpe"](3, spec, skip_ids=(0, 4))
    layout = random_layout(spec, 2, 12, 12)
    x = torch.randn(2, 3, 12, 12)
    plain = NORMS["clade"](3, spec)
    initialise(norm, "xavier", 0.02)
    plain.load_state_dict(norm.state_dict(), strict=False)
    torch.testing.assert_close(norm(x, layout), plain(x, layout))  # as CLADE before any training

    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn_like(parameter))
    normal = F.batch_norm(x, None, None, training=True)
    y = norm(x, layout)
    for n, h, w in itertools.product((0, 1), (0, 3, 11), (1, 5, 10)):
        c = int(layout.labels[n, h, w])
        d = torch.zeros(2) if c in (0, 4) else layout.distances[n, :, h, w]
        by = [1 + (part.weight.flatten() @ d + part.bias) for part in (norm.scale_position, norm.shift_position)]
        expected = normal[n, :, h, w] * norm.weight[c] * by[0] + norm.bias[c] * by[1]
        torch.testing.assert_close(y[n, :, h, w], expected)
    with pytest.raises(ConfigError, match=r"skip_ids: \[5\] are no train ids: write ids of 0\.\.4"):
        NORMS["clade_icpe"](3, spec, skip_ids=(0, 5))


@pytest.mark.parametrize("name", NORMS.names())
@pytest.mark.parametrize("generator", [SPADEGenerator, StyleSPADEGenerator])
def test_every_norm_works_in_the_generators_that_take_one(generator, name):
    spec = replace(SPEC, has_distances=NORMS[name].needs_distances)
    network = generator(spec, (32, 32), num_filters=2, style_dims=4, norm=NORMS[name])
    image = network(random_layout(spec, 2, 32, 64), torch.randn(2, 4))
    assert image.shape == (2, 3, 32, 64)
    image.square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_concat_appends_the_layout_to_the_normalised_features():
    norm = NORMS["concat"](3, SPEC)
    layout, x = random_layout(SPEC, 2, 16, 24), torch.randn(2, 3, 8, 12)
    y = norm(x, layout)
    torch.testing.assert_close(y[:, :3], F.batch_norm(x, None, None, training=True))
    dense = F.interpolate(layout.one_hot(), size=(8, 12), mode="nearest")
    assert norm.out_channels == 3 + SPEC.num_channels and torch.equal(y[:, 3:], dense)


@pytest.mark.parametrize(("name", "style_dims"), [("spade", 0), ("spade", 8), ("oasis", 8)])
@pytest.mark.parametrize("norm", ["spade", "clade"])
def test_noise_injection_changes_pixels_by_the_style_code_and_starts_at_nothing(name, norm, style_dims):
    torch.manual_seed(0)
    make = partial(GENERATORS[name], SPEC, (64, 64), num_filters=2, norm=partial(NORMS[norm]))
    generator = make(style_dims=style_dims, noise_injection=True).eval()
    plain = make(style_dims=style_dims).eval()
    initialise(generator, "xavier", 1.0)
    assert make(style_dims=0, noise_injection=True).style_dims == 2
    assert generator.style_dims == max(style_dims, 2) and generator.halo is None
    strengths = [p for name, p in generator.named_parameters() if name.startswith("noise.strengths.")]
    assert len(strengths) == 2 * len(generator.blocks) and not any(p.any() for p in strengths)
    weights = {name: value for name, value in generator.state_dict().items() if "noise" not in name}
    plain.load_state_dict(weights)  # the noise itself is no part of a checkpoint
    layout, z = random_layout(SPEC, 3, 64, 96), torch.randn(3, generator.style_dims)
    torch.testing.assert_close(generator(layout, z), plain(layout, z if style_dims else None))

    generator(layout, z).square().mean().backward()
    assert all(p.grad.any() for p in strengths)  # so it learns
    torch.nn.init.constant_(strengths[-1], 1.0)
    images = generator(layout, z)
    torch.testing.assert_close(generator(layout, z), images, rtol=0, atol=0)
    torch.testing.assert_close(generator(layout[1:2], z[1:2]), images[1:2], rtol=1e-4, atol=1e-5)
    difference = (generator(layout, torch.cat([-z[:, :2], z[:, 2:]], 1)) - images).abs().amax(1)
    assert (difference > 1e-6).float().mean() > 0.99


def test_pixel_noise_is_white_and_its_own_in_every_block_and_image():
    noise, z = PixelNoise([4] * 8), torch.tensor([[0.3, -1.2], [0.3, -1.1], [-2.0, 0.5]])
    maps = torch.stack([torch.cat(noise(z, 96, 128, block)[0], 1) for block in range(7)])  # [7, 3, 2, 96, 128]
    assert maps.mean().abs() < 0.02 and abs(maps.std() - 1) < 0.02
    others = torch.corrcoef(maps.reshape(42, -1)) - torch.eye(42)
    assert others.abs().max() < 0.05
    for places in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0)):
        assert (maps.roll(places, (-2, -1)) * maps).mean().abs() < 0.01
    assert torch.equal(noise(z[1:2], 40, 50, 3)[0][1], maps[3, 1:2, 1:, :40, :50])
    extreme = torch.tensor([[40.0, -40.0]])  # the far ends of the map meet
    assert torch.equal(noise(extreme, 1024, 8, 0)[0][0][:, :, 512:], noise(-extreme, 512, 8, 0)[0][0])


def test_each_region_and_pixel_has_the_pixel_noise_of_its_own_vector():
    noise, vectors = PixelNoise([4] * 8), torch.randn(2, 3, 5)
    index = torch.randint(0, 3, (2, 8, 12), dtype=torch.uint8)
    by_region = noise(NoiseRegions(vectors, index), 8, 12, 2)[0]
    by_pixel = noise(NoiseRegions(vectors, index).spread(8, 12), 8, 12, 2)[0]
    for number in range(3):
        alone, of_one = (noise(z, 8, 12, 2)[0] for z in (vectors[:, number], NoiseRegions(vectors[:, [number]], None)))
        here = (index == number)[:, None]
        for place in range(2):
            assert torch.equal(alone[place], of_one[place])
            for maps in (by_region, by_pixel):
                assert torch.equal(maps[place][here], alone[place][here])


@pytest.mark.parametrize("size", [256, 512, 1024])
def test_larger_pictures_are_sums_of_the_image_heads(size):
    # No reference numbers exist beyond 256: this checks the sum as imaginaire's description gives it.
    options = {"num_filters": 2, "style_dims": 4, "norm": SMALL_NORM}
    small = StyleSPADEGenerator(SPEC, (256, 256), **options).state_dict()
    generator = StyleSPADEGenerator(SPEC, (size, size), output_size=size, output_multiplier=1.5, **options)
    larger = {key: value.shape for key, value in generator.state_dict().items()}
    assert {key: value.shape for key, value in small.items()}.items() <= larger.items()
    assert generator.size_multiple == size // 16
    added = {"up_3a", "up_3b", "to_image_512"} if size >= 512 else set()
    added |= {"up_4a", "up_4b", "to_image_1024"} if size >= 1024 else set()
    assert {key.partition(".")[0] for key in larger if key not in small} == added
    pictures = []
    for head in ["to_image", *(name for name in added if name.startswith("to_image"))]:
        generator.get_submodule(head).register_forward_hook(lambda m, inputs, output: pictures.append(output))
    height, width = size // 4, size // 8
    image = generator(random_layout(SPEC, 2, height, width), torch.randn(2, 4))
    assert [picture.shape[2] for picture in pictures] == [64, 128, 256][: len(added) // 3 + 1]
    whole = sum(F.interpolate(picture, size=(height, width), mode="nearest") for picture in pictures)
    torch.testing.assert_close(image, torch.tanh(1.5 * whole))
    assert all(picture.std() > 0 for picture in pictures)


def test_the_positional_encoding_adds_row_and_column_to_the_start_map():
    # No reference numbers exist for it: this checks the coordinates themselves.
    generator = StyleSPADEGenerator(
        SPEC, (256, 256), num_filters=2, style_dims=4, positional_encoding=True, norm=SMALL_NORM
    )
    seen = []
    generator.head_0.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    layout = random_layout(SPEC, 2, 256, 256)
    assert generator(layout, torch.randn(2, 4)).shape == (2, 3, 256, 256)
    assert torch.equal(seen[0][:, :-2], layout.resized(16, 16).one_hot())
    line = torch.linspace(-1, 1, 16)
    torch.testing.assert_close(seen[0][1, -2], line[:, None].expand(16, 16))
    torch.testing.assert_close(seen[0][1, -1], line[None, :].expand(16, 16))
    generator(random_layout(SPEC, 1, 128, 512), torch.randn(1, 4))
    row, column = seen[1][0, -2], seen[1][0, -1]
    assert row.shape == (8, 32) and (row.diff(dim=0) > 0).all() and row.diff(dim=1).abs().max() < 1e-6
    assert (column.diff(dim=1) > 0).all() and column.diff(dim=0).abs().max() < 1e-6


def test_pix2pixhd_is_the_published_network_and_says_what_size_it_needs():
    with torch.device("meta"):
        generator = Pix2pixHDGenerator(LayoutSpec(35, has_edges=True), (256, 512))
    # By the paper's appendix: 3x3 weights of down, residual and up layers, 7x7 ones at both ends, and biases.
    widths = [64, 128, 256, 512, 1024]
    ends = 49 * (36 * 64 + 64 * 3) + 64 + 3
    strided = sum(9 * a * b for a, b in itertools.pairwise(widths))
    biases = sum(widths[1:]) + sum(widths[:-1])
    expected = ends + 2 * strided + biases + 9 * 2 * (9 * 1024 * 1024 + 1024)
    assert sum(p.numel() for p in generator.parameters()) == expected
    assert not any(isinstance(module, (nn.BatchNorm2d, SPADE)) for module in generator.modules())
    strong = Pix2pixHDGenerator(SPEC, (64, 64), num_filters=2, num_blocks=1, spectral_norm=True)
    plain = [name for name, m in strong.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))
             and not hasattr(m, "weight_u")]  # fmt: skip
    assert plain == ["to_image"]
    with pytest.raises(ConfigError, match=r"gen\.num_downsamplings: 4 needs images of 32 or more, not 16x64"):
        Pix2pixHDGenerator(SPEC, (16, 64))
    with pytest.raises(ValueError, match="both must be 32 or more"):
        strong(random_layout(SPEC, 1, 16, 64))


@pytest.mark.parametrize(
    ("channels", "size", "groups", "stride"),
    [(24, 4, 1, 1), (24, 5, 3, 2), (1024, 3, 1, 1), (1024, 2, 2, 1), (256, 31, 1, 1), (256, 16, 2, 1), (64, 128, 2, 2)],
)
def test_to_divide_what_is_convolved_is_to_divide_the_weight(channels, size, groups, stride):
    """A layer with more weights than values divides those by sigma; gradients are products with very few pixels, and of
    the weight with many."""
    torch.manual_seed(0)
    layer = SpectralConv2d(channels, channels, 3, stride, padding=1).double()
    plain, x = copy.deepcopy(layer), torch.randn(2 * groups, channels, size, size, dtype=torch.double)
    own, other = (x.clone().requires_grad_() for _ in range(2))
    y = layer(own, groups)
    assert y.grad_fn.name() == "_QuotientBackward" and y.grad_fn.by_winograd == (channels == 256)
    outputs = []
    for images in other.chunk(groups):
        plain.iterate()
        sigma = plain.weight_u.clone() @ plain.weight.flatten(1) @ plain.weight_v.clone()
        outputs.append(F.conv2d(images, plain.weight / sigma, plain.bias, stride, padding=1))
    expected = torch.cat(outputs)
    direction = torch.randn_like(expected)
    (y * direction).sum().backward()
    (expected * direction).sum().backward()
    gradients = ((a.grad, b.grad) for a, b in zip(layer.parameters(), plain.parameters(), strict=True))
    for found, wanted in ((y, expected), (own.grad, other.grad), *gradients):
        assert (found - wanted).norm() <= 1e-12 * wanted.norm()
    assert torch.equal(layer.weight_u, plain.weight_u)
    layer.requires_grad_(False)  # as D's in the generator's update
    layer(own, groups).sum().backward()
    assert (own.grad - other.grad).norm() > 0


# Double precision by torch's own products; oneDNN's are of float32.
WAYS = st.sampled_from([(torch.double, Choices()), (torch.float, Choices(onednn=HAS_ONEDNN))])


@settings(max_examples=30)
@given(st.tuples(*[st.integers(1, 3)] * 3, *[st.integers(4, 9)] * 2), st.integers(1, 4), *[st.integers(1, 2)] * 2, WAYS)
def test_the_gradient_of_a_weight_as_products_of_windows(shape, size, stride, padding, way):
    (count, channels, out, height, width), (dtype, choices) = shape, way
    torch.manual_seed(0)
    x = torch.randn(count, channels, height, width, dtype=torch.double)
    weight = torch.randn(out, channels, size, size, dtype=torch.double, requires_grad=True)
    y = F.conv2d(x, weight, None, stride, padding - 1)
    gradient = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, weight, gradient)
    x, gradient = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, gradient))
    found = products_of_windows(x, gradient, size, stride, padding - 1, choices)
    torch.testing.assert_close(found, expected.to(dtype), rtol=1e-5, atol=1e-5)


@settings(max_examples=30)
@given(
    st.tuples(*[st.integers(1, 3)] * 3, *[st.integers(1, 9)] * 2), st.sampled_from([1, 256, 2**22]), st.booleans(), WAYS
)
def test_winograds_form_is_the_convolution_and_its_gradients(shape, numbers, has_bias, way):
    """Also of odd sizes, and in pieces of images, of rows and of output channels."""
    (count, channels, out, height, width), (dtype, choices) = shape, way
    torch.manual_seed(0)
    x = torch.randn(count, channels, height, width, dtype=torch.double, requires_grad=True)
    weight = torch.randn(out, channels, 3, 3, dtype=torch.double, requires_grad=True)
    bias = torch.randn(out, dtype=torch.double) if has_bias else None
    expected = F.conv2d(x, weight, bias, padding=1)
    gradient = torch.randn_like(expected)
    wanted = expected, *torch.autograd.grad(expected, (x, weight), gradient)
    bias = None if bias is None else bias.to(dtype)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(convolution, "NUMBERS", numbers)
        inputs = x.to(dtype), weight.to(dtype), gradient.to(dtype), choices
        y, found = convolution.winograd(*inputs[:2], bias, choices), convolution.winograd_gradients(*inputs)
        parts = [convolution.winograd_gradients(*inputs, *asked) for asked in ((True, False), (False, True))]
    assert parts[0][1] is parts[1][0] is None
    assert torch.equal(parts[0][0], found[0]) and torch.equal(parts[1][1], found[1])
    close = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float else {}
    for ours, theirs in zip((y, *found), wanted, strict=True):
        torch.testing.assert_close(ours, theirs.to(dtype), **close)


def test_training_measures_its_choices_each_by_those_before():
    def answer(onednn: float, windows: float | None, narrow: float, wide: float) -> tuple[Choices, list[str]]:
        asked: list[str] = []

        def ask(question: str, measure: object) -> float | None:
            asked.append(question)
            for part, gain in (("128", narrow), ("256", wide), ("gradients", windows)):
                if part in question:
                    return gain
            return onednn

        return measure_choices(ask), asked

    if not HAS_ONEDNN:
        pytest.skip("a torch without oneDNN")
    assert answer(0.9, 1.2, 1.2, 2)[0] == Choices(False, True, 128)
    assert answer(1.04, 1.2, 1.04, 1.1)[0] == Choices(False, True, 256)
    assert answer(1.0, 0.9, 0.5, 1.04)[0] == Choices(False, False, 0)
    assert answer(2.0, 0.9, 0.5, 1.1)[0] == Choices(True, False, 256)
    assert answer(2.0, None, 2, 2)[0] == Choices()
    assert answer(2.0, 0.9, 0.5, 1.04)[1] == [
        "matrix products by oneDNN",
        "gradients of weights as products by oneDNN",
        "Winograd in training, 128 channels by oneDNN, no windows",
        "Winograd in training, 256 channels by oneDNN, no windows",
    ]


def test_what_is_measured_is_how_a_choice_computes():
    pairs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "gain", lambda way, usual: pairs.append((way.args[0], usual.args[0])) or 1.2)
        measure_choices(lambda question, measure: measure() if "matrix" not in question else 1.0)
    plain, windows, winograd = Choices(False, False, 0), Choices(False, True, 0), Choices(False, True, 128)
    assert pairs == [(windows, plain), (winograd, windows)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "gain", lambda way, usual: (way(), usual(), 1.0)[2])  # both compute
        assert convolution._gain_in_training(128, Choices(HAS_ONEDNN, True, 128)) == 1.0


def test_a_checkpoint_keeps_the_choices_of_its_run():
    assert Choices.kept({"cpu_choices": {"onednn": HAS_ONEDNN, "windows": False, "winograd_from": 128}}) == Choices(
        HAS_ONEDNN, False, 128
    )
    # Of older checkpoints, which had one choice, or none.
    assert Choices.kept({"winograd_from": 128}) == Choices(False, True, 128)
    assert Choices.kept({"cpu_choices": {"winograd_from": 128, "of_a_later_version": 1}}) == Choices(False, True, 128)
    assert Choices.kept({"winograd_from": None}) == Choices.kept({}) == Choices(False, True, 0)


def test_products_by_onednn_have_the_values_and_derivatives_of_torchs_own():
    if not HAS_ONEDNN:
        pytest.skip("a torch without oneDNN")
    torch.manual_seed(0)
    usual, onednn = Choices(), Choices(onednn=True)
    for rows, inner, columns in ((5, 7, 3), (3, 4, 9), (1, 1, 1), (8, 2, 8)):
        a, b = torch.randn(2, rows, inner), torch.randn(2, inner, columns)
        for laid_a, laid_b in ((a, b), (a.mT.contiguous().mT, b), (a, b.mT.contiguous().mT)):
            torch.testing.assert_close(onednn.multiply(laid_a[0], laid_b[0]), a[0] @ b[0])
            torch.testing.assert_close(torch.stack(list(onednn.multiply_each(laid_a, laid_b))), a @ b)
            for choices in (usual, onednn):
                twice = choices.add_each(choices.add_each(None, laid_a, laid_b), laid_a, laid_b)
                torch.testing.assert_close(twice, 2 * (a @ b))
        found = []
        for choices in (usual, onednn):
            x, weight = a[0].clone().requires_grad_(), b[0].mT.clone().requires_grad_()
            y = choices.linear(x, weight)
            assert (y.grad_fn.name() == "_LinearBackward") == choices.onednn
            first = torch.autograd.grad(y.sin().sum(), (x, weight), create_graph=True)
            found.append([y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    x, weight = torch.randn(2, 3).double(), torch.randn(4, 3).double()
    assert torch.equal(onednn.linear(x, weight), F.linear(x, weight))  # oneDNN has no double precision
    assert onednn.linear(x.float().to("meta"), weight.float().to("meta")).shape == (2, 4)  # on another device


@pytest.mark.parametrize(
    ("size", "stride", "padding", "winograd_from"),
    [(3, 1, 1, 0), (3, 1, 1, 64), (3, 1, 1, 128), (3, 2, 0, 64), (4, 2, 2, 64)],
)
def test_a_convolution_of_large_maps_in_channels_last_has_the_same_derivatives(size, stride, padding, winograd_from):
    """In training on a CPU: of x, weight and bias, and the second ones."""
    torch.manual_seed(0)
    x = torch.randn(2, 64, 65 * stride, 65 * stride).double().to(memory_format=torch.channels_last)
    inputs = [t.requires_grad_() for t in (x, torch.randn(64, 64, size, size).double(), torch.randn(64).double())]
    found = []
    for function in (partial(convolve_pixels, choices=Choices(winograd_from=winograd_from)), F.conv2d):
        y = function(*inputs, stride=(stride, stride), padding=(padding, padding))
        assert (y.grad_fn.name() == "_ConvolvedBackward") == (function is not F.conv2d)
        if function is not F.conv2d:
            fits = stride == 1 < winograd_from
            assert y.grad_fn.by_winograd == (fits and winograd_from == 64, fits)
        once = torch.autograd.grad(y.sin().sum(), inputs, retain_graph=True)
        first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        found.append([y, *once, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()


@pytest.mark.parametrize(
    "options", [{"stride": (1, 2)}, {"padding": (1, 0)}, {"padding": "same"}, {"kernel_size": (3, 1)}, {"dilation": 2}]
)
def test_a_convolution_need_not_be_square(options):
    torch.manual_seed(0)
    layer = SpectralConv2d(32, 32, **{"kernel_size": 3} | options).double()
    plain, x = copy.deepcopy(layer), torch.randn(1, 32, 96, 96).double().to(memory_format=torch.channels_last)
    expected = plain._conv_forward(x, plain.normalised_weight(), plain.bias)
    torch.testing.assert_close(y := layer(x), expected)
    (y.sin().sum() + expected.sin().sum()).backward()
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)


@pytest.mark.parametrize(("upsampling", "steps"), [("fewer", 4), ("normal", 5), ("more", 6), ("most", 7)])
def test_upsampling_depth(upsampling, steps):
    generator = SPADEGenerator(SPEC, (128, 128), num_filters=2, upsampling=upsampling, norm=SMALL_NORM)
    assert generator.size_multiple == 2**steps
    assert generator(random_layout(SPEC, 2, 128, 256)).shape == (2, 3, 128, 256)


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 2, 1, 1)])
def test_the_smooth_enlargement_is_torchs_bilinear_one(shape):
    x = torch.randn(shape, dtype=torch.double, requires_grad=True)
    expected = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(enlarge_smoothly(x), expected)
    found, wanted = (torch.autograd.grad(y.sin().sum(), x)[0] for y in (enlarge_smoothly(x), expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("interpolation", "smooth"), [("bilinear", 5), ("nearest_then_bilinear", 2)])
@pytest.mark.parametrize("name", ["spade", "oasis"])
def test_a_generator_with_bilinear_steps_sees_farther(name, interpolation, smooth, monkeypatch):
    torch.manual_seed(0)
    make = partial(GENERATORS[name], SPEC, (32, 32), num_filters=2, style_dims=0, norm=SMALL_NORM)
    generator = make(interpolation=interpolation).eval()
    initialise(generator, "xavier", 1.0)
    halo = generator.halo
    assert halo > make().halo
    calls = []
    monkeypatch.setattr(
        generator_module, "enlarge_smoothly", lambda x: calls.append(x.shape[2:]) or enlarge_smoothly(x)
    )
    place = 40
    layout, changed = (random_layout(SPEC, 1, 32, halo + 64) for _ in range(2))
    changed.labels[..., place + halo :] = 0
    with torch.inference_mode():
        first, second = generator(layout), generator(changed)
    assert torch.equal(first[..., :place], second[..., :place]) and not torch.equal(first, second)
    assert [rows for rows, _ in calls] == 2 * [2**step for step in range(5 - smooth, 5)]


@pytest.mark.parametrize("name", DISCRIMINATORS.names())
def test_every_discriminator_scores_fake_and_real_of_the_same_maps_together(name):
    discriminator = DISCRIMINATORS[name](SPEC, num_filters=4).eval()
    side = max(64, discriminator.min_size)
    layout, fake, real = random_layout(SPEC, 2, side, side), torch.rand(2, 3, side, side), torch.rand(2, 3, side, side)
    together = split_scores(discriminator(layout, torch.cat([fake, real])))
    for half, images in zip(together, (fake, real), strict=True):
        for a, b in zip(half, discriminator(layout, images), strict=True):
            torch.testing.assert_close(a.logits, b.logits)
            assert len(a.features) == len(b.features)


def test_a_discriminators_width_doubles_up_to_its_maximum():
    for num_filters, widths in ((3, [3, 6, 8, 8]), (16, [16, 8, 8, 8])):
        with torch.device("meta"):
            network = DISCRIMINATORS["multiscale_patch"](SPEC, num_filters=num_filters, max_num_filters=8)
        assert [layer[0].out_channels for layer in network.discriminators[0].layers] == widths


@pytest.mark.parametrize("name", ENCODERS.names())
def test_every_encoder_takes_any_size(name):
    encoder = ENCODERS[name](7, num_filters=2, image_size=128)
    for size in ((64, 64), (50, 90)):
        mu, logvar = encoder(torch.rand(2, 3, *size))
        assert mu.shape == logvar.shape == (2, 7)


@pytest.mark.parametrize("name", [name for name in LOSSES.names() if name != "perceptual"])
def test_every_loss_is_a_finite_scalar_with_gradient(name):
    term, layout = LOSSES[name](), random_layout(SPEC, 2, 64, 64)
    of_classes = getattr(term, "scores_classes", False)
    discriminator = DISCRIMINATORS["oasis_unet" if of_classes else "multiscale_patch"](SPEC, num_filters=4)
    fake = torch.rand(2, 3, 64, 64, requires_grad=True)
    mu, logvar = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    real = torch.rand(2, 3, 64, 64)
    scores = split_scores(discriminator(layout, torch.cat([fake, real])))
    plan = term.plan(layout, 0, 0) if isinstance(term, AdversarialLoss) else None
    loss = term(GeneratorOutputs(fake, real, *scores, mu, logvar, layout, plan))
    assert loss.dim() == 0 and loss.isfinite()
    loss.backward()
    assert any(t.grad is not None and t.grad.abs().sum() > 0 for t in (fake, mu))


def test_spectral_convolution_has_unit_norm_and_needs_no_iteration_in_evaluation():
    conv = SpectralConv2d(4, 6, 3, padding=1)
    x = torch.randn(2, 4, 8, 8)
    for _ in range(200):
        conv(x)
    weight = conv.eval().normalised_weight()
    assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, rel=1e-4)
    before = copy.deepcopy(conv.state_dict())
    conv(x)
    assert all(torch.equal(before[k], v) for k, v in conv.state_dict().items())
    torch.testing.assert_close(conv(x), F.conv2d(x, weight, conv.bias, padding=1))


def test_a_new_layers_sigma_is_one_that_its_weight_has():
    """With a random v it was nearly zero at times: about one new U-Net in twelve gave NaN in evaluation mode."""
    for _ in range(20):
        for layer in (SpectralConv2d(4, 6, 3), SpectralConvTranspose2d(4, 6, 3), SpectralLinear(8, 6)):
            sizes = torch.linalg.svdvals(layer._matrix())
            assert sizes[-1] <= layer.sigma() <= sizes[0]


def test_spectral_transposed_convolution_has_unit_norm_over_its_output_channels():
    conv = SpectralConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1)
    reference = nn.utils.spectral_norm(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1))
    reference.load_state_dict({"bias": conv.bias, "weight_orig": conv.weight, "weight_u": conv.weight_u,
                               "weight_v": conv.weight_v})  # fmt: skip
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(conv(x), reference(x))
    torch.testing.assert_close(conv.weight_u, reference.weight_u)


def test_spectral_vectors_keep_their_memory_and_a_graph_its_own():
    """A CUDA graph replays on the memory that it was captured with."""
    convs = [SpectralConv2d(4, 6, 3, padding=1)]
    convs.append(copy.deepcopy(convs[0]))
    x = torch.randn(2, 4, 8, 8)
    places = [buffer.data_ptr() for buffer in convs[0].buffers()]
    first, second = convs[0](x).square().sum(), convs[0](x).sum()
    second.backward()
    convs[0].zero_grad()
    first.backward()
    convs[1](x).square().sum().backward()
    assert [buffer.data_ptr() for buffer in convs[0].buffers()] == places
    assert torch.equal(convs[0].weight.grad, convs[1].weight.grad)
    assert not torch.equal(convs[0].weight_u, convs[1].weight_u)


def test_a_network_can_be_copied_after_a_training_forward():
    generator = SPADEGenerator(SPEC, (32, 32), num_filters=2, norm=SMALL_NORM)
    generator(random_layout(SPEC, 2, 32, 64)).sum().backward()
    assert copy.deepcopy(generator).state_dict().keys() == generator.state_dict().keys()


@pytest.mark.parametrize("kind", ["xavier", "normal", "kaiming", "orthogonal"])
def test_initialisation_zeroes_biases_and_draws_weights(kind):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 5))
    initialise(network, kind, 0.02)
    assert all(module.bias.abs().max() == 0 and module.weight.std() > 0 for module in network)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (2, 8, 16, 16)])
def test_instance_norm_has_the_right_gradient_in_either_memory_order(shape, order):
    x, gradient = torch.randn(2, *shape, dtype=torch.float64)
    gradient = gradient.contiguous(memory_format=order)  # torch's own instance norm fails here
    leaf = x.requires_grad_()
    centred = leaf - leaf.mean((2, 3), keepdim=True)
    plain = centred / torch.sqrt(centred.square().mean((2, 3), keepdim=True) + 1e-5)
    (wanted,) = torch.autograd.grad(plain, leaf, gradient)
    y = InstanceNorm2d(shape[1])(leaf)
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(torch.autograd.grad(y, leaf, gradient)[0], wanted)


def test_folded_spectral_norms_change_no_output():
    generator = SPADEGenerator(SPEC, (32, 64), num_filters=2, style_dims=3, norm=SMALL_NORM)
    layout, z = random_layout(SPEC, 2, 32, 64), torch.randn(2, 3)
    with torch.no_grad():
        generator(layout, z)  # moves u and v off their start
        wanted = generator.eval()(layout, z)
        folded = fold_spectral_norm(copy.deepcopy(generator))
        assert torch.equal(folded(layout, z), wanted)
    assert not any(name.endswith(("_u", "_v")) for name in folded.state_dict())
    assert type(folded.blocks[0].conv_0) is nn.Conv2d and not folded.training


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.sampled_from([1, 4, 300]), st.integers(1, 70), st.integers(1, 40)),
    out=st.sampled_from([3, 256]),
    bias=st.booleans(),
)
def test_a_winograd_convolution_is_the_convolution(shape, out, bias):
    """To 1e-10 in double precision, odd sizes and pictures in several pieces included."""
    torch.manual_seed(0)
    conv = nn.Conv2d(shape[1], out, 3, padding=1, bias=bias).double()
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(WinogradConv2d(conv)(x), conv(x), rtol=1e-10, atol=1e-10)


def test_average_copies_first_then_follows():
    source, average = nn.Linear(3, 3), nn.Linear(3, 3)
    update_average(average, source, 0.0)
    assert torch.equal(average.weight, source.weight)
    old = source.weight.detach().clone()
    with torch.no_grad():
        source.weight.add_(1)
    update_average(average, source, 0.9)
    torch.testing.assert_close(average.weight, 0.9 * old + 0.1 * source.weight)


def test_reestimated_statistics_are_the_plain_average_over_batches():
    generator = SPADEGenerator(SPEC, (32, 32), num_filters=2, norm=SMALL_NORM).eval()
    layouts = [random_layout(SPEC, 2, 32, 64, seed) for seed in range(3)]
    vectors = generator.blocks[0].conv_0.weight_u.clone()
    seen = []
    hook = generator.blocks[0].norm_0.normalize.register_forward_hook(lambda m, inputs, output: seen.append(inputs[0]))
    reestimate_batch_norm(generator, [(layout, None) for layout in layouts])
    hook.remove()
    norm = generator.blocks[0].norm_0.normalize
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0))
    assert norm.momentum == 0.1 and not norm.training
    assert torch.equal(generator.blocks[0].conv_0.weight_u, vectors)


def test_perceptual_loss_reads_weights_from_a_file_and_says_what_to_do_without(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"weights_path: no weights at .*vgg19-dcbb9e9d\.pth.*losses\.perceptual\.weight: 0"
    ):
        LOSSES["perceptual"](layers=("relu_1_1",), layer_weights=(1.0,))
    with pytest.raises(ConfigError, match="relu_9_9"):
        LOSSES["perceptual"](layers=("relu_9_9",), layer_weights=(1.0,))
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="not the weights of torchvision's vgg19"):
        LOSSES["perceptual"](layers=("relu_1_1",), layer_weights=(1.0,), weights_path=str(damaged))

    # Random weights of the first layers stand for the published file, whose key names they bear.
    first, second = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3)
    state = {"features.0.weight": first.weight, "features.0.bias": first.bias,
             "features.2.weight": second.weight, "features.2.bias": second.bias}  # fmt: skip
    path = tmp_path / "checkpoints/vgg19-dcbb9e9d.pth"
    path.parent.mkdir()
    torch.save({key: value.detach() for key, value in state.items()}, path)
    loss = LOSSES["perceptual"](layers=("relu_1_1", "relu_1_2"), layer_weights=(0.5, 2.0), imagenet_statistics=False)
    fake, real = torch.rand(2, 3, 16, 16, requires_grad=True), torch.rand(2, 3, 16, 16)
    value = loss(GeneratorOutputs(fake, real, [], []))

    def plain(x):
        one = F.relu(F.conv2d(x, first.weight, first.bias, padding=1))
        return one, F.relu(F.conv2d(one, second.weight, second.bias, padding=1))

    (a1, a2), (b1, b2) = plain(fake), plain(real)
    torch.testing.assert_close(value, 0.5 * (a1 - b1).abs().mean() + 2 * (a2 - b2).abs().mean())
    value.backward()
    assert fake.grad is not None and not any(p.requires_grad for p in loss.parameters())


def test_a_name_is_registered_once():
    registry = Registry("thing")
    registry.register("a")(int)
    with pytest.raises(ValueError, match="registered twice"):
        registry.register("a")(float)
    with pytest.raises(ConfigError, match="unknown thing 'b'"):
        registry["b"]
