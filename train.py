"""The script of ``imaginaire-spade train``. Its code is imaginaire_spade/commands/train.py."""

from imaginaire_spade.commands import run

if __name__ == "__main__":
    run("commands.train")
