"""Define the typed configuration of a run; ``config_trainer.py`` has its sections on training.

Responsible for every key that YAML may set outside the components (whose keys are the keyword-only parameters of the
registered class, see ``registry.py``) and the default of each, written once, here or there. Reads no files
(``config_files.py`` does) and builds nothing (``build.py`` does).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_serializer, model_validator

from imaginaire_spade.config_trainer import Count, OptimizerConfig, Section, TrainerConfig
from imaginaire_spade.errors import ConfigError
from imaginaire_spade.labels import EdgeSource, LabelSpec
from imaginaire_spade.registry import DATASETS, DISCRIMINATORS, ENCODERS, GENERATORS, LOSSES, Component, Weight

Side = Annotated[int, Field(ge=1, le=2**16)]
"""Height or width in pixels."""
Number = Annotated[int | float, Field(ge=-1e30, le=1e30)]
"""What float32 holds, differences included."""


class Loss(Section):
    """One term of the generator's objective."""

    weight: Weight
    component: Annotated[Component, LOSSES]

    @model_validator(mode="before")
    @classmethod
    def _take_apart(cls, entry: dict[str, Any]) -> dict[str, Any]:
        """Take the weight out of ``{"type": NAME, "weight": W, key: value, ...}``."""
        if entry.get("weight", 0) is None:
            raise ConfigError(f"no weight. To leave out a loss of the base config, write {entry['type']}: 0")
        weight = {key: value for key, value in entry.items() if key == "weight"}
        return {**weight, "component": {key: value for key, value in entry.items() if key != "weight"}}

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return {"weight": self.weight, **self.component.args}


class AugmentationConfig(Section):
    """Joint geometry of image, label and edge map, in this order. All sizes in pixels."""

    resize_smallest_side: Side | None = None
    """Resize so that the smaller side has this length, aspect ratio kept."""
    resize_h_w: tuple[Side, Side] | None = None
    """Resize to exactly (height, width), whatever the aspect ratio."""
    random_scale_limit: float = Field(0.0, ge=0, le=10)
    """Then enlarge by a factor drawn from [1, 1 + limit]."""
    random_crop_h_w: tuple[Side, Side] | None = None
    """Then cut (height, width) at a random position. The crop consists of whole pixels of the stored image."""
    center_crop_h_w: tuple[Side, Side] | None = None
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
        resized = self.resize_h_w or (self.resize_smallest_side and (self.resize_smallest_side,) * 2)
        if crop and resized:
            # Only the smaller side's length is known before the image is.
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
    """The places of the samples of a split, and how they are cut."""

    roots: tuple[str, ...] = Field(min_length=1)
    """LMDBs (built by scripts/build_lmdb.py or by imaginaire) or plain data set folders; the kind is detected."""
    batch_size: int = Field(1, ge=1, le=2**16)
    """Images per process and iteration. The global batch is this times the number of processes."""
    augmentations: AugmentationConfig = AugmentationConfig()


class Condition(Section):
    """A dense condition: float channels that the networks see beside the labels, or in place of them."""

    name: str = Field(pattern=r"^[A-Za-z]\w*$")
    """Folder of its files, beside images/: PNG or TIFF of 8 or 16 bits, float TIFF, or .npy [H, W] or [H, W, C]."""
    channels: int = Field(1, ge=1, le=64)
    range: tuple[Number, Number] | None = None
    """The file's values that the networks see as -1 and 1; a file with others is refused. null: 0 and the largest
    integer of the file's 8 or 16 bits. Files of floats need a range."""
    clip: bool = False
    """Move values outside the range to its ends, instead of refusing the file."""
    flip_sign: tuple[int, ...] | None = None
    """Channels whose sign a mirrored sample turns: [0] for normals and flow, whose first channel points to the right.
    With several channels and horizontal_flip it must be stated; [] is right for colours."""

    @model_validator(mode="before")
    @classmethod
    def _read_name(cls, entry: Any) -> Any:
        """Read a name alone as a condition of that name."""
        entry = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict):
            return entry
        return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}

    @model_validator(mode="after")
    def _check(self) -> Condition:
        if self.range and self.range[0] >= self.range[1]:
            raise ValueError(f"range: {list(self.range)}: the first value must be the smaller one")
        if wrong := [c for c in self.flip_sign or () if not 0 <= c < self.channels]:
            raise ValueError(f"flip_sign: {wrong}: channels are 0..{self.channels - 1}")
        if self.name in ("images", "seg_maps", "edge_maps", "inst_maps", "distances"):
            raise ValueError(f"name: {self.name} is a folder of its own meaning: rename yours")
        return self


class ImageSpec(Section):
    """The meaning of a photo's numbers: what is trained on, and what is generated."""

    channels: int = Field(3, ge=1, le=64)
    """1 (grey), 3 (RGB; a grey photo counts as R = G = B), or as many bands as the photos have, in their order."""
    range: tuple[Number, Number] | Literal["auto"] | None = None
    """Lowest and highest value, of photos of 16 bits or floats: they become -1 and 1 (what lies beyond is clipped; the
    builder counts it). Whole numbers, [0, 4095], for integers; [0.0, 3000.0] for floats. auto: the minimum and maximum
    that scripts/build_lmdb.py measured over the training data. null: 8 bits, 0 to 255."""
    drop_alpha: bool = False
    """Leave out the alpha channel (transparency) of photos that have one; without it they are refused."""
    orientation: Literal["upright", "stored"] | None = None
    """Photos with an EXIF orientation: upright (turned as viewers show them) or stored (as their pixels lie). null:
    whichever has the label map's size; a photo of which that does not tell is refused."""
    preview: tuple[int, int, int] | None = None
    """Channels, counted from 0, that previews and pages show as red, green and blue. null: the first three, or the
    first alone, as grey."""

    @model_validator(mode="after")
    def _check(self) -> ImageSpec:
        if isinstance(self.range, tuple) and not self.range[0] < self.range[1]:
            raise ValueError(f"range: {list(self.range)}: the lowest value comes first: write range: [0, 4095]")
        if self.preview and not 0 <= min(self.preview) <= max(self.preview) < self.channels:
            raise ValueError(f"preview: {list(self.preview)}: channels are 0..{self.channels - 1}")
        return self

    @property
    def limits(self) -> tuple[int | float, int | float]:
        """Return ``range`` as numbers."""
        assert self.range != "auto", "replaced by build.with_measured_range"
        return self.range or (0, 255)

    @property
    def dtype(self) -> str:
        """Return the type of generated images' values: integers where ``range`` is of integers that 16 bits hold."""
        low, high = self.limits
        types = {"uint8": (0, 2**8), "uint16": (0, 2**16), "int16": (-(2**15), 2**15)}
        integers = isinstance(low, int) and isinstance(high, int)
        return next((t for t, (least, end) in types.items() if integers and least <= low and high < end), "float32")


class LabelledData(Section):
    """The meaning of the files of a data set, wherever they lie."""

    name: str = "data"
    labels: LabelSpec
    """The label table; null: there are no label maps, and images are made from edges or conditions alone."""
    images: ImageSpec = ImageSpec()
    """What the numbers of a photo mean; the default is 8-bit RGB."""
    edges: EdgeSource = EdgeSource.NONE
    """Edge channel: from edge_maps/ files, or drawn after augmentation from inst_maps/ or from the label map."""
    conditions: tuple[Condition, ...] = ()
    """Dense conditions, such as [{name: depth, range: [0, 10]}, {name: normals, channels: 3, flip_sign: [0]}]."""
    suffixes: dict[str, str] = {}
    """Data type -> what the names of its files in folders have beside the stem by which they are joined: a suffix
    (`seg_maps: _mask` for NAME_mask.png), or text with `*` for the stem (`images: "photo_*"`). Files without are left
    out."""

    @field_validator("suffixes")
    @classmethod
    def _check_suffixes(cls, suffixes: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        types = ["images", "seg_maps", "edge_maps", "inst_maps", "distances"]
        types += [condition.name for condition in info.data.get("conditions", ())]
        for data_type, suffix in suffixes.items():
            if data_type not in types or not suffix.strip("*") or suffix.count("*") > 1 or "/" in suffix:
                raise ValueError(
                    f"{data_type}: {suffix}: write one of {', '.join(types)}: _mask (or mask_*, with one *)"
                )
        return suffixes

    @model_validator(mode="after")
    def _check_inputs(self) -> LabelledData:
        names = [condition.name for condition in self.conditions]
        if len(set(names)) < len(names):
            raise ValueError(f"conditions: {', '.join(names)}: state each name once")
        if not self.labels.num_classes and self.edges == EdgeSource.LABELS:
            raise ValueError("edges: labels are drawn from label maps, and labels is null: write edges: file")
        if not self.labels.num_classes and self.edges == EdgeSource.NONE and not names:
            raise ValueError("labels is null, so images need another input: write edges: file, or conditions: [depth]")
        return self


class DataConfig(LabelledData):
    """A data set: its label table and its splits."""

    type: Annotated[Component, DATASETS] | None = None
    """A data set class of your own, by its registered name (docs/own_data.md); null: folders or LMDBs."""
    num_workers: int | None = Field(None, ge=0, le=1024)
    """Loader workers per process; null = min(8, cores / processes)."""
    shuffle_shards: Count | None = None
    """Number of shards whose samples training mixes at a time, in a new order every epoch: for data sets larger than
    memory, of which it then reads a few files at a time. null = it mixes all."""
    skip_bad: bool = False
    """Read and check every sample at the start, and go on without those that cannot be used; LOGDIR/bad_files.txt has
    their names."""
    train: SplitConfig
    val: SplitConfig | None = None

    @model_validator(mode="after")
    def _check_type(self) -> DataConfig:
        if self.type and (self.skip_bad or self.suffixes):
            raise ValueError("skip_bad and suffixes are for folders; with a type of your own its class selects samples")
        return self


class TestDataConfig(Section):
    """Label maps for inference.py if no --input_dir is given."""

    __test__ = False
    roots: tuple[str, ...] = Field(min_length=1)
    batch_size: int = Field(1, ge=1, le=2**16)


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

    seed: int = Field(0, ge=0, lt=2**63)
    """Every random draw is a function of this and of a sample's position in the run."""
    gen: Annotated[Component, GENERATORS]
    dis: Annotated[Component, DISCRIMINATORS]
    encoder: Annotated[Component, ENCODERS] | None = None
    """Style encoder; needs a generator with style_dims > 0."""
    losses: dict[str, Loss]
    """Terms of the generator's objective by registered name; one of them, `gan` or `segmentation_gan`, also states the
    discriminator's loss."""
    gen_opt: OptimizerConfig
    dis_opt: OptimizerConfig
    trainer: TrainerConfig
    data: DataConfig
    test_data: TestDataConfig | None = None
    pretrained_weight: WeightSource | None = None
    """The checkpoint that inference.py uses if neither --checkpoint nor --logdir names one."""

    @field_validator("losses", mode="before")
    @classmethod
    def _name_losses(cls, losses: Any) -> dict[str, Any]:
        """Read ``NAME: WEIGHT`` and ``NAME: {weight: WEIGHT, key: value, ...}``."""
        if not isinstance(losses, dict):
            raise ConfigError("a mapping of loss names to weights")
        entries = {name: entry if isinstance(entry, dict) else {"weight": entry} for name, entry in losses.items()}
        return {name: {"type": name, **entry} for name, entry in entries.items()}

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        found = self._adversarial_losses()
        if len(found) != 1:
            known = ", ".join(name for name in LOSSES.names() if getattr(LOSSES[name], "is_adversarial", False))
            raise ValueError(
                f"losses must contain one term that states the discriminator's loss, not"
                f" {' and '.join(found) or 'none'}: write one of {known}, and 0 for one of the base config"
            )
        if not any(loss.weight > 0 for loss in self.losses.values()):
            raise ValueError(f"losses: all weights are 0, so the generator learns nothing: write losses.{found[0]}: 1")
        flips = self.data.train.augmentations.horizontal_flip
        if unclear := [c.name for c in self.data.conditions if flips and c.channels > 1 and c.flip_sign is None]:
            raise ValueError(
                f"data.conditions: {unclear[0]}: horizontal_flip mirrors it: write flip_sign: [0] if its first channel"
                " points to the right (normals, flow), or flip_sign: [] if no channel has a direction"
            )
        if self.trainer.evaluation and self.trainer.evaluation.segmenter and not self.data.labels.num_classes:
            raise ValueError("trainer.evaluation.metrics: segmentation compares label maps, and data.labels is null")
        return self

    def _adversarial_losses(self) -> list[str]:
        names = [name for name in self.losses if getattr(LOSSES[name], "is_adversarial", False)]
        return [name for name in names if self.losses[name].weight > 0] or names

    @property
    def adversarial_loss(self) -> str:
        """Name the one term of ``losses`` that also states the discriminator's loss."""
        return self._adversarial_losses()[0]
