"""Inputs other than label maps: dense conditions (depth, normals), edges alone, soft label maps; and data sets of one's
own."""

import io
import sys

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import REPOSITORY, blocky_labels, write_jpg, write_png
from PIL import Image

from imaginaire_spade import Synthesizer
from imaginaire_spade.build import build_discriminator, build_generator, build_split, layout_spec
from imaginaire_spade.config import AugmentationConfig, Condition
from imaginaire_spade.config_files import dump_config, load_config, load_data, parse_config
from imaginaire_spade.data.batch import Sample
from imaginaire_spade.data.conditions import decode_condition
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.loader import training_loader
from imaginaire_spade.errors import CheckpointError, ConfigError, DataError
from imaginaire_spade.export.generator import export_model
from imaginaire_spade.inference.model import Model
from imaginaire_spade.interop.checkpoint import export_files
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.lmdb_builder.build import build_dataset, extract, look_through
from imaginaire_spade.models.layers import convolve_layout, initialise
from imaginaire_spade.models.norms import CLADE, SPADE
from imaginaire_spade.training.checkpoint import newest_checkpoint, write_checkpoint

sys.path.insert(0, str(REPOSITORY))
from projects.own_data import datasets as own_data

LABELS = LabelSpec(num_classes=5, ignore=(255,))
NONE = LabelSpec(num_classes=0, dont_care=False)
DEPTH = Condition(name="depth", range=(0, 10))
NORMALS = Condition(name="normals", channels=3, range=(-1, 1), flip_sign=(0,))
BOTH = (DEPTH, NORMALS)

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------------ the networks


def random_layout(spec: LayoutSpec, n: int = 2, h: int = 9, w: int = 12) -> SemanticLayout:
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(0, spec.num_classes + 1, (n, h, w), generator=g, dtype=torch.int16)
    edges = torch.randint(0, 2, (n, h, w), generator=g, dtype=torch.uint8) if spec.has_edges else None
    conditions = torch.randn(n, spec.num_conditions, h, w, generator=g, dtype=torch.float64)
    return SemanticLayout(spec, labels, edges, None, conditions if spec.num_conditions else None)


SPECS = [
    LayoutSpec(40, has_dont_care=True, has_edges=True, num_conditions=4),
    LayoutSpec(3, num_conditions=2),
    LayoutSpec(0, num_conditions=3),
    LayoutSpec(0, has_edges=True),
    LayoutSpec(0, has_edges=True, num_conditions=1),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_sum_of_two_convolutions_is_one_over_all_channels(spec):
    layout = random_layout(spec)
    parts = [F.one_hot(layout.labels.long(), spec.num_classes + 1).permute(0, 3, 1, 2)[:, : spec.num_label_channels]]
    parts += [layout.edges[:, None]] if spec.has_edges else []
    parts += [layout.conditions] if spec.num_conditions else []
    plain = torch.cat([part.double() for part in parts], 1)
    assert torch.equal(layout.one_hot(torch.float64), plain) and plain.shape[1] == spec.num_channels
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(7, spec.num_channels, 3, 3, generator=g, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, generator=g, dtype=torch.float64)
    for stride in (1, 2):
        both = [
            convolve_layout(layout, weight, bias, stride, padding=1), F.conv2d(plain, weight, bias, stride, padding=1)
        ]  # fmt: skip
        torch.testing.assert_close(*both, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            *(torch.autograd.grad(y.square().sum(), weight)[0] for y in both), rtol=0, atol=1e-10
        )
    small = layout.resized(4, 5)
    assert torch.equal(small.one_hot(torch.float64), F.interpolate(plain, size=(4, 5)))
    again = SemanticLayout.from_dense(spec, plain)
    assert torch.equal(again.one_hot(torch.float64), plain) and (spec.num_label_channels or not again.labels.any())


def test_spade_looks_labels_up_beside_conditions_and_gives_the_same():
    spec = SPECS[0]
    norm = SPADE(6, spec, hidden_channels=8, spectral_norm=True).double().eval()
    initialise(norm, "xavier", 1.0)
    layout, x = random_layout(spec), torch.randn(2, 6, 9, 12, dtype=torch.float64)
    looked_up = torch.autograd.grad((y := norm(x, layout)).square().sum(), [*norm.parameters()])
    norm.path = "dense"
    dense = torch.autograd.grad((z := norm(x, layout)).square().sum(), [*norm.parameters()])
    torch.testing.assert_close(y, z, rtol=0, atol=1e-12)
    torch.testing.assert_close(looked_up, dense, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(norm(x, SemanticLayout.from_dense(spec, layout.one_hot(torch.float64))), z)


def run_tree(**data) -> dict:
    """The smallest run that trains; ``data`` replaces keys of its data section."""
    tree = yaml.safe_load("""
        gen: {type: spade, num_filters: 2, norm: {type: spade, hidden_channels: 4}}
        dis: {type: multiscale_patch, num_filters: 2, num_layers: 2}
        losses: {gan: 1.0, l1: 1.0}
        gen_opt: {lr: 1.0e-3}
        dis_opt: {lr: 1.0e-3}
        trainer: {max_iterations: 2, log_every: 1, image_every: 2, image_rows: 2, checkpoint_every: 2,
                  model_average: {batch_norm_images: 4}}
        data:
          labels: {num_classes: 5, ignore: [255]}
          num_workers: 0
          train: {roots: [raw], batch_size: 2, augmentations: {resize_h_w: [32, 64], horizontal_flip: true}}
    """)
    tree["data"] |= data
    return tree


CONDITIONS = [{"name": "depth", "range": [0, 10]},
              {"name": "normals", "channels": 3, "range": [-1, 1], "flip_sign": [0]}]  # fmt: skip


@pytest.mark.parametrize("dis", ["multiscale_patch", "fpse"])
@pytest.mark.parametrize("labels", [{"num_classes": 40}, None])
def test_discriminators_see_conditions(dis, labels):
    tree = run_tree(labels=labels, conditions=CONDITIONS, edges="file")
    tree["dis"] = {"type": dis, "num_filters": 2, "num_layers": 2}
    config = parse_config(tree)
    torch.manual_seed(0)
    network, spec = build_discriminator(config).double().eval(), layout_spec(config)
    layout, images = random_layout(spec, 1, 32, 32), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    dense = SemanticLayout.from_dense(spec, layout.one_hot(torch.float64))
    for ours, plain in zip(network(layout, images), network(dense, images), strict=True):
        torch.testing.assert_close(ours.logits, plain.logits, rtol=0, atol=1e-12)
    other = SemanticLayout(spec, layout.labels, layout.edges, None, layout.conditions + 1)
    assert not torch.allclose(network(other, images)[0].logits, network(layout, images)[0].logits)


def test_clade_and_concat_see_conditions_and_clade_needs_classes():
    tree = run_tree(conditions=CONDITIONS)
    for norm in ("clade", "concat"):
        tree["gen"] = {"type": "spade", "num_filters": 2, "norm": norm}
        config = parse_config(tree)
        generator, spec = build_generator(config).eval(), layout_spec(config)
        layout = random_layout(spec, 1, 32, 32)
        other = SemanticLayout(spec, layout.labels, None, None, layout.conditions.flip(1))
        assert not torch.equal(generator(layout), generator(other))
    with pytest.raises(ConfigError, match=r"gen\.norm: clade looks up classes, and data\.labels is null"):
        CLADE(4, LayoutSpec(0, has_edges=True))
    with pytest.raises(ValueError, match="conditions missing, but the layout's spec"):
        SemanticLayout(spec, layout.labels)


# ------------------------------------------------------------------------------------------------ the config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "labels is null, so images need another input: write edges: file"),
        ({"labels": None, "edges": "labels"}, "edges: labels are drawn from label maps, and labels is null"),
        ({"labels": {"num_classes": 0}}, "num_classes: 0: to train without label maps write data.labels: null"),
        ({"conditions": [{"name": "normals", "channels": 3}]}, r"normals: horizontal_flip mirrors it: write flip_sign"),
        ({"conditions": ["depth", "depth"]}, "state each name once"),
        ({"conditions": ["images"]}, "images is a folder of its own meaning"),
        ({"conditions": ["../x"]}, r"data\.conditions\.0\.name"),
        ({"conditions": [{"name": "depth", "range": [1, 1]}]}, "the first value must be the smaller one"),
        ({"conditions": [{"name": "depth", "flip_sign": [1]}]}, r"flip_sign: \[1\]: channels are 0\.\.0"),
        ({"conditions": [{"name": "depth", "chanels": 1}]}, r"unknown key; did you mean 'channels'"),
        ({"type": "csv_pears"}, r"data\.type: unknown data set 'csv_pears'; did you mean 'csv_pairs'"),
        ({"type": "csv_pairs", "skip_bad": True}, "skip_bad and suffixes are for folders"),
        ({"suffixes": {"depth": "_d"}}, "depth: _d: write one of images"),
        ({"type": {"type": "csv_pairs", "delimeter": ";"}}, "did you mean 'delimiter'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_line_to_write(changes, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(run_tree(**changes))


def test_a_config_is_written_and_read_back():
    for changes in ({"conditions": ["depth", *CONDITIONS[1:]]}, {"labels": None, "edges": "file"},
                    {"type": {"type": "csv_pairs", "delimiter": ";"}}):  # fmt: skip
        config = parse_config(run_tree(**changes))
        assert parse_config(dump_config(config)) == config
    assert dump_config(parse_config(run_tree()))["data"]["conditions"] == []


# ------------------------------------------------------------------------------------------------ files and samples


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tiff(array: np.ndarray) -> bytes:
    return cv2.imencode(".tif", array[..., ::-1] if array.ndim == 3 else array)[1].tobytes()


@pytest.fixture
def scene_folder(tmp_path):
    """Makes photos, label maps with ids up to 4, edges, depth = 2 id + 1 and normals ((id - 2) / 4, 0, 1)."""

    def make(name: str = "raw", kind: str = "npy", count: int = 5, size: tuple[int, int] = (40, 56)):
        for number in range(count):
            rng = np.random.default_rng(number)
            ids, key = blocky_labels(rng, *size, 5), f"{number:04d}"
            depth = (2 * ids + 1).astype(np.float32)
            normals = np.dstack([(ids.astype(np.float32) - 2) / 4, 0 * depth, 0 * depth + 1])
            folder = tmp_path / name
            write_jpg(folder / "images" / f"{key}.jpg", rng.integers(0, 256, (*size, 3), dtype=np.uint8))
            write_png(folder / "seg_maps" / f"{key}.png", ids)
            write_png(folder / "edge_maps" / f"{key}.png", (ids == 2).astype(np.uint8) * 255)
            for data_type, values in (("depth", depth), ("normals", normals)):
                path = folder / data_type / f"{key}.{ {'png': 'png', 'tif': 'tif'}.get(kind, 'npy') }"
                path.parent.mkdir(exist_ok=True)
                if kind == "png":  # 16 bits, in thousandths of the range
                    low, high = (0, 10) if data_type == "depth" else (-1, 1)
                    write_png(path, ((values - low) / (high - low) * 60000).round().astype(np.uint16))
                else:
                    path.write_bytes(tiff(values) if kind == "tif" else npy(values))
        return tmp_path / name

    return make


def check_sample(sample: Sample, tolerance: float = 1e-6) -> bool:
    """Compare the conditions with what the labels say; return whether the sample is mirrored."""
    ids = sample.labels.float()
    assert sample.conditions.dtype == torch.float32 and sample.conditions.shape == (4, *ids.shape)
    depth, x, y, z = sample.conditions
    torch.testing.assert_close(depth, (2 * ids + 1) / 5 - 1, rtol=0, atol=tolerance)
    torch.testing.assert_close(z, torch.ones_like(z), rtol=0, atol=tolerance)
    torch.testing.assert_close(y, torch.zeros_like(y), rtol=0, atol=tolerance)
    right = (ids - 2) / 4
    torch.testing.assert_close(x.abs(), right.abs(), rtol=0, atol=tolerance)
    mirrored = not torch.allclose(x, right, atol=tolerance)
    torch.testing.assert_close(x, -right if mirrored else right, rtol=0, atol=tolerance)
    return mirrored


CUT = AugmentationConfig(resize_smallest_side=50, random_crop_h_w=(32, 48), horizontal_flip=True)


@pytest.mark.parametrize("kind", ["npy", "tif", "png"])
def test_conditions_go_through_the_geometry_with_their_labels(scene_folder, kind):
    depth, normals = BOTH
    if kind == "png":
        depth, normals = (c.model_copy(update={"range": (0, 60000)}) for c in BOTH)
    root = scene_folder(kind=kind)
    options = {"augmentations": CUT, "conditions": (depth, normals), "edges": "file"}
    data = LabelMapDataset(root, LABELS, **options)
    mirrored = [check_sample(data[i % 5, i], 4e-5 if kind == "png" else 1e-6) for i in range(20)]
    assert 2 < sum(mirrored) < 18
    # Without label maps the same values come, of the same geometry.
    alone = LabelMapDataset(root, NONE, **options)
    for i in range(4):
        one, other = data[i, i], alone[i, i]
        assert torch.equal(one.conditions, other.conditions) and torch.equal(one.edges, other.edges)
        assert torch.equal(one.image, other.image) and not other.labels.any() and other.labels.shape == one.labels.shape


def test_an_lmdb_holds_what_the_folder_does(scene_folder, tmp_path):
    root = scene_folder(kind="tif")
    (root / "depth" / "0003.tif").rename(root / "depth" / "0003.TIFF")
    manifest = build_dataset(root, tmp_path / "out", LABELS, edges="file", conditions=BOTH, num_workers=0, num_shards=2)
    assert list(manifest["data_types"]) == ["images", "seg_maps", "edge_maps", "depth", "normals"]
    folder, lmdb = (
        LabelMapDataset(r, LABELS, edges="file", conditions=BOTH, augmentations=CUT) for r in (root, tmp_path / "out")
    )
    workers = next(training_loader(lmdb, 3, seed=1, num_workers=2))
    alone = next(training_loader(folder, 3, seed=1, num_workers=0))
    assert torch.equal(workers.layout.conditions, alone.layout.conditions) and workers.layout.conditions.std() > 0.1
    assert torch.equal(workers.images, alone.images)
    contents = look_through(tmp_path / "out", LABELS, 0)
    assert not contents.problems and contents.num_samples == 5 and contents.num_bytes["normals"] > 0
    files = {path.parent.name: path for path in extract(tmp_path / "out", "0003", tmp_path / "one")}
    assert files["depth"].read_bytes() == (root / "depth" / "0003.TIFF").read_bytes()
    assert files["depth"].suffix == ".tif"
    # Resuming notices another range; shrinking takes nearest pixels.
    narrow = (DEPTH.model_copy(update={"range": (0, 20)}), NORMALS)
    with pytest.raises(DataError, match=r"another .* or data\.conditions"):
        build_dataset(root, tmp_path / "out", LABELS, edges="file", conditions=narrow, num_workers=0, num_shards=2)
    build_dataset(root, tmp_path / "small", LABELS, conditions=BOTH, num_workers=0, resize_smallest_side=20)
    for index in range(5):
        sample = LabelMapDataset(tmp_path / "small", LABELS, conditions=BOTH)[index]
        assert sample.labels.shape == (20, 28) and not check_sample(sample)
    # Without label maps none are stored.
    manifest = build_dataset(root, tmp_path / "none", NONE, edges="file", conditions=BOTH, num_workers=0)
    assert list(manifest["data_types"]) == ["images", "edge_maps", "depth", "normals"]
    assert manifest["class_pixels"] is None and not look_through(tmp_path / "none", NONE, 0).problems


@pytest.mark.parametrize(
    ("data", "condition", "message"),
    [
        (npy(np.full((40, 56), 11.5)), DEPTH, r"values 11\.5\.\.11\.5, outside the range \[0, 10\] of depth"),
        (npy(np.full((40, 56), np.nan)), DEPTH, "not finite"),
        (npy(np.full((40, 56), 3.5)), Condition(name="depth"), r"floats 3\.5\.\.3\.5, and no range is stated"),
        (npy(np.zeros((40, 56, 3))), DEPTH, r"3 channel\(s\), but this condition has 1: write channels: 3"),
        (
            npy(np.zeros((40, 56), np.int64)),
            DEPTH,
            r"int64 \[40, 56, 1\]; a condition is 8- or 16-bit unsigned integers",
        ),
        (npy(np.zeros((40, 57))), DEPTH, "is 40 x 57 .* must be of one size"),
        (npy(np.zeros((40, 56)))[:500], DEPTH, "not readable as a NumPy file of one array: EOF"),
        (b"\xff\xd8\xff\xe0 a photo", DEPTH, "JPEG and WebP change values: save a condition as PNG, TIFF or .npy"),
        (b"II*\0 cut off", DEPTH, "not readable as an image"),
        (b"", DEPTH, "0 bytes"),
    ],
)
def test_a_file_that_is_no_such_condition_is_named(scene_folder, tmp_path, data, condition, message):
    root = scene_folder(count=3)
    (root / "depth" / "0001.npy").write_bytes(data)
    with pytest.raises(DataError, match=rf"depth{'/'}0001\.npy(.|\n)*({message})"):
        LabelMapDataset(root, LABELS, conditions=(condition,))[1]
    with pytest.raises(DataError, match=rf"1 problem(.|\n)*0001\.npy(.|\n)*({message})|0000(.|\n)*{message}"):
        build_dataset(root, tmp_path / "out", LABELS, conditions=(condition,), num_workers=0)


def test_values_outside_are_clipped_on_request_and_integers_have_their_own_range(scene_folder):
    root = scene_folder(count=1)
    (root / "normals" / "0000.npy").rename(root / "normals" / "0000_n.npy")
    suffixes = parse_config(run_tree(conditions=CONDITIONS, suffixes={"normals": "_n"})).data.suffixes
    check_sample(LabelMapDataset(root, LABELS, conditions=BOTH, suffixes=suffixes)[0])
    (root / "depth" / "0000.npy").write_bytes(npy(np.linspace(-5, 15, 40 * 56).reshape(40, 56)))
    clipped = LabelMapDataset(root, LABELS, conditions=(DEPTH.model_copy(update={"clip": True}),))[0].conditions
    assert clipped.min() == -1 and clipped.max() == 1
    for dtype in (np.uint8, np.uint16):
        most = np.iinfo(dtype).max
        (root / "depth" / "0000.npy").write_bytes(npy(np.array([[0, most]], dtype).repeat(40, 0).repeat(28, 1)))
        values = LabelMapDataset(root, LABELS, conditions=(Condition(name="depth"),))[0].conditions
        assert sorted(values.unique().tolist()) == [-1, 1]


def test_big_endian_and_fortran_arrays_are_read():
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    for stored in (array.astype(">f4"), np.asfortranarray(array), array.astype(np.float16)):
        assert np.array_equal(decode_condition(npy(stored), "x")[..., 0], array)
    colours = np.dstack([array, array + 1, array + 2])
    assert np.array_equal(decode_condition(tiff(colours), "x"), colours)


# ------------------------------------------------------------------------------------------------ runs


def train(commands, tmp_path, tree, *extra):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    result = commands.run("train.py", "--config", path, "--logdir", tmp_path / "log", *extra, NO_CURVES="1")
    assert result.returncode == 0, result.stderr
    return result


def infer(commands, tmp_path, source, *extra, name="out"):
    arguments = "--logdir", tmp_path / "log", "--input_dir", source, "--output_dir", tmp_path / name, *extra
    result = commands.run("inference.py", *arguments)
    assert result.returncode == 0, result.stderr
    return {path.stem: np.asarray(Image.open(path)) for path in (tmp_path / name).glob("*.png")}


def test_edges_alone_train_and_generate(scene_folder, tmp_path, commands):
    root = scene_folder(size=(32, 64))
    (root / "seg_maps").rename(tmp_path / "kept")
    tree = run_tree(labels=None, edges="file", train=run_tree()["data"]["train"] | {"roots": [str(root)]})
    with pytest.raises(DataError, match=r"without label maps, from edges or conditions alone, write data\.labels"):
        LabelMapDataset(root, LABELS, edges="file")
    train(commands, tmp_path, tree)
    bare, whole = infer(commands, tmp_path, root / "edge_maps"), infer(commands, tmp_path, root, name="whole")
    assert len(bare) == 5 and all(np.array_equal(bare[key], whole[key]) for key in bare)
    arguments = "--logdir", tmp_path / "log", "--input_dir", root, "--output_dir", tmp_path / "no", "--map", "1=2"
    assert (
        "--map replaces classes of label maps, and this model takes none"
        in commands.run("inference.py", *arguments).stderr
    )
    synthesizer = Synthesizer.load(tmp_path / "log", device="cpu")
    edges = np.asarray(Image.open(root / "edge_maps" / "0002.png"))
    assert np.array_equal(synthesizer(edges=edges), bare["0002"])
    assert isinstance(synthesizer(edges=Image.fromarray(edges)), Image.Image)
    for given in ({"label_map": edges}, {}, {"label_map": edges, "edges": edges}):
        with pytest.raises(ConfigError, match="trained without label maps: give edges alone"):
            synthesizer(**given)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/_labels/0002.png"))[..., 0], 255 - edges)
    result = commands.run("-m", "imaginaire_spade.demo", "--checkpoint", tmp_path / "log")
    assert result.returncode == 2 and "made for edges, which cannot be painted as label maps" in result.stderr


def test_conditions_beside_labels_train_and_generate(scene_folder, tmp_path, commands):
    root, lmdb = scene_folder(size=(32, 64)), tmp_path / "lmdb"
    split = run_tree()["data"]["train"] | {"roots": [str(lmdb)]}
    tree = run_tree(conditions=CONDITIONS, train=split, val={**split, "augmentations": {"resize_h_w": [32, 64]}})
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(tree))
    result = commands.run(
        "scripts/build_lmdb.py", "--config", tmp_path / "build.yaml", "--data_root", root, "--output_root", lmdb
    )
    assert result.returncode == 0 and "depth, normals" in result.stdout, result.stderr
    train(commands, tmp_path, tree)
    made = infer(commands, tmp_path, root)
    synthesizer = Synthesizer.load(tmp_path / "log", device="cpu")
    ids = np.asarray(Image.open(root / "seg_maps" / "0001.png"))
    given = {name: np.load(root / name / "0001.npy") for name in ("depth", "normals")}
    assert np.array_equal(synthesizer(ids, conditions=given), made["0001"])
    assert not np.array_equal(synthesizer(ids, conditions=given | {"depth": 10 - given["depth"]}), made["0001"])
    assert synthesizer(ids[:31, :50], conditions={k: v[:31, :50] for k, v in given.items()}, size="own").shape == (
        31, 50, 3
    )  # fmt: skip
    with pytest.raises(ConfigError, match="conditions: none given; this generator takes depth, normals"):
        synthesizer(ids)
    with pytest.raises(DataError, match=r"conditions\['depth'\]: values 11"):
        synthesizer(ids, conditions=given | {"depth": given["depth"] * 0 + 11})
    with pytest.raises(DataError, match="differ in size"):
        synthesizer(ids, conditions=given | {"depth": given["depth"][1:]})
    result = commands.run("inference.py", "--logdir", tmp_path / "log", "--input_dir", root / "seg_maps",
                          "--output_dir", tmp_path / "no")  # fmt: skip
    assert result.returncode == 2 and "with folders depth/, normals/ of the conditions" in result.stderr
    # Another set of conditions is another network.
    changed = dict(tree, data=dict(tree["data"], conditions=CONDITIONS[:1]))
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(changed))
    result = commands.run("train.py", "--config", tmp_path / "changed.yaml", "--logdir", tmp_path / "log")
    assert result.returncode == 2 and "depth (1); normals (3); this config has depth (1)" in result.stderr
    result = commands.run("inference.py", "--logdir", tmp_path / "log", "--input_dir", root, "--output_dir",
                          root / "depth")  # fmt: skip
    assert result.returncode == 2 and "lies among the label maps" in result.stderr


def saved(tmp_path, tree) -> Model:
    """A model with random weights of this configuration."""
    config = parse_config(tree, overrides=["trainer.init.gain=1.0"])
    torch.manual_seed(0)
    generator = build_generator(config)
    path = tmp_path / "model.pt"
    write_checkpoint(path, {"config": dump_config(config), "generator": generator.state_dict()})
    return Model.load(path, weights="raw", for_inference=False)


@pytest.mark.parametrize("changes", [{"conditions": CONDITIONS}, {"labels": None, "edges": "file"}])
def test_other_systems_have_no_such_generators(changes):
    with pytest.raises(CheckpointError, match="clade has generators of label maps alone"):
        export_files("clade", {}, parse_config(run_tree(**changes)), "ema")


def test_soft_label_maps(tmp_path):
    tree = run_tree(edges="labels")
    synthesizer = Synthesizer(saved(tmp_path, tree), size="own")
    ids = blocky_labels(np.random.default_rng(0), 30, 50, 5)
    hard = np.eye(6, dtype=np.float32)[ids].transpose(2, 0, 1)
    plain = synthesizer(ids).astype(int)
    for soft in (hard, hard[:5].astype(np.float64), torch.from_numpy(hard)):
        assert np.abs(synthesizer(soft) - plain).max() <= 1  # another path of the same sums
    np.testing.assert_array_equal(synthesizer(torch.from_numpy(ids)), plain)
    blurred = np.stack([cv2.blur(channel, (9, 9)) for channel in hard])
    assert np.abs(synthesizer(blurred) - plain).max() > 1
    assert synthesizer(hard, size=(64, 64)).shape == (64, 64, 3)
    for wrong, message in (
        (hard.transpose(1, 2, 0), r"float32 \[30, 50, 6\]; a soft label map is float \[C, H, W\] with C = 5 or 6"),
        (hard * 3 - 1, r"values -1\.\.2; a soft label map has shares, 0\.\.1"),
        (hard * np.nan, "values nan"),
    ):
        with pytest.raises(DataError, match=message):
            synthesizer(wrong)
    with pytest.raises(ConfigError, match="None; this generator was trained with label maps"):
        synthesizer()
    tree["gen"]["norm"] = "clade"
    with pytest.raises(ConfigError, match="takes one class per pixel"):
        Synthesizer(saved(tmp_path, tree))(hard)


@pytest.mark.parametrize("labels", [{"num_classes": 40}, None])
def test_a_generator_with_conditions_is_exported(tmp_path, labels):
    tree = run_tree(labels=labels, conditions=CONDITIONS, edges="file")
    tree["gen"] = {"type": "pix2pixhd", "num_filters": 2, "num_downsamplings": 1, "num_blocks": 0}
    model = saved(tmp_path, tree)
    checked = []
    export_model(model, tmp_path / "model.pt2", lambda name, difference: checked.append(difference))
    assert len(checked) == 4 and max(checked) < 1e-4
    inputs = {"edges": torch.zeros(1, 64, 64), "conditions": torch.zeros(1, 4, 64, 64)}
    if labels:
        inputs["labels"] = torch.zeros(1, 64, 64, dtype=torch.int32)
    assert torch.export.load(tmp_path / "model.pt2").module()(**inputs).shape == (1, 3, 64, 64)


# ------------------------------------------------------------------------------------------------ own data sets


def csv_of(tmp_path, root):
    rows = [f"../raw/images/{path.stem}.jpg;{path}" for path in sorted((root / "seg_maps").glob("*.png"))]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/pairs.csv").write_text("photo;label_map\n" + "\n".join(rows), encoding="utf-8")
    return tmp_path / "lists/pairs.csv"


def test_pairs_of_a_csv_are_the_folders_samples(scene_folder, tmp_path, commands):
    root = scene_folder(size=(32, 64))
    split = run_tree()["data"]["train"] | {"roots": [str(csv_of(tmp_path, root))]}
    tree = run_tree(type={"type": "csv_pairs", "delimiter": ";"}, train=split, edges="labels")
    config = parse_config(tree)
    own = build_split(config, config.data.train)
    own.pairs[4] = (tmp_path / "gone.png", own.pairs[4][1])
    with pytest.raises(DataError, match=r"gone\.png: cannot be read"):
        own[4]
    write_png(tmp_path / "deep.png", np.zeros((32, 64, 3), np.uint16))
    own.pairs[4] = (tmp_path / "deep.png", own.pairs[3][1])
    with pytest.raises(DataError, match=r"deep\.png: a photo of 16 bits"):  # as in folders
        own[4]
    (tmp_path / "utf16.csv").write_text("photo;label_map\n", encoding="utf-16")
    with pytest.raises(DataError, match=r"utf16\.csv: cannot be read as CSV in UTF-8"):
        build_split(config, config.data.train.model_copy(update={"roots": [str(tmp_path / "utf16.csv")]}))
    own = build_split(config, config.data.train)
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(dict(tree, data=dict(tree["data"], type="nobody_has_it"))))
    assert load_data(tmp_path / "table.yaml").labels == config.data.labels
    plain = LabelMapDataset(root, config.data.labels, edges="labels", augmentations=config.data.train.augmentations)
    for index in range(5):
        assert all(map(torch.equal, own[index, 7 + index].tensors(), plain[index, 7 + index].tensors()))
    assert own[1, 7].key == "0001" and own.without_images()[1, 7].image is None
    module = "--import", "projects.own_data.datasets"
    train(commands, tmp_path, tree, *module)
    assert newest_checkpoint(tmp_path / "log") is not None
    assert len(infer(commands, tmp_path, root / "seg_maps", *module)) == 5
    Model.load(newest_checkpoint(tmp_path / "log"), for_inference=False).publish(tmp_path / "g.safetensors")
    assert Model.load(tmp_path / "g.safetensors").config.data.type is None  # whoever gets it has not the class


def test_crops_of_scenes_are_functions_of_seed_and_position(tmp_path):
    (tmp_path / "scenes").mkdir()
    for name in ("a", "b"):
        ids = blocky_labels(np.random.default_rng(3), 300, 200, 5)
        np.save(tmp_path / "scenes" / f"{name}_labels.npy", ids)
        np.save(tmp_path / "scenes" / f"{name}.npy", ids[..., None].repeat(3, -1) * 50)
    split = run_tree()["data"]["train"] | {"roots": [str(tmp_path / "scenes")]}
    crops = {"type": "scene_crops", "crop_h_w": [32, 64], "crops_per_scene": 6}
    config = parse_config(run_tree(type=crops, train=split))
    data = build_split(config, config.data.train)
    assert len(data) == 12 and data.keys[6] == "b/00000"
    batches = [[next(it) for _ in range(4)] for it in
               (training_loader(data, 3, seed=0, num_workers=workers) for workers in (0, 2))]  # fmt: skip
    for one, other in zip(*batches, strict=True):
        assert one.keys == other.keys and torch.equal(one.layout.labels, other.layout.labels)
        assert torch.equal(one.images[:, 0], one.layout.labels * 50) and torch.equal(one.images, other.images)
    [last] = [next(training_loader(data, 3, seed=0, images_seen=9, num_workers=0))]  # as a run that continues
    assert torch.equal(last.layout.labels, batches[0][3].layout.labels)
    assert not torch.equal(data[0, 1].labels, data[0, 2].labels) and torch.equal(data[0, 1].labels, data[0, 1].labels)
    too_large = parse_config(run_tree(type=crops | {"crop_h_w": [32, 640]}, train=split))
    with pytest.raises(DataError, match=r"\[300, 200\] is smaller than data\.type\.crop_h_w: \[32, 640\]"):
        build_split(too_large, too_large.data.train)[0]


class Mine(own_data.OwnDataset):
    """The same arrays for every key."""

    arrays: dict

    def list_keys(self):
        return self.roots

    def load(self, index, rng):
        return self.arrays


def test_a_data_set_of_ones_own_is_held_to_its_contract():
    ids, photo = np.zeros((32, 64), np.uint8), np.zeros((32, 64, 3), np.uint8)

    def sample(arrays, roots=("a", "b"), **data):
        config = parse_config(run_tree(**data))
        known = config.data, layout_spec(config), config.data.train.augmentations, 0, True
        return type("Made", (Mine,), {"arrays": arrays})(roots, *known)[0]

    both = {"seg_maps": ids, "images": photo}
    assert sample(both).image.shape == (3, 32, 64)
    extra = {"conditions": CONDITIONS, "edges": "instances"}
    full = sample({**both, "inst_maps": ids, "depth": ids, "normals": photo.astype(float)}, **extra)
    assert full.conditions.shape == (4, 32, 64) and full.edges.dtype == torch.uint8
    edges = sample({"images": photo, "edge_maps": ids.astype(float) + 0.5}, labels=None, edges="file")
    assert edges.labels.shape == (32, 64) and edges.edges.all()
    for wrong, changes, message in (
        ({"images": photo}, {}, r"Made, sample 'a': seg_maps: load\(\) must give it as it describes, not None"),
        ({**both, "seg_maps": ids.astype(float)}, {}, r"seg_maps: load\(\) must give .* not float64 \[32, 64\]"),
        ({"seg_maps": ids}, {}, "images: load"),
        ({**both, "images": photo[..., 0]}, {}, r"images: uint8 \[32, 64\]; data\.images asks for 3 channels of uint8"),
        ({**both, "images": photo[1:]}, {}, r"images is 31 x 64 .* seg_maps is 32 x 64: they must be of one size"),
        ({**both, "seg_maps": ids + 9}, {}, "label value.* 9 outside the table"),
        (both, {"edges": "file"}, "edge_maps: load"),
        (both, {"conditions": ["depth"]}, "depth: load"),
        ({**both, "depth": photo}, {"conditions": ["depth"]}, r"depth: 3 channel\(s\)"),
        ({**both, "depth": ids[:, 1:]}, {"conditions": ["depth"]}, "depth is 32 x 63"),
    ):
        with pytest.raises(DataError, match=message):
            sample(wrong, **changes)

    def fail(self, index, rng):
        raise FileNotFoundError(2, "No such file", "x.npz")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError, match=r"sample 'a': .*No such file: 'x\.npz'"):
        patch.setattr(Mine, "load", fail)
        sample(both)
    for roots, message in (((), "there are no samples"), (("a", "a"), "'a' stands for several samples")):
        with pytest.raises(DataError, match=message):
            sample(both, roots)


def test_a_data_set_class_keeps_what_the_base_says_of_the_data(tmp_path):
    base = REPOSITORY / "configs/projects/spade/sample/small64.yaml"
    (tmp_path / "a.yaml").write_text(f"base: {base}\ndata: {{type: csv_pairs, train: {{roots: [x]}}}}")
    (tmp_path / "b.yaml").write_text("base: a.yaml\ndata: {type: scene_crops}")
    plain = load_config(base).data
    for name, kind in (("a", "csv_pairs"), ("b", "scene_crops")):
        data = load_config(tmp_path / f"{name}.yaml").data
        assert data.type.type == kind and data.train.roots == ("x",)
        assert data.labels == plain.labels and data.train.augmentations == plain.train.augmentations
