"""What several command lines share: the parser; flags, each of one spelling, help text and parsed name; checks."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imaginaire_spade.command_names import as_called
from imaginaire_spade.errors import ConfigError

SOURCES = ("nvlabs_spade", "clade", "imaginaire", "oasis")
"""The systems whose checkpoints and configs are read (a class each in ``interop/systems.py``)."""

SHARED: dict[tuple[str, ...], dict[str, Any]] = {
    ("--set",): {
        "action": "append", "default": [], "dest": "overrides", "metavar": "KEY=VALUE",
        "help": "override a config key (repeat)",
    },
    ("--import",): {
        "action": "append", "default": [], "dest": "imports", "metavar": "MODULE",
        "help": "import your module, which registers your components (repeat)",
    },
    ("--weights",): {
        "choices": ("ema", "raw"), "default": "ema", "help": "ema (default); raw: non-averaged weights"
    },
    ("--device",): {"choices": ("auto", "cpu", "cuda", "mps"), "default": "auto"},
    ("--local-rank", "--local_rank"): {"type": int, "help": argparse.SUPPRESS},  # older launchers pass it
}  # fmt: skip


class CommandParser(argparse.ArgumentParser):
    """A parser with the module's docstring as description, printed as it is.

    A command line imports what it works with after it has parsed: ``--help`` then takes no seconds for torch.
    """

    def __init__(self, description: str | None, prog: str | None = None) -> None:
        super().__init__(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def format_help(self) -> str:
        """Format the help, with commands named as the user calls them."""
        return as_called(super().format_help())


def add_shared_flags(parser: argparse._ActionsContainer, *flags: str, **changes: Any) -> None:
    """Add flags of ``SHARED``, named by their first spelling, to a parser or to a group of one.

    Args:
        changes: what differs in this command line, as ``add_argument`` takes it.
    """
    for flag in flags:
        spellings = next(spellings for spellings in SHARED if spellings[0] == flag)
        parser.add_argument(*spellings, **SHARED[spellings] | changes)


def check_output_file(output: Path, *, overwrite: bool, suffixes: Sequence[str] = (), flag: str = "--output") -> None:
    """Check, before any work, that ``--output`` names a file that may be written.

    Args:
        suffixes: how the name may end; none: any way.
    Raises:
        ConfigError: the name is wrong, a folder's, in a file, or taken while ``overwrite`` is False.
    """
    if suffixes and output.suffix not in suffixes:
        raise ConfigError(f"{flag} {output}: write a name that ends in {' or '.join(suffixes)}")
    if output.is_dir():
        raise ConfigError(f"{flag} {output} is a folder: give the name of a file")
    above = next(path for path in output.absolute().parents if path.exists())
    if not above.is_dir():
        raise ConfigError(f"{flag} {output}: {above} is no place for a file: give another name")
    if output.exists() and not overwrite:
        raise ConfigError(f"{flag} {output} is there already: give another name, or --overwrite to replace it")
