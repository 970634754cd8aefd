"""Changed files of every kind: one short message or a right answer, in little memory and time, and nothing besides.

``pytest -m slow tests/fuzz`` tries 15,000, with other seeds: FUZZ_SEED=N. ``pytest tests/fuzz -k report`` one kind.
"""

import os

import pytest
import torch

from .data_kinds import KINDS as KINDS_OF_DATA
from .fuzzer import GOOD, fuzz
from .kinds import KINDS as KINDS_OF_FILES

KINDS = KINDS_OF_FILES | KINDS_OF_DATA

SHORT = 2
"""Inputs of each kind in the short form."""
LONG = -(-15_000 // len(KINDS))


@pytest.fixture(autouse=True)
def little_and_one_thread(one_thread):
    """Forked processes share no threads."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("count", [SHORT, pytest.param(LONG, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_changed_files_are_refused_or_understood(kind, count, tmp_path):
    assert torch.get_num_threads() == 1
    start = int(os.environ.get("FUZZ_SEED", "0")) * 1_000_000
    counts, faults = fuzz(kind, tmp_path / "files", range(start, start + count), checked=KINDS[kind])
    print(kind.__name__, dict(counts))
    assert not faults, f"{dict(counts)}\n" + "\n".join(faults[:5])
    assert sum(counts.values()) == count and sum(counts[good] for good in GOOD) == count
