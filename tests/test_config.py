"""Configuration: strict, merged, overridable, and every recipe of the repository loads."""

import itertools
import json
import sys
import types
import typing
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import BaseModel
from torch import nn

from imaginaire_spade.build import check_run
from imaginaire_spade.config import Loss, RunConfig
from imaginaire_spade.config_files import MAX_DEPTH, dump_config, dump_yaml, load_config, parse_config
from imaginaire_spade.errors import ConfigError
from imaginaire_spade.optimizer import build_optimizer
from imaginaire_spade.registry import DISCRIMINATORS, ENCODERS, GENERATORS, LOSSES, NORMS, Component

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE = REPOSITORY / "configs/projects/spade/sample/small64.yaml"
RECIPES = sorted(p for p in (REPOSITORY / "configs/projects").rglob("*.yaml") if not p.name.startswith("_"))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_every_recipe_loads_passes_the_checks_and_survives_a_round_trip(path):
    config = load_config(path)
    check_run(config, world_size=8)
    assert parse_config(dump_config(config)) == config
    assert parse_config(json.loads(json.dumps(dump_config(config)))) == config  # as a published generator holds it
    assert parse_config(yaml.safe_load(dump_yaml(config))) == config


def test_all_recipes_are_found():
    assert len(RECIPES) == 56


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.max_iter=5", ["trainer.max_iter: unknown key", "'max_iterations'"]),
        ("trainer.model_average.betta=0.9", ["unknown key", "'beta'"]),
        ("gen.norm.kernal_size=3", ["gen.norm.kernal_size: unknown key", "'kernel_size'"]),
        ("trainer.seed=3", ["trainer.seed: unknown key; did you mean seed at the top level?"]),
        ("gen.lr=1e-3", ["gen.lr: unknown key; did you mean gen_opt.lr or dis_opt.lr?"]),
        (
            "trainer.batch_size=3",
            ["did you mean data.train.batch_size or data.val.batch_size or test_data.batch_size?"],
        ),
        ("gen.type=spad", ["unknown generator 'spad'", "'spade'", "--import"]),
        ("dis=multiscale_patches", ["unknown discriminator", "'multiscale_patch'"]),
        ("losses.perceptal=1", ["unknown loss 'perceptal'", "'perceptual'"]),
        ("losses.gan.mode=hinges", ["losses.gan.mode: must be 'hinge'", "'hinges'"]),
        ("losses.gan=null", ["losses.gan: no weight", "write gan: 0"]),
        ("losses={gan: 0, feature_matching: 0, perceptual: 0}", ["all weights are 0", "write losses.gan: 1"]),
        ("data.train.batch_size='4'", ["data.train.batch_size: must be a valid integer", "'4'"]),
        ("data.train.batch_size=0", ["greater than or equal to 1"]),
        ("gen_opt.lr=fast", ["gen_opt.lr: must be a valid number"]),
        ("data.labels.remap={300000: 1}", ["300000 cannot occur"]),
        ("data.labels.remap={7: 99}", ["remap {7: 99}", "0..10"]),
        ("data.labels.names=[a, b]", ["names has 2 entries for num_classes: 11"]),
        ("data.train.augmentations.random_crop_h_w=[96, 96]", ["crop of [96, 96] is larger", "resize_h_w: [64, 64]"]),
        ("trainer.max_epochs=3", ["exactly one of max_iterations and max_epochs"]),
        ("losses.gan.weight=-1", ["greater than or equal to 0"]),
        ("pretrained_weight={url: 'https://x/y.pt'}", ["sha256"]),
    ],
)
def test_a_mistake_is_named_with_its_place_and_the_way_out(override, expected):
    with pytest.raises(ConfigError) as raised:
        load_config(SAMPLE, [override])
    message = str(raised.value)
    assert f"--set {override}" in message or "small64.yaml" in message or "sample.yaml" in message
    for part in expected:
        assert part in message


def test_the_message_names_file_and_line(tmp_path):
    path = write(tmp_path / "c.yaml", f"base: {SAMPLE}\ntrainer:\n  log_evry: 3\n")
    with pytest.raises(ConfigError, match=r"c\.yaml:3: trainer\.log_evry: unknown key; did you mean 'log_every'"):
        load_config(path)


def test_every_mistake_is_reported_at_once(tmp_path):
    path = write(tmp_path / "c.yaml", f"base: {SAMPLE}\ntrainer: {{log_evry: 3}}\ngen: {{num_filter: 3}}\nseed: x\n")
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert all(key in str(raised.value) for key in ("log_evry", "num_filter", "seed"))


def test_a_block_that_slipped_into_another_section_stays_a_short_message(tmp_path):
    path = write(tmp_path / "c.yaml", f"base: {SAMPLE}\ndata:\n" + "".join(f"  key{n}: {n}\n" for n in range(50)))
    with pytest.raises(ConfigError, match="key0: unknown key") as raised:
        load_config(path)
    lines = str(raised.value).splitlines()
    assert len(lines) == 13 and lines[-1] == "... and 38 more such mistakes"
    assert str(raised.value).count("Allowed here") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n- 2", "a config is a mapping"),
        ("seed: 1\nseed: 2\n", "c.yaml:2: seed is stated twice"),
        ("base: c.yaml\n", "circle"),
        ("base: nowhere.yaml\n", "no such config file"),
        ("x: !!python/object/apply:os.system ['echo owned']", "not valid YAML"),
    ],
)
def test_broken_files(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path / "c.yaml", text))


def test_bases_merge_and_overrides_win(tmp_path):
    write(tmp_path / "a.yaml", f"base: {SAMPLE}\ngen_opt: {{lr: 5e-4}}\n")
    path = write(tmp_path / "b.yaml", "base: a.yaml\ngen_opt: {adam_beta1: 0.5}\n")
    config = load_config(path, ["gen.num_filters=7", "data.train.roots=[x, y]"], extra={"seed": 9})
    assert config.gen_opt.lr == 5e-4  # YAML 1.1 would read 5e-4 as a string
    assert config.gen_opt.adam_beta1 == 0.5
    assert config.gen.args["num_filters"] == 7
    assert config.data.train.roots == ("x", "y")
    assert config.seed == 9


def test_a_component_of_another_type_starts_afresh(tmp_path):
    write(tmp_path / "a.yaml", f"base: {SAMPLE}\ngen_opt: {{lr_policy: {{type: linear, decay_start: 0.9}}}}\n")
    path = write(tmp_path / "b.yaml", "base: a.yaml\ngen_opt: {lr_policy: {type: constant}}\n")
    assert load_config(path).gen_opt.lr_policy.decay_start == 0.5


def test_a_nested_component_has_a_default(tmp_path):
    path = write(tmp_path / "c.yaml", f"base: {SAMPLE}\ngen: null\n")
    config = load_config(path, ["gen=spade"])
    assert dump_config(config)["gen"]["norm"] == {
        "type": "spade", "normalization": "batch", "hidden_channels": 128, "kernel_size": 3, "path": "auto",
        "affine": False, "spectral_norm": False,
    }  # fmt: skip


def test_a_component_holds_checked_values_and_components():
    config = load_config(SAMPLE, ["gen.norm={type: clade_icpe, skip_ids: [1, 2]}"])
    norm = config.gen.args["norm"]
    assert norm == Component(type="clade_icpe", args={"normalization": "batch", "skip_ids": (1, 2)})
    assert config.losses["gan"].component.args["mode"] == "hinge"


def test_overrides_apply_to_a_stored_config():
    stored = dump_config(load_config(SAMPLE))
    config = parse_config(stored, "model.pt", ["data.train.batch_size=3", "gen.norm.path=dense"])
    assert config.data.train.batch_size == 3 and config.gen.args["norm"].args["path"] == "dense"
    assert parse_config(stored) == load_config(SAMPLE)  # which they left alone
    with pytest.raises(ConfigError) as raised:
        parse_config(stored, "model.pt", ["gen.norm.kernal_size=3", "trainer.max_epochs=2"])
    assert "--set gen.norm.kernal_size=3: gen.norm.kernal_size: unknown key; did you mean" in str(raised.value)
    assert "model.pt: trainer: state exactly one" in str(raised.value)
    with pytest.raises(ConfigError, match="1: unknown key"):
        parse_config({**stored, 1: 2}, "model.pt")


def test_nothing_writes_to_a_config():
    config = load_config(SAMPLE)
    with pytest.raises(Exception, match="frozen"):
        config.trainer.log_every = 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.gradient_accumulation=3"], "cannot be split into trainer.gradient_accumulation: 3"),
        (["data.train.augmentations={resize_h_w: [60, 64]}"], r"60x64, but gen \(spade\) needs multiples of 16"),
        (["data.train.augmentations={resize_smallest_side: 64}"], "random_crop_h_w"),
        (["data.val.augmentations={}"], r"data\.val\.augmentations\.resize_h_w: \[64, 64\]"),
        (["data.val.augmentations={resize_h_w: [64, 70]}"], "images of 64x70"),
        (["gen.norm.kernel_size=4"], r"norm\.kernel_size: 4 must be odd"),
        (["dis={type: fpse, num_filters: 4}"], r"dis \(fpse\) needs at least 128.*dis\.num_layers"),
        (["losses.kl=0.2"], "losses.kl needs a style encoder"),
        (["encoder=conv"], "gen.style_dims is 0"),
    ],
)
def test_what_would_fail_later_is_rejected_at_the_start(overrides, message):
    with pytest.raises(ConfigError, match=message):
        check_run(load_config(SAMPLE, overrides), world_size=1)


HOSTILE_VALUES = {
    "date": "2024-13-45", "int": "!!int foo", "float": "!!float abc", "bool": "!!bool maybe", "time": "!!timestamp x",
    "digits": "1" * 5000, "zone": "2001-01-01 00:00:00 +99:99", "deep": "[" * 500 + "]" * 500,
    "circle": "&a [*a]", "circle of a mapping": "&a {b: *a}", "zero byte": r'"a\0b"', "surrogate": r'"\ud800"',
    "of a mapping": "{[1, 2]: 3}", "python": "!!python/object/apply:os.getcwd []",
    "bomb": "[&a [x, x, x, x, x, x, x, x], " + ", ".join(
        f"&{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise("abcdefghij")) + "]",
}  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE_VALUES.values(), ids=HOSTILE_VALUES)
def test_a_value_that_cannot_be_made_is_one_short_message(tmp_path, value):
    path = write(tmp_path / "c.yaml", f"base: {SAMPLE}\ndata: {{name: {value}}}\n")
    for arguments in ((path,), (SAMPLE, [f"data.name={value}"])):
        with pytest.raises(ConfigError) as raised:
            load_config(*arguments)
        assert len(str(raised.value)) < 3000
        assert str(path if len(arguments) == 1 else "--set data.name")[:20] in str(raised.value)


@pytest.mark.parametrize("base", ["1.5", "true", "[5]", "[{a: b}]", "{a: b}", "[null]", "null", r'"a\0b"'])
def test_a_base_is_the_name_of_a_file_or_a_list_of_names(tmp_path, base):
    with pytest.raises(ConfigError):
        load_config(write(tmp_path / "c.yaml", f"base: {base}\n"))


def test_bases_that_many_files_name_are_read_once_and_endless_ones_are_refused(tmp_path):
    for number in range(MAX_DEPTH):
        named = str(SAMPLE) if number == MAX_DEPTH - 1 else f"{number + 1}.yaml, {number + 1}.yaml"
        write(tmp_path / f"{number}.yaml", f"base: [{named}]\n")
    assert load_config(tmp_path / "20.yaml") == load_config(SAMPLE)  # read again and again, that took 2^30 times
    for number in range(MAX_DEPTH + 10):
        write(tmp_path / f"{number}.yaml", f"base: {number + 1}.yaml\n")
    with pytest.raises(ConfigError, match="the base of a base"):
        load_config(tmp_path / "0.yaml")


def test_a_wrong_value_is_cut_in_the_message(tmp_path):
    text = f"base: {SAMPLE}\ndata:\n  labels: {[list(range(300))] * 5}\n"
    with pytest.raises(ConfigError, match=r"data\.labels") as raised:
        load_config(write(tmp_path / "c.yaml", text))
    assert len(str(raised.value)) < 1100


CHECKED_ELSEWHERE = ("flip_sign", "preview", "ignore", "remap", "palette", "mirror", "ImageSpec.range", "skip_ids")
"""Keys whose numbers have bounds that depend on others."""


def unbounded(annotation, metadata=()):
    """Yield the numbers in an annotation that may be as large, or as small, as one likes."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation, *more = typing.get_args(annotation)
        metadata = [*metadata, *(bound for item in more for bound in getattr(item, "metadata", ()))]
    if typing.get_origin(annotation) is typing.Literal:
        return
    for argument in typing.get_args(annotation):
        yield from unbounded(argument, metadata if isinstance(annotation, types.UnionType) else ())
    bounds = {name for item in metadata for name in ("ge", "gt", "le", "lt") if getattr(item, name, None) is not None}
    if annotation in (int, float) and not (bounds & {"ge", "gt"} and bounds & {"le", "lt"}):
        yield annotation


def test_every_number_has_bounds():
    def sections(model):
        yield model
        for field in model.model_fields.values():
            for candidate in (field.annotation, *typing.get_args(field.annotation)):
                if isinstance(candidate, type) and issubclass(candidate, BaseModel) and candidate is not Component:
                    yield from sections(candidate)

    models = {*sections(RunConfig), Loss}
    models |= {r.schema(name) for r in (GENERATORS, DISCRIMINATORS, ENCODERS, NORMS, LOSSES) for name in r.names()}
    found = [
        f"{model.__name__}.{key}"
        for model in models
        for key, field in model.model_fields.items()
        if [*unbounded(field.annotation, field.metadata)]
    ]
    assert sorted(name for name in found if not name.endswith(CHECKED_ELSEWHERE)) == []
    assert len(models) > 20 and len(found) >= len(CHECKED_ELSEWHERE) - 1
    for model in models:
        assert not model.model_config["allow_inf_nan"]


@pytest.mark.parametrize(
    "override",
    [
        "gen.num_filters=0", "gen.norm.hidden_channels=0", "gen.norm.kernel_size=-3", "dis.num_layers=0",
        "dis.num_layers=4000000000", "dis.num_discriminators=0", "dis.max_num_filters=-1", "gen.style_dims=-1",
        "gen={type: spade, num_filters: 1, upsampling: most}", "gen.num_filters=60000",
        "data.train.batch_size=1000000",
        "data.train={roots: [a], batch_size: 60000, augmentations: {resize_h_w: [8192, 8192]}}",
        "data.train.augmentations.resize_h_w=[1000000, 64]",
    ],
)  # fmt: skip
def test_sizes_that_nothing_holds_are_refused(override):
    with pytest.raises(ConfigError):
        check_run(load_config(SAMPLE, [override]), world_size=1)


def test_apex_is_nvidias_or_refused(monkeypatch):
    config = load_config(SAMPLE, ["gen_opt.fused=apex"])
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))  # as PyPI's, which has no optimizers
    with pytest.raises(ConfigError, match=r"fused: apex, .*apex on PyPI is another project.*write fused: auto"):
        check_run(config, world_size=1)

    class FusedAdam(torch.optim.Adam):
        def __init__(self, parameters, *, adam_w_mode, **settings):
            assert not adam_w_mode
            super().__init__(parameters, **settings)

    optimizers = types.ModuleType("apex.optimizers")
    optimizers.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    check_run(config, world_size=1)
    assert isinstance(build_optimizer([nn.Parameter(torch.zeros(1))], config.gen_opt), FusedAdam)
