#!/usr/bin/env python
"""The script of ``imaginaire-spade data edges``. Its code is imaginaire_spade/commands/make_edge_maps.py."""

from imaginaire_spade.commands import run

if __name__ == "__main__":
    run("commands.make_edge_maps")
