"""imaginaire_spade: label maps to photos.

Importing the package registers its components, so that ``load_config`` knows them.
"""

from imaginaire_spade import losses as _losses  # noqa: F401
from imaginaire_spade.models import discriminator as _discriminator  # noqa: F401
from imaginaire_spade.models import encoder as _encoder  # noqa: F401
from imaginaire_spade.models import fpse as _fpse  # noqa: F401
from imaginaire_spade.models import generator as _generator  # noqa: F401
from imaginaire_spade.models import norms as _norms  # noqa: F401
from imaginaire_spade.models import pix2pixhd as _pix2pixhd  # noqa: F401
from imaginaire_spade.models import style_generator as _style_generator  # noqa: F401

from imaginaire_spade.build import build_discriminator, build_encoder, build_generator  # isort: skip
from imaginaire_spade.config import RunConfig, load_config
from imaginaire_spade.inference.synthesizer import Synthesizer
from imaginaire_spade.layout import LayoutSpec, SemanticLayout

__version__ = "0.1.0"
__all__ = [
    "LayoutSpec",
    "RunConfig",
    "SemanticLayout",
    "Synthesizer",
    "build_discriminator",
    "build_encoder",
    "build_generator",
    "load_config",
]
