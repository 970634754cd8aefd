"""Training: the real command lines on tiny data, and the promises about processes, restarts and files."""

import copy
import json
import zipfile
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import torch
import yaml
from fork_server import TORCHRUN
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_layout import random_layout
from torch._subclasses.fake_tensor import FakeTensorMode

from imaginaire_spade.build import build_generator, build_losses, layout_spec
from imaginaire_spade.config_files import load_config, parse_config
from imaginaire_spade.distributed import ProcessInfo
from imaginaire_spade.errors import CheckpointError, UserError
from imaginaire_spade.inference.model import Model
from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.models import products
from imaginaire_spade.models.for_inference import Ask, by_rule
from imaginaire_spade.models.generator import Pix2pixHDGenerator
from imaginaire_spade.models.products import HAS_ONEDNN, Choices
from imaginaire_spade.training import checkpoint, loop
from imaginaire_spade.training.profile import multiply_adds
from imaginaire_spade.training.setup import calibration_layouts, prepare, resume

REPOSITORY = Path(__file__).resolve().parents[1]

TINY = {
    "gen": {"type": "spade", "num_filters": 2, "norm": {"type": "spade", "hidden_channels": 8}},
    "dis": {"type": "multiscale_patch", "num_filters": 4, "num_layers": 2},
    "losses": {"gan": 1.0, "feature_matching": 10.0},
    "gen_opt": {"lr": 1e-3, "lr_policy": {"type": "linear"}},
    "dis_opt": {"lr": 1e-3},
    "trainer": {
        "max_iterations": 6, "log_every": 2, "image_every": 3, "checkpoint_every": 3, "image_rows": 2,
        "model_average": {"beta": 0.5, "start_iteration": 1, "batch_norm_images": 8},
    },
    "data": {
        "labels": {"num_classes": 5}, "edges": "labels", "num_workers": 0,
        "train": {"roots": ["?"], "batch_size": 4,
                  "augmentations": {"resize_smallest_side": 36, "horizontal_flip": True, "random_crop_h_w": [32, 64]}},
    },
}  # fmt: skip


@pytest.fixture
def tiny_run(tiny_folder, tmp_path):
    """(config file, function that trains it in this process and gives its checkpoint)."""
    tree = json.loads(json.dumps(TINY))
    tree["data"]["train"]["roots"] = [str(tiny_folder(size=(40, 80), keys=10))]
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))

    def run(
        logdir: str | Path,
        *overrides: str,
        stop_after: int | None = None,
        start_from: Path | None = None,
        curves: bool = False,
        ask: Ask = by_rule,
        **how,
    ) -> dict:
        config = load_config(path, overrides)
        made = prepare(config, build_losses(config), ProcessInfo(), torch.device("cpu"), stop_after, ask)
        with pytest.MonkeyPatch.context() as patch:
            if not curves:  # they take longer to draw than a run does here
                patch.setattr("imaginaire_spade.training.run_log.write_curves", lambda *_: None)
            loop.train(made, tmp_path / logdir, start_from, **how)
        return checkpoint.load_checkpoint(checkpoint.newest_checkpoint(tmp_path / logdir))

    return path, run


def tensors_of(tree, prefix: str = "") -> dict[str, torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return {name: tensor for key, value in items for name, tensor in tensors_of(value, f"{prefix}/{key}").items()}


def assert_same(a: dict, b: dict) -> None:
    first, second = tensors_of(a), tensors_of(b)
    assert first.keys() == second.keys() and len(first) > 100
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def test_a_run_goes_on_by_the_cost_of_pixels_that_it_began_with(tiny_run, capsys):
    """By 0.001 all norms are dense, by 100 almost all take tables: other last places."""
    _, run = tiny_run
    whole, other = (run(name, ask=lambda *_, cost=cost: cost) for name, cost in (("whole", 0.001), ("other", 100.0)))
    run("parts", stop_after=3, ask=lambda *_: 0.001)
    capsys.readouterr()
    parts = run("parts", ask=lambda *_: 100.0)
    assert (
        "SPADE norms: auto, tables where label maps repeat enough (a dense pixel costs 0.001 of"
        in capsys.readouterr().out
    )
    assert parts["run"]["spade_pixel_cost"] == 0.001
    assert_same(parts, whole)
    with pytest.raises(AssertionError):
        assert_same(other, whole)
    assert parts["run"]["cpu_choices"] is None  # no layer is wide enough
    constants = run(
        "bf16", "trainer.precision=bf16", "trainer.max_iterations=1", ask=lambda *_: pytest.fail("measured")
    )
    assert constants["run"]["spade_pixel_cost"] == 1


@pytest.mark.parametrize("has_instructions", [True, False])
def test_sixteen_bits_on_a_processor_without_instructions_for_them_are_warned_of(
    has_instructions, tiny_run, tmp_path, monkeypatch, capsys
):
    if not hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported"):
        pytest.skip("a torch without oneDNN")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_instructions)
    _, run = tiny_run
    run("bf16", "trainer.precision=bf16", "trainer.max_iterations=1")
    said = "bf16 on a processor without instructions for it takes many times as long as fp32: write fp32"
    assert (f"warning: trainer.precision: {said}" in capsys.readouterr().out) != has_instructions
    models = [
        Model.load(tmp_path / "bf16/checkpoints/checkpoint_000000000004.pt", precision=p) for p in ("bf16", "fp32")
    ]
    assert [f"precision {said}" in model.notes for model in models] == [not has_instructions, False]
    assert products.slow_precision("bf16", torch.device("cuda")) is None


def test_a_run_goes_on_with_the_convolutions_that_it_began_with(tiny_run):
    _, run = tiny_run

    def wide(logdir: str, **how) -> dict:
        return run(logdir, "gen.num_filters=8", "trainer.max_iterations=2", **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("imaginaire_spade.models.convolution.FEWEST", 1)
        whole, other = wide("whole", ask=lambda *_: 2.0), wide("other", ask=lambda *_: 0.5)
        wide("parts", stop_after=1, ask=lambda *_: 2.0)
        parts = wide("parts", ask=lambda *_: 0.5)
    faster, usual = Choices(HAS_ONEDNN, True, 128), Choices(False, False, 0)
    assert [Choices.kept(content["run"]) for content in (whole, parts, other)] == [faster, faster, usual]
    assert_same(parts, whole)
    with pytest.raises(AssertionError):
        assert_same(other, whole)


def test_a_run_leaves_what_it_promises(tiny_run, tmp_path):
    _, run = tiny_run
    content = run("log", curves=True)
    logdir = tmp_path / "log"
    names = [p.name for p in sorted((logdir / "checkpoints").iterdir())]
    checkpoints = ["checkpoint_000000000012.pt", "checkpoint_000000000024.pt"]
    assert names == [name + beside for name in checkpoints for beside in ("", ".sha256")]
    assert content["images_seen"] == 24
    records = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in records] == [2, 3, 4, 6]  # every log_every, and where a checkpoint was due
    losses = ("gan", "feature_matching", "d_fake", "d_real", "g_total", "d_total")
    others = (
        "lr/gen",
        "lr/dis",
        "health/d_accuracy",
        "health/fake_saturation",
        "health/real_saturation",
        "speed/images_per_s",
        "data/share_waiting",
        "memory/peak_gib",
    )
    for key in (*(f"loss/{name}" for name in losses), *others):
        assert isinstance(records[0][key], float)
    assert records[-1]["lr/gen"] < records[0]["lr/gen"] == 1e-3  # linear decay in the second half
    assert records[-1]["lr/dis"] == 1e-3
    assert parse_config(yaml.safe_load((logdir / "config.yaml").read_text())) == parse_config(content["config"])
    assert len(list(logdir.glob("events.out.tfevents.*"))) == 1
    assert (logdir / "curves.png").stat().st_size > 5000
    assert [p.name for p in sorted((logdir / "images").iterdir())] == [
        "preview_000000000000.jpg", "preview_000000000012.jpg", "preview_000000000024.jpg",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer.precision=bf16",),
        ("data.num_workers=2", "trainer.iteration=reference"),
        ("gen.style_dims=6", "encoder={type: conv, num_filters: 2, image_size: 128}", "losses.kl=0.1"),
        ("gen.norm={type: clade}", "trainer.gradient_accumulation=2", "trainer.activation_checkpointing=true"),
        ("trainer.precision=bf16", "gen.norm={type: clade}", "data.num_workers=2"),
        ("trainer.precision=fp16", "gen.norm={type: clade_icpe}", "gen.noise_injection=true"),
    ],
)
def test_stopping_and_starting_again_changes_nothing(tiny_run, overrides):
    # After 8 of 10 images. SPADE in fp32, in two processes: test_processes_that_come_and_go_change_nothing. CLADE in
    # bf16, in two processes, under faults: test_soak.py.
    _, run = tiny_run
    overrides += ("trainer.max_iterations=3",)
    straight = run("straight", *overrides)
    run("broken", *overrides, stop_after=2)
    assert_same(run("broken", *overrides), straight)


def test_forms_and_precisions_differ_but_are_finite(tiny_run):
    _, run = tiny_run
    results = {}
    for name, overrides in {
        "shared": (), "reference": ("trainer.iteration=reference",), "bf16": ("trainer.precision=bf16",),
        "fp16": ("trainer.precision=fp16",),
    }.items():  # fmt: skip
        results[name] = tensors_of(run(name, *overrides)["generator"])
        assert all(t.isfinite().all() for t in results[name].values())
    key = "/to_image.weight"
    assert not torch.equal(results["shared"][key], results["reference"][key])
    # Where a gradient is about 0, Adam makes a step of its rounding, which the next iteration enlarges: one iteration,
    # and a larger epsilon.
    short = ("trainer.max_iterations=1", "gen_opt.adam_eps=1e-3", "dis_opt.adam_eps=1e-3")
    rows, channels = (
        tensors_of(run(f"channels_last_{last}", *short, f"trainer.channels_last={last}")) for last in ("false", "true")
    )
    for name, tensor in rows.items():
        if name.startswith(("/generator/", "/discriminator/")):
            torch.testing.assert_close(channels[name], tensor, rtol=1e-4, atol=5e-6, msg=name)


@pytest.mark.parametrize("fused", ["auto", "off"])
@pytest.mark.parametrize(("before", "after"), [("false", "true"), ("true", "false")])
def test_the_memory_format_may_change_between_launches(tiny_run, before, after, fused):
    _, run = tiny_run
    # As above, of gradients about 0. The moments of fused Adam pair with weights by their place in memory.
    settings = (
        "trainer.max_iterations=2",
        *(f"{x}_opt={{lr: 0.01, adam_eps: 1.0, fused: {fused}}}" for x in ("gen", "dis")),
    )
    straight = tensors_of(run("straight", *settings, f"trainer.channels_last={before}"))
    run("turned", *settings, f"trainer.channels_last={before}", stop_after=1)
    turned = tensors_of(run("turned", *settings, f"trainer.channels_last={after}"))
    for name, tensor in straight.items():
        if name.startswith(("/generator/", "/discriminator/")):
            torch.testing.assert_close(turned[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


DAMAGE = {
    "a weight of another shape": ("generator", "to_image.weight", lambda t: t[..., :2]),
    "a weight of half precision": ("generator", "to_image.weight", torch.Tensor.half),
    "a weight of whole numbers": ("generator_ema", "to_image.weight", torch.Tensor.long),
    "a statistic of double precision": ("generator", "blocks.0.norm_0.normalize.running_mean", torch.Tensor.double),
    "a sparse weight": ("discriminator", "discriminators.0.layers.0.0.weight", torch.Tensor.to_sparse),
    "a moment of another shape": ("gen_optimizer", "exp_avg_sq", lambda t: t[None]),
    "a moment of half precision": ("dis_optimizer", "exp_avg_sq", torch.Tensor.half),
    "a sparse moment": ("gen_optimizer", "exp_avg_sq", torch.Tensor.to_sparse),
    "a word for a moment": ("gen_optimizer", "exp_avg_sq", str),
    "two steps for one": ("gen_optimizer", "step", lambda t: torch.stack([t, t])),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_tensor_of_a_checkpoint_is_checked_before_any_is_loaded(tiny_run, tmp_path, damage):
    path, run = tiny_run
    content = run("log", "trainer.max_iterations=1")
    field, name, change = DAMAGE[damage]
    tensors = content[field]["state"][3] if field.endswith("optimizer") else content[field]
    tensors[name] = change(tensors[name])
    config = load_config(path, ())
    state = prepare(config, build_losses(config), ProcessInfo(), torch.device("cpu")).state
    before = copy.deepcopy(state.state_dict())
    with pytest.raises(CheckpointError, match=rf"here\.pt: {field} does not fit this config: .*{name}"):
        state.load_state_dict(content, "here.pt")
    assert_same(state.state_dict(), before)


WRONG_CONTENT = {
    "run is a number": lambda c: c.update(run=5),
    "run lacks a fact": lambda c: c["run"].pop("world_size"),
    "config is a list": lambda c: c.update(config=[1]),
    "no config": lambda c: c.pop("config"),
    "images_seen is a tensor": lambda c: c.update(images_seen=torch.ones(2)),
    "generator is a number": lambda c: c.update(generator=1.0),
    "optimizer is a number": lambda c: c.update(gen_optimizer=1.0),
    "optimizer without state": lambda c: c["gen_optimizer"].update(state=[]),
    "optimizer without groups": lambda c: c["gen_optimizer"].pop("param_groups"),
    "no betas": lambda c: c["gen_optimizer"]["param_groups"][0].update(betas=()),
    "moments are a list": lambda c: c["gen_optimizer"]["state"].update({0: []}),
    "no second moment": lambda c: c["gen_optimizer"]["state"][0].pop("exp_avg_sq"),
    "endless step": lambda c: c["gen_optimizer"]["state"][0].update(step=float("nan")),
    "parameter named by a word": lambda c: c["gen_optimizer"]["state"].update(x=c["gen_optimizer"]["state"][0]),
    "scaler is a list": lambda c: c.update(gen_scaler=["x"]),
    "scale is a word": lambda c: c.update(gen_scaler={"scale": "x"}),
    "weights under numbers": lambda c: c["generator"].update({1: torch.ones(1)}),
    "evaluation is text": lambda c: c.update(evaluation="x"),
}


def test_wrong_contents_of_a_checkpoint_are_one_message_and_no_fresh_start(tiny_run, tmp_path):
    path, run = tiny_run
    content = run("log", "trainer.max_iterations=1")
    newest = checkpoint.newest_checkpoint(tmp_path / "log")
    config = load_config(path, ["trainer.max_iterations=2"])
    made = prepare(config, build_losses(config), ProcessInfo(), torch.device("cpu"))
    before = copy.deepcopy(made.state.state_dict())
    for name, change in WRONG_CONTENT.items():
        changed = copy.deepcopy(content)
        change(changed)
        checkpoint.write_checkpoint(newest, changed)
        with pytest.raises(UserError):
            resume(made, tmp_path / "log", None)
            pytest.fail(f"{name}: accepted")
        if name.startswith(("generator", "weights", "config", "no config", "images")):
            with pytest.raises(UserError):
                Model.load(newest, weights="raw", for_inference=False)
                pytest.fail(f"{name}: accepted for inference")
    assert_same(made.state.state_dict(), before)


def test_betas_are_the_configs_and_not_the_checkpoints(tiny_run, tmp_path):
    path, run = tiny_run
    run("log", "trainer.max_iterations=1")
    config = load_config(path, ["trainer.max_iterations=2", "gen_opt.adam_beta1=0.25"])
    made = prepare(config, build_losses(config), ProcessInfo(), torch.device("cpu"))
    assert "changed since: gen_opt.adam_beta1: 0.0 -> 0.25" in resume(made, tmp_path / "log", None)
    assert made.state.gen_optimizer.param_groups[0]["betas"][0] == 0.25


def test_a_bit_that_flipped_is_seen_without_the_sha256_too(tiny_run, tmp_path):
    path, run = tiny_run
    content = run("log", "trainer.max_iterations=1")
    newest = checkpoint.newest_checkpoint(tmp_path / "log")
    checkpoint.checksum_path(newest).unlink()
    assert "without its sha256" in Model.load(newest, for_inference=False).notes[0]
    config = load_config(path, ["trainer.max_iterations=2"])
    made = prepare(config, build_losses(config), ProcessInfo(), torch.device("cpu"))
    assert "without its sha256" in resume(made, tmp_path / "log", None)
    weights = max(content["generator"].values(), key=torch.numel).numpy().tobytes()
    damaged = bytearray(newest.read_bytes())
    damaged[damaged.index(weights[:256]) + 100] ^= 64
    newest.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"is damaged or foreign \(the checksum of .*data/\d+ in it is wrong"):
        checkpoint.load_checkpoint(newest)
    newest.write_bytes(b"")
    with zipfile.ZipFile(newest, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(10**6))
    with pytest.raises(CheckpointError, match="its records are compressed"):
        checkpoint.load_checkpoint(newest)


@pytest.mark.parametrize("seen", ["many", -3, 1.5, True])
def test_a_counter_that_is_no_number_of_images_is_refused(tiny_run, seen):
    path, run = tiny_run
    content = run("log", "trainer.max_iterations=1")
    config = load_config(path, ())
    state = prepare(config, build_losses(config), ProcessInfo(), torch.device("cpu")).state
    with pytest.raises(CheckpointError, match=r"here\.pt: images_seen does not fit this config: it is"):
        state.load_state_dict({**content, "images_seen": seen}, "here.pt")
    assert state.images_seen == 0


def test_the_averages_statistics_span_the_whole_training_set_on_any_number_of_processes(
    tiny_run, tiny_folder, tmp_path
):
    """As in CamVid, whose first samples in the order of names are one sequence at dusk."""
    path, _ = tiny_run
    root = tiny_folder(
        "sequences", keys=[f"{sequence}/{i:03d}" for sequence in "abcde" for i in range(20)], size=(32, 64)
    )
    common = (f"data.train.roots=[{root}]", "trainer.model_average.batch_norm_images=25")
    images = sorted(root.glob("images/*/*.jpg"))

    def chosen(batch_size: int, world_size: int, *more: str) -> list[list[list[str]]]:
        """For each forward the keys of each process."""
        config = load_config(path, (*common, f"data.train.batch_size={batch_size}", *more))
        runs = [
            prepare(config, build_losses(config), ProcessInfo(rank, world_size), torch.device("cpu"))
            for rank in range(world_size)
        ]
        for image in images:
            image.write_bytes(b"no image")  # label maps alone are read
        batches = [calibration_layouts(run) for run in runs]
        assert all(batch.images is None for own in batches for batch in own)
        return [[list(batch.keys) for batch in forward] for forward in zip(*batches, strict=True)]

    one = chosen(8, 1)
    keys = [key for forward in one for own in forward for key in own]
    assert len(set(keys)) == 25 and Counter(key[0] for key in keys) == dict.fromkeys("abcde", 5)
    for forward in one:  # and so does each forward, whose statistics are averaged
        assert len({key[0] for own in forward for key in own}) == 5
    for batch_size, world_size in ((4, 2), (2, 4), (1, 8), (8, 2), (16, 4)):
        others = chosen(batch_size, world_size)
        assert sorted(key for forward in others for own in forward for key in own) == sorted(keys)
        if batch_size * world_size == 8:
            assert [sorted(chain(*forward)) for forward in others] == [sorted(chain(*forward)) for forward in one]
    again, other = (sorted(key for f in chosen(8, 1, f"seed={seed}") for key in chain(*f)) for seed in (0, 1))
    assert again == sorted(keys) != other
    assert all(own for forward in chosen(1, 4, "trainer.model_average.batch_norm_images=1") for own in forward)


def test_shards_are_shuffled_as_the_config_says(tiny_run):
    _, run = tiny_run
    with pytest.warns(UserWarning, match="data.shuffle_shards: 3 mixes all samples"):
        run("log", "trainer.max_iterations=1", "data.shuffle_shards=3")


def test_accumulated_pieces_equal_the_whole_batch(tiny_run):
    # With instance norm no statistic spans the batch, so one step on 4 images equals 2 steps on 2 each, accumulated.
    _, run = tiny_run
    settings = ("gen.norm.normalization=instance", "trainer.max_iterations=1", "gen_opt.adam_eps=1e-3",
                "dis_opt.adam_eps=1e-3", "trainer.iteration=reference", "gen.spectral_norm=false",
                "dis.spectral_norm=false", "seed=1")  # fmt: skip
    whole = tensors_of(run("whole", *settings))
    pieces = tensors_of(run("pieces", *settings, "trainer.gradient_accumulation=2"))
    for name, tensor in whole.items():
        if name.startswith(("/generator/", "/discriminator/")):
            torch.testing.assert_close(pieces[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_damaged_newest_checkpoint_is_named_and_passed_over(tiny_run, tmp_path, capsys):
    _, run = tiny_run
    straight = run("log")
    newest = checkpoint.newest_checkpoint(tmp_path / "log")
    newest.write_bytes(newest.read_bytes()[:1000])
    assert_same(run("log"), straight)
    printed = capsys.readouterr().out
    assert f"{newest}: cannot be read as a checkpoint" in printed and "taking the one before" in printed


def test_old_checkpoints_go_and_finished_runs_say_so(tiny_run, tmp_path, capsys):
    _, run = tiny_run
    run("log", "trainer.checkpoint_every=1", "trainer.keep_last=2")
    assert len(list((tmp_path / "log" / "checkpoints").iterdir())) == 4  # each with its sha256
    run("log")
    assert "finished: iteration 6 of 6. To go on, raise trainer.max_iterations" in capsys.readouterr().out


def test_a_run_that_is_extended_says_what_the_learning_rate_does(tiny_run, capsys):
    _, run = tiny_run
    run("log")
    capsys.readouterr()
    run("log", "trainer.max_iterations=12", stop_after=7)
    printed = capsys.readouterr().out
    assert (
        "gen_opt: the learning rate jumps from 0.000333 in the last iteration to 0.001 in the next; it falls to 0 at"
        " iteration 12 (lr_policy: linear)"
    ) in printed
    assert "dis_opt: the learning" not in printed  # constant
    run("log", "trainer.max_iterations=12", "dis_opt.lr=2e-3", stop_after=8)
    printed = capsys.readouterr().out
    assert "dis_opt: the learning rate jumps from 0.001 in the last iteration to 0.002 in the next\n" in printed
    assert "gen_opt: the learning" not in printed


def test_a_checkpoint_of_another_architecture_is_refused_in_words(tiny_run, tmp_path):
    _, run = tiny_run
    run("log", stop_after=3)
    with pytest.raises(CheckpointError, match="edge"):
        run("log", "data.edges=none")
    with pytest.raises(CheckpointError, match="num_filters"):
        run("log", "gen.num_filters=3")
    with pytest.raises(CheckpointError, match="7"):
        run("log", "data.labels.num_classes=7")


def test_starting_from_a_checkpoint_elsewhere(tiny_run, tmp_path):
    _, run = tiny_run
    straight = run("first")
    run("half", stop_after=3)
    start = checkpoint.newest_checkpoint(tmp_path / "half")
    assert_same(run("second", start_from=start), straight)
    assert_same(run("of a log dir", start_from=tmp_path / "half"), straight)
    with pytest.raises(CheckpointError, match="no such checkpoint file"):
        run("third", start_from=tmp_path / "nowhere.pt")


def test_a_foreign_file_runs_no_code_and_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"format": checkpoint.FORMAT, "x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="damaged or foreign"):
        checkpoint.load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"scripts/import_checkpoint\.py"):
        checkpoint.load_checkpoint(tmp_path / "other.pt")


def test_a_collapsing_run_is_reported_and_a_sound_one_is_not(tiny_run, tmp_path, capsys):
    _, run = tiny_run
    ticks = ("trainer.log_every=1", "trainer.checkpoint_every=50", "trainer.image_every=50")
    run("sound", *ticks, "trainer.max_iterations=12")
    assert "warning" not in capsys.readouterr().out
    # A generator that stands still, and a discriminator without what slows it down.
    run("won", *ticks, "trainer.max_iterations=40", "gen_opt.lr=1e-9", "dis_opt.lr=0.002",
        "dis={type: multiscale_patch, num_filters: 16, num_layers: 3, normalization: none, spectral_norm: false}",
        "trainer.init={type: kaiming}", "losses.feature_matching=0")  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.count("the discriminator has won: it classifies 9") == 1
    assert "the outputs saturate" not in printed
    run("white", *ticks, "trainer.max_iterations=12", "gen_opt.lr=1.0")
    printed = capsys.readouterr().out
    assert printed.count("the outputs saturate: 100% of the generated values") == 1
    assert "the discriminator has won" not in printed
    events = EventAccumulator(str(tmp_path / "won")).Reload()
    (text,) = events.Tensors("warnings/text_summary")
    assert b"What to do" in text.tensor_proto.string_val[0]
    assert max(event.value for event in events.Scalars("health/d_accuracy")) > 0.98


def outputs_after(content: dict) -> torch.Tensor:
    """Images by the trained generator, in evaluation mode, on a fixed layout."""
    config = parse_config(content["config"])
    generator = build_generator(config).eval()
    generator.load_state_dict(content["generator"])
    with torch.no_grad():
        return generator(random_layout(layout_spec(config), 2, 32, 64))


def losses_in(logdir: Path) -> list[list[float]]:
    """Of each iteration; other images give others."""
    records = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    return [[value for key, value in record.items() if key.startswith("loss/")] for record in records]


def test_processes_that_come_and_go_change_nothing(tiny_run, tmp_path, commands, capsys):
    # Adam divides by the root of the squared gradient: where that is zero but for rounding (a bias before a norm) it
    # steps in a random direction. A large epsilon leaves what is compared here, the gradients. Their rounding grows
    # tenfold and more from one iteration to the next, where an L1 or hinge term is at its kink: so there are three.
    path, run = tiny_run
    shared = ("trainer.max_iterations=3", "gen_opt={lr: 0.01, adam_eps: 1.0}", "dis_opt={lr: 0.01, adam_eps: 1.0}",
              "trainer.log_every=1")  # fmt: skip

    def in_several(logdir: str, *more: str, count: int = 2) -> str:
        settings = (*shared, "data.train.batch_size=2", "data.num_workers=1", "trainer.bucket_cap_mb=0.01")
        arguments = ("--config", path, "--logdir", tmp_path / logdir, *(f"--set={item}" for item in settings), *more)
        launcher = (*TORCHRUN, "--standalone", f"--nproc_per_node={count}")
        result = commands.run(*launcher, "train.py", *arguments, NO_CURVES="1")
        assert result.returncode == 0, result.stderr
        return result.stdout

    one = run("one", *shared)
    assert "batch: 2 per process x 2 process(es) = 4 globally" in in_several("two")
    in_several("two_one", "--max_iterations=1")
    in_several("three", count=3)  # two terms have the same sum in any order, three have not
    in_several("three_three", "--max_iterations=1", count=3)
    in_several("three_three", count=3)
    two, three, three_three = (
        checkpoint.load_checkpoint(checkpoint.newest_checkpoint(tmp_path / name))
        for name in ("two", "three", "three_three")
    )
    assert_same(three_three, three)

    run("one_two", *shared, stop_after=1)
    capsys.readouterr()
    two_one, told = run("two_one", *shared), capsys.readouterr().out
    message = (
        "then {} process(es) and 4 images per iteration, now {} and 4: samples continue in the same order from number 4"
    )
    assert message.format(2, 1) in told
    assert message.format(1, 2) in in_several("one_two")
    one_two = checkpoint.load_checkpoint(checkpoint.newest_checkpoint(tmp_path / "one_two"))

    for name, content in (("two", two), ("two_one", two_one), ("one_two", one_two)):
        for ours, theirs in zip(losses_in(tmp_path / name), losses_in(tmp_path / "one"), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
        assert content["images_seen"] == one["images_seen"]
        torch.testing.assert_close(outputs_after(content), outputs_after(one), rtol=0, atol=5e-4)
        for key in ("/generator/blocks.0.norm_0.normalize.running_mean", "/generator_ema/to_image.weight"):
            torch.testing.assert_close(tensors_of(content)[key], tensors_of(one)[key], rtol=1e-3, atol=1e-5)


def test_the_older_launcher_and_a_component_of_ones_own(tiny_run, tmp_path, commands):
    path, _ = tiny_run
    (tmp_path / "my_parts.py").write_text(
        "from imaginaire_spade.models.generator import SPADEGenerator\n"
        "from imaginaire_spade.registry import GENERATORS\n\n"
        '@GENERATORS.register("mine")\n'
        "class Mine(SPADEGenerator):\n"
        "    def __init__(self, spec, image_size, *, width: int = 3):\n"
        "        super().__init__(spec, image_size, num_filters=width)\n"
    )
    arguments = ("--config", path, "--logdir", tmp_path / "log", "--set=gen={type: mine, width: 2}",
                 "--max_iterations", "1")  # fmt: skip
    launcher = ("-m", "torch.distributed.launch", "--nproc_per_node=1", "--master_port=29511")
    result = commands.run(*launcher, "train.py", *arguments, "--import", "my_parts", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    content = checkpoint.load_checkpoint(checkpoint.newest_checkpoint(tmp_path / "log"))
    assert content["config"]["gen"] == {"type": "mine", "width": 2}

    without = commands.run("train.py", *arguments)
    assert without.returncode == 2
    assert without.stderr.startswith("error: --set gen=") and "unknown generator 'mine'" in without.stderr
    assert "Traceback" not in without.stderr


def test_a_dry_run_measures_and_writes_nothing(tiny_run, tmp_path, commands):
    path, _ = tiny_run
    result = commands.run("train.py", "--config", path, "--logdir", tmp_path / "log", "--dry_run")
    assert result.returncode == 0, result.stderr
    for part in (
        "parameters: generator 0.",
        "G multiply-adds for an image of 32x64",
        "schedule: 6 iterations",
        "peak memory",
        "nothing was written",
    ):
        assert part in result.stdout
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("norm", "labels", "edges", "size", "millions", "billions"),
    [
        # Park et al. 2019: COCO-Stuff, ADE20K, Cityscapes; Tan et al. 2021: ADE20K.
        ("spade", {"num_classes": 182, "dont_care": True}, "labels", [256, 256], 97.5, 191),
        ("spade", {"num_classes": 150, "dont_care": True}, "none", [256, 256], 96.5, 181),
        ("spade", {"num_classes": 35, "dont_care": False}, "labels", [256, 512], 93.0, 281),
        ("clade", {"num_classes": 150, "dont_care": True}, "none", [256, 256], 71.4, 42.2),
    ],
)
def test_the_published_generators_have_the_published_parameters_and_multiply_adds(
    tiny_config, norm, labels, edges, size, millions, billions
):
    # Equal to the last published digit: the publications count all convolutions, biases and norms not.
    upsampling = "more" if size == [256, 512] else "normal"
    config = load_config(
        tiny_config(edges=edges, **labels),
        [
            f"gen={{type: spade, upsampling: {upsampling}, norm: {norm}}}",
            f"data.train.augmentations={{random_crop_h_w: {size}}}",
        ],
    )
    spec = layout_spec(config)
    with FakeTensorMode():  # shapes only: no memory, no arithmetic
        generator = build_generator(config).eval()
        maps = torch.zeros(1, *size, dtype=torch.uint8)
        count = multiply_adds(generator, SemanticLayout(spec, maps, maps if spec.has_edges else None))
    assert round(sum(p.numel() for p in generator.parameters()) / 1e6, 1) == millions
    assert float(f"{count / 1e9:.3g}") == billions


def test_multiply_adds_are_those_of_the_convolutions_and_matrix_products():
    spec = LayoutSpec(3)
    generator = Pix2pixHDGenerator(spec, (16, 16), num_filters=2, num_downsamplings=1, num_blocks=1).eval()
    full, half = 16 * 24, 8 * 12
    expected = full * 49 * (3 * 2 + 2 * 3) + half * 9 * 2 * 4 + half * 2 * 9 * 4 * 4 + half * 9 * 4 * 2
    assert multiply_adds(generator, random_layout(spec, 1, 16, 24)) == expected


def test_a_profile_prints_operations_and_writes_a_trace(tiny_run, tmp_path, commands):
    path, _ = tiny_run
    result = commands.run("train.py", "--config", path, "--logdir", tmp_path / "log", "--profile")
    assert result.returncode == 0, result.stderr
    assert "convolution_backward" in result.stdout
    assert json.loads((tmp_path / "log/profile/trace_rank0.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config", "nowhere.yaml"), "nowhere.yaml: no such config file"),
        (("--device", "cuda"), "--device cuda: this machine"),
        (("--max_iterations", "0"), "--max_iterations 0: must be at least 1"),
        (("--set", "data.train.roots=[/nowhere]"), "/nowhere"),
        (("--set", "trainer.log_evry=1"), "did you mean 'log_every'"),
        (("--import", "no_such_module"), "--import no_such_module"),
        (("--logdir", "LICENSE"), "LICENSE"),
    ],
)
def test_mistakes_on_the_command_line_end_in_one_message(tiny_run, tmp_path, commands, arguments, message):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    path, _ = tiny_run
    before = [] if "--logdir" in arguments else ["--logdir", tmp_path / "log"]
    result = commands.run("train.py", "--config", path, *before, *arguments)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "log").exists()
