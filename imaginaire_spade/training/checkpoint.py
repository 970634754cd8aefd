"""Write complete, self-describing checkpoints to disk and read them without running code.

A checkpoint is a dict of tensors and plain types: ``format``, ``version``, ``config`` (the fully resolved tree, label
table included), ``run`` (batch and data it was trained with, see ``setup.py``) and the fields of ``TrainState``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from imaginaire_spade.errors import CheckpointError, first_line
from imaginaire_spade.files import atomic_write, file_sha256, flush_folder
from imaginaire_spade.version import __version__

FORMAT = "imaginaire_spade.checkpoint.1"
PUBLISHED = "imaginaire_spade.generator.1"
"""The format of generators that ``inference/model.py`` publishes."""
BEST = "best.pt"


def checkpoints_in(directory: Path) -> list[Path]:
    """List the complete checkpoints of a folder, oldest first; none where there is no such folder.

    Raises:
        PermissionError: the folder may not be read, so what is in it is not known.
    """
    try:
        paths = list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(path for path in paths if re.fullmatch(r"checkpoint_\d{12}\.pt", path.name))


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the newest checkpoint of a log dir or of its ``checkpoints`` folder; None if there is none."""
    found = checkpoints_in(directory / "checkpoints") or checkpoints_in(directory)
    return found[-1] if found else None


class CheckpointWriter:
    """Write the checkpoints of a run into ``directory``, each in the background while training goes on.

    A context: leaving it waits for the last write. Only one process of a run may save.

    Args:
        keep_last: number of recent checkpoints to keep; older ones are deleted once a newer one is complete.
    Raises:
        CheckpointError: (from ``save``, ``check``, ``wait``) a write failed; older checkpoints are untouched.
    """

    def __init__(self, directory: Path, keep_last: int) -> None:
        self.directory, self.keep_last = directory, keep_last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._write: Future[None] | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def save(self, images_seen: int, content: dict[str, Any], keep: bool = False, best: bool = False) -> Path:
        """Copy ``content`` to the host's memory, then write it in the background as ``checkpoint_<images_seen>.pt``.

        Args:
            keep: also keep it permanently, in ``kept/``.
            best: also keep it as ``best.pt``, in place of the one before.
        """
        self.wait()
        path = self.directory / f"checkpoint_{images_seen:012d}.pt"
        names = [self.directory / "kept" / path.name] * keep + [self.directory / BEST] * best
        self._write = self._thread.submit(self._finish, path, _on_host(content), names)
        return path

    def check(self, wait: bool = False) -> None:
        """Raise the error of the last write if it has ended; wait until it has if ``wait``."""
        if self._write is not None and (wait or self._write.done()):
            write, self._write = self._write, None
            write.result()

    def wait(self) -> None:
        """Wait until the last write has ended; raise its error."""
        self.check(wait=True)

    def _finish(self, path: Path, content: dict[str, Any], names: Sequence[Path]) -> None:
        for leftover in self.directory.rglob(".*.tmp"):  # of a process that was killed while it wrote
            with suppress(OSError):
                leftover.unlink(missing_ok=True)
        write_checkpoint(path, content)
        for name in names:
            keep_as(path, name)
        for old in checkpoints_in(self.directory)[: -self.keep_last]:
            with suppress(OSError):  # it stays, and the next write tries again
                old.unlink(missing_ok=True)
                checksum_path(old).unlink(missing_ok=True)


def _on_host(tree: Any) -> Any:
    """Copy a tree of plain containers, with every tensor copied to the host's memory."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return type(tree)((key, _on_host(value)) for key, value in tree.items())
    if isinstance(tree, list | tuple):
        return type(tree)(_on_host(value) for value in tree)
    return tree


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint and its sha256, complete or not at all.

    Raises:
        CheckpointError: nothing was written; a file of that name stays as it was.
    """
    content = {"format": FORMAT, "version": __version__, **content}
    try:
        with _checksummed(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch hides it
        raise CheckpointError(
            f"{path}: could not be written ({cause}). Free some space or correct the permissions; earlier checkpoints"
            " are untouched and the same command continues from the newest"
        ) from None


def keep_as(path: Path, name: Path) -> None:
    """Keep a checkpoint under a second name too, which replaces what had that name: as a link, or as a copy if the file
    system has no links.

    Raises:
        CheckpointError: nothing was written.
    """
    try:
        with _checksummed(name, _stated_sha256(path)) as temporary:
            try:
                os.link(path, temporary)
            except OSError:
                shutil.copyfile(path, temporary)
    except OSError as error:
        raise CheckpointError(f"{name}: could not be written ({error}); {path} is complete") from None


@contextmanager
def _checksummed(path: Path, digest: str | None = None) -> Iterator[Path]:
    """Yield a temporary path. When the block ends, the file there is flushed and named ``path``, its sha256 beside it.

    Args:
        digest: the sha256, if it is known.
    """
    with atomic_write(path) as temporary:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # a full disk may show here alone, and must leave the old file with its sha256
        digest = digest or file_sha256(temporary)
        checksum_path(path).unlink(missing_ok=True)  # at no time does a sha256 stand beside another file's bytes
    temporary.unlink(missing_ok=True)  # it is still there if both were links to one file
    with atomic_write(checksum_path(path)) as temporary:
        temporary.write_text(f"{digest}  {path.name}\n")
    flush_folder(path.parent)


def checksum_path(path: Path) -> Path:
    """Return the file with the sha256 of a checkpoint, in the format of the command ``sha256sum``."""
    return path.with_name(f"{path.name}.sha256")


def _stated_sha256(path: Path) -> str | None:
    """Read the sha256 from the file beside a checkpoint; None if there is no such file."""
    beside = checksum_path(path)
    return (beside.read_text(errors="replace").split() or [""])[0] if beside.is_file() else None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours, onto the CPU, and check that it holds what it should.

    Raises:
        CheckpointError: it is absent, damaged, foreign, or holds other things.
        PermissionError: it may not be read.
    """
    return _with_checked_content(path, _read(path))


def _read(path: Path) -> dict[str, Any]:
    """Read a checkpoint file. Without a sha256 beside it, the checksums are compared that torch writes into it.

    Raises:
        CheckpointError: it is absent, damaged or foreign.
        PermissionError: it may not be read.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path}: a generator for inference only; training needs the checkpoint it was exported from"
        )
    try:
        stated = _stated_sha256(path)
        if stated is not None and stated != file_sha256(path):
            raise CheckpointError(
                f"{path}: cannot be read as a checkpoint, it is damaged: its sha256 is not the one in"
                f" {checksum_path(path).name}"
            )
        with zipfile.ZipFile(path) as records:
            if any(record.compress_type for record in records.infolist()):
                raise ValueError("its records are compressed, which torch does not write")
            if stated is None and (wrong := records.testzip()) is not None:
                raise ValueError(f"the checksum of {wrong} in it is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, CheckpointError | PermissionError):
            raise
        reason = first_line(error)
        raise CheckpointError(f"{path}: cannot be read as a checkpoint, it is damaged or foreign ({reason})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not a checkpoint of this package. One of another system is converted by"
            " scripts/import_checkpoint.py"
        )
    return content


def _with_checked_content(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    for name in ("config", "run", "evaluation"):
        if not isinstance(content.get(name), Mapping | None):
            raise CheckpointError(f"{path}: its {name} is a {type(content[name]).__name__}, not a mapping")
    if content.get("images_seen") is not None:
        check_counter(content["images_seen"], f"{path}: images_seen does not fit")
    return content


def published_sha256(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Compute the sha256 of a published generator: of its metadata (as JSON, sorted), and of the name and the bytes of
    each tensor, in the order of names. The metadata ``sha256`` is where it is kept, and left out."""
    stated = {key: value for key, value in metadata.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(stated, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_published(path: Path) -> dict[str, Any]:
    """Read a published generator as a checkpoint that holds the networks or their EMAs, whichever were published.

    Raises:
        CheckpointError: it is absent, damaged, or no published generator.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        if metadata.get("format") != PUBLISHED:
            raise CheckpointError(f"{path}: not written by scripts/export_generator.py, so it does not say what it is")
        config, images_seen = json.loads(metadata["config"]), int(metadata["images_seen"])
        if metadata.get("sha256") not in (None, published_sha256(tensors, metadata)):
            raise ValueError("its sha256 is not the one in its metadata")
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read as a published generator, it is damaged ({error})") from None
    check_counter(images_seen, f"{path}: images_seen does not fit")
    content: dict[str, Any] = {"format": PUBLISHED, "config": config, "images_seen": images_seen}
    content["sha256"] = metadata.get("sha256")
    suffix = "_ema" if metadata.get("weights") == "ema" else ""
    for name in ("generator", "encoder"):
        state = {key.removeprefix(f"{name}."): tensors[key] for key in tensors if key.startswith(f"{name}.")}
        content |= {name: None, f"{name}_ema": None} | ({f"{name}{suffix}": state} if state else {})
    return content


def check_tensors(stored: Mapping[str, Any], wanted: Mapping[str, torch.Tensor], where: str) -> None:
    """Compare the tensors to load with those they replace. Names that one of the two lacks are left to torch.

    Raises:
        CheckpointError: one is no tensor, or has another shape, dtype or layout; the message names the first few.
    """
    if not isinstance(stored, Mapping) or not all(isinstance(name, str) for name in stored):
        raise CheckpointError(f"{where}: it is no mapping of names to tensors, but a {type(stored).__name__}")
    wrong = [
        f"{name} is {_described(stored[name])}, not {_described(place)}"
        for name, place in wanted.items()
        if name in stored and _described(stored[name]) != _described(place)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{where}: {'; '.join(wrong[:3])}{more}")


def check_counter(value: Any, where: str) -> int:
    """Return ``value`` if it can be a number of images.

    Raises:
        CheckpointError: it cannot.
    """
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{where}: it is {value!r}, not a whole number from 0 on")
    return value


def _described(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    sparse = "" if value.layout == torch.strided else f" ({str(value.layout).removeprefix('torch.')})"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}{sparse}"


def load_newest(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """Read the newest valid checkpoint of a folder; print the name of each damaged one and take the one before."""
    for path in reversed(checkpoints_in(directory)):
        try:
            content = _read(path)
        except CheckpointError as error:
            print(f"warning: {error}; taking the one before", flush=True)
        else:
            return path, _with_checked_content(path, content)
    return None
