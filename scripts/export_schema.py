#!/usr/bin/env python
"""The script of ``imaginaire-spade export schema``. Its code is imaginaire_spade/commands/export_schema.py."""

from imaginaire_spade.commands import run

if __name__ == "__main__":
    run("commands.export_schema")
