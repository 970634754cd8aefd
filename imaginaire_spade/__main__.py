"""``python -m imaginaire_spade COMMAND``, also under torchrun: the command ``imaginaire-spade``."""

from imaginaire_spade.commands import main

if __name__ == "__main__":
    main()
