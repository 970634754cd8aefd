"""Command lines without the seconds that importing torch takes: run in forks of one process that has imported it.

``python fork_server.py FD`` is that process. It never computes anything, so that its forks start with nothing but
imported modules. Each is a process like any other, with arguments, environment, output, signals and exit code of its
own. torchrun starts its workers in the same way with ``--run_path --start_method=fork``.
"""

from __future__ import annotations

import atexit
import importlib
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--run_path", "--start_method=fork", "--monitor_interval=0.1")
IMPORTED = (
    "imaginaire_spade.inference.folder", "imaginaire_spade.training.loop", "imaginaire_spade.training.profile",
    "matplotlib.backends.backend_agg", "matplotlib.figure", "torch._dynamo", "torch.distributed.run",
)  # fmt: skip
"""What the command lines import, and what torch and matplotlib import at their first use."""


class Forked:
    """A running command; the part of ``subprocess.Popen`` that tests need. Both outputs go to files."""

    def __init__(self, server: ForkServer, pid: int, stdout: Path, stderr: Path) -> None:
        self.server, self.pid, self.stdout, self.stderr = server, pid, stdout, stderr

    def poll(self) -> int | None:
        self.server.listen()
        return self.server.ended.get(self.pid)

    def wait(self, timeout: float = 240) -> int:
        give_up_at = time.monotonic() + timeout
        while (code := self.poll()) is None:
            assert time.monotonic() < give_up_at, f"still running:\n{self.stdout.read_text()}{self.stderr.read_text()}"
            time.sleep(0.01)
        return code

    def output(self) -> str:
        """Both outputs, once it is over."""
        self.wait()
        return self.stdout.read_text() + self.stderr.read_text()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


class ForkServer:
    """Starts commands as forks. A context: in the end nothing that it started is left."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ended, self._count = folder, {}, 0
        self._pids: list[int] = []

    def __enter__(self) -> ForkServer:
        ours, theirs = os.pipe(), os.pipe()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs[0]), str(ours[1])],
            pass_fds=(theirs[0], ours[1]), env=environment, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(theirs[0])
        os.close(ours[1])
        self._events, self._requests = Connection(ours[0], writable=False), Connection(theirs[1], readable=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.listen()
        for pid in self._pids:
            if pid not in self.ended:
                os.killpg(pid, signal.SIGKILL)
        self._requests.close()
        self._process.wait()
        self._events.close()

    def start(self, *arguments: str | Path, cwd: Path = REPOSITORY, **environment: str) -> Forked:
        """``python ARGUMENTS`` with these variables beside those of the server.

        NO_CURVES=1: no picture of curves, which takes longer to draw than a small run does.
        """
        self._count += 1
        stdout, stderr = (self.folder / f"{self._count}.{name}" for name in ("out", "err"))
        self._requests.send((list(map(str, arguments)), str(cwd), environment, str(stdout), str(stderr)))
        started = self._next_event()
        while not isinstance(started, int):
            self._note(started)
            started = self._next_event()
        self._pids.append(started)
        return Forked(self, started, stdout, stderr)

    def run(self, *arguments: str | Path, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess:
        process = self.start(*arguments, cwd=cwd, **environment)
        code = process.wait()
        return subprocess.CompletedProcess(arguments, code, process.stdout.read_text(), process.stderr.read_text())

    def listen(self) -> None:
        while self._events.poll():
            self._note(self._events.recv())

    def _next_event(self) -> object:
        assert self._events.poll(120), "the fork server does not answer"
        return self._events.recv()

    def _note(self, event: tuple[int, int]) -> None:
        pid, code = event
        self.ended[pid] = code


def serve(requests: Connection, events: Connection) -> list[str]:
    """Fork for each request; in the fork, return its arguments. Tells of every start (pid) and end (pid, code)."""
    while True:
        try:
            request = requests.recv() if requests.poll(0.01) else None
        except EOFError:
            os._exit(0)
        while running := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG) if has_children() else None:
            code = running.si_status if running.si_code == os.CLD_EXITED else -running.si_status
            events.send((running.si_pid, code))
        if request is None:
            continue
        arguments, cwd, environment, stdout, stderr = request
        pid = os.fork()
        if pid:
            events.send(pid)
            continue
        os.setsid()
        requests.close()
        events.close()
        for path, number in ((stdout, 1), (stderr, 2)):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, number)
            os.close(descriptor)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite run in the background has it ignored
        os.chdir(cwd)
        os.environ.update(environment)
        sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
        if environment.get("NO_CURVES"):
            importlib.import_module("imaginaire_spade.training.run_log").write_curves = lambda *_: None
        return arguments


def has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def run(arguments: list[str]) -> int:
    """Run ``python ARGUMENTS`` here; the exit code."""
    try:
        if arguments[0] == "-m":
            sys.modules.pop(arguments[1], None)
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def leave(code: int) -> None:
    """As the interpreter does, but for taking its modules apart, which takes longer than many a test."""
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    for module in IMPORTED:
        importlib.import_module(module)
    numbers = [int(text) for text in sys.argv[1:]]
    leave(run(serve(Connection(numbers[0], writable=False), Connection(numbers[1], readable=False))))
