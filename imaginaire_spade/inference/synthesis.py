"""Generate images from label maps, in memory.

Owns the way of a label map through the generator: batches of one size, padding and cropping, and the messages about too
little memory and damaged weights.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from imaginaire_spade.data.batch import denormalise
from imaginaire_spade.data.distances import class_distances
from imaginaire_spade.errors import UserError, is_out_of_memory
from imaginaire_spade.files import RgbImage, resize_image
from imaginaire_spade.inference.model import Model
from imaginaire_spade.layout import SemanticLayout
from imaginaire_spade.training.step import AUTOCAST

BATCHES_HELD = 8
"""Label maps waiting for others of their size: at most this many batches."""


@dataclass(frozen=True)
class Request:
    """One image to make."""

    name: str
    labels: Tensor
    """uint8 or int16 [H, W], train ids."""
    edges: Tensor | None = None
    """uint8 [H, W] of 0/1."""
    z: Tensor | None = None
    """float [style_dims]."""
    distances: Tensor | None = None
    """float32 [2, H, W]; computed if the generator needs them and they are not given."""
    resize_to: tuple[int, int] | None = None
    """(height, width) to which the image is resized; None: it keeps the label map's."""

    def padded_size(self, multiple: int) -> tuple[int, int]:
        """Return the smallest (height, width), at least the label map's, that ``multiple`` divides."""
        height, width = self.labels.shape
        return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def synthesise(model: Model, requests: Iterable[Request], batch_size: int = 1) -> Iterator[tuple[str, RgbImage]]:
    """Generate images: yield (name, RGB uint8 [H, W, 3] of the label map's size or ``resize_to``) in arbitrary order.

    Requests are taken lazily and wait for others of their padded size, at most ``BATCHES_HELD`` batches of them.

    Raises:
        UserError: the device has too little memory, or the network's output is not finite.
    """
    # The next batch is launched before the last one is fetched, so that a GPU does not wait for the host.
    launched: tuple[list[Request], Tensor] | None = None
    for batch in group_by_size(requests, model.generator.size_multiple, batch_size):
        previous, launched = launched, (batch, _forward(model, batch))
        if previous is not None:
            yield from _fetch(*previous)
    if launched is not None:
        yield from _fetch(*launched)


def group_by_size(requests: Iterable[Request], multiple: int, batch_size: int) -> Iterator[list[Request]]:
    """Group requests of one padded size into batches of up to ``batch_size``."""
    waiting: dict[tuple[int, int], list[Request]] = {}
    for request in requests:
        size = request.padded_size(multiple)
        group = waiting.setdefault(size, [])
        group.append(request)
        if len(group) == batch_size:
            yield waiting.pop(size)
        elif sum(map(len, waiting.values())) >= BATCHES_HELD * batch_size:
            yield waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
    yield from waiting.values()


def pad_to_layout(model: Model, requests: Sequence[Request]) -> SemanticLayout:
    """Stack requests of one padded size, filled up with don't-care (no edges) at the bottom and on the right."""
    spec = model.layout_spec
    height, width = requests[0].padded_size(model.generator.size_multiple)

    def stack(maps: Sequence[Tensor], fill: int) -> Tensor:
        return torch.stack([F.pad(m, (0, width - m.shape[-1], 0, height - m.shape[-2]), value=fill) for m in maps])

    labels = stack([request.labels for request in requests], spec.num_classes)
    edges = [request.edges for request in requests if request.edges is not None]
    distances = None
    if spec.has_distances:  # of the label map itself, not of its padding
        distances = stack([_distances_of(request) for request in requests], 0)
    return SemanticLayout(spec, labels, stack(edges, 0) if edges else None, distances)


def _distances_of(request: Request) -> Tensor:
    given = request.distances
    return torch.from_numpy(class_distances(request.labels.numpy())) if given is None else given


@torch.inference_mode()
def _forward(model: Model, requests: Sequence[Request]) -> Tensor:
    """Generate requests of one padded size: float [N, 3, H, W] on the device, padding included."""
    step = 1 if model.one_by_one else len(requests)
    dtype = AUTOCAST[model.precision]
    try:
        images = []
        for start in range(0, len(requests), step):
            part = requests[start : start + step]
            codes = [request.z for request in part if request.z is not None]
            z = torch.stack(codes).to(model.device) if codes else None
            layout = pad_to_layout(model, part).to(model.device)
            with torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
                images.append(model.generator(layout, z))
        return torch.cat(images)
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = str(error).partition("\n")[0]
            raise UserError(f"--compile: torch cannot compile this generator here ({reason}); leave it out") from error
        if not is_out_of_memory(error):
            raise
        height, width = requests[0].padded_size(model.generator.size_multiple)
        raise UserError(
            f"{requests[0].name}: not enough memory on {model.device} for {step} image(s) of {height}x{width} at once. "
            + ("Write a smaller --batch_size" if step > 1 else "Make the label map smaller, or use a machine with more")
        ) from None


def _fetch(requests: Sequence[Request], images: Tensor) -> Iterator[tuple[str, RgbImage]]:
    """Yield a batch's (name, image), cropped and resized."""
    finite = images.isfinite().flatten(1).all(1).cpu()
    pixels = denormalise(images).permute(0, 2, 3, 1).cpu().numpy()
    for request, image, is_finite in zip(requests, pixels, finite.tolist(), strict=True):
        if not is_finite:
            raise UserError(
                f"{request.name}: the generator's output is not finite. The weights are damaged, or training had"
                " diverged: try an earlier checkpoint, or --weights raw"
            )
        height, width = request.labels.shape
        yield request.name, resize_image(image[:height, :width], *(request.resize_to or (height, width)))
