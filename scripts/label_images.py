#!/usr/bin/env python
"""The script of ``imaginaire-spade data label``. Its code is imaginaire_spade/commands/label_images.py."""

from imaginaire_spade.commands import run

if __name__ == "__main__":
    run("commands.label_images")
