"""The command lines, one file each: ``imaginaire-spade COMMAND``. ``train.py``, ``inference.py``, ``evaluate.py`` and
``scripts/`` call them too."""

import importlib
import os
import sys

from imaginaire_spade.command_names import COMMANDS
from imaginaire_spade.errors import ConfigError, run_command_line
from imaginaire_spade.version import __version__


def main() -> None:
    """Run ``imaginaire-spade COMMAND ...``."""
    words = sys.argv[1:]
    if words[:1] == ["--version"]:
        return print(f"imaginaire-spade {__version__}")
    command = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in COMMANDS), None)
    if command is not None:
        sys.argv = [f"imaginaire-spade {command}", *words[command.count(" ") + 1 :]]
        return run(COMMANDS[command][0])
    group = {name: told for name, (_, told) in COMMANDS.items() if name.startswith(f"{words[0]} ")} if words else {}
    if not words or words[0] in ("-h", "--help") or (group and words[1:] in ([], ["-h"], ["--help"])):
        return print(_overview(group))
    return run_command_line(_refuse)


def run(module: str) -> None:
    """Run the ``main`` of ``imaginaire_spade.MODULE``. torchrun's report names the error of a process."""
    from imaginaire_spade.processes import spin_briefly

    spin_briefly()

    def call() -> None:
        importlib.import_module(f"imaginaire_spade.{module}").main()

    if "TORCHELASTIC_RUN_ID" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        return record(run_command_line)(call)
    return run_command_line(call)


def _overview(group: dict[str, str]) -> str:
    rows = group or {name: told for name, (_, told) in COMMANDS.items()}
    lines = [f"  {name:<19} {told}" for name, told in rows.items()]
    head = "usage: imaginaire-spade COMMAND ...   (COMMAND --help: its options; --version)"
    return "\n".join([head, "", *lines])


def _refuse() -> None:
    from imaginaire_spade.registry import did_you_mean  # (pydantic takes a second)

    is_group = any(name.startswith(f"{sys.argv[1]} ") for name in COMMANDS)
    given = " ".join(sys.argv[1 : 2 + is_group])
    hint = did_you_mean(given, COMMANDS) or "."
    raise ConfigError(f"imaginaire-spade {given}: no such command{hint} There are: {', '.join(COMMANDS)}")
