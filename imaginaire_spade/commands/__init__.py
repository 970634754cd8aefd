"""The command lines, one file each: ``imaginaire-spade COMMAND``. ``train.py``, ``inference.py``, ``evaluate.py`` and
``scripts/`` call them too."""

import importlib
import os
import sys

from imaginaire_spade.errors import ConfigError, run_command_line
from imaginaire_spade.version import __version__

COMMANDS = {
    "train": ("commands.train", "train a generator (torchrun -m imaginaire_spade.train: in several processes)"),
    "infer": ("commands.inference", "generate the images of label maps"),
    "evaluate": ("commands.evaluate", "score generated images"),
    "paint": ("demo.__main__", "paint label maps in a browser and see the images"),
    "data sample": ("commands.make_sample_data", "draw the sample data set"),
    "data prepare": ("commands.prepare_dataset", "turn a download or an annotation tool's export into folders"),
    "data label": ("commands.label_images", "label photos that have no label maps"),
    "data edges": ("commands.make_edge_maps", "draw edge maps"),
    "data distances": ("commands.make_distance_maps", "write the distance maps of CLADE-ICPE"),
    "data build": ("commands.build_lmdb", "build an LMDB data set from folders"),
    "data inspect": ("commands.inspect_lmdb", "show what a data set holds, verify it, draw its legend"),
    "import checkpoint": ("commands.import_checkpoint", "turn another system's checkpoint into one of ours"),
    "import config": ("commands.import_config", "turn another system's config into one of ours"),
    "export generator": ("commands.export_generator", "write the generator as one .safetensors file to publish"),
    "export onnx": ("commands.export_onnx", "write the generator for onnxruntime or torch.export"),
    "export checkpoint": ("commands.export_checkpoint", "write a checkpoint under another system's names"),
    "export schema": ("commands.export_schema", "write the JSON schema of configs, for editors"),
    "contact-sheet": ("commands.make_contact_sheet", "draw label maps, real and generated images side by side"),
    "fid-stats": ("commands.compute_fid_stats", "compute feature statistics once, for many evaluations"),
}
"""Command -> its module in this package, which has ``main``, and what it does."""


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
