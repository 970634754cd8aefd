#!/usr/bin/env python
"""The script of ``imaginaire-spade data sample``. Its code is imaginaire_spade/commands/make_sample_data.py."""

from imaginaire_spade.commands import run

if __name__ == "__main__":
    run("commands.make_sample_data")
