"""Draw preview sheets: label map, edges, real image, generated ones, for a few fixed samples."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imaginaire_spade import sheets
from imaginaire_spade.data.batch import Batch, denormalise
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.loader import sequential_batches
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.noise import style_codes
from imaginaire_spade.training.state import TrainState


def preview_batch(dataset: LabelMapDataset, rows: int) -> Batch | None:
    """Read samples spread evenly over a data set, the same at every launch; None for no rows."""
    count = min(rows, len(dataset))
    if not count:
        return None
    indices = [round(i * (len(dataset) - 1) / max(1, count - 1)) for i in range(count)]
    return next(iter(sequential_batches(dataset, indices, count)))


@torch.no_grad()
def preview_sheet(state: TrainState, batch: Batch, labels: LabelSpec, style_dims: int, seed: int) -> NDArray[np.uint8]:
    """Draw a sheet, uint8 RGB [H, W, 3], with one row per sample. The generators run in evaluation mode."""
    device = next(state.generator.parameters()).device
    columns = {"label map": labels.colourise(batch.layout.labels.numpy())}
    if batch.layout.edges is not None:
        columns["edges"] = (255 - batch.layout.edges.numpy() * 255).astype(np.uint8)[..., None].repeat(3, -1)
    assert batch.images is not None
    columns["real"] = _rows(batch.images)
    z = style_codes(seed, batch.keys, style_dims, device)
    layout = batch.layout.to(device)
    state.generator.eval()
    columns["generated"] = _rows(denormalise(state.generator(layout, z)))
    state.generator.train()
    if state.generator_ema is not None:
        columns["average"] = _rows(denormalise(state.generator_ema(layout, z)))
    rows = [[column[i] for column in columns.values()] for i in range(len(batch))]
    return sheets.draw_contact_sheet(rows, list(columns))


def _rows(images: Tensor) -> NDArray[np.uint8]:
    return images.permute(0, 2, 3, 1).cpu().numpy()
