"""The table path against the dense path it replaces."""

import copy
import itertools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock
from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layout import kinds_of_noise, random_layout
from torch import nn

from imaginaire_spade import neighbourhoods
from imaginaire_spade.data.batch import Batch
from imaginaire_spade.layout import LayoutSpec, NoiseRegions, SemanticLayout
from imaginaire_spade.models import layers, modulation, recomputation, spectral_norm
from imaginaire_spade.models import norms as norms_module
from imaginaire_spade.models.discriminator import FPSEDiscriminator, MultiscaleDiscriminator
from imaginaire_spade.models.for_inference import WinogradConv2d, optimise_for_inference
from imaginaire_spade.models.generator import SPADEGenerator, SPADEResidualBlock, StyleSPADEGenerator
from imaginaire_spade.models.layers import initialise, second_convolution, sum_rows, sum_users
from imaginaire_spade.models.norms import CLADE, SPADE, BatchNorm2d
from imaginaire_spade.neighbourhoods import Lookup, find_neighbourhoods
from imaginaire_spade.registry import NORMS


def code_map(n: int, h: int, w: int, num_codes: int, block: int, seed: int) -> torch.Tensor:
    """Blocks of block x block equal codes."""
    g = torch.Generator().manual_seed(seed)
    small = torch.randint(0, num_codes, (n, -(-h // block), -(-w // block)), generator=g)
    return small.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :h, :w].to(torch.int16)


def windows(maps: torch.Tensor, kernel_size: int, outside: int) -> torch.Tensor:
    """The plain computation: [N, H, W] -> [N, H, W, k * k]."""
    padded = F.pad(maps, (kernel_size // 2,) * 4, value=outside)
    return padded.unfold(1, kernel_size, 1).unfold(2, kernel_size, 1).flatten(3)


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 3),
    h=st.integers(1, 14),
    w=st.integers(1, 14),
    num_codes=st.sampled_from([1, 2, 3, 40, 2000, 30000]),
    block=st.integers(1, 6),
    kernel_size=st.sampled_from([1, 3, 5, 7]),
    seed=st.integers(0, 2**31),
)
def test_every_window_is_found_again_and_only_once(n, h, w, num_codes, block, kernel_size, seed):
    codes = code_map(n, h, w, num_codes, block, seed)
    inner, outer, pixels = find_neighbourhoods(codes, num_codes, kernel_size)
    wide = 2 * kernel_size - 1
    around = inner[outer][pixels]  # [N, H, W, k * k, k * k]
    places = torch.arange(wide**2).view(1, wide, wide)
    order = windows(places, kernel_size, -1)[0]
    order = order[kernel_size // 2 : wide - kernel_size // 2, kernel_size // 2 : wide - kernel_size // 2].flatten(0, 1)
    assert torch.equal(around, windows(codes.long(), wide, num_codes)[..., order])

    plain = windows(codes, wide, num_codes).flatten(0, 2)
    used = pixels.unique()
    assert len(used) == len(plain.unique(dim=0))
    assert len(outer.unique(dim=0)) == len(outer)


@settings(max_examples=50, deadline=None)
@given(places=st.integers(1, 50), terms=st.integers(1, 5), rows=st.integers(1, 60), seed=st.integers(0, 2**31))
def test_sums_of_rows_and_their_gradient_are_the_plain_ones(places, terms, rows, seed):
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(0, rows, (places, terms), generator=g)
    table = torch.randn(rows, 3, generator=g, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(places, 3, generator=g, dtype=torch.float64)
    fast, plain = sum_rows(table, Lookup(index, rows)), table[index].sum(1)
    torch.testing.assert_close(fast, plain)
    (a,), (b,) = (torch.autograd.grad((y * weights).sum(), table) for y in (fast, plain))
    torch.testing.assert_close(a, b)


def test_ids_that_do_not_fit_one_integer_are_packed_in_steps():
    g = torch.Generator().manual_seed(0)
    columns = list(torch.randint(0, 3, (9, 500), generator=g) * (2**30 // 2))
    ids, count = neighbourhoods._number(columns, 2**30 + 1)
    rows, plain = torch.stack(columns, 1).unique(dim=0, return_inverse=True)
    assert count == len(rows) and torch.equal(ids, plain)


def blocky_layout(spec: LayoutSpec, n: int, h: int, w: int, seed: int = 0) -> SemanticLayout:
    """Blocks of equal labels, some of them don't care; edges where labels change, and a few elsewhere."""
    labels = code_map(n, h, w, spec.num_classes + 1, 5, seed)
    if not spec.has_edges:
        return SemanticLayout(spec, labels)
    edges = F.pad(labels[:, 1:] != labels[:, :-1], (0, 0, 1, 0)).byte()
    edges[:, ::7, ::3] = 1
    return SemanticLayout(spec, labels, edges)


def results(network: nn.Module, layout: SemanticLayout, x: torch.Tensor, **options) -> list[torch.Tensor]:
    """Output, gradients of x, of all parameters and of the noise vectors, buffers after the forward."""
    x = x.clone().requires_grad_()
    y = network(x, layout, **options)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).cos()
    vectors = [] if layout.noise is None else [layout.noise.vectors]
    gradients = torch.autograd.grad((y * weights).sum() + y.square().mean(), [x, *network.parameters(), *vectors])
    return [y.detach(), *gradients, *network.buffers()]


@settings(max_examples=60, deadline=None)
@given(
    spec=st.builds(LayoutSpec, st.integers(1, 6), st.booleans(), st.booleans()),
    size=st.tuples(st.integers(1, 2), st.integers(1, 17), st.integers(2, 17)),
    kernel_size=st.sampled_from([1, 3, 5]),
    normalization=st.sampled_from(["batch", "instance"]),
    affine=st.booleans(),
    spectral_norm=st.booleans(),
    training=st.booleans(),
    random=st.booleans(),
    channels_last=st.booleans(),
    upsample=st.sampled_from([1, 2]),
    slope=st.sampled_from([1, 0.2]),
    noise=st.sampled_from([None, "image", "region"]),
)
def test_spade_by_tables_is_spade(
    spec, size, kernel_size, normalization, affine, spectral_norm, training, random, channels_last, upsample, slope,
    noise,
):  # fmt: skip
    """To 1e-10 in double precision: output, every gradient, running statistics and spectral-norm vectors."""
    torch.manual_seed(0)
    options = {"normalization": normalization, "kernel_size": kernel_size, "affine": affine,
               "spectral_norm": spectral_norm, "hidden_channels": 4}  # fmt: skip
    layout = random_layout(spec, *size) if random else blocky_layout(spec, *size)
    if noise:
        given, _ = kinds_of_noise(size[0], 2, *size[1:])[noise]
        vectors, index = (given.vectors, given.index) if noise == "region" else (given.unsqueeze(1), None)
        layout = layout.with_noise(NoiseRegions(vectors.double().requires_grad_(), index))
        spec = layout.spec
    dense = SPADE(3, spec, path="dense", **options).double().train(training)
    if affine:
        nn.init.normal_(dense.normalize.weight)
        nn.init.normal_(dense.normalize.bias)
    if normalization == "batch":
        dense.normalize.running_mean.normal_()
        dense.normalize.running_var.uniform_(0.5, 2)
    table = SPADE(3, spec, path="table", **options).double().train(training)
    table.load_state_dict(dense.state_dict())
    x = torch.randn(size[0], 3, *size[1:], dtype=torch.float64) * 2 + 1
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    after = {"upsample": upsample, "slope": slope}
    for a, b in zip(results(table, layout, x, **after), results(dense, layout, x, **after), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"upsample": 2}, {"slope": 0.2}, {"upsample": 2, "slope": 0.2}])
def test_the_plain_twins_of_the_gpus_kernels_are_what_the_cpu_does_in_chunks(monkeypatch, options):
    layout = blocky_layout(LayoutSpec(5, has_edges=True), 2, 16, 12)
    x, norm = torch.randn(2, 3, 8, 6, dtype=torch.float64), SPADE(3, layout.spec, path="table", hidden_channels=4)
    chunked = results(copy.deepcopy(norm).double(), layout, x, **options)
    monkeypatch.setattr(modulation, "_in_chunks", lambda x: False)
    monkeypatch.setattr(modulation, "triton_kernels", lambda device: None)
    for a, b in zip(results(norm.double(), layout, x, **options), chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_norm_that_is_compiled_as_a_whole_is_dense(monkeypatch):
    layout = blocky_layout(LayoutSpec(5, has_edges=True), 2, 16, 12)
    norm, x = SPADE(3, layout.spec, path="table", hidden_channels=4), torch.randn(2, 3, 8, 6)
    expected = norm(x, layout)
    tables = []
    monkeypatch.setattr(norms_module, "second_convolution", lambda *_: tables.append(1) or second_convolution(*_))
    torch.testing.assert_close(norm(x, layout), expected, rtol=0, atol=0)
    assert tables == [1]
    compiled = torch.compile(norm, backend="eager")(x, layout)  # traced, but not translated
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
    assert tables == [1]


def test_kernels_that_cannot_be_compiled_are_named_once_and_done_without(monkeypatch):
    from imaginaire_spade.models import kernels

    monkeypatch.setattr(kernels, "probe", Mock(side_effect=OSError("no compiler here")))
    device = torch.device("cuda", 77)
    with pytest.warns(RuntimeWarning, match=r"no Triton kernels for cuda:77, so that norms run slower: no compiler"):
        assert layers.triton_kernels(device) is None
    assert layers.triton_kernels(device) is None and kernels.probe.call_count == 1


def test_under_autocast_tables_are_as_near_the_truth_as_the_dense_path():
    torch.manual_seed(0)
    spec = LayoutSpec(5, has_edges=True)
    layout, options = blocky_layout(spec, 2, 32, 32), {"upsample": 2, "slope": 0.2}
    x = torch.randn(2, 8, 16, 16).bfloat16()
    table = SPADE(8, spec, path="table", hidden_channels=8)
    dense = SPADE(8, spec, path="dense", hidden_channels=8)
    dense.load_state_dict(table.state_dict())
    truth = results(copy.deepcopy(dense).double(), layout, x.double(), **options)
    with torch.autocast("cpu", torch.bfloat16):
        found = [results(norm, layout, x, **options) for norm in (table, dense)]
    for one, other, true in zip(*found, truth, strict=True):
        if true.is_floating_point():
            assert (one - true).norm() < 1.5 * (other - true).norm() + 1e-3 * true.norm()


def test_noise_per_pixel_takes_the_dense_path_and_a_warning_says_so():
    layout = blocky_layout(LayoutSpec(5), 2, 64, 64)
    noisy = {name: layout.with_noise(noise) for name, (noise, _) in kinds_of_noise(2, 3, 64, 64).items()}
    norm = SPADE(4, noisy["pixel"].spec, path="table")
    assert norms_module.takes_noise(norm) and not norms_module.takes_noise(SPADE(4, layout.spec))
    assert norm._takes_tables(noisy["image"]) and norm._takes_tables(noisy["region"])
    with pytest.warns(RuntimeWarning, match="noise per pixel: SPADE norms are dense"):
        assert not norm._takes_tables(noisy["pixel"])
    x = torch.randn(2, 4, 64, 64)  # the same noise, by region and written out per pixel
    torch.testing.assert_close(norm(x, noisy["region"]), norm(x, noisy["pixel"]), rtol=0, atol=1e-5)


def test_auto_takes_tables_where_they_pay_and_only_where_they_can():
    spec = LayoutSpec(20, has_edges=True)
    norm = SPADE(64, spec)
    blocky, random = blocky_layout(spec, 1, 64, 64), random_layout(spec, 1, 64, 64)
    assert norm._takes_tables(blocky) and not norm._takes_tables(blocky.resized(2, 2))
    assert not norm._takes_tables(random)
    for path in ("auto", "table"):
        norm = SPADE(16, spec, path=path, hidden_channels=8)
        soft = SemanticLayout.from_dense(spec, blocky.one_hot() * 0.9)
        between = SemanticLayout(spec, blocky.labels, blocky.edges.float() / 2)
        x = torch.randn(1, 16, 64, 64)
        for layout in (soft, between):
            assert not norm._takes_tables(layout)
            assert not torch.allclose(norm(x, layout), norm(x, blocky), atol=1e-4)


def test_a_measured_cost_of_a_pixel_moves_the_choice():
    spec = LayoutSpec(20, has_edges=True)
    norm, blocky, random = SPADE(64, spec), blocky_layout(spec, 1, 64, 64), random_layout(spec, 1, 64, 64)
    norms_module.choose_paths(norm, 0.01)
    assert not norm._takes_tables(blocky) and norms_module.pixel_cost(norm) == 0.01
    norms_module.choose_paths(norm, 3.0)
    assert norm._takes_tables(random)
    for unknown in (None, "3", -3.0, float("nan")):  # not measured, or from a file of a stranger's
        norms_module.choose_paths(norm, unknown)
        assert norm._takes_tables(blocky) and not norm._takes_tables(random)
    assert norms_module.pixel_cost(SPADE(8, spec, path="table")) is None


def test_the_cost_of_a_pixel_is_measured_by_both_paths_and_draws_nothing(monkeypatch):
    takes, taken = SPADE._takes_tables, []

    def gain(way, usual):
        way()
        usual()
        return 0.5

    monkeypatch.setattr(norms_module, "gain", gain)
    monkeypatch.setattr(SPADE, "_takes_tables", lambda *args: taken.append(takes(*args)) or taken[-1])
    norm, before = SPADE(8, LayoutSpec(3)), torch.random.get_rng_state()
    cost = norms_module.measure_pixel_cost(norm, lambda question, measure: measure())
    assert 0.55 < cost < 0.65  # half of (1 + 32 / hidden) and the constant rows
    assert taken == [True, False] and torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("path", "size", "tables"),
    [("auto", 256, False), ("dense", 256, False), ("table", 256, True), ("table", 64, True), ("table", 32, False)],
)
def test_on_a_gpu_config_and_resolution_alone_decide(path, size, tables):
    norm = SPADE(8, LayoutSpec(3), path=path)
    view = SimpleNamespace(labels=SimpleNamespace(is_cuda=True), is_discrete=True, height=size, width=size)
    assert norm._takes_tables(view) is tables  # and no count is asked for


def test_the_way_of_the_norms_can_be_told():
    network = nn.Sequential(SPADE(8, LayoutSpec(3), path="table", kernel_size=5), nn.ReLU())
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [norms_module.describe_path(network, device) for device in (cpu, gpu)] == [
        "tables", "tables from 4096 pixels up, dense below"
    ]  # fmt: skip
    assert norms_module.table_kernel_sizes(network) == (5,)
    assert norms_module.describe_path(SPADE(8, LayoutSpec(3)), gpu) == "auto, dense on a GPU"
    assert norms_module.describe_path(CLADE(8, LayoutSpec(3)), gpu) is None


def forced(network: nn.Module, path: str) -> nn.Module:
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, SPADE):
            module.path = path
    return network


@pytest.mark.parametrize("style", [False, True], ids=["spade", "style_spade"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_generators_by_tables_make_the_same_pictures_and_gradients(style, training):
    torch.manual_seed(0)
    spec = LayoutSpec(5, has_dont_care=True, has_edges=True)
    if style:
        norm = partial(SPADE, hidden_channels=8, kernel_size=5, affine=True, spectral_norm=True)
        generator = StyleSPADEGenerator(spec, (32, 64), num_filters=4, style_dims=6, norm=norm)
        z = torch.randn(2, 6, dtype=torch.float64)
    else:
        generator, z = SPADEGenerator(spec, (32, 64), num_filters=4, norm=partial(SPADE, hidden_channels=8)), None
    generator.double().train(training)
    layout = blocky_layout(spec, 2, 32, 64)
    pictures, gradients = [], []
    for path in ("table", "dense"):
        network = forced(generator, path)
        image = network.forward(layout, z)
        image.square().sum().backward()
        pictures.append(image.detach())
        gradients.append([p.grad for p in network.parameters()])
        with torch.inference_mode():
            assert forced(generator, path)(layout, z).isfinite().all()
    torch.testing.assert_close(*pictures, rtol=0, atol=2e-5)
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


@pytest.mark.parametrize("kind", [MultiscaleDiscriminator, FPSEDiscriminator])
@pytest.mark.parametrize("edges", ["none", "bits", "float"])
def test_discriminators_see_integer_maps_as_they_see_the_one_hot_map(kind, edges):
    torch.manual_seed(0)
    spec = LayoutSpec(5, has_edges=edges != "none")
    discriminator = kind(spec, num_filters=4).eval().double()
    height, width = max(64, discriminator.min_size), 128
    layout = random_layout(spec, 2, height, width)
    if edges == "float":
        layout = SemanticLayout(spec, layout.labels, layout.edges.double() * 0.3)
    results = []
    for one in (layout, SemanticLayout.from_dense(spec, layout.one_hot(torch.float64))):
        images = torch.linspace(-1, 1, 12 * height * width, dtype=torch.float64)
        images = images.view(4, 3, height, width).requires_grad_()
        scores = discriminator(one, images)
        total = torch.stack([s.logits.square().mean() for s in scores]).sum()
        gradients = torch.autograd.grad(total, [images, *discriminator.parameters()], allow_unused=True)
        results.append(
            [*(f for s in scores for f in (s.logits, *s.features)), *(g for g in gradients if g is not None)]
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_under_autocast_types_are_the_dense_paths_and_statistics_stay_exact(dtype, training):
    torch.manual_seed(0)
    spec = LayoutSpec(5, has_edges=True)
    dense = SPADE(8, spec, path="dense", hidden_channels=8).train(training)
    table = forced(dense, "table")
    layout = blocky_layout(spec, 2, 24, 24)
    exact = copy.deepcopy(dense)
    for x in (torch.randn(2, 8, 24, 24), torch.randn(2, 8, 24, 24).to(dtype)):
        outputs, gradients = [], []
        for norm, enabled in ((table, True), (dense, True), (exact, False)):
            given = x.clone().to(x.dtype if enabled else torch.float32).requires_grad_()
            with torch.autocast("cpu", dtype, enabled=enabled):
                y = norm(given, layout)
            y.float().square().sum().backward()
            outputs.append(y.detach())
            gradients.append(given.grad)
        for one, other, true in (outputs, gradients):
            assert one.dtype == other.dtype == x.dtype
            assert (one - true).norm() < 2 * (other - true).norm()
        torch.testing.assert_close(table.normalize.running_var, exact.normalize.running_var, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", [SPADE, partial(SPADE, path="table", affine=True), CLADE])
def test_a_frozen_generator_makes_the_same_pictures(norm):
    spec = LayoutSpec(5, has_dont_care=True, has_edges=True)
    torch.manual_seed(0)
    generator = SPADEGenerator(spec, (64, 64), num_filters=16, norm=norm)
    initialise(generator, "xavier", 1.0)
    for module in generator.modules():
        if isinstance(module, BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    layouts = [blocky_layout(spec, 2, 64, 64, seed) for seed in range(2)]
    for layout in layouts:
        generator(layout)  # moves the running statistics
    frozen = optimise_for_inference(copy.deepcopy(generator), winograd=True)
    wide = [module for module in frozen.modules() if isinstance(module, WinogradConv2d)]
    assert len(wide) == 6  # of 256 channels each
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    generator.eval()
    for layout in layouts:
        torch.testing.assert_close(frozen(layout), generator(layout).detach(), rtol=0, atol=1e-5)
        moved = optimise_for_inference(copy.deepcopy(generator).to(memory_format=torch.channels_last), winograd=False)
        torch.testing.assert_close(moved(layout), generator(layout).detach(), rtol=0, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 40), terms=st.integers(1, 3), hot=st.integers(0, 3000), seed=st.integers(0, 99),
    as_on_gpu=st.booleans(),
)  # fmt: skip
def test_chunks_of_users_cover_every_user_once_and_none_is_long(rows, terms, hot, seed, as_on_gpu):
    g = torch.Generator().manual_seed(seed)
    index = torch.cat([torch.randint(0, rows, (50, terms), generator=g), torch.full((hot, terms), rows // 2)])
    lookup = Lookup(index, rows)
    begin, first = OnGPU(lookup).chunks if as_on_gpu else lookup.chunks
    lengths = F.pad(begin, (0, 1), value=index.numel()).diff()
    assert int(lengths.min()) >= 0 and int(lengths.max()) <= neighbourhoods.CHUNK
    values = torch.randn(len(index), 3, dtype=torch.float64, generator=g)
    parts = F.embedding_bag(lookup.users, values, begin, mode="sum")
    total = F.embedding_bag(torch.arange(len(begin)), parts, first, mode="sum")
    torch.testing.assert_close(total, sum_users(values, lookup))


class OnGPU(Lookup):
    """Cuts chunks as on a GPU, where their number is not known."""

    def __init__(self, lookup: Lookup) -> None:
        class Index(torch.Tensor):
            is_cuda = True

        super().__init__(lookup.index.as_subclass(Index), lookup.num_rows)


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("with_noise", [False, True])
def test_neighbourhoods_found_ahead_are_those_of_each_piece(pieces, with_noise):
    spec = LayoutSpec(5, has_edges=True)
    layout = SemanticLayout(spec, blocky_layout(spec, 4, 128, 192).labels, "labels")
    batch = Batch(layout, None, tuple("abcd"), ((128, 192),) * 4, tuple(range(4)))
    batch = replace(batch, ahead=batch.look_ahead((3, 5), pieces, with_noise)).map(torch.clone)
    assert isinstance(layout._edges, str) and len(batch.ahead) == pieces
    for number, piece in enumerate(batch.split(pieces)):
        own, used = layout[number * len(piece) : (number + 1) * len(piece)], piece.layout
        if with_noise:
            own, used = (each.with_noise(torch.randn(len(piece), 7)) for each in (own, used))
        for size, (height, width) in itertools.product((3, 5), ((128, 192), (64, 96))):
            found, plain = (each.resized(height, width).neighbourhoods(size) for each in (used, own))
            assert found.labels.index.dtype == torch.int32
            assert torch.equal(found.edges, plain.edges) and torch.equal(found.outside, plain.outside)
            lookups = [[*filter(None, (f.labels, f.noise, f.pixels, *f.outer))] for f in (found, plain)]
            assert len(lookups[0]) == 3 + with_noise + (size > 3) * 2
            for one, other in zip(*lookups, strict=True):
                assert torch.equal(one.index.long(), other.index) and one.num_rows == other.num_rows
                assert all(torch.equal(a.long(), b) for a, b in zip(one.chunks, other.chunks, strict=True))
        assert used.resized(32, 48).neighbourhoods(3).labels.index.dtype == torch.int64  # too few pixels
        # What was found without noise, or for noise of another kind, does not serve.
        assert bool(piece.layout.with_noise(torch.randn(len(piece), 7)).ahead) == with_noise
        assert not piece.layout.with_noise(NoiseRegions(torch.randn(len(piece), 6, 7), own.labels)).ahead


@pytest.mark.parametrize("channels", [5, 4], ids=["shortcut", "identity"])
@pytest.mark.parametrize("norm", ["spade", "clade", "clade_icpe"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("on_gpu", "size"), [(False, 16), (True, 16), (False, 4)])  # (with 4, weights are the larger)
def test_what_the_backward_pass_makes_again_is_not_kept_and_the_same(
    monkeypatch, norm, channels, autocast, on_gpu, size
):
    """A convolution keeps neither the norm's output nor W / sigma: they are made again, bit for bit."""
    spec = LayoutSpec(5, has_edges=True, has_distances=NORMS[norm].needs_distances)
    torch.manual_seed(0)
    build = partial(SPADE, path="table", hidden_channels=8) if norm == "spade" else NORMS[norm]
    block = SPADEResidualBlock(4, channels, spec, build, spectral_norm=True)
    for name, parameter in block.named_parameters():
        if "position" in name:  # they start at 0
            nn.init.normal_(parameter)
    seen: list[ref] = []
    for conv in (module for name, module in block.named_children() if name.startswith("conv")):
        conv.register_forward_pre_hook(lambda module, inputs: seen.append(ref(inputs[0])))
    divide = spectral_norm.SpectralNorm.normalised_weight

    def noted(layer):
        seen.append(ref(weight := divide(layer)))
        return weight

    monkeypatch.setattr(spectral_norm.SpectralNorm, "normalised_weight", noted)
    if on_gpu:
        monkeypatch.setattr(modulation, "_in_chunks", lambda x: False)
        monkeypatch.setattr(modulation, "triton_kernels", lambda device: None)
    state, x = copy.deepcopy(block.state_dict()), torch.randn(2, 4, size // 2, size // 2)
    layout = random_layout(spec, 2, size, size)
    results = []
    for forgets in (False, True):
        with monkeypatch.context() as patch:
            if not forgets:
                for module in (modulation, spectral_norm, recomputation):
                    patch.setattr(module, "again_of", lambda tensor: None)
            block.load_state_dict(state)
            block.zero_grad()
            seen.clear()
            own = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, autocast):
                y = block(own, layout, upsample=2)
            if not autocast:  # (there even a graph that keeps them keeps copies in bf16)
                assert [one() is None for one in seen] == [forgets] * len(seen) and seen
        y.float().sin().sum().backward()
        results.append([y.detach(), own.grad, *(parameter.grad for parameter in block.parameters())])
    assert all(map(torch.equal, *results))


def test_of_a_derived_tensor_only_the_small_parts_are_kept():
    """What a function makes of a norm's output is made again too, once for all that needs it, with its gradients."""
    torch.manual_seed(0)
    x, table, added = (torch.randn(*shape, requires_grad=True) for shape in ((1, 3, 4, 4), (2, 3), (1, 3, 1, 1)))
    pixels, calls = Lookup(torch.randint(0, 2, (16, 1)), 2), []

    def function(y, added):
        calls.append(1)
        return (y * added).exp()

    found = []
    for form in (recomputation.derive, lambda function, *inputs: function(*inputs)):
        statistics = modulation.Statistics(torch.zeros(3), torch.ones(3))
        y = modulation.modulate(x, modulation.Modulation(table, table, pixels), statistics, slope=0.2)
        z = form(function, y, added)
        with recomputation.forgotten(z, recomputation.again_of(z)):
            out = z.square() + z.sin()
        gone = ref(z), ref(y)
        del y, z
        assert [one() is None for one in gone] == [form is recomputation.derive] * 2
        found.append([out.detach(), *torch.autograd.grad(out.sum(), [x, table, added])])
    assert all(map(torch.equal, *found)) and len(calls) == 3
