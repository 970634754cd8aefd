#!/usr/bin/env python
"""The script of ``imaginaire-spade import config``. Its code is imaginaire_spade/commands/import_config.py."""

from imaginaire_spade.commands import run

if __name__ == "__main__":
    run("commands.import_config")
