# ruff: noqa: F811 (the fixture tiny_run is imported)
"""Runs that begin with another run's weights, also with other classes."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from test_faults import SMALL
from test_training import TINY, tiny_run  # noqa: F401

from imaginaire_spade.build import layout_spec
from imaginaire_spade.config_files import dump_config, parse_config
from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.inference.model import Model
from imaginaire_spade.layout import SemanticLayout
from imaginaire_spade.noise import style_codes
from imaginaire_spade.training import checkpoint
from imaginaire_spade.training.fine_tuning import initialise_from
from imaginaire_spade.training.state import new_train_state, update_average

CPU = torch.device("cpu")
GENERATORS = {
    "spade": {"type": "spade", "num_filters": 2, "norm": {"type": "spade", "hidden_channels": 4}},
    "clade": {"type": "spade", "num_filters": 2, "norm": {"type": "clade"}},
    "clade_icpe": {"type": "spade", "num_filters": 2, "norm": {"type": "clade_icpe"}},
    "concat": {"type": "spade", "num_filters": 2, "norm": {"type": "concat"}},
    "noise": {"type": "spade", "num_filters": 2, "norm": {"type": "clade"}, "noise_injection": True},
    "pix2pixhd": {"type": "pix2pixhd", "num_filters": 2},
    "style_spade": {"type": "style_spade", "num_filters": 2, "style_dims": 4, "norm": {"type": "spade"}},
    "oasis": {"type": "oasis", "num_filters": 2, "style_dims": 3, "norm": {"type": "spade", "hidden_channels": 4}},
}
DISCRIMINATORS = {
    "multiscale_patch": {"type": "multiscale_patch", "num_filters": 2, "num_layers": 3},
    "fpse": {"type": "fpse", "num_filters": 2, "num_layers": 3},
    "oasis_unet": {"type": "oasis_unet", "num_filters": 2, "middle_num_filters": 3, "max_num_filters": 4,
                   "last_num_filters": 2},
}  # fmt: skip
DISCRIMINATOR_OF = {"style_spade": "fpse", "oasis": "oasis_unet"}


def config_of(names: list[str], *, edges: str = "labels", dont_care: bool = True, size: int = 64, **changes):
    tree = json.loads(json.dumps(TINY))
    tree["data"] |= {"edges": edges}
    tree["trainer"]["init"] = {"type": "xavier", "gain": 1.0}
    tree["data"]["labels"] = {"num_classes": len(names), "names": names, "dont_care": dont_care, "ignore": [255]}
    tree["data"]["train"]["augmentations"] = {"resize_h_w": [size, size]}
    return parse_config(tree | changes, source="test")


def layout_of(config, labels: torch.Tensor) -> SemanticLayout:
    spec = layout_spec(config)
    distances = torch.rand(1, 2, *labels.shape[1:], generator=torch.Generator().manual_seed(0))
    return SemanticLayout(spec, labels, "labels" if spec.has_edges else None, distances if spec.has_distances else None)


def saved(config, path, **left_out):
    """Write the checkpoint of a state whose weights and vectors have settled; return both."""
    state = new_train_state(config, CPU, seed=1)
    for _ in range(200):
        for module in [*state.generator.modules(), *state.discriminator.modules()]:
            if hasattr(module, "iterate"):
                module.iterate()
    for average, network in state.averages():
        update_average(average, network, 0.0)
    checkpoint.write_checkpoint(path, {"config": dump_config(config)} | state.state_dict() | left_out)
    return state


OLD = ["sky", "road", "car", "tree"]


@pytest.mark.parametrize("edges", ["labels", "none"])
@pytest.mark.parametrize(("gen", "dis"), [(gen, DISCRIMINATOR_OF.get(gen, "multiscale_patch")) for gen in GENERATORS])
def test_networks_make_the_same_of_the_classes_that_they_share(tmp_path, gen, dis, edges):
    spectral = gen in ("style_spade", "concat")
    # A new class changes the norm of a normalised weight, so these networks only get their classes in a new order.
    names = ["Tree", "road ", "sky", "car"] if spectral else ["lava", "tree", "sky", "swamp", "road", "car"]
    size = 256 if gen == "style_spade" else 64
    changes = {"gen": GENERATORS[gen], "dis": DISCRIMINATORS[dis], "size": size}
    old, new = config_of(OLD, edges=edges, **changes), config_of(names, edges=edges, **changes)
    path = tmp_path / "old.pt"
    before, now = saved(old, path), new_train_state(new, CPU, seed=2)
    said = initialise_from(SimpleNamespace(config=new, state=now), path)
    assert "tree" in said.casefold() and ("lava" not in names or " new" in said)
    few = torch.randint(0, 5, (1, 8, 8), generator=torch.Generator().manual_seed(3)) // 2 * 2  # sky, car, don't care
    labels = few.repeat_interleave(size // 8, 1).repeat_interleave(size // 8, 2)
    matched = [*([name.strip().casefold() for name in names].index(name) for name in OLD), len(names)]
    layouts = [layout_of(old, labels.byte()), layout_of(new, torch.tensor(matched)[labels].byte())]
    z = style_codes(0, ["a"], before.generator.style_dims, CPU)
    with torch.no_grad():
        for name in ("generator", "generator_ema"):
            networks = [getattr(state, name).eval() for state in (before, now)]
            first, second = (network(layout, z) for network, layout in zip(networks, layouts, strict=True))
            assert first.std() > 1e-5
            torch.testing.assert_close(second, first, atol=1e-5, rtol=1e-3)
        scores = [
            state.discriminator.eval()(layout, first) for state, layout in zip((before, now), layouts, strict=True)
        ]
        if dis == "oasis_unet":  # "generated", then the classes
            (theirs,), (ours,) = scores
            assert theirs.logits.std() > 1e-4
            scores = [theirs.logits, ours.logits[:, [0, *(1 + channel for channel in matched)]]]
        torch.testing.assert_close(scores[1], scores[0], atol=1e-4, rtol=1e-3)


def test_edges_and_dont_care_may_come_and_go(tmp_path):
    path = tmp_path / "old.pt"
    before = saved(config_of(OLD, edges="labels", dont_care=False), path)
    new = config_of(["road", "sky"], edges="none", dont_care=True)
    now = new_train_state(new, CPU, seed=2)
    fresh = new_train_state(new, CPU, seed=2)
    said = initialise_from(SimpleNamespace(config=new, state=now), path)
    weights = [state.generator.fc.weight for state in (before, now, fresh)]
    for channel, source in ((0, 1), (1, 0)):
        assert torch.equal(weights[1][:, channel], weights[0][:, source])
    assert torch.equal(weights[1][:, 2], weights[2][:, 2])
    assert "no longer there: car, tree" in said and "don't care" in said
    assert now.images_seen == 0 and not any(state["step"] for state in now.gen_optimizer.state.values())


def test_conditions_continue_beside_edges_and_other_classes(tmp_path):
    def with_depth(names: list[str]):
        config = config_of(names)
        conditions = ({"name": "depth", "range": [0, 10]}, {"name": "normals", "channels": 3, "flip_sign": [0]})
        return parse_config(dump_config(config) | {"data": dump_config(config)["data"] | {"conditions": conditions}})

    path, old, new = tmp_path / "old.pt", with_depth(OLD), with_depth(["road", "lava"])
    before, now = saved(old, path), new_train_state(new, CPU, seed=2)
    said = initialise_from(SimpleNamespace(config=new, state=now), path)
    assert (
        re.search("edges +the edges", said)
        and "the conditions continue" in said
        and "no longer there: sky, car, tree" in said
    )
    first, second = (state.generator.fc.weight for state in (before, now))
    # (4 classes, don't care, edges, 4 channels of conditions; 2 classes, don't care, edges, the same.)
    for channel, source in ((0, 1), (2, 4), (3, 5), (4, 6), (5, 7), (6, 8), (7, 9)):
        assert torch.equal(second[:, channel], first[:, source])
    again = new_train_state(old, CPU, seed=3)
    assert "all 4 classes continue" in initialise_from(SimpleNamespace(config=old, state=again), path)
    assert torch.equal(again.generator.fc.weight, first)


def test_a_run_is_fine_tuned_for_other_classes(tiny_run, tmp_path, capsys):
    _, run = tiny_run
    run("first", *SMALL, "trainer.max_iterations=2")
    more = (*SMALL, "data.labels.num_classes=9", "trainer.max_iterations=2", "trainer.freeze_discriminator_layers=1")
    tuned = run("second", *more, init_from=tmp_path / "first")
    printed = capsys.readouterr().out
    assert "starting from the weights of" in printed and "class 8" in printed and "new" in printed
    assert tuned["images_seen"] == 8
    first = checkpoint.load_checkpoint(checkpoint.newest_checkpoint(tmp_path / "first"))
    for name, weight in tuned["discriminator"].items():
        if name.endswith(("layers.0.0.bias", "layers.0.bias")):
            assert torch.equal(weight, first["discriminator"][name]), name
        elif "to_logits.weight" in name:
            assert not torch.equal(weight, first["discriminator"][name]), name
    # The same command again continues.
    run("second", *more, "trainer.max_iterations=3", init_from=tmp_path / "first")
    printed = capsys.readouterr().out
    assert "continuing from" in printed and "note: --init_from " in printed
    # A published generator.
    Model.load(checkpoint.newest_checkpoint(tmp_path / "first"), for_inference=False).publish(
        tmp_path / "g.safetensors"
    )
    run("third", *more, init_from=tmp_path / "g.safetensors")
    printed = capsys.readouterr().out
    assert "generator: " in printed and "(of the EMA)" in printed and "discriminator: fresh" in printed
    with pytest.raises(CheckpointError, match="num_filters"):
        run("fourth", *more, "gen.num_filters=3", init_from=tmp_path / "first")
    with pytest.raises(CheckpointError, match="no checkpoint is there"):
        run("fourth", *more, init_from=tmp_path)
