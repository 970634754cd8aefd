"""The script of ``imaginaire-spade evaluate``. Its code is imaginaire_spade/commands/evaluate.py."""

from imaginaire_spade.commands import run

if __name__ == "__main__":
    run("commands.evaluate")
