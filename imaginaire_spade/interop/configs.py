"""Configs of other systems -> ours: imaginaire's SPADE YAML, the ``opt.txt`` of the 2019 SPADE release and of CLADE.

Every key is either translated or listed as ignored (no equivalent).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from imaginaire_spade.config_files import dump_yaml, load_labels, parse_config, read_yaml
from imaginaire_spade.errors import ConfigError
from imaginaire_spade.interop import describe
from imaginaire_spade.interop.label_tables import ADE20K, label_table

_REQUIRED = object()


class Keys:
    """A foreign config that remembers which of its keys were read."""

    def __init__(self, tree: Mapping[str, Any], path: Path) -> None:
        self._tree = tree
        self._path = path
        self._read: set[str] = set()
        self.notes: list[str] = []

    def take(self, dotted: str, default: Any = _REQUIRED) -> Any:
        """Return a key's value; ``default`` if the file does not state it. Raises ConfigError if it is required."""
        self._read.add(dotted)
        if not self.has(dotted):
            if default is _REQUIRED:
                raise ConfigError(f"{self._path}: {dotted} is not stated; add it to the file")
            return default
        node: Any = self._tree
        for part in dotted.split("."):
            node = node[part]
        return node

    def has(self, dotted: str) -> bool:
        """Whether the file states a key."""
        node: Any = self._tree
        for part in dotted.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return False
            node = node[part]
        return True

    def unread(self) -> Iterator[str]:
        """List the dotted keys (with values) that nothing read."""

        def leaves(node: Any, prefix: str) -> Iterator[str]:
            if any(prefix == key or prefix.startswith(f"{key}.") for key in self._read):
                return
            if isinstance(node, Mapping) and node:
                for key, value in node.items():
                    yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
            else:
                yield f"{prefix}: {node}"

        yield from leaves(self._tree, "")


def import_config(source: str, path: Path, tables: Path | None = None) -> tuple[str, list[str]]:
    """Translate a config file of another system into our YAML, with notes on choices and ignored keys.

    Args:
        source: ``imaginaire`` (a YAML), ``nvlabs_spade`` or ``clade`` (opt.txt).
        path: the file.
        tables: our folder configs/labels/, for the names of ADE20K's classes; None: they have none.
    Raises:
        ConfigError: the file cannot be read, lacks a key, or describes networks that are not supported.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error}); give the .yaml or opt.txt") from None
    if source == "imaginaire":
        tree = read_yaml(text, str(path))
        if not isinstance(tree, Mapping):
            raise ConfigError(f"{path}: not a config of imaginaire, which is a mapping of gen, dis, data, ...")
        keys = Keys(tree, path)
        ours = _from_imaginaire(keys)
    else:
        keys = Keys(parse_options(text, path), path)
        ours = _from_options(source, keys, tables)
    config = parse_config(ours, source=f"{path}, translated")
    return dump_yaml(config), [*keys.notes, *(f"ignored (no equivalent): {line}" for line in keys.unread())]


def parse_options(text: str, path: Path) -> dict[str, Any]:
    """Parse the lines ``name: value [default: ...]`` of an opt.txt."""
    options = {}
    for line in text.splitlines():
        if matched := re.fullmatch(r"\s*(\w+): (.*?)\s*(?:\[default: .*\])?\s*", line):
            value = matched[2]
            number = re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", value)
            words = {"True": True, "False": False, "None": None}
            options[matched[1]] = yaml.safe_load(_as_float(value)) if number else words.get(value, value)
    if not options:
        raise ConfigError(f"{path}: not an opt.txt, which has lines such as 'label_nc: 182  [default: 182]'")
    return options


def _as_float(number: str) -> str:
    return repr(float(number)) if re.search(r"[.eE]", number) else number


# ------------------------------------------------------------------------- the 2019 SPADE release, CLADE

_ARCHITECTURE = (
    "contain_dontcare_label", "no_instance", "crop_size", "aspect_ratio", "ngf", "norm_G", "use_vae", "z_dim",
    "num_upsampling_layers", "ndf", "norm_D", "num_D", "n_layers_D", "norm_E",
)  # fmt: skip
_GAN_MODES = {"hinge": "hinge", "ls": "least_square", "original": "non_saturated", "w": "wasserstein"}


def _from_options(source: str, keys: Keys, tables: Path | None) -> dict[str, Any]:
    hyper = {name: keys.take(name, None) for name in _ARCHITECTURE} | {"label_nc": keys.take("label_nc")}
    if source == "clade":
        hyper |= {name: keys.take(name, None) for name in ("norm_mode", "add_dist")}
    hyper = {name: value for name, value in hyper.items() if value is not None}
    dataset = keys.take("dataset_mode", "coco")
    if hyper.get("add_dist"):  # CLADE gives no position to 0 in the files, which is channel 0 in every data set
        hyper["skip_ids"] = [0]
    if (net := keys.take("netG", "spade")) != "spade":
        raise ConfigError(f"netG: {net}: only netG: spade is supported")
    spec = describe(source, "layout_spec", hyper)
    gpus = max(1, len([gpu for gpu in str(keys.take("gpu_ids", "0")).split(",") if gpu.strip() not in ("", "-1")]))
    batch = keys.take("batchSize")
    if batch % gpus:
        raise ConfigError(f"batchSize: {batch} is no multiple of the {gpus} GPUs of gpu_ids")
    losses: dict[str, Any] = {"gan": {"weight": 1.0, "mode": _GAN_MODES[keys.take("gan_mode", "hinge")]}}
    if not keys.take("no_ganFeat_loss", False):
        losses["feature_matching"] = float(keys.take("lambda_feat", 10.0))
    if not keys.take("no_vgg_loss", False):
        losses["perceptual"] = {"weight": float(keys.take("lambda_vgg", 10.0)), "imagenet_statistics": False}
    if hyper.get("use_vae"):
        losses["kl"] = float(keys.take("lambda_kld", 0.05)) * batch / gpus
        keys.notes.append(f"lambda_kld sums over the {batch // gpus} images of a GPU: losses.kl is on their mean")
    lr, betas = float(keys.take("lr", 2e-4)), (float(keys.take("beta1", 0.0)), float(keys.take("beta2", 0.9)))
    ttur = not keys.take("no_TTUR", False)
    constant, decaying = keys.take("niter", 50), keys.take("niter_decay", 0)
    policy = {"type": "linear", "decay_start": constant / (constant + decaying)} if decaying else {"type": "constant"}
    adam = dict(zip(("adam_beta1", "adam_beta2"), (0.0, 0.9) if ttur else betas, strict=True)) | {"lr_policy": policy}
    if (optimizer := keys.take("optimizer", "adam")) != "adam":
        raise ConfigError(f"optimizer: {optimizer}: only adam is supported")
    if (steps := keys.take("D_steps_per_G", 1)) != 1:
        keys.notes.append(f"D_steps_per_G: {steps}: here one update of each per iteration")
    augmentations, final = _geometry(keys, describe(source, "image_size", hyper))
    labels = label_table(source, spec, dataset)
    if dataset in ADE20K:
        keys.notes.append(
            "data.labels: ADE20K's raw ids are the classes, 0 (other) included: the release subtracts one from them,"
            " but drops the result"
        )
        named = None if tables is None else load_labels(tables / "ade20k_release.yaml")
        if named is not None and named.num_classes == labels["num_classes"]:
            labels |= {"names": named.names, "palette": named.palette}
    keys.notes.append(
        f"dataroot: {keys.take('dataroot', None)}: roots here are LMDBs or folders with images/ and seg_maps/: set"
        " data.train.roots and data.val.roots"
    )
    name = str(keys.take("name", "imported"))
    return {
        "gen": describe(source, "generator", hyper),
        "dis": describe(source, "discriminator", hyper),
        "encoder": describe(source, "encoder", hyper) if hyper.get("use_vae") else None,
        "losses": losses,
        "gen_opt": {"lr": lr / 2 if ttur else lr, **adam},
        "dis_opt": {"lr": lr * 2 if ttur else lr, **adam},
        "trainer": {
            "max_epochs": constant + decaying,
            "iteration": "reference",
            "init": {"type": keys.take("init_type", "xavier"), "gain": float(keys.take("init_variance", 0.02))},
            "model_average": None,
        },
        "data": {
            "name": name,
            "labels": labels,
            "edges": "instances" if spec.has_edges else "none",
            "train": {"roots": [f"dataset/{name}/train"], "batch_size": batch // gpus, "augmentations": augmentations},
            "val": {"roots": [f"dataset/{name}/val"], "augmentations": {"resize_h_w": final}},
        },
    }


def _geometry(keys: Keys, size: tuple[int, int]) -> tuple[dict[str, Any], list[int]]:
    """``preprocess_mode`` as augmentations, and the final [height, width]."""
    mode, load = keys.take("preprocess_mode", "resize_and_crop"), keys.take("load_size", 286)
    result: dict[str, Any] = {"horizontal_flip": not keys.take("no_flip", False)}
    if mode == "fixed":
        return result | {"resize_h_w": list(size)}, list(size)
    crop = [size[1], size[1]]
    if "resize" in mode:
        result["resize_h_w"] = [load, load] if "crop" in mode else crop
    elif "scale_shortside" in mode:
        result["resize_smallest_side"] = load
    elif "scale_width" in mode:
        result["resize_smallest_side"] = load
        keys.notes.append(
            f"preprocess_mode: {mode} has no counterpart: the smaller side is scaled to load_size instead"
        )
    elif mode != "crop":
        keys.notes.append(f"preprocess_mode: {mode} has no counterpart: images are cropped to crop_size")
    if "crop" in mode or mode == "none":
        result["random_crop_h_w"] = crop
    return result, crop


# ------------------------------------------------------------------------- imaginaire


def _from_imaginaire(keys: Keys) -> dict[str, Any]:
    inputs = keys.take("data.input_labels")
    types = {name: options for entry in keys.take("data.input_types") for name, options in entry.items()}
    if unknown := set(inputs) - {"seg_maps", "edge_maps"}:
        raise ConfigError(f"data.input_labels: {', '.join(sorted(unknown))}: only seg_maps and edge_maps are supported")
    if list(inputs) not in (["seg_maps"], ["seg_maps", "edge_maps"]):  # whose channels stand in another order
        raise ConfigError(f"data.input_labels: {list(inputs)}: only seg_maps, then edge_maps if any, is supported")
    hyper = {
        "num_seg_classes": keys.take("data.one_hot_num_classes.seg_maps"),
        "use_dont_care": keys.take("data.use_dont_care", False),
        "edge_channels": types["edge_maps"]["num_channels"] if "edge_maps" in inputs else 0,
        "out_image_small_side_size": keys.take("gen.out_image_small_side_size", 256),
        "activation_norm_affine": keys.take("gen.activation_norm_params.activation_norm_params.affine", True),
        "use_posenc_in_input_layer": keys.take("gen.use_posenc_in_input_layer", True),
    }
    for name, dotted, default in (
        ("num_filters", "num_filters", 128), ("kernel_size", "kernel_size", 3), ("style_dims", "style_dims", 256),
        ("weight_norm_type", "weight_norm_type", "spectral"), ("output_multiplier", "output_multiplier", 1.0),
        ("spade_hidden_filters", "activation_norm_params.num_filters", 128),
        ("spade_kernel_size", "activation_norm_params.kernel_size", 3),
        ("separate_projection", "activation_norm_params.separate_projection", False),
        ("activation_norm_type", "activation_norm_params.activation_norm_type", "sync_batch"),
        ("skip_activation_norm", "skip_activation_norm", True),
        ("style_enc_num_filters", "style_enc.num_filters", 128),
    ):  # fmt: skip
        hyper[name] = keys.take(f"gen.{dotted}", default)
    if (kernel := keys.take("gen.style_enc.kernel_size", 3)) != 3:
        raise ConfigError(f"gen.style_enc.kernel_size: {kernel}: only 3 is supported")
    dis = {
        name: keys.take(f"dis.{name}", default)
        for name, default in (
            ("kernel_size", 4), ("num_filters", 128), ("max_num_filters", 512), ("num_discriminators", 2),
            ("num_layers", 5), ("activation_norm_type", "none"), ("weight_norm_type", "spectral"),
            ("use_fpse", True), ("fpse_kernel_size", 3), ("fpse_activation_norm_type", "none"),
        )
    }  # fmt: skip
    batch = keys.take("data.train.batch_size")
    splits = {split: _split(keys, split) for split in ("train", "val")}
    edges = "file" if hyper["edge_channels"] else "none"
    average = {"enabled": True, "beta": 0.9999, "start_iteration": 1000, "num_batch_norm_estimation_iterations": 30}
    average = {name: keys.take(f"trainer.model_average_config.{name}", value) for name, value in average.items()}
    amp = keys.take("trainer.amp_config.enabled", False) or keys.take("trainer.amp", "O0") not in ("O0", None)
    trainer: dict[str, Any] = {
        "precision": "fp16" if amp else "fp32",
        "iteration": "reference",
        "init": {"type": keys.take("trainer.init.type", "xavier"), "gain": float(keys.take("trainer.init.gain", 0.02))},
        "model_average": {
            "beta": average["beta"], "start_iteration": average["start_iteration"],
            "batch_norm_images": average["num_batch_norm_estimation_iterations"] * batch,
        } if average["enabled"] else None,
    }  # fmt: skip
    if amp:
        keys.notes.append("mixed precision is fp16 there; on GPUs since Ampere trainer.precision: bf16 is safer")
    epochs, iterations = keys.take("max_epoch", None), keys.take("max_iter", None)
    if epochs is not None and iterations is not None:
        keys.notes.append(f"max_iter: {iterations} is left out: here a run has one length, max_epoch: {epochs}")
    trainer |= {"max_epochs": epochs} if epochs is not None else {"max_iterations": iterations}
    for theirs, ours in (("logging_iter", "log_every"), ("image_save_iter", "image_every"),
                         ("snapshot_save_iter", "checkpoint_every")):  # fmt: skip
        if (value := keys.take(theirs, None)) is not None:
            trainer[ours] = value
    tree = {
        "gen": describe("imaginaire", "generator", hyper),
        "dis": describe("imaginaire", "discriminator", dis),
        "encoder": describe("imaginaire", "encoder", hyper) if keys.has("gen.style_enc") else None,
        "losses": _imaginaire_losses(keys, batch),
        "gen_opt": _adam(keys, "gen_opt"),
        "dis_opt": _adam(keys, "dis_opt"),
        "trainer": trainer,
        "data": {
            "name": str(keys.take("data.name", "imported")),
            "labels": label_table("imaginaire", describe("imaginaire", "layout_spec", hyper)),
            "edges": edges,
            "num_workers": keys.take("data.num_workers", None),
            **splits,
        },
    }
    if keys.take("test_data", None) is not None:
        tree["test_data"] = {
            "roots": _roots(keys, "test_data"),
            "batch_size": keys.take("test_data.test.batch_size", 1),
        }
    if hyper["use_dont_care"]:
        here = "255" if tree["data"]["labels"]["ignore"] else "none"
        keys.notes.append(
            f"there every id from num_classes on is don't care; here {here} is: add others to data.labels.ignore"
        )
    return tree


def _imaginaire_losses(keys: Keys, batch: int) -> dict[str, Any]:
    weights = keys.take("trainer.loss_weight")
    mode = keys.take("trainer.gan_mode", "hinge")
    losses: dict[str, Any] = {}
    for name, value in weights.items():
        if name == "gan":
            losses[name] = {"weight": float(value), "mode": "half_least_square" if mode == "least_square" else mode}
        elif name == "perceptual":
            losses[name] = {"weight": float(value), "imagenet_statistics": True}
            for theirs, ours in (("layers", "layers"), ("weights", "layer_weights")):
                if (stated := keys.take(f"trainer.perceptual_loss.{theirs}", None)) is not None:
                    losses[name][ours] = stated
            if (network := keys.take("trainer.perceptual_loss.mode", "vgg19")) != "vgg19":
                raise ConfigError(f"trainer.perceptual_loss.mode: {network}: only vgg19 is supported")
        elif name == "kl":
            losses[name] = float(value) * batch
            keys.notes.append(f"loss_weight.kl sums over the {batch} images of a GPU: losses.kl is on their mean")
        elif name == "feature_matching":
            losses[name] = float(value)
        else:
            keys.notes.append(f"ignored (no equivalent): trainer.loss_weight.{name}: {value}")
    return losses


def _adam(keys: Keys, section: str) -> dict[str, Any]:
    if (kind := keys.take(f"{section}.type", "adam")) != "adam":
        raise ConfigError(f"{section}.type: {kind}: only adam is supported")
    policy, step = keys.take(f"{section}.lr_policy.type", "step"), keys.take(f"{section}.lr_policy.step_size", 10**9)
    if policy != "step" or step < 10**6:
        keys.notes.append(f"{section}.lr_policy: {policy} has no counterpart: the learning rate is constant")
    return {
        "lr": float(keys.take(f"{section}.lr")),
        "adam_beta1": float(keys.take(f"{section}.adam_beta1", 0.0)),
        "adam_beta2": float(keys.take(f"{section}.adam_beta2", 0.999)),
    }


def _roots(keys: Keys, section: str) -> list[str]:
    roots = keys.take(f"{section}.roots", None) or keys.take(f"{section}.test.roots", None)
    return [roots] if isinstance(roots, str) else list(roots)


def _split(keys: Keys, split: str) -> dict[str, Any]:
    augmentations: dict[str, Any] = {}
    for name in ("resize_smallest_side", "random_scale_limit", "horizontal_flip"):
        if (value := keys.take(f"data.{split}.augmentations.{name}", None)) is not None:
            augmentations[name] = float(value) if name == "random_scale_limit" else value
    for name in ("resize_h_w", "random_crop_h_w", "center_crop_h_w"):
        if (value := keys.take(f"data.{split}.augmentations.{name}", None)) is not None:
            augmentations[name] = [int(x) for x in str(value).strip("[]() ").split(",")]
    if keys.take(f"data.{split}.augmentations.rotate", 0):
        keys.notes.append(f"data.{split}.augmentations.rotate has no counterpart here")
    keys.take(f"data.{split}.is_lmdb", None)  # what a root is, is seen from what lies there
    return {
        "roots": _roots(keys, f"data.{split}"),
        "batch_size": keys.take(f"data.{split}.batch_size", 1),
        "augmentations": augmentations,
    }
