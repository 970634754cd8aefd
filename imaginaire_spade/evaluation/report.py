"""Write a report as one JSON file: scores, their evaluation protocol, and warnings for the reader."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from imaginaire_spade.errors import DataError, UserError
from imaginaire_spade.evaluation.protocol import Protocol, differences
from imaginaire_spade.files import read_json, write_bytes

HIGHER_IS_BETTER = ("precision", "recall", "diversity", "accuracy", "miou", "iou")
"""A score whose name contains one of these; all others are distances."""


@dataclass(frozen=True)
class Report:
    """What an evaluation found."""

    scores: Mapping[str, float]
    protocol: Protocol
    subject: Mapping[str, str]
    """What was evaluated: folders, checkpoint, images seen. No part of the protocol."""
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    """Images that were left out (--skip_bad), one message each."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """More than single numbers (scores per class); plain JSON types."""
    examples: Mapping[int, str] = field(default_factory=dict)
    """Class -> key of the sample that has most of it, for the report page; not saved."""

    def save(self, path: Path) -> None:
        """Write JSON.

        Raises:
            UserError: the file cannot be written.
        """
        tree = asdict(self)
        del tree["examples"]
        write_bytes(path, (json.dumps(tree, indent=2) + "\n").encode())

    def text(self) -> str:
        """Return lines for the screen: the stamp, then the scores, then the warnings."""
        lines = ["protocol", *(f"  {line}" for line in self.protocol.lines())]
        lines += ["evaluated", *(f"  {name}: {value}" for name, value in self.subject.items())]
        lines += ["scores", *(f"  {name}: {value:.6g}" for name, value in self.scores.items())]
        lines += [f"left out: {problem}" for problem in self.problems]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def load_report(path: Path) -> Report:
    """Read what ``save`` wrote.

    Raises:
        DataError: the file is no report.
    """
    tree = read_json(path)
    names = ("scores", "protocol", "subject", "warnings", "problems", "details")
    if not isinstance(tree, dict) or set(tree) != set(names):
        raise DataError(f"{path}: not a report of evaluate.py (expected {', '.join(names)})")
    scores, protocol = tree["scores"], tree["protocol"]
    numbers = isinstance(scores, dict) and all(isinstance(value, int | float) for value in scores.values())
    if not numbers or not isinstance(protocol, dict):
        raise DataError(f"{path}: not a report of evaluate.py: its scores are no numbers, or it has no protocol")
    stamp = Protocol.from_json(protocol, str(path))
    return Report(scores, stamp, tree["subject"], tuple(tree["warnings"]), tuple(tree["problems"]), tree["details"])


def compare(paths: tuple[Path, Path]) -> str:
    """Set the scores of two reports side by side.

    Raises:
        UserError: they were not obtained under one protocol, saying what differs; or they share no score.
    """
    a, b = (load_report(path) for path in paths)
    if different := differences(a.protocol, b.protocol):
        raise UserError(
            f"{paths[0]} and {paths[1]} were not obtained under one protocol; their scores cannot be compared:\n  "
            + "\n  ".join(different)
        )
    common = [name for name in a.scores if name in b.scores]
    if not common:
        raise UserError(f"{paths[0]} and {paths[1]} have no score in common")
    rows = [("", str(paths[0]), str(paths[1]), "")]
    for name in common:
        first, second = a.scores[name], b.scores[name]
        rows.append((name, f"{first:.6g}", f"{second:.6g}", _verdict(name, first, second)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def higher_is_better(name: str) -> bool:
    """Tell whether a larger value of a score is the better one."""
    return any(word in name for word in HIGHER_IS_BETTER)


def _verdict(name: str, first: float, second: float) -> str:
    if name.endswith("_std") or math.isclose(first, second, rel_tol=1e-9):
        return ""
    return f"the {'first' if (first > second) == higher_is_better(name) else 'second'} is better"
