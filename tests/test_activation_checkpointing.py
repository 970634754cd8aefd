# ruff: noqa: F811 (the fixture tiny_run is imported)
"""Activation checkpointing: the same numbers, less memory, every side effect once."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_layout import random_layout
from test_training import assert_same, tiny_run  # noqa: F401
from torch.autograd.graph import saved_tensors_hooks

from imaginaire_spade.errors import ConfigError
from imaginaire_spade.layout import LayoutSpec
from imaginaire_spade.models.generator import Generator
from imaginaire_spade.registry import GENERATORS, NORMS
from imaginaire_spade.training.step import checkpoint_activations

SPEC = LayoutSpec(5, has_edges=True)


def small(name: str, norm: str) -> tuple[Generator, LayoutSpec]:
    spec = replace(SPEC, has_distances=NORMS[norm].needs_distances)
    options = {"num_filters": 2}
    if name != "pix2pixhd":
        options["norm"] = NORMS[norm] if norm != "spade" else partial(NORMS[norm], hidden_channels=8)
    return GENERATORS[name](spec, (64, 64), **options), spec


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        *((name, "spade") for name in GENERATORS.names()),
        *(("spade", norm) for norm in NORMS.names() if norm != "spade"),
    ],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_and_buffers_are_the_same_and_less_is_kept(name, norm, autocast):
    torch.manual_seed(0)
    plain, spec = small(name, norm)
    plain.train()
    checkpointed = copy.deepcopy(plain)
    checkpoint_activations(checkpointed)
    layout = random_layout(spec, 2, 64, 64)
    z = torch.randn(2, plain.style_dims) if plain.style_dims else None
    kept = []
    for generator in (plain, checkpointed):
        for _ in range(2):
            sizes = []

            def note(tensor, sizes=sizes):
                sizes.append(tensor.nbytes)
                return tensor

            with saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, autocast):
                images = generator(layout, z)
            images.square().mean().backward()
        kept.append(sum(sizes))
    assert kept[1] < 0.6 * kept[0]
    for (key, ours), theirs in zip(checkpointed.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key
    for (key, ours), theirs in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), key


@pytest.mark.parametrize("overrides", [(), ("trainer.iteration=reference", "trainer.precision=bf16")])
def test_a_run_is_the_same(tiny_run, overrides):
    _, run = tiny_run
    settings = ("trainer.max_iterations=2", "trainer.gradient_accumulation=2", *overrides)
    assert_same(run("checkpointed", *settings, "trainer.activation_checkpointing=true"), run("plain", *settings))


def test_a_generator_without_known_blocks_is_refused():
    class Other(Generator):
        pass

    with pytest.raises(ConfigError, match=r"trainer\.activation_checkpointing: this generator has no block"):
        checkpoint_activations(Other())
