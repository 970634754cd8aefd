"""The script of ``imaginaire-spade infer``. Its code is imaginaire_spade/commands/inference.py."""

from imaginaire_spade.commands import run

if __name__ == "__main__":
    run("commands.inference")
