#!/usr/bin/env python
"""The script of ``imaginaire-spade data inspect``. Its code is imaginaire_spade/commands/inspect_lmdb.py."""

from imaginaire_spade.commands import run

if __name__ == "__main__":
    run("commands.inspect_lmdb")
