"""Name the command lines as the user calls them: ``imaginaire-spade COMMAND``, or the repository's scripts."""

import re
import sys
from pathlib import Path

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

_SCRIPTS = {module.rpartition(".")[2]: command for command, (module, _) in COMMANDS.items()}
_SCRIPT = re.compile(
    r"(?<![\w/.-])(torchrun(?: -\S+)* |python )?"
    rf"(?:(?:scripts/)?({'|'.join(_SCRIPTS)})\.py\b|-m imaginaire_spade\.demo\b)"
)


_HAS_SCRIPTS = (Path(__file__).parents[1] / "scripts/build_lmdb.py").is_file()
"""Whether the repository lies around the package; it does not around an installed one."""


def as_called(text: str) -> str:
    """Name commands in ``text`` as the user calls them.

    ``python scripts/build_lmdb.py`` becomes ``imaginaire-spade data build`` if that is how this process was started,
    or if there are no scripts.
    """
    if _HAS_SCRIPTS and not any(name.startswith("imaginaire-spade") for name in sys.argv[:1]):
        return text

    def name(found: re.Match[str]) -> str:
        launcher, script = found.groups(default="")
        by = f"{launcher}-m imaginaire_spade" if launcher.startswith("torchrun") else "imaginaire-spade"
        return f"{by} {_SCRIPTS[script or '__main__']}"

    return _SCRIPT.sub(name, text)
