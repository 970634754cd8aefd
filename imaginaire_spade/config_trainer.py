"""Define the typed configuration of training: the sections ``gen_opt``, ``dis_opt`` and ``trainer`` of a run.

See ``config.py``, which has the other sections.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from imaginaire_spade.errors import ConfigError
from imaginaire_spade.registry import TRACKERS, Component

Count = Annotated[int, Field(ge=1, le=10**12)]


class Section(BaseModel):
    """Base of every part of the configuration: frozen, strict, no unknown keys, no infinite numbers."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class LearningRatePolicy(Section):
    """How the learning rate changes over the run."""

    type: Literal["constant", "linear"] = "constant"
    """Constant, or linear to 0 (section 4 of the SPADE paper)."""
    decay_start: float = Field(0.5, ge=0, lt=1)
    """Share of the run after which a linear policy falls to 0 at the end (SPADE: 0.5)."""


class OptimizerConfig(Section):
    """Adam. With two learning rates for generator and discriminator this is the two-time-scale rule (TTUR)."""

    type: Literal["adam"] = "adam"
    lr: float = Field(gt=0, le=1000)
    """Learning rate (SPADE: 1e-4 for the generator, 4e-4 for the discriminator)."""
    adam_beta1: float = Field(0.0, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0, le=1000)
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
    start_iteration: int = Field(1000, ge=0, le=10**9)
    """Up to this iteration the EMA is a plain copy."""
    form: Literal["folded", "state"] = "folded"
    """What is averaged. folded: the weights that layers apply, divided by their spectral norm (as in imaginaire).
    state: every number of the generator's state as it is, weights before spectral norm and its vectors u and v too (as
    in OASIS's release, with start_iteration: 0)."""
    batch_norm_images: int = Field(64, ge=0, le=10**6)
    """Training label maps, spread evenly over the data set, over which the EMA's batch statistics are re-estimated
    for previews, at the end and, at most once per 20 times as many training images, for checkpoints; in between, or
    with 0, they are averaged too. With form: state the EMA instead does forwards in training mode with so many, a
    global batch each, for every checkpoint too: its statistics move with momentum 0.1, u and v become unit vectors
    again (OASIS's release: 51 batches)."""


class InitConfig(Section):
    """Initial weights of convolutions and linear layers (biases are zero)."""

    type: Literal["xavier", "normal", "kaiming", "orthogonal"] = "xavier"
    gain: float = Field(0.02, gt=0, le=1000)
    """Gain (xavier, orthogonal) or standard deviation (normal); unused by kaiming."""


AugmentationPolicy = Literal["color", "translation", "cutout", "zoom"]


class DiscriminatorAugmentationConfig(Section):
    """Augmentation of what the discriminator sees, for small data sets; the generator's images stay as they are."""

    policies: tuple[AugmentationPolicy, ...] = ("color", "translation", "cutout", "zoom")
    """What is changed: brightness, saturation and contrast; the place, by up to 1/8 of the side; a hidden rectangle of
    half the side; the size, by up to 1.25. Label maps move with their images."""
    probability: Annotated[float, Field(ge=0, le=1)] | Literal["adaptive"] = "adaptive"
    """Probability, 0 to 1, of each policy for each image. adaptive: from 0 up to 0.8, as the discriminator overfits."""
    target: float = Field(0.6, ge=-1, le=1)
    """adaptive: the probability rises while `health/d_overfitting` is larger, and falls while it is smaller."""
    adapt_images: Count = 100_000
    """adaptive: training images over which the probability can rise from 0 to 1 (Karras et al.: 500,000)."""

    @field_validator("probability", mode="before")
    @classmethod
    def _check_probability(cls, value: Any) -> Any:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value != "adaptive" and not (is_number and 0 <= value <= 1):
            raise ConfigError(f"write adaptive, or a number from 0 to 1, not {value!r}")
        return value

    @model_validator(mode="after")
    def _check(self) -> DiscriminatorAugmentationConfig:
        if not self.policies or len(set(self.policies)) < len(self.policies):
            raise ValueError(f"policies: {list(self.policies)}: state at least one, and each one once")
        return self


Metric = Literal["fid", "kid", "precision_recall", "cmmd", "segmentation"]


class EvaluationConfig(Section):
    """Scores of the (averaged) generator during training, on samples of data.val; see docs/evaluation.md."""

    every_images: Count
    """Training images between two evaluations; there is also one at the end."""
    num_images: int | None = Field(None, ge=4, le=10**9)
    """Validation samples, spread evenly over data.val, the same every time; null: all."""
    metrics: tuple[Metric, ...] = Field(("fid",), min_length=1)
    """What is measured."""
    best: Literal["fid", "kid", "precision", "recall", "cmmd", "miou", "pixel_accuracy"] = "fid"
    """The score whose best checkpoint is kept as checkpoints/best.pt."""
    patience: Count | None = None
    """The run ends early when so many evaluations in a row did not improve `best`; null: it never does."""
    features: str = "inception"
    """Network of the scores, all but segmentation: `inception`, `efficientnet_lite0`, `efficientnet_lite2`,
    `torchvision:NAME`, `timm:NAME`, `dinov2` or `clip`; `:FILE` behind it: weights (of the last two a folder)."""
    inception_weights: str | None = None
    """File of Inception weights; null: torch's cache; `random:SEED`: an untrained network, to try things out."""
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
        measured_by |= {
            "fid": "fid",
            "kid": "kid",
            "cmmd": "cmmd",
            "miou": "segmentation",
            "pixel_accuracy": "segmentation",
        }
        needed = measured_by[self.best]
        if needed not in self.metrics:
            raise ValueError(f"best: {self.best} is measured by {needed}, which metrics does not name: add it there")
        if ("segmentation" in self.metrics) != (self.segmenter is not None):
            raise ValueError("metrics: segmentation and segmenter: MODEL belong together: state both or neither")
        return self


class TrainerConfig(Section):
    """The training run."""

    max_iterations: Count | None = None
    """Length of the run in iterations (one update of D and of G each) ..."""
    max_epochs: float | None = Field(None, gt=0, le=10**6)
    """... or in passes over the training set: state one of the two."""
    iteration: Literal["shared", "reference"] = "shared"
    """shared: one generator forward serves both updates, D first; reference: G first, then D on new images of
    the updated G, as the published SPADE numbers were obtained."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the networks; weights, statistics and losses are float32 in any case."""
    max_skipped_updates: Count = 25
    """fp16: the run ends after this many updates in a row whose gradients overflowed (each halves the loss scale)."""
    gradient_accumulation: Count = 1
    """Split each process's batch into this many pieces, one after the other: less memory, same batch."""
    activation_checkpointing: bool = False
    """Compute the activations inside the generator's blocks a second time in the backward pass instead of keeping them:
    less memory, about a third more time for the generator, the same numbers."""
    freeze_discriminator_layers: int = Field(0, ge=0, le=100)
    """For fine-tuning on little data (FreezeD): so many first layers of each patch discriminator, or blocks of a
    U-Net's encoder, keep their weights."""
    discriminator_augmentation: DiscriminatorAugmentationConfig | None = None
    """For training on little data: what D sees is augmented, so that it cannot learn the images by heart; `{}` for the
    defaults, null: off. See docs/own_data.md."""
    sync_batch_norm: bool = True
    """Batch statistics over all processes."""
    init: InitConfig = InitConfig()
    model_average: ModelAverageConfig | None = ModelAverageConfig()
    channels_last: bool = False
    """Memory format of the networks' weights."""
    cuda_graphs: bool = False
    """Record the updates of D and G once, as a CUDA graph, and replay it: less work for the host. One GPU, no tables
    (``gen.norm.path``), fp32 or bf16. Never run on a GPU so far: tested on CPUs, without the graph."""
    log_every: Count = 100
    """Iterations between two lines of the log (and points of the curves)."""
    image_every: Count = 1000
    """Iterations between two rows of preview images."""
    image_rows: int = Field(4, ge=0, le=1000)
    """Validation samples in a preview."""
    checkpoint_every: Count = 1000
    """Iterations between two checkpoints."""
    evaluation: EvaluationConfig | None = None
    """Scores during training; null: none."""
    trackers: tuple[Annotated[Component, TRACKERS], ...] = Field(("tensorboard",), validate_default=True)
    """Where the run can be watched: `[tensorboard, wandb]`, or `{type: wandb, project: streets}` in place of a name."""
    keep_last: Count = 3
    """Checkpoints that stay on disk."""
    keep_every: Count | None = None
    """Keep one checkpoint permanently every N iterations, in checkpoints/kept; a multiple of checkpoint_every."""
    on_failed_save: Literal["stop", "continue"] = "stop"
    """Whether a checkpoint that cannot be written (disk full) ends the run, or training goes on to the next one."""
    bucket_cap_mb: float = Field(25.0, gt=0, le=10**6)
    """Several processes: gradients are exchanged in pieces of this many MiB, each while the next is still computed."""
    process_group_timeout_s: float = Field(300.0, gt=0, le=10**7)
    """After this long without an answer from the other processes a process gives up."""

    @model_validator(mode="after")
    def _check(self) -> TrainerConfig:
        names = [tracker.type for tracker in self.trackers]
        if len(set(names)) < len(names):
            raise ValueError(f"trackers: {', '.join(names)}: state each one once")
        if (self.max_iterations is None) == (self.max_epochs is None):
            raise ValueError("state exactly one of max_iterations and max_epochs")
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every: {self.keep_every} must be a multiple of checkpoint_every: {self.checkpoint_every}"
            )
        return self
