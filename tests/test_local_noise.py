"""Noise in parts of an image (OASIS): by class, region, pixel; new noise for a part while the rest keeps its own."""

from dataclasses import fields

import cv2
import numpy as np
import pytest
import torch
from conftest import blocky_labels, write_png
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_inference import TREE, changed, run, save  # noqa: F401

from imaginaire_spade import Synthesizer
from imaginaire_spade.data.distances import connected_regions
from imaginaire_spade.errors import ConfigError, DataError
from imaginaire_spade.inference.local_noise import KINDS, LocalNoise, stack_noise
from imaginaire_spade.inference.model import Model
from imaginaire_spade.inference.synthesis import Request, check_tile, local_styles, style_of_seed, synthesise
from imaginaire_spade.models.for_inference import optimise_for_inference

pytestmark = pytest.mark.usefixtures("one_thread")
GEN = {"type": "oasis", "num_filters": 2, "style_dims": 4, "norm": {"type": "spade", "hidden_channels": 8}}
NAMES = ["sky", "sea", "sand", "tree", "house"]


def checkpoint_of(folder, **gen):
    tree = changed(TREE, gen=GEN | gen, encoder=None, data__edges="none", data__labels__names=NAMES)
    return save(folder / "oasis.pt", tree)


def model_of(checkpoint) -> Model:
    model = Model.load(checkpoint, for_inference=False)
    for norm in (module for module in model.generator.modules() if hasattr(module, "running_var")):
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 2)
    for name, parameter in model.generator.named_parameters():
        if "strengths" in name:
            parameter.data.uniform_(-0.5, 0.5)
    optimise_for_inference(model.generator, winograd=True)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoint_of(tmp_path_factory.mktemp("oasis"))


@pytest.fixture(scope="module")
def model(checkpoint) -> Model:
    return model_of(checkpoint)


class Batching(Model):
    one_by_one = False


def batching(model: Model) -> Model:
    return Batching(**{field.name: getattr(model, field.name) for field in fields(model)})


def image_of(model: Model, labels: np.ndarray, z, tile: int | None = None) -> np.ndarray:
    request = Request("a", torch.from_numpy(labels), z=z)
    ((_, image),) = synthesise(model, [request], convert=lambda images, _: images, tile=tile)
    return image


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 4), st.integers(0, 2**31))
def test_regions_are_the_connected_components_of_each_class(height, width, num_classes, seed):
    ids = np.random.default_rng(seed).integers(0, num_classes, (height, width))
    regions = connected_regions(ids)
    pairs = set()
    for c in range(num_classes):
        _, components = cv2.connectedComponents((ids == c).astype(np.uint8), connectivity=8)
        pairs |= {(c, one, region) for one, region in zip(components.flat, regions.flat, strict=True) if one}
    assert len(pairs) == len({pair[2] for pair in pairs}) == len({pair[:2] for pair in pairs}) == regions.max() + 1
    first = np.unique(regions, return_index=True)[1]
    assert (np.diff(first) > 0).all()  # numbered as they begin


def test_what_has_a_vector_of_its_own_and_what_the_vector_depends_on():
    ids = np.array([[0, 0, 1, 0], [2, 2, 1, 0], [2, 2, 2, 2]], np.uint8)

    def maps(kind, key="a", seed=0, anew=(), of=ids):
        placed = LocalNoise(kind, 3, seed, key, None, anew).place(torch.from_numpy(of))
        noise = stack_noise([placed], *of.shape)
        return (noise if kind == "pixel" else noise.spread(*of.shape))[0].permute(1, 2, 0).numpy()  # [H, W, 3]

    parts = {"image": np.zeros_like(ids), "class": ids, "region": connected_regions(ids)}
    parts["pixel"] = np.arange(12).reshape(3, 4)
    for kind in KINDS:
        found = maps(kind)
        assert len(np.unique(found.reshape(-1, 3), axis=0)) == parts[kind].max() + 1
        assert all(len(np.unique(found[parts[kind] == part], axis=0)) == 1 for part in np.unique(parts[kind]))
        assert np.array_equal(found, maps(kind)) and not np.isin(found, maps(kind, key="b")).any()
        assert not np.isin(found, maps(kind, seed=1)).any()
        # A part that is drawn anew has the noise of the other seed, and the rest its own.
        for place in (1, (2, 1)):
            assert np.array_equal(
                maps(kind, anew=((place, 1),)), np.where((ids == 1)[..., None], maps(kind, seed=1), found)
            )
        in_turn = maps(kind, anew=((2, 1), (2, 5), (0, 5)))
        assert np.array_equal(in_turn, np.where((ids == 1)[..., None], found, maps(kind, seed=5)))
    by_pixel = maps("image", anew=(((3, 1), 1),)) != maps("image")
    assert np.array_equal(by_pixel[..., 0], parts["region"] == parts["region"][1, 3])  # one of the two regions of 0
    assert np.array_equal((maps("class", anew=(((3, 1), 1),)) != maps("class"))[..., 0], ids == 0)
    # Other classes, and regions of other classes, may come and go.
    other = np.where(ids == 1, 4, ids).astype(np.uint8)
    other[2, 3] = 3
    for kind in ("class", "region"):
        same = np.isin(other, (0, 2))
        assert np.array_equal(maps(kind, of=other)[same], maps(kind)[same])


@pytest.mark.parametrize("noise_injection", [False, True])
def test_new_noise_for_a_part_leaves_what_is_far_from_it_and_is_that_of_the_other_seed(
    model, noise_injection, tmp_path
):
    halo = model.generator.halo
    model = model_of(checkpoint_of(tmp_path, noise_injection=True)) if noise_injection else model
    labels = np.zeros((32, 2 * halo + 128), np.uint8)
    labels[:, halo + 64 :] = 1
    own, other = (image_of(model, labels, style_of_seed(seed, 4)) for seed in (0, 7))
    for place in (1, (halo + 100, 5)):
        made = image_of(model, labels, LocalNoise("image", 4, 0, "", style_of_seed(0, 4), ((place, 7),)))
        assert np.abs(made - own)[:, :64].max() < 1e-6 and np.abs(made - other)[:, -64:].max() < 1e-6
        middle = made[:, 64:-64]
        assert min(np.abs(middle - one[:, 64:-64]).max() for one in (own, other)) > 1e-3


def test_noise_injection_makes_no_tiles(tmp_path):
    model = model_of(checkpoint_of(tmp_path, noise_injection=True))
    with pytest.raises(ConfigError, match="noise injection"):
        check_tile(model, "auto")


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_and_batches_make_the_images_of_the_whole_and_of_one(model, kind):
    rng = np.random.default_rng(0)
    large = blocky_labels(rng, 250, 300, 5)
    noise = LocalNoise(kind, 4, 3, "a", style_of_seed(3, 4), ((1, 9), ((150, 20), 8)))
    assert np.abs(image_of(model, large, noise, tile=224) - image_of(model, large, noise)).max() < 1e-5

    style_of = local_styles(lambda key, _: style_of_seed(len(key), 4), kind, 3, ((1, 9),), 4)
    requests = [
        Request(key, torch.from_numpy(blocky_labels(rng, *size, 5)), z=style_of(key, 0))
        for key, size in (("a", (40, 60)), ("bb", (64, 64)), ("ccc", (33, 41)))
    ]
    alone = dict(synthesise(model, requests))
    together = dict(synthesise(batching(model), reversed(requests), batch_size=3))
    for key, image in alone.items():
        assert np.abs(image.astype(int) - together[key]).max() <= 1


def test_the_command_line_and_python_make_the_same_images(run, checkpoint, tmp_path):  # noqa: F811
    labels = {
        "a": blocky_labels(np.random.default_rng(0), 64, 64, 5),
        "s/b": np.kron([[0, 1], [2, 1]], np.ones((32, 48))),
    }
    folder = tmp_path / "maps"
    for key, ids in labels.items():
        write_png(folder / f"{key}.png", ids.astype(np.uint8))
    synthesizer = Synthesizer.load(checkpoint, device="cpu")
    for number, (flags, arguments) in enumerate({
        ("--noise", "class"): {"noise": "class"},
        ("--noise", "region", "--resample", "sea", "--resample_seed", "11"): {"noise": "region", "anew": {"sea": 11}},
        ("--noise", "pixel", "--resample", "70, 40"): {"noise": "pixel", "anew": {(70, 40): 6}},
        ("--resample", "1", "--resample", "0,0"): {"anew": {1: 6, (0, 0): 6}},
    }.items()):  # fmt: skip
        out = tmp_path / f"out{number}"
        keys = ("s/b",) if "70, 40" in flags else labels
        maps = folder / "s" if "70, 40" in flags else folder
        for seed in ("--style_seed", "--seed"):
            run("--checkpoint", checkpoint, "--input_dir", maps, "--output_dir", out, seed, "5", "--overwrite", *flags)
            written = {key: np.asarray(Image.open(out / f"{'b' if len(keys) == 1 else key}.png")) for key in keys}
            wanted = {key: synthesizer(labels[key].astype(np.uint8), seed=5, **arguments) for key in keys}
            same = [np.array_equal(written[key], wanted[key]) for key in keys]
            assert same == [seed == "--style_seed"] * len(keys), flags  # one look for all, one for each
    batch = np.stack([labels["a"], labels["a"]])
    first, second = synthesizer(batch, noise="class", anew={"sea": 3})
    assert np.array_equal(first, second)


def test_one_mistake_one_message(run, checkpoint, tmp_path):  # noqa: F811
    plain = save(tmp_path / "plain.pt", changed(TREE, encoder=None, data__edges="none"))
    write_png(tmp_path / "maps/a.png", np.zeros((64, 64), np.uint8))

    def call(*flags, of=checkpoint):
        run("--checkpoint", of, "--input_dir", tmp_path / "maps", "--output_dir", tmp_path / "out", *flags)

    with pytest.raises(
        ConfigError, match=r"--noise region: this generator \(gen.type: spade\) takes no noise in parts"
    ):
        call("--noise", "region", of=plain)
    with pytest.raises(ConfigError, match="--resample: this generator"):
        call("--resample", "sky", of=plain)
    with pytest.raises(ConfigError, match=r"--resample sy: 'sy' is no class.*sky.*or a pixel X,Y"):
        call("--resample", "sy")
    with pytest.raises(DataError, match=r"a: new noise at 64,3: outside of this label map of 64x64"):
        call("--resample", "64,3")
    for wrong in (("--resample_seed", "3"), ("--noise", "class", "--style_interpolate", "1", "2")):
        with pytest.raises(SystemExit):
            call(*wrong)
    assert not list((tmp_path / "out").rglob("*.png"))
    synthesizer, ids = Synthesizer.load(checkpoint, device="cpu"), np.zeros((64, 64), np.uint8)
    for arguments, message in (
        ({"noise": "regions"}, "noise 'regions': write one of image, class, region, pixel"),
        ({"noise": "class", "style": np.zeros(4)}, "leave it out"),
        ({"anew": {"lake": 1}}, "anew lake: 'lake' is no class"),
        ({"anew": {(64, 0): 1}}, "outside of this label map"),
        ({"anew": ["sea"]}, "write the parts and the seed of each"),
        ({"anew": {"sea": "1"}}, "anew sea: its seed is '1'"),
        ({"anew": {(1, 2, 3): 1}}, "a pixel is"),
        ({"anew": {(1.5, 2): 1}}, "a pixel is"),
        ({"anew": {99: 1}}, r"write a name \(\w+, ..., don't care\)"),  # no id as a name that is near
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            synthesizer(ids, **arguments)
    with pytest.raises(ConfigError, match="anew: this generator"):
        Synthesizer.load(plain, device="cpu")(ids, anew={1: 1})
