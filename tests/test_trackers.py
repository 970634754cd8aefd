# ruff: noqa: F811 (the fixture tiny_run is imported)
"""Trackers: what they get, that they can neither hold up nor end a run, and what is refused before it starts."""

import json
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups
from test_training import assert_same, tiny_run  # noqa: F401 (a fixture)

from imaginaire_spade.build import build_losses
from imaginaire_spade.config_files import load_config
from imaginaire_spade.distributed import ProcessInfo
from imaginaire_spade.errors import ConfigError
from imaginaire_spade.registry import TRACKERS
from imaginaire_spade.training import loop, trackers
from imaginaire_spade.training.setup import prepare

OPENED, CALLS = [], []
"""What happened to the trackers of these tests."""


class Recorder(trackers.Tracker):
    package = "json"
    trouble = staticmethod(lambda method: None)

    def __init__(self, run, logdir, run_id, *, project: str = "p"):
        self.trouble("open")
        self.run_id = run_id or f"run {len(OPENED)}"
        OPENED.append((project, self.run_id, run_id is not None))

    def note(self, method, *arguments):
        self.trouble(method)
        CALLS.append((method, *arguments))

    def log(self, images_seen, values):
        self.note("log", images_seen, sorted(values))

    def log_image(self, images_seen, sheet):
        self.note("image", images_seen, sheet.shape[2])

    def close(self, status):
        self.note("close", status)


@pytest.fixture
def recorder(monkeypatch):
    """Its class; ``trouble`` is called with the name of each method."""
    monkeypatch.setitem(TRACKERS._known(), "recorder", Recorder)  # for the time of a test: config.md lists the others
    OPENED.clear()
    CALLS.clear()

    def cause(trouble):
        monkeypatch.setattr(Recorder, "trouble", staticmethod(trouble))

    return cause


WITH = "trainer.trackers=[{type: recorder, project: streets}]"
SHORT = ("trainer.max_iterations=2", "trainer.log_every=1", "trainer.image_rows=1")


def test_a_tracker_gets_what_is_logged_and_goes_on_in_the_same_run(tiny_run, tmp_path, recorder):
    _, run = tiny_run
    straight = run("straight")
    run("log", WITH, stop_after=3)
    assert [call[:2] for call in CALLS] == [
        ("image", 0), ("log", 8), ("log", 12), ("image", 12), ("close", "finished")
    ]  # fmt: skip
    assert CALLS[0][2] == 3 and {"loss/gan", "lr/gen", "epoch"} <= set(CALLS[1][2])
    assert_same(run("log", WITH), straight)
    assert OPENED == [("streets", "run 0", False), ("streets", "run 0", True)]
    assert not list((tmp_path / "log").glob("events.*"))  # it was not asked for
    run("log", WITH)
    assert len(OPENED) == 2  # there was nothing to do


def test_the_other_ranks_have_no_trackers(tiny_run, tmp_path, recorder):
    path, _ = tiny_run
    config = load_config(path, [WITH, "trainer.max_iterations=1"])
    run = prepare(config, build_losses(config), ProcessInfo(rank=1, world_size=2), torch.device("cpu"))
    loop.train(run, tmp_path / "log", None)
    assert run.state.images_seen == 8 and not OPENED


@pytest.mark.parametrize("method", ["log", "image", "close"])
def test_a_tracker_that_fails_costs_one_warning(tiny_run, tmp_path, recorder, capsys, method):
    def fail(name):
        if name == method:
            raise ConnectionError("the server is gone\nsecond line")

    recorder(fail)
    _, run = tiny_run
    assert run("log", WITH, *SHORT)["images_seen"] == 8
    warning = (
        "warning: trainer.trackers: recorder gets nothing more from this launch: ConnectionError: the server is gone\n"
    )
    assert capsys.readouterr().out.count(warning) == 1
    assert (tmp_path / "log/train.log").read_text().count("recorder gets nothing more") == 1


def test_a_tracker_that_hangs_holds_nothing_up(tiny_run, recorder, capsys, monkeypatch):
    leave = threading.Event()
    recorder(lambda method: leave.wait(60) if method == "log" else None)
    monkeypatch.setitem(trackers.CLOSING_S, "finished", 0.1)
    _, run = tiny_run
    assert run("log", WITH, *SHORT)["images_seen"] == 8
    assert "recorder gets nothing more from this launch: it did not take the last records" in capsys.readouterr().out
    monkeypatch.setattr(trackers, "WAITING", 1)
    run("other", WITH, *SHORT)
    assert "recorder gets nothing more from this launch: it does not answer" in capsys.readouterr().out
    leave.set()


def test_a_tracker_that_cannot_be_opened_refuses_a_new_run_alone(tiny_run, tmp_path, recorder, capsys):
    _, run = tiny_run

    def fail(method):
        raise RuntimeError("no permission")

    recorder(fail)
    with pytest.raises(ConfigError, match=r"trainer\.trackers: recorder: no permission\. Mend that, or leave it out"):
        run("log", WITH, *SHORT)
    recorder(lambda method: None)
    run("log", WITH, *SHORT, stop_after=1)
    recorder(fail)
    assert run("log", WITH, *SHORT)["images_seen"] == 8
    assert "warning: trainer.trackers: recorder: no permission; this launch goes on without it" in (
        capsys.readouterr().out
    )
    assert json.loads((tmp_path / "log/trackers.json").read_text()) == {"recorder": "run 0"}


def test_what_cannot_work_is_refused_by_name(tiny_run, tmp_path, monkeypatch):
    path, _ = tiny_run

    def check(names):
        trackers.check_trackers(load_config(path, [f"trainer.trackers={names}"]))

    for name in ("wandb", "mlflow", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=rf"{name} is not installed .*pip install -U {name}, or leave it out"):
            check(f"[{name}]")
    settings = SimpleNamespace(mode="online")
    wandb = SimpleNamespace(
        __spec__=SimpleNamespace(origin="x"), setup=lambda: SimpleNamespace(settings=settings), login=lambda prompt: 0
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(ConfigError, match="wandb is not logged in: run `wandb login`"):
        check("[wandb]")
    settings.mode = "offline"
    check("[tensorboard, wandb]")
    (tmp_path / "wandb").mkdir()  # as wandb leaves it behind
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.syspath_prepend(tmp_path)
    if not getattr(__import__("wandb"), "__file__", None):
        with pytest.raises(ConfigError, match="wandb is not installed"):
            check("[wandb]")
    for names, message in (
        ("[wandbb]", "unknown tracker 'wandbb'; did you mean 'wandb'"), ("[wandb, wandb]", "state each one once"),
        ("[{type: wandb, projekt: a}]", "unknown key; did you mean 'project'"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            check(names)


def hparams_page(logdir):
    """The rows of TensorBoard's page: hyper-parameters, last scalars, status."""
    runs = EventMultiplexer().AddRunsFromDirectory(str(logdir))
    runs.Reload()
    context = backend_context.Context(TBContext(data_provider=MultiplexerDataProvider(runs, str(logdir))))
    asked = api_pb2.GetExperimentRequest(include_metrics=True)
    experiment = get_experiment.Handler(RequestContext(), context, "", asked).run()
    columns = [api_pb2.ColParams(metric=info.name, include_in_result=True) for info in experiment.metric_infos]
    columns += [api_pb2.ColParams(hparam=info.name, include_in_result=True) for info in experiment.hparam_infos]
    statuses = [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_RUNNING]
    asked = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=statuses, col_params=columns, slice_size=99, include_metrics=True,
        aggregation_type=api_pb2.AGGREGATION_AVG,
    )  # fmt: skip
    groups = list_session_groups.Handler(RequestContext(), context, "", asked).run().session_groups
    return [
        (
            {name: getattr(value, value.WhichOneof("kind")) for name, value in group.hparams.items()},
            {value.name.tag: value.value for value in group.metric_values},
            group.sessions[0].status,
        )
        for group in groups
    ]


def test_tensorboard_has_config_command_version_and_the_hparams_page(tiny_run, tmp_path, monkeypatch):
    _, run = tiny_run
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "my recipe.yaml"])
    run("logs/a", stop_after=3)
    run("logs/b", "gen_opt.lr=2e-3")
    run("logs/a")
    events = EventAccumulator(str(tmp_path / "logs/a")).Reload()
    for name, part in (
        ("command", b"train.py --config 'my recipe.yaml'"), ("version", b"0.1"), ("config", b"    max_iterations: 6"),
    ):  # fmt: skip
        texts = events.Tensors(f"{name}/text_summary")
        assert [text.step for text in texts] == [0, 12] and part in texts[-1].tensor_proto.string_val[0]
    assert [event.step for event in events.Scalars("loss/gan")] == [8, 12, 16, 24]
    rows = hparams_page(tmp_path / "logs")
    assert sorted(row[0]["gen_opt.lr"] for row in rows) == [1e-3, 2e-3]
    for hyperparameters, metrics, status in rows:
        assert hyperparameters["gen.norm.type"] == "spade" and hyperparameters["global_batch"] == 4
        assert not any(key.startswith("data.labels") for key in hyperparameters)
        assert {"loss/gan", "loss/feature_matching", "memory/peak_gib"} <= metrics.keys()
        assert status == api_pb2.STATUS_SUCCESS
    a = next(row for row in rows if row[0]["gen_opt.lr"] == 1e-3)
    assert a[1]["loss/gan"] == pytest.approx(events.Scalars("loss/gan")[-1].value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_the_real_libraries(tiny_run, tmp_path, monkeypatch, capsys, name):
    pytest.importorskip(name)
    for key, value in {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
                       "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    path, run = tiny_run
    trackers.check_trackers(load_config(path, [f"trainer.trackers=[{name}]"]))
    run("log", f"trainer.trackers=[{name}]", stop_after=3)
    first = json.loads((tmp_path / "log/trackers.json").read_text())
    run("log", f"trainer.trackers=[{name}]")
    assert json.loads((tmp_path / "log/trackers.json").read_text()) == first and first[name]
    assert "warning" not in capsys.readouterr().out
