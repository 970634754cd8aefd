"""Change files at random and see what becomes of them, each in a process of its own with limits of memory and time.

A kind of file is a function in ``kinds.py`` or ``data_kinds.py``: ``kind(folder)`` writes a sound file, or several, and
returns the path or the paths, and a function that uses them as a command line would, and returns what it understood.
"""

from __future__ import annotations

import gc
import os
import random
import re
import resource
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imaginaire_spade.errors import UserError

Use = Callable[[], Any]
LIMIT_S = 30
LIMIT_BYTES = 3 << 30
"""More than the process has at the start."""
MOST_BYTES = 1536 << 20
"""More than at the start, at the peak: what is more counts as a fault."""
GOOD = ("refused", "same", "accepted")
OUTCOMES = (*GOOD, "traceback", "other data", "long message", "hang", "killed", "memory", "file outside")

TOKENS = (
    "0", "-1", "1e400", "NaN", "Infinity", "9" * 400, "null", "true", "[]", "{}", '""', "[[[[", "}", '"', "\\u0000",
    "x", "1" * 5000, "../../x", "/", "*a", "&a [*a]", "!!int x", "2024-13-45", "'", ":", ",", "\t", "\ud800", "\u202e",
    "2e9", "-0.0", "4294967296", "{a: b}", "[1, 2, 3]", "~", "<<", "base",
)  # fmt: skip


def change(content: bytes, rng: random.Random, *, only_cut: bool = False) -> bytes:
    """Return the bytes of a file, changed in one to three places; or cut off, often near its end."""
    if only_cut:
        return content[: -rng.randrange(1, 40)] if rng.random() < 0.5 else _cut(content, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = rng.choice(CHANGES)(content, rng)
    return content


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content or b"\0")
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _splice(content: bytes, rng: random.Random) -> bytes:
    start, end, place = sorted(rng.randrange(len(content) + 1) for _ in range(3))
    return content[:place] + content[start : min(end, start + 4096)] * rng.choice((1, 1, 2, 50)) + content[place:]


def _leave_out(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    return content[:start] + content[start + rng.choice((1, 2, 4, 16, 256)) :]


def _overwrite(content: bytes, rng: random.Random) -> bytes:
    value = rng.choice((b"\0" * 4, b"\xff" * 4, b"\xff" * 8, b"\x7f\xff\xff\xff", rng.randbytes(8), b"\0" * 64))
    start = rng.randrange(len(content) + 1)
    return content[:start] + value + content[start + len(value) :]


def _token(content: bytes, rng: random.Random) -> bytes:
    words = [match.span() for match in re.finditer(rb"[\w.+-]+", content[:100_000])]
    start, end = rng.choice(words) if words else (0, 0)
    return content[:start] + rng.choice(TOKENS).encode(errors="surrogatepass") + content[end:]


def _swap(content: bytes, rng: random.Random) -> bytes:
    words = [match.span() for match in re.finditer(rb"[\w.+-]+", content[:100_000])]
    if len(words) < 2:
        return content
    (a, b), (c, d) = sorted(rng.sample(words, 2))
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


CHANGES = (_flip, _cut, _splice, _leave_out, _overwrite, _token, _token, _token, _swap)


def outcome_of(use: Use, folder: Path, sound: Any = None) -> tuple[str, str]:
    """Use a file in a process of its own; return which of ``OUTCOMES`` it was, and what was said.

    Args:
        folder: where that process may write.
        sound: what ``use`` returns of the file as it was, if a changed file must be refused or give the same; None:
            other values are as good.
    """
    before = _names(folder.parent)
    log = folder / ".said"
    started_with = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if not (child := os.fork()):
        _in_child(use, folder, log, sound)
    _, status, usage = os.wait4(child, 0)
    said = log.read_text(errors="replace") if log.exists() else ""
    log.unlink(missing_ok=True)
    if os.WIFSIGNALED(status):
        return ("hang" if os.WTERMSIG(status) == signal.SIGALRM else "killed"), f"signal {os.WTERMSIG(status)}"
    outcome = OUTCOMES[os.WEXITSTATUS(status)]
    if outcome in GOOD and (usage.ru_maxrss - started_with) << 10 > MOST_BYTES:
        return "memory", f"{usage.ru_maxrss - started_with} KiB"
    if outside := _names(folder.parent) - before:
        return "file outside", f"{sorted(outside)}"
    return outcome, said


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _in_child(use: Use, folder: Path, log: Path, sound: Any) -> None:
    outcome, said = "traceback", ""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LIMIT_S)
        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (used + LIMIT_BYTES, used + LIMIT_BYTES))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os.chdir(folder)
        given = use()
        outcome = "accepted" if sound is None else "same" if given == sound else "other data"
        said = repr(given)
    except UserError as error:
        said = str(error)
        is_short = 0 < len(said) < 3000 and said.count("\n") <= 60
        outcome = "refused" if is_short else "long message"
    except SystemExit as error:
        outcome, said = ("refused" if error.code == 2 else "traceback"), repr(error)
    except BaseException:
        said = "".join(traceback.format_exc()[-3000:])
    finally:
        log.write_text(said, errors="replace")
        os._exit(OUTCOMES.index(outcome))


def fuzz(
    kind: Callable[[Path], tuple[Path | list[Path], Use]], folder: Path, seeds: range, *, checked: bool | str
) -> tuple[Counter[str], list[str]]:
    """Change a file of a kind once for every seed. Return how often each outcome was, and a line for each fault.

    Args:
        checked: whether a changed file must be refused, or be understood as before; text: files are cut off, and must.
    """
    folder.mkdir()
    paths, use = kind(folder)
    paths = paths if isinstance(paths, list) else [paths]
    contents, sound = [path.read_bytes() for path in paths], use()
    assert outcome_of(use, folder, sound)[0] == "same", outcome_of(use, folder, sound)
    counts, faults = Counter[str](), []
    gc.freeze()  # children do not walk through all that is imported
    for seed in seeds:
        rng = random.Random(f"{kind.__name__} {seed}")
        path, content = rng.choice(list(zip(paths, contents, strict=True)))
        path.write_bytes(change(content, rng, only_cut=isinstance(checked, str)))
        outcome, said = outcome_of(use, folder, sound if checked else None)
        path.write_bytes(content)
        counts[outcome] += 1
        if outcome not in GOOD:
            faults.append(f"{kind.__name__}, seed {seed}, {path.name}: {outcome}: {said[-1500:]}")
            print(faults[-1], file=sys.stderr)
    gc.unfreeze()
    return counts, faults
