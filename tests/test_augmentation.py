# ruff: noqa: F811 (the fixture tiny_run is imported)
"""What the discriminator sees (``trainer.discriminator_augmentation``): the changes, the draws, the probability."""

import json

import pytest
import torch
from fork_server import TORCHRUN
from test_layout import random_layout
from test_training import REPOSITORY, assert_same, tiny_run  # noqa: F401

from imaginaire_spade.build import build_losses
from imaginaire_spade.config_files import load_config
from imaginaire_spade.distributed import ProcessInfo
from imaginaire_spade.errors import CheckpointError, ConfigError
from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.losses import GANLoss, SegmentationGANLoss
from imaginaire_spade.models.discriminator import Scores
from imaginaire_spade.training.augmentation import (
    AT_MOST,
    INTERVAL,
    AdaptiveProbability,
    AugmentedView,
    augmentation_draws,
)  # fmt: skip
from imaginaire_spade.training.checkpoint import load_checkpoint, newest_checkpoint
from imaginaire_spade.training.setup import prepare

pytestmark = pytest.mark.usefixtures("one_thread")
POLICIES = ("color", "translation", "cutout", "zoom")
CPU = torch.device("cpu")
KEY = "trainer.discriminator_augmentation"


def view_of(layout: SemanticLayout, *policies: str, probability: float = 1.0, seed: int = 0) -> AugmentedView:
    policies = policies or POLICIES
    return AugmentedView(layout, augmentation_draws(seed, range(len(layout)), policies, CPU), probability, policies)


@pytest.mark.parametrize("spec", [LayoutSpec(30, True, True, True), LayoutSpec(30), LayoutSpec(30, False, True)])
@pytest.mark.parametrize("policies", [("translation",), ("cutout",), ("translation", "cutout")])
def test_images_and_label_maps_move_together(spec, policies):
    # Images that show their label maps: whole pixels, so both say the same of every place.
    layout = random_layout(spec, 6, 32, 48)
    images = layout.labels[:, None].float().expand(-1, 3, -1, -1)
    view = view_of(layout, *policies)
    seen, labels = view(torch.cat([images, -images])), view.layout.labels
    assert view.layout.spec == spec and labels.dtype == layout.labels.dtype
    fake, real = seen.chunk(2)
    hidden = (labels == spec.num_classes) & (fake == 0).all(1)  # behind the cutout: grey, and no class
    assert (fake[:, 0] == labels)[~hidden].all() and torch.equal(real, -fake)
    assert (fake.flatten(1) != images.flatten(1)).any(1).all()  # every sample is changed
    if spec.has_edges:
        dense = torch.cat([layout.edges[:, None].float()] * 3, 1)
        assert torch.equal(view(dense)[:, 0], view.layout.edges.float())
    assert ((fake == 0).all(1).float().mean() > 0.1) == ("cutout" in policies)
    # The translated-in area is the image mirrored at its border, and nothing that is no image.
    assert "cutout" in policies or {*labels.unique().tolist()} <= {*layout.labels.unique().tolist()}


def test_a_zoom_keeps_every_class_under_its_pixels():
    # Blocks of one class; the images show the classes. Away from the blocks' borders both agree.
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (8, 4, 6), generator=rng).repeat_interleave(12, 1).repeat_interleave(12, 2)
    layout = SemanticLayout(LayoutSpec(9, False, True), labels.byte(), "labels")
    view = view_of(layout, "zoom", "translation")
    seen = view(labels[:, None].float())[:, 0]
    agree = (seen - view.layout.labels).abs() < 1e-5
    assert 0.75 < agree.float().mean() < 0.99  # linear in between
    assert (agree | (view.layout.edges > 0)).float().mean() > 0.99  # edges lie where the classes change
    assert (view.layout.labels != layout.labels).flatten(1).any(1).all()


def test_gradients_flow_through_every_change():
    layout = random_layout(LayoutSpec(4), 2, 5, 6)
    images = torch.rand(4, 2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    view = view_of(layout, seed=3)
    assert torch.autograd.gradcheck(view, images.requires_grad_(), check_undefined_grad=False)
    [gradient] = torch.autograd.grad(view(images).square().sum(), images)
    assert (gradient.flatten(1).abs().sum(1) > 0).all()


def test_what_is_not_changed_stays_the_same_to_the_bit():
    layout = random_layout(LayoutSpec(20, True, True), 64, 16, 24)
    images = torch.randn(128, 3, 16, 24)
    before = layout.labels.clone(), images.clone()
    never = view_of(layout, probability=0.0)
    assert torch.equal(never(images), images)
    assert all(map(torch.equal, never.layout.tensors(), layout.tensors()))
    # Each policy is drawn by itself, for each sample.
    often = view_of(layout, probability=0.3)
    changed = (often(images) != images).flatten(1).any(1)
    assert torch.equal(*changed.chunk(2)) and 0.6 < changed.float().mean() < 0.9  # 1 - 0.7^4 = 0.76
    one = view_of(layout, "color", probability=0.3)
    assert 0.1 < (one(images) != images).flatten(1).any(1).float().mean() < 0.5
    assert torch.equal(one.layout.labels, layout.labels)
    assert torch.equal(layout.labels, before[0]) and torch.equal(images, before[1])  # what others see


def test_colors_change_each_image_by_itself_and_alike_in_both_halves():
    layout, base = random_layout(LayoutSpec(4), 5, 8, 8), torch.rand(5, 3, 8, 8) - 0.5
    view = view_of(layout, "color")
    together = view(torch.cat([base, base]))
    assert torch.equal(*together.chunk(2)) and torch.equal(together[:5], view(base))
    alone = view_of(layout[:1], "color")(base[:1])
    torch.testing.assert_close(alone, together[:1])
    grey = view(torch.zeros(5, 3, 8, 8))  # of which only the brightness changes
    assert (grey.amax((1, 2, 3)) - grey.amin((1, 2, 3)) < 1e-6).all() and len(grey[:, 0, 0, 0].unique()) == 5
    for channels in (1, 4):
        assert view(torch.rand(5, channels, 8, 8)).shape == (5, channels, 8, 8)


def test_a_policys_draws_belong_to_the_position_alone():
    some = augmentation_draws(5, [7, 3, 12], POLICIES, CPU)
    assert some.dtype == torch.float32 and some.shape == (3, 4, 4) and some.min() >= 0 and some.max() < 1
    assert torch.equal(some[1:2], augmentation_draws(5, [3], POLICIES, CPU))
    assert torch.equal(some[:, 2:3], augmentation_draws(5, [7, 3, 12], ("cutout",), CPU))
    assert len(some.unique()) == some.numel()
    assert not torch.equal(some, augmentation_draws(6, [7, 3, 12], POLICIES, CPU))
    many = augmentation_draws(5, range(4000), POLICIES, CPU)
    torch.testing.assert_close(many.mean(0), torch.full((4, 4), 0.5), atol=0.02, rtol=0)


def test_the_probability_follows_overfitting():
    adaptive = AdaptiveProbability(images=1000, target=0.6)
    values = []
    for iteration in range(1, 400 + 1):
        adaptive.observe(torch.tensor(0.9 if iteration <= 200 else 0.1))
        adaptive.follow(iteration, global_batch=5)
        values.append(float(adaptive.value))
    assert values[: INTERVAL - 1] == [0] * (INTERVAL - 1) and values[INTERVAL - 1] == pytest.approx(20 / 1000)
    assert values[99] == pytest.approx(500 / 1000) and max(values) == values[199] == pytest.approx(AT_MOST)
    assert values[299] == pytest.approx(0.3) and values[-1] == 0
    adaptive.observe(torch.tensor(1.0))  # several observations count as their mean
    adaptive.observe(torch.tensor(0.3))
    adaptive.follow(INTERVAL, 5)
    assert float(adaptive.value) == pytest.approx(0.02)


@pytest.mark.parametrize(
    "options", [{"mode": "hinge"}, {"mode": "least_square"}, {"mode": "wasserstein"}, {"relative": True}]
)
def test_overfitting_is_the_sign_of_the_scores_of_real_images(options):
    gan = GANLoss(**options)

    def scores(value: float, of: int = 64) -> list[Scores]:
        noise = torch.randn(4, 1, of, of, generator=torch.Generator().manual_seed(of))
        return [Scores(noise + value, []), Scores(noise.flip(-1) + value, [])]

    boundary = 0.5 if options.get("mode") == "least_square" else 0.0
    assert abs(gan.overfitting(scores(boundary), scores(boundary, 63))) < 0.1 if not gan._is_relative else True
    assert gan.overfitting(scores(boundary - 9), scores(boundary + 9)) == 1
    assert gan.overfitting(scores(boundary + 9), scores(boundary - 9)) == -1


def test_overfitting_of_a_discriminator_that_scores_classes():
    # Half of the pixels that have a class are taken for real; those without one do not count.
    layout = SemanticLayout(LayoutSpec(3, True), torch.tensor([[[0, 1], [2, 2], [3, 3]]], dtype=torch.uint8))
    logits = torch.zeros(1, 5, 3, 2)
    logits[:, 2] = torch.tensor([[1.0, -9.0], [1.0, -9.0], [-9.0, -9.0]])
    logits[:, 0] = 0.5
    scores, gan = [Scores(logits, [])], SegmentationGANLoss()
    assert gan.overfitting(scores, scores, layout) == 0
    logits[:, 4] = 1
    assert gan.overfitting(scores, scores, layout) == 1
    logits[:, 0] = 2
    assert gan.overfitting(scores, scores, layout) == -1


# ------------------------------------------------------------------------------------------------ runs


def health_of(logdir) -> list[dict[str, float]]:
    return [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]


UNET = {"num_filters": 2, "middle_num_filters": 2, "max_num_filters": 2, "last_num_filters": 2}
OASIS = (f"dis={{type: oasis_unet, {str(UNET).strip('{}')}}}", "losses={segmentation_gan: 1}",
         "data.train.augmentations={resize_h_w: [64, 64]}")  # fmt: skip
EAGER = f"{KEY}={{target: -1, adapt_images: 100}}"  # rises at every adaptation


@pytest.mark.parametrize(
    "usual",
    [
        ("trainer.iteration=shared",),
        ("trainer.iteration=reference", "dis={type: fpse, num_filters: 2, num_layers: 2}"),
        OASIS,
    ],
)
def test_a_run_without_changes_equals_one_without_the_key(tiny_run, usual):
    _, run = tiny_run
    usual += ("trainer.max_iterations=2", "trainer.image_rows=0")
    plain, never, often = (
        run(str(number), *usual, *how)
        for number, how in enumerate([(), (f"{KEY}={{probability: 0}}",), (f"{KEY}={{probability: 0.9}}",)])
    )
    assert_same(plain, never)
    with pytest.raises(AssertionError):
        assert_same(plain, often)


def test_an_adapted_probability_is_continued_exactly(tiny_run, tmp_path):
    # Interrupted between two adaptations, after the first.
    _, run = tiny_run
    usual = (EAGER, "trainer.max_iterations=8", "trainer.log_every=1", "trainer.image_rows=0",
             "trainer.gradient_accumulation=2", "trainer.precision=bf16")  # fmt: skip
    straight = run("straight", *usual)
    assert straight["augmentation"]["value"] == pytest.approx(2 * INTERVAL * 4 / 100)
    run("pieces", *usual, stop_after=6)
    assert_same(straight, run("pieces", *usual))
    for name in ("straight", "pieces"):
        records = health_of(tmp_path / name)
        measured = [record["health/augmentation_probability"] for record in records]
        assert measured == pytest.approx([0, 0, 0, 0, 0.16, 0.16, 0.16, 0.16])
        assert all(-1 <= record["health/d_overfitting"] <= 1 for record in records)


def test_augmentation_can_begin_and_end_in_the_middle_of_a_run(tiny_run):
    _, run = tiny_run
    run("log", "trainer.max_iterations=2")
    begun = run("log", EAGER, "trainer.max_iterations=6")
    assert begun["augmentation"]["value"] == pytest.approx(0.16)
    assert run("log", "trainer.max_iterations=7")["augmentation"] is None
    broken = {**begun, "augmentation": {"value": torch.zeros(3), "observed": torch.zeros(2)}}
    config = load_config(tiny_run[0], [EAGER])
    state = prepare(config, build_losses(config), ProcessInfo(), CPU).state
    with pytest.raises(CheckpointError, match="augmentation does not fit this config"):
        state.load_state_dict(broken, "it")


def test_processes_agree_on_what_is_seen(tiny_run, tmp_path, commands):
    # Two processes and one: the same draws, the same probability (the sign of a mean).
    path, run = tiny_run
    usual = (EAGER, "trainer.max_iterations=6", "trainer.image_rows=0")
    one = run("one", *usual)
    result = commands.run(
        *TORCHRUN, "--standalone", "--nproc_per_node=2", REPOSITORY / "train.py", "--config", path, "--logdir", "two",
        *(f"--set={value}" for value in (*usual, "data.train.batch_size=2")),
        "--device", "cpu", cwd=tmp_path, NO_CURVES="1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    for first, second in zip(health_of(tmp_path / "one"), health_of(tmp_path / "two"), strict=True):
        assert first["health/augmentation_probability"] == second["health/augmentation_probability"]
        for name in ("loss/d_total", "loss/feature_matching"):
            assert first[name] == pytest.approx(second[name], rel=2e-2), name
        assert first["health/d_overfitting"] == pytest.approx(second["health/d_overfitting"], abs=0.1)
    two = load_checkpoint(newest_checkpoint(tmp_path / "two"))["augmentation"]
    number = one["augmentation"]["observed"][1]  # of two iterations since the adaptation, and twice as many processes
    assert number == 2 and two["observed"][1] == 4 and two["value"] == one["augmentation"]["value"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{probability: 2}", "probability: write adaptive, or a number from 0 to 1, not 2"),
        ("{probability: null}", "probability: write adaptive, or a number from 0 to 1, not None"),
        ("{probability: adaptiv}", "probability: write adaptive, or a number from 0 to 1, not 'adaptiv'"),
        ("{policies: [colour]}", "must be 'color', 'translation', 'cutout' or 'zoom'"),
        ("{policies: [color, color]}", "state at least one, and each one once"),
        ("{policies: []}", "state at least one, and each one once"),
        ("{propability: 1}", "did you mean 'probability'"),
    ],
)
def test_bad_input_is_told(tiny_run, value, message):
    with pytest.raises(ConfigError, match=KEY) as error:
        load_config(tiny_run[0], [f"{KEY}={value}"])
    assert message in str(error.value)
