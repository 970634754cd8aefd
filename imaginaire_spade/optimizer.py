"""Build the optimizers: Adam, which keeps no first moment where that is the gradient."""

import importlib
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from imaginaire_spade.config_trainer import OptimizerConfig
from imaginaire_spade.errors import ConfigError


def _plain(method: Any) -> Any:
    """Take off what torch wraps around an optimizer's methods for torch.compile: its first call imports the compiler,
    900 modules in three seconds."""
    return inspect.unwrap(method)


class Adam(torch.optim.Optimizer):
    """Adam by torch's kernels; with beta1 = 0 the first moment is the gradient, so none is kept.

    Weights are those of ``torch.optim.Adam`` to the bit. That saves 4 bytes for each weight, in memory and in
    checkpoints, and 4 more in ``in_backward``.

    Args:
        fused: by one kernel for all weights.
    """

    add_param_group = _plain(torch.optim.Optimizer.add_param_group)
    state_dict = _plain(torch.optim.Optimizer.state_dict)
    zero_grad = _plain(torch.optim.Optimizer.zero_grad)

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], eps: float, fused: bool
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "fused": fused, "capturable": False})
        self._make_moments()  # now: made between activations, they would leave holes in memory

    def _make_moments(self) -> None:
        """Set those that are missing to zero, and remove first moments that the gradient stands for."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                there = parameter.device if group["fused"] else "cpu"
                state["step"] = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32, device=there)
                for name in ("exp_avg", "exp_avg_sq"):
                    if name == "exp_avg" and group["betas"][0] == 0:
                        state.pop(name, None)
                    elif name not in state:
                        state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Let a ``GradScaler`` leave unscaling, and the check for infinite gradients, to the kernel."""
        return bool(self.defaults["fused"])

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update each weight that has a gradient."""
        for group in self.param_groups:
            self._update(group, group["params"])

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """Update each weight as soon as a backward pass in this context has its gradient, and free the gradient.

        So the gradients never exist together, and ``step`` finds none. Not for gradients that are exchanged, scaled or
        accumulated afterwards.
        """
        handles = []

        def update(group: dict[str, Any], parameter: Tensor) -> None:
            self._update(group, [parameter])
            parameter.grad = None

        for group in self.param_groups:
            handles += [p.register_post_accumulate_grad_hook(partial(update, group)) for p in group["params"]]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adam(
            parameters, gradients, [state["exp_avg"] for state in states] if beta1 else gradients,
            [state["exp_avg_sq"] for state in states], [], [state["step"] for state in states],
            fused=group["fused"], capturable=group["capturable"], amsgrad=False, beta1=beta1, beta2=beta2,
            lr=group["lr"], weight_decay=0.0, eps=group["eps"], maximize=False,
            grad_scale=getattr(self, "grad_scale", None), found_inf=getattr(self, "found_inf", None),
        )  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what an Adam has saved, with first moments or without: zeros where this one keeps them."""
        _plain(torch.optim.Optimizer.load_state_dict)(self, state_dict)
        self._make_moments()


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build Adam in the form of ``fused``.

    Raises:
        ConfigError: apex is requested, and NVIDIA's is not installed.
    """
    betas = (config.adam_beta1, config.adam_beta2)
    settings: dict[str, Any] = {"lr": config.lr, "betas": betas, "eps": config.adam_eps}
    if config.fused == "apex":
        return apex_adam()(list(parameters), adam_w_mode=False, **settings)
    return Adam(parameters, fused=config.fused != "off", **settings)


def bytes_per_weight(config: OptimizerConfig) -> int:
    """Count what training keeps of a weight: itself, its gradient, Adam's moments; 4 bytes each."""
    return 4 * (4 if config.adam_beta1 or config.fused == "apex" else 3)


def apex_adam() -> Any:
    """Return the class of NVIDIA's fused Adam.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"fused: apex, but NVIDIA's apex is not importable ({error}). The package called apex on PyPI is another"
            " project: build NVIDIA's from source (INSTALL.md), or write fused: auto"
        ) from None
