#!/usr/bin/env python
"""The script of ``imaginaire-spade data prepare``. Its code is imaginaire_spade/commands/prepare_dataset.py."""

from imaginaire_spade.commands import run

if __name__ == "__main__":
    run("commands.prepare_dataset")
