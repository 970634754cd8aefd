"""Configs of other systems -> ours: imaginaire's YAML; the ``opt.txt`` of the 2019 SPADE release, of CLADE, of OASIS.

The tables list the keys that translate one by one; the functions below them handle the others. Every key is either
translated or listed as ignored (no equivalent).
"""

import operator
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imaginaire_spade.config_files import dump_yaml, load_labels, parse_config, read_yaml
from imaginaire_spade.errors import ConfigError
from imaginaire_spade.files import read_text
from imaginaire_spade.interop import describe, describe_networks
from imaginaire_spade.interop.keys import REQUIRED, Keys, Row
from imaginaire_spade.interop.label_tables import ADE20K, label_table
from imaginaire_spade.interop.systems import SYSTEMS


def import_config(source: str, path: Path, tables: Path | None = None) -> tuple[str, list[str]]:
    """Translate a config file of another system into our YAML, with notes on choices and ignored keys.

    Args:
        source: ``imaginaire`` (a YAML), ``nvlabs_spade``, ``clade`` or ``oasis`` (opt.txt).
        path: the file.
        tables: our folder configs/labels/, for the names of classes; None: they have none.
    Raises:
        ConfigError: the file cannot be read, lacks a key, or describes networks that are not supported.
    """
    text = read_text(path, ConfigError, f"{path}: cannot be read as text (give the .yaml or opt.txt)")
    if source == "imaginaire":
        tree = read_yaml(text, str(path))
        if not isinstance(tree, Mapping):
            raise ConfigError(f"{path}: not a config of imaginaire, which is a mapping of gen, dis, data, ...")
        keys = Keys(tree, path)
        ours = _from_imaginaire(keys)
    else:
        keys = Keys(parse_options(text, path), path)
        ours = _from_oasis(keys, tables) if source == "oasis" else _from_options(source, keys, tables)
    config = parse_config(ours, source=f"{path}, translated")
    return dump_yaml(config), [*keys.notes, *(f"ignored (no equivalent): {line}" for line in keys.unread())]


def parse_options(text: str, path: Path) -> dict[str, Any]:
    """Parse the lines ``name: value [default: ...]`` of an opt.txt."""
    options: dict[str, Any] = {}
    for line in text.splitlines():
        if matched := re.fullmatch(r"\s*(\w+): (.*?)\s*(?:\[default: .*\])?\s*", line):
            value = matched[2]
            if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", value):
                options[matched[1]] = int(value) if value.lstrip("-+").isdecimal() else float(value)
            else:
                options[matched[1]] = {"True": True, "False": False, "None": None}.get(value, value)
    if not options:
        raise ConfigError(f"{path}: not an opt.txt, which has lines such as 'label_nc: 182  [default: 182]'")
    return options


# ------------------------------------------------------------------------- the 2019 SPADE release, CLADE

_GAN_MODES = {"hinge": "hinge", "ls": "least_square", "original": "non_saturated", "w": "wasserstein"}
_OPTIONS = (
    Row("name", "data.name", str),
    Row("init_type", "trainer.init.type"),
    Row("init_variance", "trainer.init.gain"),
    Row("gan_mode", "losses.gan.mode", _GAN_MODES.__getitem__),
    Row("no_flip", "data.train.augmentations.horizontal_flip", operator.not_),
)


def _from_options(source: str, keys: Keys, tables: Path | None) -> dict[str, Any]:
    # Networks.
    hyper = {"label_nc": keys.take("label_nc")} | keys.translate(Row(name, name) for name in SYSTEMS[source].defaults)
    keys.check("netG", "spade")
    ours = {
        **describe_networks(source, hyper),
        "trainer.iteration": "reference",
        "trainer.model_average": None,
        "losses.gan.weight": 1.0,
        "data.name": "imported",
        "data.train.augmentations.horizontal_flip": True,
    } | keys.translate(_OPTIONS)

    # Batch and losses.
    batch, gpus = _batch_and_gpus(keys, "batchSize")
    ours["data.train.batch_size"] = batch // gpus
    if not keys.take("no_ganFeat_loss", False):
        ours["losses.feature_matching"] = float(keys.take("lambda_feat", 10.0))
    if not keys.take("no_vgg_loss", False):
        ours["losses.perceptual"] = {"weight": float(keys.take("lambda_vgg", 10.0)), "imagenet_statistics": False}
    if hyper.get("use_vae"):
        ours["losses.kl"] = float(keys.take("lambda_kld", 0.05)) * batch / gpus
        keys.notes.append(f"lambda_kld sums over the {batch // gpus} images of a GPU: losses.kl is on their mean")

    # Optimizers and schedule.
    keys.check("optimizer", "adam")
    if (steps := keys.take("D_steps_per_G", 1)) != 1:
        keys.notes.append(f"D_steps_per_G: {steps}: here one update of each per iteration")
    constant, decaying = keys.take("niter", 50), keys.take("niter_decay", 0)
    policy = {"type": "linear", "decay_start": constant / (constant + decaying)} if decaying else {"type": "constant"}
    lr, beta1, beta2 = keys.take("lr", 2e-4), keys.take("beta1", 0.0), keys.take("beta2", 0.9)
    adam = {"lr": lr, "adam_beta1": beta1, "adam_beta2": beta2, "lr_policy": policy}
    ours["gen_opt"] = ours["dis_opt"] = adam
    if not keys.take("no_TTUR", False):
        adam |= {"adam_beta1": 0.0, "adam_beta2": 0.9}
        ours["gen_opt"], ours["dis_opt"] = adam | {"lr": lr / 2}, adam | {"lr": lr * 2}
    ours["trainer.max_epochs"] = constant + decaying

    # Data.
    spec, dataset = describe(source, "layout_spec", hyper), keys.take("dataset_mode", "coco")
    labels = label_table(source, spec, dataset)
    if dataset in ADE20K:
        keys.notes.append(
            "data.labels: ADE20K's raw ids are the classes, 0 (other) included: the release subtracts one from them,"
            " but drops the result"
        )
        named = None if tables is None else load_labels(tables / "ade20k_release.yaml")
        if named is not None and named.num_classes == labels["num_classes"]:
            labels |= {"names": named.names, "palette": named.palette}
    ours |= {"data.labels": labels, "data.edges": "instances" if spec.has_edges else "none"}
    return ours | _roots(keys, ours["data.name"]) | _geometry(keys, describe(source, "image_size", hyper))


def _batch_and_gpus(keys: Keys, key: str) -> tuple[int, int]:
    """Return the images of an iteration, and among how many GPUs they are divided."""
    gpus = max(1, len([gpu for gpu in str(keys.take("gpu_ids", "0")).split(",") if gpu.strip() not in ("", "-1")]))
    batch = keys.take(key)
    if batch % gpus:
        raise ConfigError(f"{key}: {batch} is no multiple of the {gpus} GPUs of gpu_ids")
    return batch, gpus


def _roots(keys: Keys, name: str) -> dict[str, Any]:
    keys.notes.append(
        f"dataroot: {keys.take('dataroot', None)}: roots here are LMDBs or folders with images/ and seg_maps/: set"
        " data.train.roots and data.val.roots"
    )
    return {f"data.{split}.roots": [f"dataset/{name}/{split}"] for split in ("train", "val")}


def _geometry(keys: Keys, size: tuple[int, int]) -> dict[str, Any]:
    """Translate ``preprocess_mode`` into augmentations of both splits; ``size`` is the networks' (height, width)."""
    mode, load = keys.take("preprocess_mode", "resize_and_crop"), keys.take("load_size", 286)
    train, val = "data.train.augmentations.", "data.val.augmentations."
    if mode == "fixed":
        return {f"{train}resize_h_w": list(size), f"{val}resize_h_w": list(size)}
    crop = [size[1], size[1]]
    ours: dict[str, Any] = {f"{val}resize_h_w": crop}
    if "resize" in mode:
        ours[f"{train}resize_h_w"] = [load, load] if "crop" in mode else crop
    elif "scale_shortside" in mode or "scale_width" in mode:
        ours[f"{train}resize_smallest_side"] = load
        if "scale_width" in mode:
            keys.notes.append(
                f"preprocess_mode: {mode} has no counterpart: the smaller side is scaled to load_size instead"
            )
    elif mode != "crop":
        keys.notes.append(f"preprocess_mode: {mode} has no counterpart: images are cropped to crop_size")
    if "crop" in mode or mode == "none":
        ours[f"{train}random_crop_h_w"] = crop
    return ours


# ------------------------------------------------------------------------- OASIS

_OASIS_OPTIONS = (
    Row("name", "data.name", str),
    Row("no_balancing_inloss", "losses.segmentation_gan.class_balancing", operator.not_),
    Row("lambda_labelmix", "losses.segmentation_gan.labelmix", float),
    Row("no_flip", "data.train.augmentations.horizontal_flip", operator.not_),
)
_TABLES = {"ade20k": "ade20k.yaml", "coco": "cocostuff.yaml", "cityscapes": "cityscapes_oasis.yaml"}
"""``dataset_mode`` -> its table in configs/labels/."""


def _from_oasis(keys: Keys, tables: Path | None) -> dict[str, Any]:
    # Networks; what the file lacks follows from the data set.
    dataset = keys.take("dataset_mode")
    known = ("label_nc", "contain_dontcare_label", "crop_size", "aspect_ratio", *SYSTEMS["oasis"].defaults)
    hyper = keys.translate(Row(name, name) for name in known) | {"dataset_mode": dataset}
    spec, size = (describe("oasis", part, hyper) for part in ("layout_spec", "image_size"))
    ours = {
        **describe_networks("oasis", hyper | {"D_channels": SYSTEMS["oasis"].defaults["D_channels"]}),
        "trainer.iteration": "reference",
        "trainer.init": {"type": "xavier", "gain": 0.02},
        "losses.segmentation_gan.weight": 1.0,
        "data.name": "imported",
        "data.train.augmentations.horizontal_flip": True,
    } | keys.translate(_OASIS_OPTIONS)

    # Batch, losses, optimizers, schedule.
    ours["trainer.max_epochs"] = keys.take("num_epochs", 200)
    batch, gpus = _batch_and_gpus(keys, "batch_size")
    ours["data.train.batch_size"] = batch // gpus
    if gpus > 1:
        keys.notes.append(
            f"class weights and LabelMix's draws are of all {batch} images here, of each GPU's {batch // gpus} there"
        )
    if keys.take("no_labelmix", False):
        ours["losses.segmentation_gan.labelmix"] = 0.0
    if keys.take("add_vgg_loss", False):
        ours["losses.perceptual"] = {"weight": float(keys.take("lambda_vgg", 10.0)), "imagenet_statistics": False}
    adam = {"adam_beta1": keys.take("beta1", 0.0), "adam_beta2": keys.take("beta2", 0.999)}
    ours["gen_opt"], ours["dis_opt"] = adam | {"lr": keys.take("lr_g")}, adam | {"lr": keys.take("lr_d")}
    average = {"beta": keys.take("EMA_decay", 0.9999), "start_iteration": 0, "form": "state",
               "batch_norm_images": 51 * batch}  # fmt: skip
    ours["trainer.model_average"] = None if keys.take("no_EMA", False) else average

    # Data.
    labels = label_table("oasis", spec, dataset)
    named = None if tables is None or dataset not in _TABLES else load_labels(tables / _TABLES[dataset])
    if named is not None and named.num_classes == labels["num_classes"]:
        labels |= {name: getattr(named, name) for name in ("ignore", "remap", "names", "palette", "absent")}
    ours |= {"data.labels": labels, "data.edges": "none"} | _roots(keys, ours["data.name"])
    train, val = (f"data.{split}.augmentations." for split in ("train", "val"))
    ours |= {f"{train}resize_h_w": list(size), f"{val}resize_h_w": list(size)}
    if dataset != "cityscapes":
        load = round(size[1] * 286 / 256)
        ours |= {f"{train}resize_h_w": [load, load], f"{train}random_crop_h_w": list(size)}
        keys.notes.append(
            f"images are resized to {load}x{load} and cropped at a random place, as the options of OASIS mean it; its"
            f" release resizes them to {size[0]}x{size[1]}, so that the crop never moves"
        )
    return ours


# ------------------------------------------------------------------------- imaginaire

_GENERATOR = {
    "out_image_small_side_size": 256, "num_filters": 128, "kernel_size": 3, "style_dims": 256,
    "weight_norm_type": "spectral", "skip_activation_norm": True, "use_posenc_in_input_layer": True,
    "output_multiplier": 1.0,
}  # fmt: skip
_DISCRIMINATOR = {
    "kernel_size": 4, "num_filters": 128, "max_num_filters": 512, "num_discriminators": 2, "num_layers": 5,
    "activation_norm_type": "none", "weight_norm_type": "spectral",
    "use_fpse": True, "fpse_kernel_size": 3, "fpse_activation_norm_type": "none",
}  # fmt: skip
_ADAM = {"lr": REQUIRED, "adam_beta1": 0.0, "adam_beta2": 0.999}
_AVERAGE = {"enabled": True, "beta": 0.9999, "start_iteration": 1000, "num_batch_norm_estimation_iterations": 30}
_ROWS = (
    Row("max_epoch", "trainer.max_epochs"),
    Row("max_iter", "trainer.max_iterations"),
    Row("logging_iter", "trainer.log_every"),
    Row("image_save_iter", "trainer.image_every"),
    Row("snapshot_save_iter", "trainer.checkpoint_every"),
    Row("trainer.init.type", "trainer.init.type"),
    Row("trainer.init.gain", "trainer.init.gain"),
    Row("trainer.loss_weight.feature_matching", "losses.feature_matching.weight"),
    Row("trainer.loss_weight.perceptual", "losses.perceptual.weight"),
    Row("data.name", "data.name", str),
    Row("data.num_workers", "data.num_workers"),
)
_SPLIT = (
    "batch_size", "augmentations.resize_smallest_side", "augmentations.random_scale_limit",
    "augmentations.horizontal_flip", "augmentations.resize_h_w", "augmentations.random_crop_h_w",
    "augmentations.center_crop_h_w",
)  # fmt: skip
_PERCEPTUAL = (
    Row("trainer.perceptual_loss.layers", "losses.perceptual.layers"),
    Row("trainer.perceptual_loss.weights", "losses.perceptual.layer_weights"),
)


def _from_imaginaire(keys: Keys) -> dict[str, Any]:
    # Networks.
    hyper = _imaginaire_generator(keys)
    labels = label_table("imaginaire", describe("imaginaire", "layout_spec", hyper))
    if hyper["use_dont_care"]:
        here = "255" if labels["ignore"] else "none"
        keys.notes.append(
            f"there every id from num_classes on is don't care; here {here} is: add others to data.labels.ignore"
        )
    ours = {
        **describe_networks("imaginaire", hyper | {"dis": keys.take_all("dis", _DISCRIMINATOR)}),
        "trainer.iteration": "reference",
        "data.name": "imported",
        "data.labels": labels,
        "data.edges": "file" if hyper["edge_channels"] else "none",
    } | keys.translate(_ROWS)

    # Losses.
    batch = keys.take("data.train.batch_size")
    mode = keys.take("trainer.gan_mode", "hinge")
    mode = "half_least_square" if mode == "least_square" else mode
    ours["losses.gan"] = {"weight": keys.take("trainer.loss_weight.gan"), "mode": mode}
    if "losses.perceptual.weight" in ours:
        keys.check("trainer.perceptual_loss.mode", "vgg19")
        ours |= {"losses.perceptual.imagenet_statistics": True} | keys.translate(_PERCEPTUAL)
    if (kl := keys.take("trainer.loss_weight.kl", None)) is not None:
        ours["losses.kl"] = float(kl) * batch
        keys.notes.append(f"loss_weight.kl sums over the {batch} images of a GPU: losses.kl is on their mean")

    # Optimizers and schedule.
    for section in ("gen_opt", "dis_opt"):
        keys.check(f"{section}.type", "adam")
        ours[section] = keys.take_all(section, _ADAM)
        policy = keys.take_all(f"{section}.lr_policy", {"type": "step", "step_size": 10**9})
        if policy["type"] != "step" or policy["step_size"] < 10**6:
            keys.notes.append(
                f"{section}.lr_policy: {policy['type']} has no counterpart: the learning rate is constant"
            )
    average = keys.take_all("trainer.model_average_config", _AVERAGE)
    average["batch_norm_images"] = batch * average.pop("num_batch_norm_estimation_iterations")
    ours["trainer.model_average"] = average if average.pop("enabled") else None
    if keys.take("trainer.amp_config.enabled", False) or keys.take("trainer.amp", "O0") != "O0":
        ours["trainer.precision"] = "fp16"
        keys.notes.append("mixed precision is fp16 there; on GPUs since Ampere trainer.precision: bf16 is safer")
    if "trainer.max_epochs" in ours and (iterations := ours.pop("trainer.max_iterations", None)) is not None:
        epochs = ours["trainer.max_epochs"]
        keys.notes.append(f"max_iter: {iterations} is left out: here a run has one length, max_epoch: {epochs}")

    # Data.
    for split in ("train", "val"):
        ours |= _split(keys, f"data.{split}")
    if keys.take("test_data", None) is not None:
        roots = keys.take("test_data.roots", None) or keys.take("test_data.test.roots")
        ours["test_data"] = {"roots": _to_list(roots), "batch_size": keys.take("test_data.test.batch_size", 1)}
    return ours


def _imaginaire_generator(keys: Keys) -> dict[str, Any]:
    """Return the hyper-parameters of the generator and of its style encoder."""
    inputs = list(keys.take("data.input_labels"))
    if inputs not in (["seg_maps"], ["seg_maps", "edge_maps"]):  # whose channels stand in another order
        raise ConfigError(f"data.input_labels: {inputs}: only seg_maps, then edge_maps if any, is supported")
    keys.take("data.input_types")
    edges = keys.translate([Row("data.input_types", "channels", _edge_channels)])
    norm = "gen.activation_norm_params"
    hyper = keys.take_all("gen", _GENERATOR) | {
        "num_seg_classes": keys.take("data.one_hot_num_classes.seg_maps"),
        "use_dont_care": keys.take("data.use_dont_care", False),
        "edge_channels": edges["channels"] if "edge_maps" in inputs else 0,
        "spade_hidden_filters": keys.take(f"{norm}.num_filters", 128),
        "spade_kernel_size": keys.take(f"{norm}.kernel_size", 3),
        "separate_projection": keys.take(f"{norm}.separate_projection", False),
        "activation_norm_type": keys.take(f"{norm}.activation_norm_type", "sync_batch"),
        "activation_norm_affine": keys.take(f"{norm}.activation_norm_params.affine", True),
    }
    if "gen.style_enc" in keys.nodes:
        keys.check("gen.style_enc.kernel_size", 3)
        hyper["style_enc_num_filters"] = keys.take("gen.style_enc.num_filters", 128)
    return hyper


def _edge_channels(input_types: list[dict[str, Any]]) -> int:
    types = {name: options for entry in input_types for name, options in entry.items()}
    return types["edge_maps"]["num_channels"] if "edge_maps" in types else 0


def _split(keys: Keys, split: str) -> dict[str, Any]:
    keys.take(f"{split}.is_lmdb", None)  # what a root is, is seen from what lies there
    if keys.take(f"{split}.augmentations.rotate", 0):
        keys.notes.append(f"{split}.augmentations.rotate has no counterpart here")
    rows = (Row(f"{split}.{name}", f"{split}.{name}", _to_size if "_h_w" in name else None) for name in _SPLIT)
    return {f"{split}.roots": _to_list(keys.take(f"{split}.roots"))} | keys.translate(rows)


def _to_list(roots: str | list[str]) -> list[str]:
    return [roots] if isinstance(roots, str) else list(roots)


def _to_size(text: str | list[int]) -> list[int]:
    """``"256, 256"``, or a list -> [256, 256]."""
    return [int(x) for x in str(text).strip("[]() ").split(",")]
