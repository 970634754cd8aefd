# ruff: noqa: F811 (the fixture tiny_run is imported)
"""What a run does when something is taken away from it: signals, processes, disks, memory, finite numbers."""

import os
import signal

import pytest
from test_training import assert_same, tiny_run  # noqa: F401

from imaginaire_spade.training import loop

SMALL = ("gen.num_filters=1", "trainer.image_rows=0", "trainer.model_average.batch_norm_images=4")


@pytest.fixture
def before_step(monkeypatch):
    """Makes ``action(run)`` happen before every iteration."""

    def patch(action):
        step = loop.Run.step

        def stepped(run, batch):
            action(run)
            return step(run, batch)

        monkeypatch.setattr(loop.Run, "step", stepped)

    return patch


def test_signals_save_and_leave_and_nothing_is_lost(tiny_run, before_step, capsys):
    _, run = tiny_run
    straight = run("straight", *SMALL, "trainer.max_iterations=4")
    exits = [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)]
    due = {4 * iteration: number for iteration, (number, _) in enumerate(exits)}
    before_step(lambda made: os.kill(os.getpid(), due.pop(made.state.images_seen, 0)))
    for iteration, (number, code) in enumerate(exits, start=1):
        with pytest.raises(SystemExit) as leaving:
            run("broken", *SMALL, "trainer.max_iterations=4")
        assert leaving.value.code == code
        printed = capsys.readouterr().out
        assert f"leaving on {number.name}; the same command continues from iteration {iteration}" in printed
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert_same(run("broken", *SMALL, "trainer.max_iterations=4"), straight)
