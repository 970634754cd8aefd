#!/usr/bin/env python
"""The script of ``imaginaire-spade contact-sheet``. Its code is imaginaire_spade/commands/make_contact_sheet.py."""

from imaginaire_spade.commands import run

if __name__ == "__main__":
    run("commands.make_contact_sheet")
