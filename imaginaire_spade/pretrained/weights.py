"""Find files of pretrained weights, read them without running what is in them, and say which they are."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from imaginaire_spade.errors import ConfigError

RANDOM = "random:"
"""Start of the name of an untrained network: ``random:SEED``."""
UNTRAINED = "random:0 in place of FILE tries everything out with an untrained network, whose scores mean nothing"


@dataclass(frozen=True)
class PublishedWeights:
    """Which weights a network has, and where their file comes from."""

    network: str
    url: str
    """Of the file, whose name it ends with."""
    without: str
    """What to write to do without the file."""
    other_name: str = ""
    """Under which another package keeps the same file."""

    def find(self, given: str | None, setting: str) -> Path:
        """Return the file ``given``, or the one in torch's cache.

        Args:
            setting: what to write on the command line or in a config, ending with FILE, for the message.
        Raises:
            ConfigError: no such file; the message says where to put which file.
        """
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        cached = [cache / name for name in (self.url.rpartition("/")[2], self.other_name) if name]
        places = [Path(given).expanduser()] if given else cached
        if found := [place for place in places if place.is_file()]:
            return found[0]
        raise ConfigError(
            f"{setting.removesuffix('FILE').rstrip(': ')}: no weights at {' or '.join(map(str, places))}. Nothing is"
            f" downloaded by itself: fetch {self.url} and put it at {cached[0]}, or write {setting}. ({self.without})"
        )

    def read(self, path: Path) -> dict[str, Tensor]:
        """Read the tensors in a file, without running what is in it.

        Raises:
            ConfigError: it holds anything else.
        """
        try:
            is_safetensors = path.suffix == ".safetensors"
            state = load_file(path) if is_safetensors else torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise self.unfit(path, error) from None
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise self.unfit(path, "no state dict of tensors")
        return state

    def load(self, path: Path, network: nn.Module, name_of: Callable[[str], str]) -> None:
        """Give ``network`` the weights of a file.

        Args:
            network: may be on torch's meta device.
            name_of: name of a tensor of ``network`` -> its name in the file, which may hold more.
        Raises:
            ConfigError: the file holds other weights.
        """
        state = self.read(path)
        try:
            network.load_state_dict({key: state[name_of(key)].float() for key in network.state_dict()}, assign=True)
        except (KeyError, RuntimeError) as error:
            raise self.unfit(path, error) from None

    def unfit(self, path: Path, reason: object) -> ConfigError:
        """Return the error for a file of anything but these weights."""
        text = str(reason).strip().partition("\n")[0]
        return ConfigError(f"{path}: not the weights of {self.network} ({text}). Get them from {self.url}")


def network_sha256(network: nn.Module) -> str:
    """Compute the sha256 of a network's tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def random_seed(weights: str | None, setting: str) -> int | None:
    """Return SEED of ``random:SEED``; None for any other ``weights``.

    Raises:
        ConfigError: SEED is no whole number.
    """
    if weights is None or not weights.startswith(RANDOM):
        return None
    seed = weights.removeprefix(RANDOM)
    if not seed.isdecimal():
        raise ConfigError(f"{setting.replace('FILE', weights)}: write random: and a seed, such as random:0")
    return int(seed)
