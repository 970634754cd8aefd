"""Pass what a run logs on to trackers (``trainer.trackers``): TensorBoard, Weights & Biases, MLflow, Trackio.

Each is a few lines on its library. Rank 0 alone has them. None can hold up or end a run: each works on a thread of its
own, and one that fails costs a warning. Steps are images seen. ``run_log.py`` decides what is logged.
"""

from __future__ import annotations

import importlib
import json
import queue
import re
import secrets
import shlex
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.build import build_component
from imaginaire_spade.config import RunConfig
from imaginaire_spade.config_files import dump_config, dump_yaml
from imaginaire_spade.errors import ConfigError, first_line, how_to_install
from imaginaire_spade.files import write_bytes
from imaginaire_spade.registry import TRACKERS
from imaginaire_spade.training.setup import Run
from imaginaire_spade.version import __version__

IDS = "trackers.json"
"""Of the log dir: what each tracker calls this run."""
WAITING = 200
"""Records that may wait for a tracker; with more of them it counts as one that does not answer."""
CLOSING_S = {"finished": 30.0, "stopped": 5.0, "failed": 2.0}
"""How long a tracker may take for its last records; a run that is asked to stop has half a minute in all."""

Status = Literal["finished", "stopped", "failed"]
"""Of a launch; a run that was stopped may go on."""


class Tracker:
    """Base of trackers. Methods are called in turn; after an error that is none of ``outlasts``, none is.

    A registered class is made with the run, its log dir and the ``run_id`` that it had in an earlier launch, if any;
    its keyword-only parameters are its keys in YAML. What it raises then, refuses the run.
    """

    package: ClassVar[str]
    outlasts: ClassVar[tuple[type[Exception], ...]] = ()
    run_id: str | None = None
    """What it calls this run."""

    @classmethod
    def check(cls) -> None:
        """Raise ConfigError, before any work, if it cannot be used here."""
        with how_to_install(cls.package, f"trainer.trackers: {cls.package} is not installed", ", or leave it out"):
            if importlib.import_module(cls.package).__spec__.origin is None:  # type: ignore[union-attr]
                raise ImportError(f"the folder {cls.package} is no package")

    def log(self, images_seen: int, values: Mapping[str, Any]) -> None:
        """Take one record: numbers by name, such as ``loss/gan``."""

    def log_image(self, images_seen: int, sheet: NDArray[np.uint8]) -> None:
        """Take a preview sheet, uint8 RGB [H, W, 3]."""

    def log_text(self, images_seen: int, text: str) -> None:
        """Take a warning."""

    def close(self, status: Status) -> None:
        """Take the end of this launch."""


@TRACKERS.register("tensorboard")
class TensorBoard(Tracker):
    """Files in the log dir, for `tensorboard --logdir LOGDIR`."""

    package = "tensorboard"
    outlasts = (OSError,)  # a disk that was full: the next record begins another file

    def __init__(self, run: Run, logdir: Path, run_id: str | None) -> None:
        self._run, self._logdir, self._step = run, logdir, run.state.images_seen
        self._events: Any = None
        self._library = importlib.import_module("torch.utils.tensorboard")

    def log(self, images_seen: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self._write("add_scalar", name, value, images_seen)
        self._write("flush")
        self._step = images_seen

    def log_image(self, images_seen: int, sheet: NDArray[np.uint8]) -> None:
        self._write("add_image", "preview", sheet, images_seen, dataformats="HWC")

    def log_text(self, images_seen: int, text: str) -> None:
        self._write("add_text", "warnings", text, images_seen)

    def close(self, status: Status) -> None:
        if self._events is not None:
            if status == "finished":
                self._events.file_writer.add_summary(self._library.summary.hparams({}, {})[2])
            self._write("close")

    def _write(self, method: str, *arguments: Any, **more: Any) -> None:
        try:
            if self._events is None:
                self._begin()
            getattr(self._events, method)(*arguments, **more)
        except OSError:
            self._events = None
            raise

    def _begin(self) -> None:
        self._events = self._library.SummaryWriter(str(self._logdir), purge_step=self._step + 1)
        for name, text in texts(self._run).items():
            self._events.add_text(name, textwrap.indent(text, "    "), self._step)  # in Markdown: as it is
        # The page of hyper-parameters: no list of metrics, so that each run's row has all its last scalars.
        self._events.file_writer.add_summary(self._library.summary.hparams(hyperparameters(self._run), {})[1])


@TRACKERS.register("trackio")
class Trackio(Tracker):
    """Trackio, in the user's cache, for `trackio show`; with TRACKIO_SPACE_ID in a Hugging Face Space.

    Args:
        project: name of the project.
    """

    package = "trackio"

    def __init__(self, run: Run, logdir: Path, run_id: str | None, *, project: str = "imaginaire_spade") -> None:
        library, name = importlib.import_module(self.package), logdir.resolve().name
        self.run_id = run_id or f"{re.sub('[^A-Za-z0-9_-]', '-', name)[:40]}-{secrets.token_hex(3)}"
        self._image, options = library.Image, self._options(name, logdir)
        self._run = library.init(project=project, config=hyperparameters(run), resume="allow", **options)

    def _options(self, name: str, logdir: Path) -> dict[str, Any]:
        return {"name": self.run_id, "embed": False}

    def log(self, images_seen: int, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values), step=images_seen)

    def log_image(self, images_seen: int, sheet: NDArray[np.uint8]) -> None:
        self.log(images_seen, {"preview": self._image(sheet)})

    def close(self, status: Status) -> None:
        self._run.finish()


@TRACKERS.register("wandb")
class WeightsAndBiases(Trackio):
    """Weights & Biases, after `wandb login`; with WANDB_MODE=offline into LOGDIR/wandb, for `wandb sync`.

    Args:
        project: name of the project.
    """

    package = "wandb"

    def _options(self, name: str, logdir: Path) -> dict[str, Any]:
        return {"id": self.run_id, "name": name, "dir": logdir}

    @classmethod
    def check(cls) -> None:
        super().check()
        wandb = importlib.import_module(cls.package)
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
            raise ConfigError(
                "trainer.trackers: wandb is not logged in: run `wandb login`, set WANDB_API_KEY or WANDB_MODE=offline,"
                " or leave it out"
            )


@TRACKERS.register("mlflow")
class MLflow(Tracker):
    """MLflow, at MLFLOW_TRACKING_URI; without one in a database in the working directory, for `mlflow ui`.

    Args:
        project: name of the experiment.
    """

    package = "mlflow"

    def __init__(self, run: Run, logdir: Path, run_id: str | None, *, project: str = "imaginaire_spade") -> None:
        mlflow = importlib.import_module(self.package)
        self._client, self._metric = mlflow.MlflowClient(), mlflow.entities.Metric
        if run_id is None:
            known = self._client.get_experiment_by_name(project)
            experiment = self._client.create_experiment(project) if known is None else known.experiment_id
            run_id = self._client.create_run(experiment, run_name=logdir.resolve().name).info.run_id
            for key, value in hyperparameters(run).items():
                self._client.log_param(run_id, key, value)
        self.run_id = run_id
        self._client.update_run(run_id, status="RUNNING")
        for name, text in texts(run).items():
            self._client.log_text(run_id, text, f"{name}.txt")

    def log(self, images_seen: int, values: Mapping[str, Any]) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, images_seen) for name, value in values.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def log_image(self, images_seen: int, sheet: NDArray[np.uint8]) -> None:
        self._client.log_image(self.run_id, sheet, key="preview", step=images_seen)

    def close(self, status: Status) -> None:
        states = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
        self._client.set_terminated(self.run_id, states[status])


def texts(run: Run) -> dict[str, str]:
    """Return what trackers keep as text: config, command line and version."""
    return {"config": dump_yaml(run.config), "command": shlex.join(sys.argv), "version": __version__}


def hyperparameters(run: Run) -> dict[str, bool | int | float | str]:
    """Return the config as dotted keys, without the label table; lists become text."""
    flat: dict[str, bool | int | float | str] = {"global_batch": run.calendar.global_batch}

    def add(tree: Mapping[str, Any], prefix: str) -> None:
        for name, value in tree.items():
            if isinstance(value, dict) and name != "labels":
                add(value, f"{prefix}{name}.")
            elif not isinstance(value, dict):
                flat[prefix + name] = value if isinstance(value, bool | int | float | str) else json.dumps(value)

    add(dump_config(run.config), "")
    return flat


class Following:
    """Call a tracker's methods on a thread of its own.

    Args:
        say: prints a line of the log.
    """

    def __init__(self, name: str, tracker: Tracker, say: Callable[[str], None]) -> None:
        self._name, self._tracker, self._say, self._given_up = name, tracker, say, False
        self._calls: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def send(self, method: str, *arguments: Any) -> None:
        """Have a method called, soon."""
        try:
            self._calls.put_nowait((method, arguments))
        except queue.Full:
            self._give_up("it does not answer")

    def close(self, status: Status) -> None:
        """End it. After a while it is not waited for."""
        self.send("close", status)
        self._thread.join(CLOSING_S[status])
        if self._thread.is_alive():
            self._give_up("it did not take the last records in time")

    def _give_up(self, why: str) -> None:
        if not self._given_up:
            self._given_up = True
            self._say(f"warning: trainer.trackers: {self._name} gets nothing more from this launch: {why}")

    def _work(self) -> None:
        method = ""
        while method != "close":
            method, arguments = self._calls.get()
            try:
                if not self._given_up:
                    getattr(self._tracker, method)(*arguments)
            except self._tracker.outlasts as error:
                self._say(f"warning: trainer.trackers: {self._name} has a gap here: {error}")
            except Exception as error:
                self._give_up(f"{type(error).__name__}: {first_line(error)}")


def check_trackers(config: RunConfig) -> None:
    """Raise ConfigError, before any work, if one of the run's trackers cannot be used here."""
    for component in config.trainer.trackers:
        TRACKERS[component.type].check()  # type: ignore[attr-defined]


def open_trackers(run: Run, logdir: Path, say: Callable[[str], None]) -> list[Following]:
    """Open the trackers of a run. One that goes on does so without those that cannot be opened.

    Raises:
        ConfigError: one cannot be opened.
    """
    ids: dict[str, str | None] = {}
    with suppress(OSError, ValueError):
        ids = json.loads((logdir / IDS).read_text(encoding="utf-8"))
    found = []
    for component in run.config.trainer.trackers:
        name = component.type
        try:
            tracker = build_component(TRACKERS, component, run, logdir, ids.get(name))
        except Exception as error:
            why = f"trainer.trackers: {name}: {first_line(error)}"
            if not run.state.images_seen:
                raise ConfigError(f"{why}. Mend that, or leave it out") from error
            say(f"warning: {why}; this launch goes on without it")
            continue
        ids[name] = tracker.run_id
        found.append(Following(name, tracker, say))
    if any(ids.values()):
        write_bytes(logdir / IDS, json.dumps(ids).encode())
    return found
