#!/usr/bin/env python
"""The script of ``imaginaire-spade data distances``. Its code is imaginaire_spade/commands/make_distance_maps.py."""

from imaginaire_spade.commands import run

if __name__ == "__main__":
    run("commands.make_distance_maps")
