"""Flags that several command lines share: each has one spelling, one help text and one name in what is parsed."""

from __future__ import annotations

import argparse
from typing import Any

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
    ("--device",): {"choices": ("auto", "cpu", "cuda"), "default": "auto"},
    ("--local-rank", "--local_rank"): {"type": int, "help": argparse.SUPPRESS},  # older launchers pass it
}  # fmt: skip


def add_shared_flags(parser: argparse._ActionsContainer, *flags: str, **changes: Any) -> None:
    """Add flags of ``SHARED``, named by their first spelling, to a parser or to a group of one.

    Args:
        changes: what differs in this command line, as ``add_argument`` takes it.
    """
    for flag in flags:
        spellings = next(spellings for spellings in SHARED if spellings[0] == flag)
        parser.add_argument(*spellings, **SHARED[spellings] | changes)
