"""Compare the kernels of ``kernels.py`` with their plain twins: on a GPU, or under TRITON_INTERPRET=1 on the CPU.

Prints the largest difference per dtype, relative to the largest value, as JSON.
"""

import itertools
import json
import os
import sys
from collections import defaultdict

import torch

from imaginaire_spade import layout as layout_module
from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.models import kernels, layers, modulation, norms
from imaginaire_spade.models.norms import SPADE, BatchNorm2d
from imaginaire_spade.neighbourhoods import CHUNK, Lookup

device = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") else "cuda")
layers.triton_kernels = modulation.triton_kernels = lambda device: None  # the twins alone sum
worst = defaultdict(float)


def compare(dtype: torch.dtype, found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype, (found.dtype, wanted.dtype)
    assert found.isfinite().all()
    difference = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    worst[str(dtype).removeprefix("torch.")] = max(worst[str(dtype).removeprefix("torch.")], difference.item())


torch.manual_seed(0)
kinds = ((torch.float64, 3), (torch.float32, 130), (torch.bfloat16, 130), (torch.float16, 3))  # 130: of two programs
for (dtype, channels), up, slope, indexed in itertools.product(kinds, (1, 2), (1.0, 0.2), (True, False)):
    wide = torch.promote_types(dtype, torch.float32)
    few = (torch.randn(8, 1, 6, 1, channels, device=device) * 2 + 1).to(dtype)
    table = torch.randn(5 if indexed else 1, 2 * channels, device=device, dtype=dtype)
    gamma, beta = table.chunk(2, 1)  # not contiguous, as a norm's
    mean, rstd = torch.randn(channels, device=device).to(wide), torch.rand(channels, device=device).to(wide) + 0.5
    index = torch.randint(0, 4, (8, up, 6, up), device=device, dtype=torch.int32) if indexed else None  # 4: no users
    lookup = Lookup(index.view(-1, 1), 5) if indexed else None
    arguments = few, gamma, beta, index, mean, rstd, up, slope
    wanted = modulation.forward_pixels(*arguments)
    compare(dtype, kernels.forward(*arguments), wanted)
    dy, y = torch.randn_like(wanted), wanted if slope != 1 else None
    arguments = dy, few, y, slope, lookup, mean, rstd
    for one, other in zip(
        *(f(*arguments).chunk(2, 1) for f in (kernels.gradients, modulation.gradients_of_table)), strict=True
    ):
        compare(wide, one, other)
    means = torch.randn(2, channels, device=device).to(wide)
    arguments = dy, few, y, gamma, index, mean, rstd, means, slope
    compare(dtype, kernels.backward(*arguments), modulation.backward_pixels(*arguments))

index = torch.cat([torch.randint(0, 9, (40, 3)), torch.full((CHUNK, 3), 4)]).to(device)  # a row of several chunks
values = torch.randn(len(index), 7, device=device, dtype=torch.float64)
compare(
    torch.float64, kernels.sum_users(values, Lookup(index, 9), values.dtype), layers.sum_users(values, Lookup(index, 9))
)


def results(norm: torch.nn.Module, **options: float) -> list[torch.Tensor]:
    """Output and gradients of a norm."""
    torch.manual_seed(1)
    shape = len(layout), 3, layout.height // 2, layout.width // 2
    x = torch.randn(shape, device=device, dtype=torch.float64, requires_grad=True)
    y = norm(x, layout, **options) if isinstance(norm, SPADE) else norm(x, **options)
    return [y.detach(), *torch.autograd.grad(y.square().mean() + y.sin().sum(), [x, *norm.parameters()])]


labels = torch.arange(4).repeat_interleave(48).view(1, 16, 12).repeat(2, 1, 1).byte()
for case in ("batch", "instance", "synchronized"):
    if case == "instance":  # noise, every label has a channel; lookups of 5 and of 4 places
        spec, labels, layout_module.PLACES = LayoutSpec(3, has_dont_care=True, has_edges=True), labels[:1, ::4, ::3], 5
    else:
        spec = LayoutSpec(3)
    layout = SemanticLayout(spec, labels.contiguous(), "labels" if spec.has_edges else None).to(device)
    if case == "instance":
        layout = layout.with_noise(torch.randn(1, 2, device=device, dtype=torch.float64))
    if case == "synchronized":  # not modulated
        norm: torch.nn.Module = BatchNorm2d(3, affine=False)
        norm.synchronized, options = True, {"upsample": 2}
    else:
        norm = SPADE(3, layout.spec, path="table", hidden_channels=4, normalization=case)
        options = {"upsample": 2, "slope": 0.2}
    norm.double().to(device)
    both = []
    for kernels_run in (False, True):
        modulation._in_chunks = lambda x, run=kernels_run: not run
        modulation.triton_kernels = lambda device, run=kernels_run: kernels if run else None
        norms.table_kernels = layers.table_kernels = modulation.triton_kernels
        both.append(results(norm, **options))
    for one, other in zip(*both, strict=True):
        compare(torch.float64, one, other)
json.dump(worst, sys.stdout)
