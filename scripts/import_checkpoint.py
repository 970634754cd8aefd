#!/usr/bin/env python
"""The script of ``imaginaire-spade import checkpoint``. Its code is imaginaire_spade/commands/import_checkpoint.py."""

from imaginaire_spade.commands import run

if __name__ == "__main__":
    run("commands.import_checkpoint")
