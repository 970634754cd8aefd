#!/usr/bin/env python
"""The script of ``imaginaire-spade export checkpoint``. Its code is imaginaire_spade/commands/export_checkpoint.py."""

from imaginaire_spade.commands import run

if __name__ == "__main__":
    run("commands.export_checkpoint")
