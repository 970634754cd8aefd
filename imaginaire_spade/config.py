"""Load, merge, override, check and dump the typed configuration of a run.

Owns every key that YAML may set outside the components (whose keys are the keyword-only parameters of the registered
class, see ``registry.py``) and the default of each, written once, here. Builds nothing: ``build.py`` does.

A file may name others to start from (``base: ../sample/spade.yaml`` or a list of them): mappings merge key by key,
everything else is replaced; a component whose ``type`` changes starts afresh.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from imaginaire_spade.errors import ConfigError
from imaginaire_spade.labels import EdgeSource, LabelSpec
from imaginaire_spade.registry import (
    DISCRIMINATORS,
    ENCODERS,
    GENERATORS,
    LOSSES,
    Registry,
    did_you_mean,
)


class Section(BaseModel):
    """Base of every part of the configuration: frozen, strict, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Component(Section):
    """A registered component and the resolved value of each of its keys (nested components likewise)."""

    type: str
    args: dict[str, Any]


class Loss(Section):
    """One term of the generator's objective."""

    weight: float = Field(ge=0)
    component: Component


class AugmentationConfig(Section):
    """Joint geometry of image, label and edge map, in this order. All sizes in pixels."""

    resize_smallest_side: int | None = Field(None, ge=1)
    """Resize so that the smaller side has this length, aspect ratio kept."""
    resize_h_w: tuple[int, int] | None = None
    """Resize to exactly (height, width), whatever the aspect ratio."""
    random_scale_limit: float = Field(0.0, ge=0, le=10)
    """Then enlarge by a factor drawn from [1, 1 + limit]."""
    random_crop_h_w: tuple[int, int] | None = None
    """Then cut (height, width) at a random position. The crop consists of whole pixels of the stored image."""
    center_crop_h_w: tuple[int, int] | None = None
    """Then cut (height, width) in the middle."""
    horizontal_flip: bool = False
    """Then mirror left-right with probability 1/2."""

    @model_validator(mode="after")
    def _check(self) -> AugmentationConfig:
        if self.resize_smallest_side and self.resize_h_w:
            raise ValueError("resize_smallest_side and resize_h_w exclude each other: keep one")
        if self.random_crop_h_w and self.center_crop_h_w:
            raise ValueError("random_crop_h_w and center_crop_h_w exclude each other: keep one")
        crop = self.crop_h_w
        for sizes in (self.resize_h_w, crop):
            if sizes and min(sizes) < 1:
                raise ValueError(f"{list(sizes)}: height and width must be positive")
        resized = self.resize_h_w or (self.resize_smallest_side and (self.resize_smallest_side,) * 2)
        if crop and resized:
            # The smaller side is the only one whose length is known before the picture is.
            short = min(crop) if self.resize_smallest_side else None
            if (short and short > resized[0]) or (not short and (crop[0] > resized[0] or crop[1] > resized[1])):
                raise ValueError(
                    f"a crop of {list(crop)} is larger than the image after"
                    f" {'resize_smallest_side: ' + str(resized[0]) if short else 'resize_h_w: ' + str(list(resized))}:"
                    " make the crop smaller or the resize larger"
                )
        return self

    @property
    def crop_h_w(self) -> tuple[int, int] | None:
        return self.random_crop_h_w or self.center_crop_h_w

    @property
    def output_h_w(self) -> tuple[int, int] | None:
        """Return the (height, width) of every sample; None if samples keep their own sizes."""
        return self.crop_h_w or (None if self.random_scale_limit else self.resize_h_w)


class SplitConfig(Section):
    """Where the samples of a split lie and how they are cut."""

    roots: tuple[str, ...] = Field(min_length=1)
    """LMDBs (built by scripts/build_lmdb.py or by imaginaire) or plain data set folders; the kind is detected."""
    batch_size: int = Field(1, ge=1)
    """Pictures per process and iteration. The global batch is this times the number of processes."""
    augmentations: AugmentationConfig = AugmentationConfig()


class LabelledData(Section):
    """What the files of a data set mean, wherever they lie."""

    name: str = "data"
    labels: LabelSpec
    edges: EdgeSource = EdgeSource.NONE
    """Edge channel: from edge_maps/ files, or drawn after augmentation from inst_maps/ or from the label map."""


class DataConfig(LabelledData):
    """A data set: its label table and its splits."""

    num_workers: int | None = Field(None, ge=0)
    """Loader workers per process; null = min(8, cores / processes)."""
    shuffle_shards: int | None = Field(None, ge=1)
    """Number of shards whose samples training mixes at a time, in a new order every epoch: for data sets larger than
    memory, of which it then reads a few files at a time. null = it mixes all."""
    train: SplitConfig
    val: SplitConfig | None = None


class TestDataConfig(Section):
    """Label maps for inference.py where no --input_dir is given."""

    __test__ = False
    roots: tuple[str, ...] = Field(min_length=1)
    batch_size: int = Field(1, ge=1)


class LearningRatePolicy(Section):
    """How the learning rate changes over the run."""

    type: Literal["constant", "linear"] = "constant"
    """Constant, or linear to 0 (section 4 of the SPADE paper)."""
    decay_start: float = Field(0.5, ge=0, lt=1)
    """Share of the run after which a linear policy falls to 0 at the end (SPADE: 0.5)."""


class OptimizerConfig(Section):
    """Adam. With two learning rates for generator and discriminator this is the two-time-scale rule (TTUR)."""

    type: Literal["adam"] = "adam"
    lr: float = Field(gt=0)
    """Learning rate (SPADE: 1e-4 for the generator, 4e-4 for the discriminator)."""
    adam_beta1: float = Field(0.0, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    fused: Literal["auto", "torch", "apex", "off"] = "auto"
    """auto, torch: torch's fused kernel (on a CPU too); apex: NVIDIA's FusedAdam, if installed; off: one by one."""
    lr_policy: LearningRatePolicy = LearningRatePolicy()

    @field_validator("fused", mode="before")
    @classmethod
    def _take_off_for_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # which is how YAML reads it where it is not quoted


class ModelAverageConfig(Section):
    """Exponential moving average of the generator's weights (used for previews, inference and export)."""

    beta: float = Field(0.9999, ge=0, lt=1)
    """Weight of the old EMA in each update."""
    start_iteration: int = Field(1000, ge=0)
    """Up to this iteration the EMA is a plain copy."""
    batch_norm_images: int = Field(64, ge=0)
    """Training label maps, spread evenly over the data set, over which the EMA's batch statistics are re-estimated
    for previews, at the end and, at most once per 20 times as many training images, for checkpoints; in between, or
    with 0, they are averaged too."""


class InitConfig(Section):
    """Initial weights of convolutions and linear layers (biases are zero)."""

    type: Literal["xavier", "normal", "kaiming", "orthogonal"] = "xavier"
    gain: float = Field(0.02, gt=0)
    """Gain (xavier, orthogonal) or standard deviation (normal); unused by kaiming."""


class EvaluationConfig(Section):
    """Scores of the (averaged) generator during training, on samples of data.val; see docs/evaluation.md."""

    every_images: int = Field(ge=1)
    """Training images between two evaluations; there is also one at the end."""
    num_images: int | None = Field(None, ge=4)
    """Validation samples, spread evenly over data.val, the same every time; null: all."""
    metrics: tuple[Literal["fid", "kid", "precision_recall", "segmentation"], ...] = Field(("fid",), min_length=1)
    """What is measured."""
    best: Literal["fid", "kid", "precision", "recall", "miou", "pixel_accuracy"] = "fid"
    """The score whose best checkpoint is kept as checkpoints/best.pt."""
    inception_weights: str | None = None
    """File of Inception weights, for all metrics but segmentation; null: torch's cache; `random:SEED`: an untrained
    network, to try things out."""
    feature_dim: Literal[64, 192, 768, 2048] = 2048
    """Layer of the Inception network; FID and KID proper: 2048."""
    resize: Literal["legacy", "clean"] = "legacy"
    """To the Inception network's size: as pytorch-fid does, or antialiased."""
    segmenter: str | None = None
    """Segmentation network: a Hugging Face model id or a local folder."""
    segmenter_labels: str | None = None
    """YAML or JSON file, class of the label table: label of the segmenter; null: matched by name."""

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        measured_by = {"precision": "precision_recall", "recall": "precision_recall"}
        measured_by |= {"fid": "fid", "kid": "kid", "miou": "segmentation", "pixel_accuracy": "segmentation"}
        needed = measured_by[self.best]
        if needed not in self.metrics:
            raise ValueError(f"best: {self.best} is measured by {needed}, which metrics does not name: add it there")
        if ("segmentation" in self.metrics) != (self.segmenter is not None):
            raise ValueError("metrics: segmentation and segmenter: MODEL belong together: state both or neither")
        return self


class TrainerConfig(Section):
    """The training run."""

    max_iterations: int | None = Field(None, ge=1)
    """Length of the run in iterations (one update of D and of G each) ..."""
    max_epochs: float | None = Field(None, gt=0)
    """... or in passes over the training set: state one of the two."""
    iteration: Literal["shared", "reference"] = "shared"
    """shared: one generator forward serves both updates, D first; reference: G first, then D on new images of
    the updated G, as the published SPADE numbers were obtained."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the networks; weights, statistics and losses are float32 in any case."""
    max_skipped_updates: int = Field(25, ge=1)
    """fp16: the run ends after this many updates in a row whose gradients overflowed (each halves the loss scale)."""
    gradient_accumulation: int = Field(1, ge=1)
    """Split each process's batch into this many pieces, one after the other: less memory, same batch."""
    activation_checkpointing: bool = False
    """Compute the activations inside the generator's blocks a second time in the backward pass instead of keeping them:
    less memory, about a third more time for the generator, the same numbers."""
    sync_batch_norm: bool = True
    """Batch statistics over all processes."""
    init: InitConfig = InitConfig()
    model_average: ModelAverageConfig | None = ModelAverageConfig()
    channels_last: bool = False
    """Memory format of the networks' weights."""
    log_every: int = Field(100, ge=1)
    """Iterations between two lines of the log (and points of the curves)."""
    image_every: int = Field(1000, ge=1)
    """Iterations between two rows of preview images."""
    image_rows: int = Field(4, ge=0)
    """Validation samples in a preview."""
    checkpoint_every: int = Field(1000, ge=1)
    """Iterations between two checkpoints."""
    evaluation: EvaluationConfig | None = None
    """Scores during training; null: none."""
    keep_last: int = Field(3, ge=1)
    """Checkpoints that stay on disk."""
    keep_every: int | None = Field(None, ge=1)
    """Keep one checkpoint permanently every N iterations, in checkpoints/kept; a multiple of checkpoint_every."""
    on_failed_save: Literal["stop", "continue"] = "stop"
    """Whether a checkpoint that cannot be written (disk full) ends the run, or training goes on to the next one."""
    bucket_cap_mb: float = Field(25.0, gt=0)
    """Several processes: gradients are exchanged in pieces of this many MiB, each while the next is still computed."""
    process_group_timeout_s: float = Field(300.0, gt=0)
    """After this long without an answer from the other processes a process gives up."""

    @model_validator(mode="after")
    def _check(self) -> TrainerConfig:
        if (self.max_iterations is None) == (self.max_epochs is None):
            raise ValueError("state exactly one of max_iterations and max_epochs")
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every: {self.keep_every} must be a multiple of checkpoint_every: {self.checkpoint_every}"
            )
        return self


class WeightSource(Section):
    """A published checkpoint: a path, or a URL with the sha256 it must have."""

    path: str | None = None
    url: str | None = None
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _check(self) -> WeightSource:
        if (self.path is None) == (self.url is None):
            raise ValueError("state exactly one of path and url")
        if self.url and not self.sha256:
            raise ValueError("a url needs its sha256, so that what was downloaded is what was meant")
        return self


class RunConfig(Section):
    """Everything a run is made of."""

    seed: int = Field(0, ge=0)
    """Every random draw is a function of this and of a sample's position in the run."""
    gen: Component
    dis: Component
    encoder: Component | None = None
    """Style encoder; needs a generator with style_dims > 0."""
    losses: dict[str, Loss]
    """Terms of the generator's objective by registered name; `gan` also states the discriminator's."""
    gen_opt: OptimizerConfig
    dis_opt: OptimizerConfig
    trainer: TrainerConfig
    data: DataConfig
    test_data: TestDataConfig | None = None
    pretrained_weight: WeightSource | None = None
    """What inference.py takes where neither --checkpoint nor --logdir gives one."""

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if "gan" not in self.losses:
            raise ValueError("losses must contain gan")
        return self


COMPONENT_KEYS: dict[str, Registry] = {"gen": GENERATORS, "dis": DISCRIMINATORS, "encoder": ENCODERS}


# ------------------------------------------------------------------------------------------------ reading


class _Loader(yaml.SafeLoader):
    """yaml.SafeLoader that reads 1e-4 as a number (YAML 1.1 reads it as a string)."""


_Loader.yaml_implicit_resolvers = {  # the dict is shared with SafeLoader: copy before adding
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)

Origins = dict[str, str]
"""Dotted key -> "file.yaml:12", for messages."""


def load_config(
    path: str | Path, overrides: Iterable[str] = (), *, extra: Mapping[str, Any] | None = None
) -> RunConfig:
    """Read, merge, override and check a configuration.

    Args:
        path: the YAML file.
        overrides: ``a.b=value`` strings (``--set``); the value is read as YAML.
        extra: further values by dotted key, from command-line flags of their own.
    Raises:
        ConfigError: naming the file and line, the key, what is allowed and the nearest valid spelling.
    """
    tree, origins = _read_overridden(Path(path), overrides)
    for key, value in (extra or {}).items():
        _assign(tree, key, value, f"--{key.rpartition('.')[2]}", origins)
    wanted = [key for key, field in RunConfig.model_fields.items() if field.is_required() and key != "data"]
    if "data" in tree and not set(wanted) & set(tree):
        raise ConfigError(
            f"{path}: not the config of a run: it has no {', '.join(wanted)}. Start one from a recipe and this file:"
            f" base: [configs/projects/spade/camvid/base256.yaml, {path}]"
        )
    return parse_config(tree, origins, str(path))


def load_data(path: str | Path, overrides: Iterable[str] = ()) -> LabelledData:
    """Load what a configuration says of its data set: the config of a run, or a label table alone (configs/labels/).

    Of the sections beside ``data`` only the names are checked.

    Args:
        path, overrides: as of ``load_config``.
    Raises:
        ConfigError: like ``load_config``; or there is no label table, with what to write.
    """
    tree, origins = _read_overridden(Path(path), overrides)
    data = tree.get("data")
    if not isinstance(data, dict) or "labels" not in data:
        raise ConfigError(
            f"{path}: no label table, in it or in its base. Write data: {{labels: {{num_classes: N, ignore: [255],"
            " names: [...]}}, or take one: base: configs/labels/camvid.yaml"
        )
    problems = [
        f"{_origin((key,), origins, str(path))}: {key}: unknown key{did_you_mean(key, RunConfig.model_fields)}"
        f" Allowed here: {', '.join(sorted(RunConfig.model_fields))}"
        for key in map(str, tree)
        if key not in RunConfig.model_fields
    ]
    schema = DataConfig if "train" in data else LabelledData
    try:
        content = schema.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        problems += _explain(error, schema, ("data",), origins, str(path))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return content


def load_labels(path: str | Path) -> LabelSpec:
    """Load the label table of ``load_data``. Raises ConfigError likewise."""
    return load_data(path).labels


def _read_overridden(path: Path, overrides: Iterable[str]) -> tuple[dict[str, Any], Origins]:
    """The tree of a file and its bases, with the values of ``--set``, and where each key is stated."""
    tree, origins = _read_merged(path, ())
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {item}: write --set section.key=value, such as --set trainer.log_every=10")
        try:
            value = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {item}: the value is not YAML: {error}") from None
        _assign(tree, key.strip(), value, f"--set {item}", origins)
    return tree, origins


def parse_config(tree: Mapping[str, Any], origins: Origins | None = None, source: str = "config") -> RunConfig:
    """Check a plain tree (as YAML or a checkpoint holds it) and fill in the defaults. Raises ConfigError."""
    problems: list[str] = []
    origins = origins or {}
    resolved = _resolve_components(dict(tree), problems, origins, source)
    # JSON mode is strict about scalars ("4" is no int) and lets lists be tuples.
    try:
        config = RunConfig.model_validate_json(json.dumps(resolved, default=str))
    except ValidationError as error:
        problems += _explain(error, RunConfig, (), origins, source)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return config


def read_yaml(text: str, where: str) -> Any:
    """Parse a YAML document into plain types; 1e-4 is a number. Raises ConfigError."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def parse_component(tree: Any, registry: Registry, name: str) -> Component:
    """Check one component's tree, such as ``{"type": "spade", "num_filters": 32}``, and fill in its defaults.

    Raises ConfigError that calls the component ``name``."""
    problems: list[str] = []
    resolved = _resolve(tree, registry, (name,), problems, {}, name)
    if problems:
        raise ConfigError("\n".join(problems))
    return Component.model_validate(resolved)


def dump_config(config: RunConfig) -> dict[str, Any]:
    """Return the fully resolved configuration as a plain tree; ``parse_config`` reads it back."""
    tree = config.model_dump(mode="json")
    for key in COMPONENT_KEYS:
        if tree[key] is not None:
            tree[key] = _flatten(tree[key])
    for name, loss in tree["losses"].items():
        tree["losses"][name] = {"weight": loss["weight"], **loss["component"]["args"]}
    # JSON turned the integer keys of remap into strings; YAML keeps integers.
    tree["data"]["labels"]["remap"] = {int(k): v for k, v in tree["data"]["labels"]["remap"].items()}
    return tree


def dump_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(dump_config(config), sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)


def _flatten(component: Mapping[str, Any]) -> dict[str, Any]:
    args = {
        key: _flatten(value) if isinstance(value, dict) and set(value) == {"type", "args"} else value
        for key, value in component["args"].items()
    }
    return {"type": component["type"], **args}


def _read_merged(path: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], Origins]:
    resolved = path.resolve()
    if resolved in chain:
        raise ConfigError(f"{path}: base files form a circle: {' -> '.join(map(str, (*chain, resolved)))}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        at = f" (named as base by {chain[-1]})" if chain else ""
        raise ConfigError(f"{path}: no such config file{at}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a config file: {error}") from None
    try:
        node = yaml.compose(text, _Loader)
        own = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(own, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys (gen, dis, data, ...), this is {type(own).__name__}")
    own_origins = dict(_key_lines(node, "", path))
    bases = own.pop("base", ())
    tree: dict[str, Any] = {}
    origins: Origins = {}
    for base in [bases] if isinstance(bases, str) else bases:
        base_tree, base_origins = _read_merged(Path(os.path.normpath(path.parent / base)), (*chain, resolved))
        tree = _merge(tree, base_tree)
        origins |= base_origins
    return _merge(tree, own), origins | own_origins


def _key_lines(node: yaml.Node | None, prefix: str, path: Path) -> Iterator[tuple[str, str]]:
    """(dotted key, "file:line") of every key of a composed document. Raises ConfigError on a repeated key."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        dotted = f"{prefix}{key.value}"
        if dotted in seen:
            raise ConfigError(f"{path}:{key.start_mark.line + 1}: {dotted} is stated twice: keep one")
        seen.add(dotted)
        yield dotted, f"{path}:{key.start_mark.line + 1}"
        yield from _key_lines(value, f"{dotted}.", path)


def _merge(base: Any, own: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(own, dict)):
        return own
    if own.get("type", base.get("type")) != base.get("type"):
        return own
    return base | {key: _merge(base[key], value) if key in base else value for key, value in own.items()}


def _assign(tree: dict[str, Any], dotted: str, value: Any, origin: str, origins: Origins) -> None:
    *parents, last = dotted.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{origin}: {parent} is a value, not a section")
        node[parent] = dict(child)
        node = node[parent]
    node[last] = value
    for below in [key for key in origins if key.startswith(f"{dotted}.")]:
        del origins[below]
    origins[dotted] = origin


# ------------------------------------------------------------------------------------------------ checking


def _resolve_components(tree: dict[str, Any], problems: list[str], origins: Origins, source: str) -> dict[str, Any]:
    """Replace each component of the tree by ``{"type", "args"}`` with every key resolved."""
    tree = dict(tree)
    for key, registry in COMPONENT_KEYS.items():
        if tree.get(key) is not None:
            tree[key] = _resolve(tree[key], registry, (key,), problems, origins, source)
    losses = tree.get("losses")
    if isinstance(losses, dict):
        tree["losses"] = {}
        for name, entry in losses.items():
            where = ("losses", str(name))
            if entry is None:
                problems.append(
                    f"{_origin(where, origins, source)}: losses.{name}: no weight. To leave out a loss of the base"
                    f" config, write {name}: 0"
                )
                tree["losses"][name] = {"component": _BROKEN, "weight": 0}
                continue
            entry = entry if isinstance(entry, dict) else {"weight": entry}
            args = {k: v for k, v in entry.items() if k != "weight"}
            component = _resolve({"type": name, **args}, LOSSES, where, problems, origins, source)
            loss = {"component": component} | ({"weight": entry["weight"]} if "weight" in entry else {})
            tree["losses"][name] = loss
    elif losses is not None:
        problems.append(f"{_origin(('losses',), origins, source)}: losses: a mapping of loss names to weights")
    return tree


_BROKEN = {"type": "", "args": {}}
"""Stands for a component that was complained of, so that the rest is still checked."""


def _resolve(
    entry: Any, registry: Registry, where: tuple[str, ...], problems: list[str], origins: Origins, source: str
) -> dict[str, Any]:
    entry = {"type": entry} if isinstance(entry, str) else entry
    dotted = ".".join(where)
    if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
        problems.append(
            f"{_origin(where, origins, source)}: {dotted}: a {registry.kind} is a mapping with a type:"
            f" {', '.join(registry.names())}"
        )
        return _BROKEN
    try:
        schema = registry.schema(entry["type"])
    except ConfigError as error:
        origin = _origin(where if where[0] == "losses" else (*where, "type"), origins, source)
        problems.append(f"{origin}: {dotted}: {error}")
        return _BROKEN
    args = {key: value for key, value in entry.items() if key != "type"}
    try:
        resolved = schema.model_validate_json(json.dumps(args, default=str)).model_dump(mode="json")
    except ValidationError as error:
        problems += _explain(error, schema, where, origins, source)
        return _BROKEN
    for part, part_registry in registry.parts(entry["type"]).items():
        resolved[part] = _resolve(resolved[part], part_registry, (*where, part), problems, origins, source)
    return {"type": entry["type"], "args": resolved}


def _origin(where: tuple[str, ...], origins: Origins, source: str) -> str:
    """File and line of the nearest stated key at or above ``where``."""
    for length in range(len(where), 0, -1):
        if ".".join(where[:length]) in origins:
            return origins[".".join(where[:length])]
    return source


def _explain(
    error: ValidationError, schema: type[BaseModel], prefix: tuple[str, ...], origins: Origins, source: str
) -> list[str]:
    """One line per mistake: file:line, key, what is wrong, what is allowed, nearest spelling."""
    lines = []
    for item in error.errors():
        parts = [str(part) for part in item["loc"]]
        where = (*prefix, *parts)
        at, key = _origin(where, origins, source), ".".join(where)
        if item["type"] == "extra_forbidden":
            allowed = _fields_at(schema, parts[:-1])
            hint = did_you_mean(parts[-1], allowed)
            lines.append(f"{at}: {key}: unknown key{hint} Allowed here: {', '.join(sorted(allowed))}")
        elif item["type"] == "missing":
            if parts[-1] != "component":
                lines.append(f"{at}: {key}: missing; write a value for it")
        else:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            lead = "must be " if item["msg"].startswith("Input should be ") else ""
            given = item["input"]
            shown = "" if isinstance(given, dict) else f" (given: {given!r})"
            lines.append(f"{at}: {key + ': ' if key else ''}{lead}{message}{shown}")
    return lines


def _fields_at(schema: type[BaseModel], path: list[str]) -> set[str]:
    """Names of the keys allowed in the section that ``path`` leads to."""
    for part in path:
        annotation = schema.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        schema = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), schema)
    return set(schema.model_fields)
