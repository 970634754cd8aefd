"""``torchrun -m imaginaire_spade.train``: the command line of ``train.py``."""

import sys

from imaginaire_spade.commands import run
from imaginaire_spade.commands.train import train

if __name__ == "__main__":
    run("commands.train")
else:  # Python's ``imaginaire_spade.train`` is the function, also for who imports this module.
    sys.modules[__name__] = train  # type: ignore[assignment]
