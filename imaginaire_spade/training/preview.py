"""Draw preview sheets: label map, edges, real image, generated ones, for a few fixed samples."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from imaginaire_spade import sheets
from imaginaire_spade.data.batch import Batch, denormalise
from imaginaire_spade.data.loader import sequential_batches
from imaginaire_spade.noise import style_codes
from imaginaire_spade.training.setup import Run


def preview_batch(run: Run) -> Batch | None:
    """Read validation samples spread evenly over the data set, the same at every launch; None for no rows."""
    last = len(run.val_dataset) - 1
    count = min(run.config.trainer.image_rows, last + 1)
    if not count:
        return None
    indices = [round(i * last / max(1, count - 1)) for i in range(count)]
    return next(iter(sequential_batches(run.val_dataset, indices, count)))


@torch.no_grad()
def preview_sheet(run: Run, batch: Batch) -> NDArray[np.uint8]:
    """Draw a sheet, uint8 RGB [H, W, 3], with one row per sample. The generators run in evaluation mode."""
    state = run.state
    columns = {"label map": run.config.data.labels.colourise(batch.layout.labels.numpy())}
    if batch.layout.edges is not None:
        columns["edges"] = (255 - batch.layout.edges.numpy() * 255).astype(np.uint8)[..., None].repeat(3, -1)
    assert batch.images is not None
    images = {"real": batch.images}
    z = style_codes(run.config.seed, batch.keys, run.settings.style_dims, run.device)
    layout = batch.layout.to(run.device)
    state.generator.eval()
    images["generated"] = denormalise(state.generator(layout, z))
    state.generator.train()
    if state.generator_ema is not None:
        images["average"] = denormalise(state.generator_ema(layout, z))
    columns |= {name: made.permute(0, 2, 3, 1).cpu().numpy() for name, made in images.items()}
    rows = [[column[i] for column in columns.values()] for i in range(len(batch))]
    return sheets.draw_contact_sheet(rows, list(columns))
