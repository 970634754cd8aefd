"""Which channel each raw id of a label map lights, in the networks of every other system and data set.

Where these expectations come from stands beside each. Short names of sources:
    notes      shared/parity/spade_g_normal/notes.md and clade_*/notes.md, written while the references ran
    discovery  shared/review/discovery.md, fault 1: the release's own loader and generator, run
    SPADE#45   github.com/NVlabs/SPADE/issues/45: contain_dontcare_label is True for COCO and ADE20K, False for Facades
               and custom, not set (False) for Cityscapes
    pains      shared/research/user_pains.md, rows 7 to 13
    CLADE      README of tzt101/CLADE: its data sets, and that they are prepared as SPADE's
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import write_png
from test_interop import IMAGINAIRE

from imaginaire_spade.build import build_component, build_discriminator, build_generator, check_run, layout_spec
from imaginaire_spade.config import RunConfig
from imaginaire_spade.config_diff import explain_mismatch
from imaginaire_spade.config_files import dump_config, load_config, load_labels, parse_component, parse_config
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.distances import class_distances
from imaginaire_spade.errors import CheckpointError, LabelError
from imaginaire_spade.inference.model import Model
from imaginaire_spade.interop import describe, foreign_names, import_generator
from imaginaire_spade.interop.checkpoint import architecture_config, export_files, import_checkpoint, networks_in
from imaginaire_spade.interop.configs import import_config
from imaginaire_spade.interop.label_tables import adapt_config, export_notes
from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.registry import GENERATORS
from imaginaire_spade.training.checkpoint import write_checkpoint
from imaginaire_spade.training.state import new_average, update_average

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = REPOSITORY / "configs/projects"


class Case(NamedTuple):
    """One data set of one source."""

    source: str
    dataset: str
    hyper: dict[str, Any]
    """What its opt.txt or YAML says of the label channels."""
    lights: dict[int, int]
    """Raw id -> the channel that it lights."""
    refused: tuple[int, ...]
    """Raw ids that are errors here."""
    recipe: str | None
    """Our recipe of the data set, such as users give as --config."""


COCO = {"label_nc": 182, "contain_dontcare_label": True, "no_instance": False}
ADE20K = {"label_nc": 150, "contain_dontcare_label": True, "no_instance": True}
CITYSCAPES = {"label_nc": 35, "contain_dontcare_label": False, "no_instance": False}
CASES = [
    # notes: classes are their ids, 255 is don't care, the channel after the last class. COCO's ids are 0..181 (README
    # of nightrome/cocostuff). 182 would light don't care there (notes: of ADE20K's channels the last is id 150's and
    # don't care's); no file of COCO's has it, and label maps counted from 1 would: refused.
    Case("nvlabs_spade", "coco", COCO, {0: 0, 90: 90, 181: 181, 255: 182}, (182, 183, 254), "spade/cocostuff/base256"),
    Case("clade", "coco", COCO, {0: 0, 90: 90, 181: 181, 255: 182}, (182, 183, 254), "clade/cocostuff/base256"),
    # discovery and notes: the subtraction of one is dropped. 255, which no file of ADE20K has, would be 150 (flag).
    Case("nvlabs_spade", "ade20k", ADE20K, {0: 0, 1: 1, 75: 75, 150: 150}, (151, 255), "spade/ade20k/base256"),
    # discovery: CLADE's loader has the same code (read, not run); CLADE: both names of data sets.
    Case("clade", "ade20k", ADE20K, {0: 0, 1: 1, 75: 75, 150: 150}, (151, 255), "clade/ade20k/base256"),
    Case("clade", "ade20koutdoor", ADE20K, {0: 0, 1: 1, 75: 75, 150: 150}, (151, 255), "clade/ade20k_outdoor/base256"),
    # SPADE#45: no don't care; labelIds as they are, 34 never occurs. 255 would be channel 35, which is not there: its
    # loader fails (pains, row 9), as it does on ids from 35 on (pains, row 7).
    Case("nvlabs_spade", "cityscapes", CITYSCAPES, {0: 0, 7: 7, 33: 33, 34: 34}, (35, 255), None),
    Case("clade", "cityscapes", CITYSCAPES, {0: 0, 7: 7, 33: 33, 34: 34}, (35, 255), None),
    # SPADE#45: no don't care. That its label_nc is 13 could not be established from what we may read; opt.txt says it.
    # CMP's files hold 1..12 (Tylecek and Sara 2013), and 0 where nothing is labelled.
    Case("nvlabs_spade", "facades", {"label_nc": 13, "no_instance": True}, {0: 0, 1: 1, 12: 12}, (13, 255),
         "spade/facades/base256"),
    # README of NVlabs/SPADE: label_nc and contain_dontcare_label are the user's. Notes: the id label_nc is the last
    # channel, don't care, and 255 is written as label_nc.
    Case("nvlabs_spade", "custom", {"label_nc": 5, "no_instance": True}, {0: 0, 2: 2, 4: 4}, (5, 255), None),
    Case("nvlabs_spade", "custom", {"label_nc": 5, "contain_dontcare_label": True, "no_instance": True},
         {0: 0, 4: 4, 5: 5, 255: 5}, (6, 254), None),
    # pains, row 7: users set label_nc to 300. 255 is rewritten before anything else (row 9): no class of its own.
    Case("nvlabs_spade", "custom", {"label_nc": 300, "contain_dontcare_label": True, "no_instance": True},
         {0: 0, 254: 254, 255: 300}, (), None),
]  # fmt: skip


def case_id(case: Case) -> str:
    dont_care = "_dont_care" * bool(case.hyper.get("contain_dontcare_label", case.hyper.get("use_dont_care")))
    return f"{case.source}-{case.dataset}{case.hyper.get('label_nc', case.hyper.get('num_seg_classes'))}{dont_care}"


def opt_txt(path: Path, **options: Any) -> Path:
    """An opt.txt as the releases write it."""
    lines = [f"{name:>25}: {value!s:<30}\t[default: x]" for name, value in options.items()]
    path.write_text("\n".join(["-" * 17 + " Options " + "-" * 15, *lines, "-" * 17 + " End " + "-" * 19, ""]))
    return path


def channels(config: RunConfig, folder: Path, ids: list[int]) -> list[int]:
    """The label channel that each raw id lights: a PNG with a pixel of each, through the data set and the layout."""
    name = "_".join(map(str, ids))
    write_png(folder / name / "map.png", np.array([ids], np.uint8))
    sample = LabelMapDataset(folder / name, config.data.labels, edges="none", with_images=False)[0]
    spec = LayoutSpec(config.data.labels.num_classes, has_dont_care=config.data.labels.dont_care)
    one_hot = SemanticLayout(spec, sample.labels[None]).one_hot()[0, :, 0]  # [C, pixels]
    assert one_hot.sum(0).tolist() == [1] * len(ids)
    return one_hot.argmax(0).tolist()


def check(case: Case, config: RunConfig, folder: Path) -> None:
    assert dict(zip(case.lights, channels(config, folder, list(case.lights)), strict=True)) == case.lights
    for raw in case.refused:
        with pytest.raises(LabelError, match=rf"\b{raw}\b.* outside the table"):
            channels(config, folder, [0, raw])


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_opt_txt(case, tmp_path):
    file = opt_txt(tmp_path / "opt.txt", dataset_mode=case.dataset, batchSize=1, norm_mode="clade", **case.hyper)
    text, _ = import_config(case.source, file)
    config = parse_config(yaml.safe_load(text))
    spec = describe(case.source, "layout_spec", case.hyper)
    assert layout_spec(config).num_channels == spec.num_channels
    check(case, config, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_architecture_alone(case, tmp_path):
    """import_checkpoint.py without --config: the data set is not known, so the source's rule alone holds."""
    config = architecture_config(case.source, case.hyper, None)
    known = set(case.refused) - {case.hyper["label_nc"] * case.hyper.get("contain_dontcare_label", False), 255}
    check(case._replace(refused=tuple(known)), config, tmp_path)


@pytest.mark.parametrize("case", [case for case in CASES if case.recipe], ids=case_id)
def test_architecture_with_our_recipe(case, tmp_path):
    recipe = load_config(RECIPES / f"{case.recipe}.yaml")
    config = architecture_config(case.source, case.hyper, recipe)
    assert layout_spec(config).num_channels == describe(case.source, "layout_spec", case.hyper).num_channels
    check(case, config, tmp_path)


def test_cityscapes_recipe(tmp_path):
    """255 is no class in ours: no channel, where the release would fail."""
    config = architecture_config("nvlabs_spade", CITYSCAPES, load_config(RECIPES / "spade/cityscapes/base256x512.yaml"))
    assert channels(config, tmp_path, [0, 7, 33, 34]) == [0, 7, 33, 34]
    labels = config.data.labels
    assert labels.to_train_ids(np.array([[255]], np.uint8), "x") == labels.dont_care_id and not labels.dont_care


# ---------------------------------------------------------------------------------------------- pictures of the release


def release_weights(source: str, hyper: dict[str, Any]) -> dict[str, torch.Tensor]:
    """An untrained generator under the release's names, whose pictures are neither grey nor saturated."""
    spec = describe(source, "layout_spec", hyper)
    component = parse_component(describe(source, "generator", hyper), GENERATORS, "gen")
    torch.manual_seed(3)
    network = build_component(GENERATORS, component, spec, describe(source, "image_size", hyper))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            rows_of_clade = parameter.dim() == 2
            scale = 1.0 if rows_of_clade else 0.02 if name.startswith("to_image") else 0.2
            parameter.normal_(0, scale)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of one forward
    network.train()(release_layout(spec, ade20k_map()))
    names = foreign_names(source, network)
    return {names[key]: value for key, value in network.state_dict().items()}


def release_layout(spec: LayoutSpec, raw: np.ndarray) -> SemanticLayout:
    """What the release's loader makes of a label map of ADE20K: raw ids as channels, no position for id 0."""
    semantics = torch.zeros(1, spec.num_channels, *raw.shape)
    semantics.scatter_(1, torch.from_numpy(raw.astype(np.int64))[None, None], 1)
    distances = np.where(raw == 0, 0, class_distances(raw)).astype(np.float32) if spec.has_distances else None
    return SemanticLayout.from_dense(spec, semantics, None if distances is None else torch.from_numpy(distances)[None])


def release_picture(source: str, hyper: dict[str, Any], state: dict[str, torch.Tensor], raw: np.ndarray) -> np.ndarray:
    """What test.py of the release computes: RGB uint8 [H, W, 3]."""
    network = import_generator(source, state, hyper | ({"skip_ids": []} if hyper.get("add_dist") else {})).eval()
    with torch.no_grad():
        image = network(release_layout(describe(source, "layout_spec", hyper), raw))[0]
    return ((image + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def ade20k_map(size: int = 64) -> np.ndarray:
    """Raw ids of ADE20K: other, wall, flag and some between."""
    ids = np.array([0, 1, 2, 3, 17, 100, 149, 150], np.uint8)
    blocks = ids[np.random.default_rng(5).integers(0, len(ids), (8, 8))]
    return np.kron(blocks, np.ones((size // 8, size // 8), np.uint8))


SMALL = ADE20K | {"ngf": 8, "crop_size": 64}
RELEASES = {
    "spade": ("nvlabs_spade", SMALL),
    "clade": ("clade", SMALL | {"norm_mode": "clade", "add_dist": False}),
    "icpe": ("clade", SMALL | {"norm_mode": "clade", "add_dist": True}),
}


def ok(commands: Any, *arguments: object) -> str:
    result = commands.run(*map(str, arguments))
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize("route", ["opt.txt", "recipe", "recipe alone", "architecture alone"])
@pytest.mark.parametrize("release", RELEASES)
def test_ade20k_gives_the_releases_pictures(commands, tmp_path, release, route):
    source, hyper = RELEASES[release]
    state = release_weights(source, hyper)
    torch.save(state, tmp_path / "latest_net_G.pth")
    raw = ade20k_map()
    write_png(tmp_path / "maps/a.png", raw)
    (tmp_path / "a.json").write_text(json.dumps(hyper))
    recipe = {"spade": "spade/ade20k/base256", "clade": "clade/ade20k/base256", "icpe": "clade/ade20k/base256_icpe"}
    ours = RECIPES / f"{recipe[release]}.yaml"
    if route == "opt.txt":
        file = opt_txt(tmp_path / "opt.txt", dataset_mode="ade20k", batchSize=1, load_size=64, **hyper)
        ok(commands, "scripts/import_config.py", "--source", source, file, "--output", tmp_path / "c.yaml")
        described: list[object] = ["--config", tmp_path / "c.yaml"]
    elif route == "recipe":
        described = ["--config", ours, "--architecture", tmp_path / "a.json"]
    elif route == "recipe alone":
        size = "data.train.augmentations={resize_h_w: [64, 64]}"
        described = ["--config", ours, "--set", "gen.num_filters=8", "--set", size]
    else:
        described = ["--architecture", tmp_path / "a.json"]
    said = ok(commands, "scripts/import_checkpoint.py", "--source", source, "--weights", tmp_path / "latest_net_G.pth",
              *described, "--output", tmp_path / "ade.pt")  # fmt: skip
    ok(commands, "inference.py", "--checkpoint", tmp_path / "ade.pt", "--input_dir", tmp_path / "maps",
       "--output_dir", tmp_path / "out", "--device", "cpu", "--no_gallery", "--size", "own")  # fmt: skip
    picture = cv2.imread(str(tmp_path / "out/a.png"))[..., ::-1].astype(int)
    theirs = release_picture(source, hyper, state, raw)
    difference = np.abs(picture - theirs)
    assert difference.max() <= 1 and difference.mean() < 0.01, (difference.max(), difference.mean())
    assert theirs.std() > 10 and np.isin(theirs, (0, 255)).mean() < 0.1  # it would prove nothing

    assert ("raw id r of a label map lights channel r" in said) == route.startswith("recipe"), said
    names = Model.load(tmp_path / "ade.pt", for_inference=False).config.data.labels.names
    if route != "architecture alone" and route != "opt.txt":
        assert (names[0], names[1], names[150]) == ("other", "wall", "flag")


def test_ade20ks_table_is_one_however_it_comes(tmp_path):
    """From opt.txt, from each recipe, from configs/labels/: ids, names and colours; and it stacks on every recipe."""
    file = opt_txt(tmp_path / "opt.txt", dataset_mode="ade20k", batchSize=1, **ADE20K)
    text, notes = import_config("nvlabs_spade", file, REPOSITORY / "configs/labels")
    assert any("ADE20K's raw ids are the classes" in note for note in notes)
    wanted = load_labels(REPOSITORY / "configs/labels/ade20k_release.yaml")
    tables = [parse_config(yaml.safe_load(text)).data.labels]
    named = RECIPES.rglob("ade20k*/*.yaml")
    recipes = [path for path in named if path.parents[1].name != "oasis"]  # whose don't care is raw id 0
    assert len(recipes) == 9
    for recipe in recipes:
        config = load_config(recipe)
        adapted, notes = adapt_config("nvlabs_spade", config)
        assert len(notes) == 1 and adapt_config("nvlabs_spade", adapted) == (adapted, [])
        (tmp_path / "tuned.yaml").write_text(f"base: [{recipe}, {REPOSITORY}/configs/labels/ade20k_release.yaml]")
        stacked = load_config(tmp_path / "tuned.yaml")
        check_run(stacked, 1)
        assert explain_mismatch(adapted, stacked) == [] and stacked.data.name == config.data.name
        (difference,) = explain_mismatch(adapted, config)
        assert "write configs/labels/ade20k_release.yaml last in its base" in difference
        tables += [adapted.data.labels, stacked.data.labels]
        # imaginaire has no ADE20K of its own: whoever gives this table knows the ids that the weights saw.
        assert adapt_config("imaginaire", config) == (config, [])
    for table in tables:
        assert np.array_equal(table.table, wanted.table)
        assert (table.names, table.palette, table.dont_care) == (wanted.names, wanted.palette, False)
    assert (
        wanted.names[:2] == ("other", "wall") and wanted.names[150] == "flag" and wanted.palette[1] == (120, 120, 120)
    )


def test_a_config_with_its_own_ignored_ids_and_positions_is_adapted():
    """255, "no class" in the user's table, is other; the id without position moves along."""
    config = load_config(RECIPES / "clade/ade20k/base256_icpe.yaml", ["data.labels.ignore=[0, 255]"])
    for stated, expected in ((["gen.norm.skip_ids=[150, 3]"], [0, 4]), ([], [0])):
        config = load_config(RECIPES / "clade/ade20k/base256_icpe.yaml", ["data.labels.ignore=[0, 255]", *stated])
        adapted, notes = adapt_config("clade", config)
        assert adapted.gen.args["norm"].args["skip_ids"] == tuple(expected) and len(notes) == 2 - len(stated)
        assert adapted.data.labels.table[[0, 1, 150, 255]].tolist() == [0, 1, 150, 0]
    # A fork that did subtract: the table says so itself, and is left alone.
    subtracted = {0: 150} | {raw: raw - 1 for raw in range(1, 151)}
    stated = f"data.labels={{num_classes: 151, dont_care: false, remap: {subtracted}}}"
    config = load_config(RECIPES / "spade/ade20k/base256.yaml", [stated])
    assert adapt_config("nvlabs_spade", config) == (config, [])
    assert architecture_config("nvlabs_spade", ADE20K, config).data.labels == config.data.labels


# ---------------------------------------------------------------------------------------------------------- imaginaire


class ImaginaireCase(NamedTuple):
    num_seg_classes: int
    use_dont_care: bool
    lights: dict[int, int]
    refused: tuple[int, ...]


@pytest.mark.parametrize(
    "case",
    [
        # parity/imaginaire_lmdb/notes.md: 183 classes + don't care + edge; ids >= 183, such as 255, are don't care.
        # Here 255 alone is, since COCO-Stuff's files hold no other: the rest is refused (pains, row 13), a note says.
        ImaginaireCase(183, True, {0: 0, 91: 91, 181: 181, 182: 182, 255: 183}, (183, 254)),
        # parity/imaginaire_g/notes.md: the same rule for 6 classes.
        ImaginaireCase(6, True, {0: 0, 5: 5, 255: 6}, (6, 254)),
        # By the same rule 255 is the last class of 256, and don't care where there are 255.
        ImaginaireCase(256, True, {0: 0, 254: 254, 255: 255}, ()),
        ImaginaireCase(255, True, {0: 0, 254: 254, 255: 255}, ()),
        # pains, row 13: without don't care an id beyond the classes lights nothing there; here it is refused.
        ImaginaireCase(183, False, {0: 0, 91: 91, 182: 182}, (183, 255)),
    ],
    ids=lambda case: f"{case.num_seg_classes}-{case.use_dont_care}",
)
def test_imaginaire(case, tmp_path):
    text = IMAGINAIRE.replace("{seg_maps: 183}", f"{{seg_maps: {case.num_seg_classes}}}")
    (tmp_path / "theirs.yaml").write_text(text.replace("use_dont_care: True", f"use_dont_care: {case.use_dont_care}"))
    ours, notes = import_config("imaginaire", tmp_path / "theirs.yaml")
    config = parse_config(yaml.safe_load(ours))
    assert layout_spec(config).num_channels == case.num_seg_classes + case.use_dont_care + 1
    ignored = "here none is" if case.num_seg_classes > 255 else "here 255 is"
    assert any(f"every id from num_classes on is don't care; {ignored}" in note for note in notes) == case.use_dont_care
    hyper = {
        "num_seg_classes": case.num_seg_classes, "use_dont_care": case.use_dont_care, "edge_channels": 1,
        "out_image_small_side_size": 256, "num_filters": 4, "kernel_size": 3, "style_dims": 8, "weight_norm_type":
        "spectral", "use_posenc_in_input_layer": False, "spade_hidden_filters": 4, "spade_kernel_size": 3,
        "separate_projection": True, "activation_norm_type": "sync_batch", "activation_norm_affine": True,
        "output_multiplier": 1.0, "skip_activation_norm": True,
    }  # fmt: skip
    for made in (config, architecture_config("imaginaire", hyper, None)):
        assert dict(zip(case.lights, channels(made, tmp_path, list(case.lights)), strict=True)) == case.lights
        for raw in case.refused:
            with pytest.raises(LabelError, match=rf"\b{raw}\b.* outside the table"):
                channels(made, tmp_path, [0, raw])


# ------------------------------------------------------------------------------------------ exports, and older imports

COUNTED_FROM_1 = {"num_classes": 5, "ignore": [0], "remap": {raw: raw - 1 for raw in range(1, 6)}}
"""A table such as ADE20K's."""


def trained_here(target: str, labels: dict[str, Any], norm: dict[str, Any] | None = None) -> RunConfig:
    """Small networks that ``target`` knows."""
    imaginaire = target == "imaginaire"
    gen = {"num_filters": 4, "norm": norm or {"type": "spade", "hidden_channels": 8}}
    if imaginaire:
        gen = {"type": "style_spade", "num_filters": 2, "style_dims": 6, "positional_encoding": True,
               "norm": {"type": "spade", "hidden_channels": 8, "affine": True, "spectral_norm": True}}  # fmt: skip
    fpse = {"type": "fpse", "num_filters": 4, "max_num_filters": 8, "num_discriminators": 2}
    return parse_config(
        {
            "gen": {"type": "spade"} | gen,
            "dis": fpse if imaginaire else {"type": "multiscale_patch", "num_filters": 4, "num_layers": 3},
            "losses": {"gan": 1.0},
            "gen_opt": {"lr": 1e-4},
            "dis_opt": {"lr": 1e-4},
            "trainer": {"max_iterations": 1, "init": {"type": "xavier", "gain": 1.0}},
            "data": {
                "labels": labels,
                "edges": "labels",
                "train": {"roots": ["none"], "augmentations": {"resize_h_w": [128, 128]}},
            },
        }
    )


def checkpoint_of(config: RunConfig) -> dict[str, Any]:
    """What training leaves: networks and the generator's average."""
    torch.manual_seed(4)
    generator, discriminator = build_generator(config), build_discriminator(config)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    average = new_average(generator)
    update_average(average, generator, 0.0)
    return {
        "config": dump_config(config), "images_seen": 8, "gen_optimizer": {}, "generator": generator.state_dict(),
        "generator_ema": average.state_dict(), "discriminator": discriminator.state_dict(),
    }  # fmt: skip


def see(config: RunConfig, content: dict[str, Any], raw: np.ndarray, folder: Path, weights: str) -> list[torch.Tensor]:
    """A checkpoint's picture of a label map of raw ids, and its discriminator's scores of that."""
    write_checkpoint(folder / "seen.pt", content)
    model = Model.load(folder / "seen.pt", weights=weights, for_inference=False)
    write_png(folder / "map/a.png", raw)
    spec = layout_spec(config)
    data = LabelMapDataset(
        folder / "map", config.data.labels, edges="labels", distances=spec.has_distances, with_images=False
    )
    sample = data[0]
    offsets = None if sample.distances is None else sample.distances[None]
    layout = SemanticLayout(spec, sample.labels[None], sample.edges[None], offsets)
    z = (
        torch.randn(1, model.generator.style_dims, generator=torch.Generator().manual_seed(1))
        if model.generator.style_dims
        else None
    )
    discriminator = build_discriminator(config)
    discriminator.load_state_dict(content["discriminator"])
    with torch.no_grad():
        image = model.generator(layout, z)
        return [image, *(logits for logits, _ in discriminator.eval()(layout, image))]


def blocks(size: int, ids: list[int]) -> np.ndarray:
    chosen = np.array(ids, np.uint8)[np.random.default_rng(2).integers(0, len(ids), (8, 8))]
    return np.kron(chosen, np.ones((size // 8, size // 8), np.uint8))


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize(
    ("target", "norm"),
    [
        ("nvlabs_spade", None),
        ("clade", {"type": "clade"}),
        ("clade", {"type": "clade_icpe", "skip_ids": [5]}),
        ("imaginaire", None),
    ],
    ids=["spade", "clade", "icpe", "imaginaire"],
)
def test_an_exported_network_takes_the_same_label_maps(tmp_path, target, norm, weights):
    """Trained here on a table that counts from 1, it sees raw ids there: the same pictures from the same PNG."""
    config = trained_here(target, COUNTED_FROM_1, norm)
    content, raw = checkpoint_of(config), blocks(128, [0, 1, 2, 3, 5])
    before = see(config, content, raw, tmp_path, weights)
    assert before[0].std() > 0.01
    assert "in the order of raw ids" in " ".join(export_notes(target, config, "raw"))
    assert not any("no position" in note for note in export_notes(target, config, "raw"))
    files = export_files(target, content, config, weights)
    # As the target's loader reads ids: raw id r lights channel r.
    theirs = None if norm is None else {key: [0] if key == "skip_ids" else value for key, value in norm.items()}
    there = trained_here(target, {"num_classes": 6, "dont_care": False}, theirs)
    if target == "imaginaire":
        parts = networks_in(files["imaginaire.pt"], tmp_path)
    else:
        parts = {"generator": files["latest_net_G.pth"], "discriminator": files["latest_net_D.pth"]}
    imported, _ = import_checkpoint(target, there, parts)
    after = see(there, imported, raw, tmp_path, "ema" if target == "imaginaire" and weights == "ema" else "raw")
    for ours, theirs_there in zip(before, after, strict=True):
        torch.testing.assert_close(theirs_there, ours, atol=1e-5, rtol=1e-5)


def test_channels_can_stay_in_the_order_of_train_ids(tmp_path):
    config = trained_here("nvlabs_spade", COUNTED_FROM_1)
    content = checkpoint_of(config)
    name, tensor = next(iter(content["generator"].items()))
    for damaged in ({name: tensor.double()}, {name: tensor[:1]}, {"other": tensor}):
        with pytest.raises(CheckpointError, match=r"^the checkpoint's generator .* its own config"):
            export_files("nvlabs_spade", content | {"generator": content["generator"] | damaged}, config, "raw")
    for order, same in (("train", True), ("raw", False)):
        parts = networks_in(export_files("nvlabs_spade", content, config, "raw", order)["latest_net_G.pth"], tmp_path)
        back = import_checkpoint("nvlabs_spade", config, parts)[0]["generator"]
        assert all(torch.equal(back[key], value) for key, value in content["generator"].items()) == same


@pytest.mark.parametrize("release", RELEASES)
def test_ade20k_goes_back_bit_for_bit(commands, tmp_path, release):
    source, hyper = RELEASES[release]
    state = release_weights(source, hyper)
    torch.save(state, tmp_path / "latest_net_G.pth")
    (tmp_path / "a.json").write_text(json.dumps(hyper))
    ours = RECIPES / "spade/ade20k/base256.yaml"
    ok(commands, "scripts/import_checkpoint.py", "--source", source, "--weights", tmp_path / "latest_net_G.pth",
       "--architecture", tmp_path / "a.json", "--config", ours, "--output", tmp_path / "ade.pt")  # fmt: skip
    said = ok(commands, "scripts/export_checkpoint.py", "--checkpoint", tmp_path / "ade.pt", "--target", source,
              "--output_dir", tmp_path / "out")  # fmt: skip
    assert "note:" not in said
    back = torch.load(tmp_path / "out/latest_net_G.pth", weights_only=True)
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())


def test_export_says_what_label_maps_must_hold():
    def notes(target: str, labels: dict[str, Any], norm: dict[str, Any] | None = None, order: str = "raw") -> str:
        return " ".join(export_notes(target, trained_here(target, labels, norm), order))

    for plain in ({"num_classes": 5, "ignore": [255]}, {"num_classes": 35, "dont_care": False, "ignore": [255]}):
        for target in ("nvlabs_spade", "imaginaire"):
            assert notes(target, plain) == ""
    # 255 is the channel after the last class there, here that of raw id 0.
    both = notes("nvlabs_spade", COUNTED_FROM_1 | {"ignore": [0, 255]})
    assert "in the order of raw ids" in both and "raw ids 255 light another channel in nvlabs_spade" in both
    # Road is 7 in the files and 0 in training, and so on: no order of channels would do.
    train_ids = {"num_classes": 2, "ignore": [0, 255], "remap": {7: 0, 8: 1}}
    assert notes("nvlabs_spade", train_ids).startswith("raw ids 0, 7, 8 light another channel in nvlabs_spade")
    assert "write train ids (255: don't care)" in notes("nvlabs_spade", train_ids)
    assert "raw ids 0, 1, 2, 3, 4, 5 light another channel" in notes("nvlabs_spade", COUNTED_FROM_1, order="train")
    icpe = notes("clade", {"num_classes": 5, "ignore": [255]}, {"type": "clade_icpe"})
    assert "CLADE gives pixels of raw id 0 no position" in icpe and "Networks trained with [0] agree" in icpe


@pytest.mark.parametrize(
    ("target", "norm"), [("nvlabs_spade", "clade"), ("clade", "spade"), ("nvlabs_spade", "concat")]
)
def test_a_norm_that_the_target_does_not_have_is_refused(target, norm):
    config = trained_here(target, COUNTED_FROM_1, {"type": norm})
    with pytest.raises(CheckpointError, match=rf"gen.norm: {norm}: {target} has "):
        export_files(target, checkpoint_of(config), config, "raw")


def test_an_import_under_the_table_of_before_is_noticed(commands, tmp_path, tiny_folder):
    """What import_checkpoint.py wrote with a recipe of ADE20K until it knew better."""
    source, hyper = RELEASES["spade"]
    recipe = load_config(RECIPES / "spade/ade20k/base256.yaml")
    adapted = architecture_config(source, hyper | {"ndf": 4, "n_layers_D": 2}, recipe)
    content, _ = import_checkpoint(source, adapted, {"generator": release_weights(source, hyper)})
    assert content["imported_from"] == source
    write_checkpoint(tmp_path / "new.pt", content)
    assert not any("Import them again" in note for note in Model.load(tmp_path / "new.pt", for_inference=False).notes)
    content["config"]["data"]["labels"] = dump_config(recipe)["data"]["labels"]
    del content["imported_from"]
    write_checkpoint(tmp_path / "old.pt", content)
    write_png(tmp_path / "maps/a.png", ade20k_map())
    said = ok(commands, "inference.py", "--checkpoint", tmp_path / "old.pt", "--input_dir", tmp_path / "maps",
              "--output_dir", tmp_path / "out", "--device", "cpu", "--no_gallery")  # fmt: skip
    assert "every class is taken for its neighbour. Import them again" in said
    result = commands.run("scripts/export_checkpoint.py", "--checkpoint", str(tmp_path / "old.pt"), "--target", source,
                          "--output_dir", str(tmp_path / "back"))  # fmt: skip
    assert result.returncode == 2 and "Import them again" in result.stderr and not (tmp_path / "back").exists()

    raw = tiny_folder(keys=2, size=(64, 64))
    text = yaml.safe_dump(content["config"])
    (tmp_path / "tune.yaml").write_text(text)
    tune = ["--set", f"data.train.roots=[{raw}]", "--set", "data.train.batch_size=2", "--set", "losses.perceptual=0",
            "--set", "data.num_workers=0", "--set", "data.val=null", "--set", "trainer.max_iterations=1",
            "--set", "data.train.augmentations={resize_h_w: [64, 64]}",
            "--set", "trainer.max_epochs=null"]  # fmt: skip
    said = ok(commands, "train.py", "--config", tmp_path / "tune.yaml", "--checkpoint", tmp_path / "old.pt", "--logdir",
              tmp_path / "log", "--device", "cpu", *tune)  # fmt: skip
    assert "Import them again" in said
    # Newer ones under the old recipe, with its table or without one: refused, with the line to write.
    alone, _ = import_checkpoint(
        source, architecture_config(source, hyper, None), {"generator": release_weights(source, hyper)}
    )
    write_checkpoint(tmp_path / "alone.pt", alone)
    for name in ("new", "alone"):
        result = commands.run("train.py", "--config", str(tmp_path / "tune.yaml"), "--checkpoint",
                              str(tmp_path / f"{name}.pt"), "--logdir", str(tmp_path / f"log_{name}"), "--device",
                              "cpu", *tune)  # fmt: skip
        assert result.returncode == 2, result.stdout
        assert "write configs/labels/ade20k_release.yaml last in its base" in result.stderr
    assert "import the weights again, with a recipe of ADE20K as --config" in result.stderr
