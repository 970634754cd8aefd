"""The command lines, one file each. ``train.py``, ``inference.py``, ``evaluate.py`` and ``scripts/`` call them."""

import importlib
import os

from imaginaire_spade.errors import run_command_line


def run(name: str) -> None:
    """Run the ``main`` of ``imaginaire_spade.commands.NAME``. torchrun's report names the error of a process."""

    def main() -> None:
        importlib.import_module(f"{__name__}.{name}").main()

    if "TORCHELASTIC_RUN_ID" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        return record(run_command_line)(main)
    return run_command_line(main)
