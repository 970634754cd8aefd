#!/usr/bin/env python
"""The script of ``imaginaire-spade fid-stats``. Its code is imaginaire_spade/commands/compute_fid_stats.py."""

from imaginaire_spade.commands import run

if __name__ == "__main__":
    run("commands.compute_fid_stats")
