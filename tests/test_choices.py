"""Choices that depend on the machine: measured once, remembered, the same in all runs."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from imaginaire_spade.inference import choices
from imaginaire_spade.inference.choices import remembered
from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.models import for_inference, timing
from imaginaire_spade.models.for_inference import WinogradConv2d, optimise_for_inference
from imaginaire_spade.models.generator import SPADEGenerator
from imaginaire_spade.models.layers import initialise
from imaginaire_spade.models.products import HAS_ONEDNN


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "cache" / "choices.json"
    monkeypatch.setenv("IMAGINAIRE_SPADE_CHOICES", str(path))
    return path


def never() -> float:
    raise AssertionError("measured again")


def test_an_answer_is_measured_once(file):
    assert remembered("a", lambda: 1.23456) == 1.235
    assert remembered("a", never) == 1.235
    assert remembered("b", lambda: 0.5) == 0.5
    ((machine, answers),) = json.loads(file.read_text()).items()
    assert answers == {"a": 1.235, "b": 0.5} and machine.endswith(f"torch {torch.__version__}")


def test_processors_and_versions_are_kept_apart(file, monkeypatch):
    remembered("a", lambda: 1.5)
    monkeypatch.setattr(choices, "_machine", lambda: "another")
    assert remembered("a", lambda: 0.5) == 0.5
    assert [answers["a"] for answers in json.loads(file.read_text()).values()] == [1.5, 0.5]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"MACHINE": 3}', '{"MACHINE": {"a": "2"}}', '{"MACHINE": {"a": -1.0}}', "\xff\xfe"]
)
def test_a_damaged_file_is_measured_and_written_anew(content, file):
    file.parent.mkdir()
    file.write_bytes(content.replace("MACHINE", choices._machine()).encode("latin-1"))
    assert remembered("a", lambda: 1.5) == 1.5
    assert remembered("a", never) == 1.5


@pytest.mark.parametrize("place", ["", "/dev/null/choices.json"])
def test_what_cannot_be_remembered_is_not_measured(place, monkeypatch):
    monkeypatch.setenv("IMAGINAIRE_SPADE_CHOICES", place)
    assert remembered("a", never) is None


def test_the_file_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("IMAGINAIRE_SPADE_CHOICES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choices._file() == tmp_path / "imaginaire_spade" / "choices.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choices._file() == tmp_path / ".cache" / "imaginaire_spade" / "choices.json"


def test_processes_that_ask_at_once_get_one_answer(file, commands):
    """Each would measure another number, its own process's."""
    script = file.parents[1] / "ask.py"
    script.write_text(
        "import os, time\nfrom imaginaire_spade.inference.choices import remembered\n"
        "print(remembered('a', lambda: (time.sleep(0.2), float(os.getpid()))[1]))\n"
    )
    asking = [commands.start(script, IMAGINAIRE_SPADE_CHOICES=str(file)) for _ in range(3)]
    assert [process.wait() for process in asking] == [0, 0, 0]
    assert len({process.stdout.read_text() for process in asking}) == 1


def answering(products: float, winograd: float) -> for_inference.Ask:
    return lambda question, measure: winograd if question.startswith("Winograd") else products


@pytest.mark.parametrize(
    ("channels", "gain", "chosen"),
    [
        ((256, 256), None, True), ((256, 256), 1.0, True), ((256, 256), 0.97, True), ((256, 256), 0.9, False),
        ((128, 256), None, False), ((128, 256), 1.03, False), ((128, 256), 1.1, True), ((64, 256), 9.0, False),
    ],
)  # fmt: skip
def test_the_rule_is_left_only_for_what_is_clearly_faster(channels, gain, chosen):
    conv = nn.Conv2d(*channels, 3, padding=1)
    layer = WinogradConv2d.if_faster(conv, ask=lambda question, measure: gain)
    assert isinstance(layer, WinogradConv2d) == chosen and (chosen or layer is conv)


def test_measuring_compares_the_two_ways_and_leaves_no_trace(monkeypatch):
    """By a clock of our own: the second way takes half of the first one's time."""
    ticks = iter([0, 0, 8, 10, 14, 20, 26, 30, 33, 40, 47, 50, 55, 60])
    monkeypatch.setattr(timing.time, "process_time", lambda: float(next(ticks)))
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    conv = nn.Conv2d(128, 128, 3, padding=1)
    asked = {}
    WinogradConv2d.if_faster(conv, ask=lambda question, measure: asked.setdefault(question, measure()))
    assert asked == {"Winograd, 128 to 128 channels": pytest.approx(2.0)}
    assert torch.get_num_threads() == threads
    torch.set_rng_state(state)


def test_pictures_do_not_depend_on_what_was_chosen(one_thread):
    if not HAS_ONEDNN:
        pytest.skip("a torch without oneDNN")
    spec = LayoutSpec(5, has_dont_care=True)
    torch.manual_seed(0)
    generator = SPADEGenerator(spec, (64, 64), num_filters=16, norm=for_inference.SPADE)
    initialise(generator, "xavier", 1.0)
    for norm in filter(lambda module: isinstance(module, for_inference.SPADE), generator.modules()):
        norm.path = "table"
    layout = SemanticLayout(spec, torch.randint(0, 6, (1, 8, 8)).repeat_interleave(8, 1).repeat_interleave(8, 2).byte())
    made = {}
    for products in (0.5, 2.0):
        for winograd in (0.5, 2.0):
            network = optimise_for_inference(copy.deepcopy(generator), winograd=True, ask=answering(products, winograd))
            layers = [module for module in network.modules() if isinstance(module, WinogradConv2d)]
            norms = [module for module in network.modules() if isinstance(module, for_inference.SPADE)]
            assert bool(layers) == (winograd > 1)
            assert {m.choices.onednn for m in layers + norms} == {products > 1}
            with torch.inference_mode():
                made[products, winograd] = network(layout)
    for image in made.values():
        torch.testing.assert_close(image, made[0.5, 0.5], rtol=0, atol=1e-6)


def test_tests_go_by_the_rule():
    assert os.environ["IMAGINAIRE_SPADE_CHOICES"] == "" and not Path("choices.json").exists()
