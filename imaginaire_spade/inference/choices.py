"""Remember what was measured on this machine, so that all runs on it choose alike, and make the same images.

The answers are ratios in one small JSON file, by processor and version of torch: ``IMAGINAIRE_SPADE_CHOICES`` (empty:
nothing is measured), else ``imaginaire_spade/choices.json`` in the user's cache folder. They are not kept apart by the
number of threads: K processes of one thread choose as one process of K threads does.
"""

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from imaginaire_spade.files import write_json


def remembered(question: str, measure: Callable[[], float]) -> float | None:
    """Return the answer to ``question`` of this machine; the first process that asks measures it, others wait.

    Returns:
        A positive number; None if it could not be remembered: another run might measure another one.
    """
    path = _file()
    if path is None:
        return None
    try:
        if (found := _read(path).get(_machine(), {}).get(question)) is not None:
            return found
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock"), timeout=60):
            known = _read(path)
            answers = known.setdefault(_machine(), {})
            if question not in answers:
                answers[question] = round(measure(), 3)
                write_json(path, known)
            return answers[question]
    except (OSError, NotImplementedError):  # no place to write, or one without locks
        return None


def _file() -> Path | None:
    if (given := os.environ.get("IMAGINAIRE_SPADE_CHOICES")) is not None:
        return Path(given) if given else None
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "imaginaire_spade", "choices.json")
    except RuntimeError:  # no home
        return None


def _read(path: Path) -> dict[str, dict[str, float]]:
    """Read what is known; a file that is damaged says nothing."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    machines = content if isinstance(content, dict) else {}
    return {
        machine: {name: ratio for name, ratio in answers.items() if isinstance(ratio, float) and 0 < ratio < 1e6}
        for machine, answers in machines.items()
        if isinstance(answers, dict)
    }


@cache
def _machine() -> str:
    """Name the processor (a virtual machine may hide its model, but not what it can do) and torch."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        first = ""
    facts = dict(re.findall(r"^(.+?)\s*: (.*)$", first, re.MULTILINE))
    kinds = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU implementer", "CPU part", "Features")
    digest = hashlib.sha256("\n".join(facts.get(kind, "") for kind in kinds).encode()).hexdigest()[:8]
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({digest}), torch {torch.__version__}"
