"""imaginaire_spade: label maps to photos.

The names below are loaded when they are first asked for, so that importing one small module stays cheap.
"""

import importlib
from typing import TYPE_CHECKING, Any

from imaginaire_spade.version import __version__ as __version__

if TYPE_CHECKING:
    from imaginaire_spade.build import build_discriminator as build_discriminator
    from imaginaire_spade.build import build_encoder as build_encoder
    from imaginaire_spade.build import build_generator as build_generator
    from imaginaire_spade.commands.train import train as train
    from imaginaire_spade.config import RunConfig as RunConfig
    from imaginaire_spade.config_files import load_config as load_config
    from imaginaire_spade.inference.synthesizer import Synthesizer as Synthesizer
    from imaginaire_spade.layout import LayoutSpec as LayoutSpec
    from imaginaire_spade.layout import SemanticLayout as SemanticLayout

_MODULES = {
    "LayoutSpec": "layout",
    "RunConfig": "config",
    "SemanticLayout": "layout",
    "Synthesizer": "inference.synthesizer",
    "build_discriminator": "build",
    "build_encoder": "build",
    "build_generator": "build",
    "load_config": "config_files",
    "train": "commands.train",
}
"""Name -> the module that has it."""

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
