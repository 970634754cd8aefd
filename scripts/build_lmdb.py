#!/usr/bin/env python
"""The script of ``imaginaire-spade data build``. Its code is imaginaire_spade/commands/build_lmdb.py."""

from imaginaire_spade.commands import run

if __name__ == "__main__":
    run("commands.build_lmdb")
