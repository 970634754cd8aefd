#!/usr/bin/env python
"""The script of ``imaginaire-spade export generator``. Its code is imaginaire_spade/commands/export_generator.py."""

from imaginaire_spade.commands import run

if __name__ == "__main__":
    run("commands.export_generator")
