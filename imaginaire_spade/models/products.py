"""Matrix products of float32 on a CPU: by torch's own library, or by oneDNN, which knows more processors.

Torch's own (MKL) takes AVX2 on AMD's processors, also on those with AVX-512. Which of the two is faster is measured.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from imaginaire_spade.models.timing import CLEARLY, Ask, gain

HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Choices(NamedTuple):
    """How a network is trained in float32 on a CPU. Whatever they are, results differ in their last places alone."""

    onednn: bool = False
    """Whether oneDNN multiplies matrices."""
    windows: bool = True
    """Whether gradients of weights are ``products_of_windows`` rather than oneDNN's own."""
    winograd_from: int = 256
    """Channels on both sides from which convolutions take Winograd's form; 0: never."""

    @classmethod
    def kept(cls, run: Mapping[str, Any]) -> "Choices":
        """Return those that a checkpoint's run began with; older ones had fewer."""
        known = run.get("cpu_choices") or {"winograd_from": run.get("winograd_from") or 0}
        kept = cls(**{name: known[name] for name in cls._fields if name in known})
        return kept if HAS_ONEDNN else kept._replace(onednn=False)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply a [m, k] and b [k, n]; not for autograd."""
        if not self.onednn or a.dtype != torch.float32:
            return a @ b
        # The first one is copied if it is not contiguous.
        return onednn_linear(a, b.mT) if a.is_contiguous() or len(a) < b.shape[1] else onednn_linear(b.mT, a).mT

    def multiply_each(self, a: Tensor, b: Tensor) -> Tensor | list[Tensor]:
        """Multiply a [p, m, k] and b [p, k, n]: [p, m, n], or p tensors; not for autograd."""
        if self.onednn and a.dtype == torch.float32:
            return [onednn_linear(*pair) for pair in zip(a, b.mT, strict=True)]
        return torch.bmm(a, b)

    def add_each(self, sums: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        """Add ``multiply_each`` to ``sums``, in place, if there are any: [p, m, n]."""
        if sums is not None and not self.onednn:
            return sums.baddbmm_(a, b)
        products = self.multiply_each(a, b)
        products = products if isinstance(products, Tensor) else torch.stack(products)
        return products if sums is None else sums.add_(products)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compute ``F.linear``, x [rows, in] times weight [out, in], with its derivatives."""
        if not self.onednn or x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return F.linear(x, weight)
        return _Linear.apply(x, weight)


BY_RULE = Choices()
"""Where nothing is measured."""


def measure_onednn(ask: Ask) -> bool:
    """Return whether oneDNN multiplies matrices clearly faster on this CPU, as ``ask`` tells."""
    found = ask("matrix products by oneDNN", _gain_of_onednn) if HAS_ONEDNN else None
    return found is not None and found > CLEARLY


def slow_precision(precision: str, device: torch.device) -> str | None:
    """Return what to say of 16 bits on a CPU without instructions for them, where a convolution takes ten to 200 times
    as long as in float32 (findings/bf16_without_instructions.sh)."""
    known = getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", None)
    if device.type != "cpu" or precision == "fp32" or known is None or known():
        return None
    return f"{precision} on a processor without instructions for it takes many times as long as fp32: write fp32"


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Compute ``F.linear`` by oneDNN, without derivatives; x that is not contiguous is copied."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result


@torch.inference_mode()
def _gain_of_onednn() -> float:
    x, weight = torch.ones(256, 256), torch.ones(2048, 256)
    return gain(partial(onednn_linear, x, weight), partial(F.linear, x, weight))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x, weight), of_weight = ctx.saved_tensors, None
        of_x = _Linear.apply(gradient, weight.mT) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:  # (the first one is copied)
            if x.shape[1] < gradient.shape[1]:
                of_weight = _Linear.apply(x.mT, gradient.mT).mT
            else:
                of_weight = _Linear.apply(gradient.mT, x.mT)
        return of_x, of_weight
