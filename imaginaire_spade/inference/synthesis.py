"""Generate images from label maps, in memory.

Owns the way of a label map through the generator: batches of mixed sizes, padding and cropping, and what a lack of
memory or damaged weights look like.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from imaginaire_spade.build import layout_spec
from imaginaire_spade.data.batch import denormalise
from imaginaire_spade.data.distances import class_distances
from imaginaire_spade.errors import UserError
from imaginaire_spade.inference.weights import LoadedModel
from imaginaire_spade.layout import SemanticLayout
from imaginaire_spade.pictures import Picture, resized
from imaginaire_spade.training.step import AUTOCAST

BATCHES_HELD = 8
"""Label maps waiting for others of their size: at most this many batches."""


@dataclass(frozen=True)
class Request:
    """One picture to make."""

    name: str
    labels: Tensor
    """uint8 or int16 [H, W], train ids."""
    edges: Tensor | None = None
    """uint8 [H, W] of 0/1."""
    z: Tensor | None = None
    """float [style_dims]."""
    distances: Tensor | None = None
    """float32 [2, H, W]; computed where the generator needs them and they are not given."""
    resize_to: tuple[int, int] | None = None
    """(height, width) to which the picture is resized; None: it is of the label map's."""


def padded_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """The smallest (height, width) at or above that ``multiple`` divides."""
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def synthesise(model: LoadedModel, requests: Iterable[Request], batch_size: int = 1) -> Iterator[tuple[str, Picture]]:
    """Generate images: yield (name, RGB uint8 [H, W, 3] of the label map's size or ``resize_to``) in arbitrary order.

    Requests are taken lazily and wait for others of their padded size, at most ``BATCHES_HELD`` batches of them.

    Raises:
        UserError: the device's memory does not do, or the network's values are not finite.
    """
    # The next batch is launched before the last one is fetched, so that a GPU does not wait for the host.
    launched: tuple[list[Request], Tensor] | None = None
    for batch in batches_of_one_size(requests, model.size_multiple, batch_size):
        previous, launched = launched, (batch, _forward(model, batch))
        if previous is not None:
            yield from _fetched(*previous)
    if launched is not None:
        yield from _fetched(*launched)


def batches_of_one_size(requests: Iterable[Request], multiple: int, batch_size: int) -> Iterator[list[Request]]:
    """Group requests of one padded size into batches of up to ``batch_size``."""
    waiting: dict[tuple[int, int], list[Request]] = {}
    for request in requests:
        height, width = request.labels.shape
        group = waiting.setdefault(padded_size(height, width, multiple), [])
        group.append(request)
        if len(group) == batch_size:
            del waiting[padded_size(height, width, multiple)]
            yield group
        elif sum(map(len, waiting.values())) >= BATCHES_HELD * batch_size:
            yield waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
    yield from waiting.values()


def _padded_size_of(request: Request, model: LoadedModel) -> tuple[int, int]:
    return padded_size(request.labels.shape[0], request.labels.shape[1], model.size_multiple)


def padded_layout(model: LoadedModel, requests: Sequence[Request]) -> SemanticLayout:
    """Requests of one padded size as a layout, filled up with don't-care (no edges) at the bottom and on the right."""
    spec = layout_spec(model.config)
    height, width = _padded_size_of(requests[0], model)

    def stacked(maps: Sequence[Tensor], fill: int) -> Tensor:
        return torch.stack([F.pad(m, (0, width - m.shape[-1], 0, height - m.shape[-2]), value=fill) for m in maps])

    edges = [request.edges for request in requests if request.edges is not None]
    labels = stacked([request.labels for request in requests], spec.num_classes)
    distances = None
    if spec.has_distances:  # of the label map itself, not of its padding
        distances = stacked([_distances(request) for request in requests], 0)
    return SemanticLayout(spec, labels, stacked(edges, 0) if edges else None, distances)


def _distances(request: Request) -> Tensor:
    if request.distances is not None:
        return request.distances
    return torch.from_numpy(class_distances(request.labels.numpy()))


@torch.inference_mode()
def _forward(model: LoadedModel, requests: Sequence[Request]) -> Tensor:
    """The generator's output for requests of one padded size: float [N, 3, H, W] on the device, padding included."""
    step = 1 if model.one_by_one else len(requests)
    dtype = AUTOCAST[model.precision]
    try:
        images = []
        for start in range(0, len(requests), step):
            part = requests[start : start + step]
            codes = [request.z for request in part if request.z is not None]
            z = torch.stack(codes).to(model.device) if codes else None
            layout = padded_layout(model, part).to(model.device)
            with torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
                images.append(model.generator(layout, z))
        return torch.cat(images)
    except torch.OutOfMemoryError:
        pass
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = str(error).partition("\n")[0]
            raise UserError(f"--compile: torch cannot compile this generator here ({reason}); leave it out") from error
        if "can't allocate memory" not in str(error):
            raise
    height, width = _padded_size_of(requests[0], model)
    raise UserError(
        f"{requests[0].name}: not enough memory on {model.device} for {step} image(s) of {height}x{width} at once."
        f" {'Write a smaller --batch_size' if step > 1 else 'Make the label map smaller, or use a machine with more'}"
    )


def _fetched(requests: Sequence[Request], images: Tensor) -> Iterator[tuple[str, Picture]]:
    finite = images.isfinite().flatten(1).all(1).cpu()
    pictures = denormalise(images).permute(0, 2, 3, 1).cpu().numpy()
    for request, picture, is_finite in zip(requests, pictures, finite.tolist(), strict=True):
        if not is_finite:
            raise UserError(
                f"{request.name}: the generator's output is not finite. The weights are damaged, or training had"
                " diverged: try an earlier checkpoint, or --weights raw"
            )
        height, width = request.labels.shape
        yield request.name, resized(picture[:height, :width], *(request.resize_to or (height, width)))
