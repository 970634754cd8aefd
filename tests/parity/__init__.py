"""Check our networks and losses against numbers that a reference system produced.

Outputs and buffers are computed in float32, as users get them. Gradients are computed in float64: the derivative of a
leaky ReLU jumps where its argument passes zero, and two float32 computations that agree to rounding may stand on either
side of it, which says nothing about the architecture.

A fixture is a folder with ``config.json`` (network, hyper-parameters, tolerances), ``weights.safetensors``,
``inputs.safetensors`` and ``outputs.safetensors``; every tensor of the outputs is compared or named as missing.
"""

from __future__ import annotations

from pathlib import Path

from imaginaire_spade.errors import UserError
from parity import clade, imaginaire, imaginaire_lmdb, nvlabs_spade, oasis
from parity.fixture import Fixture, Row

__all__ = ["Fixture", "Row", "verify"]

_CHECKS = {
    "nvlabs_spade": nvlabs_spade.CHECKS,
    "clade": clade.CHECKS,
    "imaginaire": {**imaginaire.CHECKS, "LMDB": imaginaire_lmdb.check},
    "oasis": oasis.CHECKS,
}


def verify(path: Path) -> list[Row]:
    """Compare every output tensor of a fixture. Raises UserError where the folder cannot be used."""
    fixture = Fixture.load(path)
    checks = _CHECKS[fixture.source]
    network = "LMDB" if "lmdb_folder" in fixture.config else fixture.config["network"]
    if network not in checks:
        known = ", ".join(str(name) for name in checks if name)
        raise UserError(f"{path}: network {network!r} of {fixture.source}; known: {known}")
    ours = dict(checks[network](fixture))
    rows = []
    for name, wanted in sorted(fixture.outputs.items()):
        if name.endswith("num_batches_tracked"):
            continue  # the reference's synchronized batch norm never counts
        bound = fixture.bound(name, wanted)
        if name not in ours:
            rows.append(Row(name, float("nan"), bound, "missing"))
        elif ours[name].numel() != wanted.numel():
            rows.append(Row(name, float("nan"), bound, f"shape {list(ours[name].shape)}, not {list(wanted.shape)}"))
        else:
            error = float((ours[name].detach().double().reshape(wanted.shape) - wanted.double()).abs().max())
            rows.append(Row(name, error, bound))
    if not rows:
        raise UserError(f"{path}: outputs.safetensors holds nothing to compare")
    return rows
