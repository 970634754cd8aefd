"""Write, as our label tables, the channel that the loaders of other systems give each id of a label map.

They read ids as channels: a pixel of raw id r lights channel r, in every data set. ADE20K is no exception in the 2019
SPADE release and in CLADE: their loader subtracts one from the ids and drops the result, so 0 ("other") lights channel
0 and class k channel k. Don't care is the channel after the last class. In the release and in CLADE, 255 and the id
``label_nc`` light it; in imaginaire, every id from the number of classes on does.

OASIS alone has don't care first, as id 0: of ADE20K's and Cityscapes' ids, which it takes as they are, and of
COCO-Stuff's plus one, where 255 becomes 0. Its tensors are imported in our order, so class r is train id r - 1 (of
COCO-Stuff's: r), and files stay as they are.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from imaginaire_spade.config import RunConfig
from imaginaire_spade.config_diff import counts_ade20k_from_0
from imaginaire_spade.config_files import dump_config, parse_config
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.layout import LayoutSpec

ADE20K = ("ade20k", "ade20koutdoor")
"""Values of ``dataset_mode`` (the second is CLADE's) in which the last class, raw id 150, is the don't-care channel."""


def label_table(source: str, spec: LayoutSpec, dataset: str | None = None) -> dict[str, Any]:
    """Return ``data.labels`` of a source's networks, without names.

    Args:
        source: as for ``import_generator``.
        spec: the label channels of the networks.
        dataset: the release's ``dataset_mode``; None: unknown.
    """
    labels: dict[str, Any] = {"num_classes": spec.num_classes, "dont_care": spec.has_dont_care}
    if source == "imaginaire":
        return labels | {"ignore": [255] if spec.has_dont_care and spec.num_classes <= 255 else []}
    if source == "oasis" and spec.has_dont_care:
        if dataset == "coco":
            return labels | {"ignore": [255]}
        return labels | {"ignore": [0], "remap": {raw: raw - 1 for raw in range(1, spec.num_classes + 1)}}
    if dataset in ADE20K:
        return {"num_classes": spec.num_label_channels, "dont_care": False}
    if not spec.has_dont_care:
        return labels
    # COCO-Stuff's files hold no 182, but label maps that count its classes from 1 do: 182 must be an error.
    return labels | {"ignore": [255] if dataset == "coco" else sorted({spec.num_classes, 255})}


def adapt_config(source: str, config: RunConfig, *, has_networks: bool = True) -> tuple[RunConfig, list[str]]:
    """Adapt a config of ours, such as a data set's recipe, to a source's weights; return it with notes on changes.

    Args:
        source: as for ``import_generator``.
        config: ADE20K's label table, in either form, is adapted; any other stays.
        has_networks: whether the config also describes the networks, because there is no architecture.
    """
    tree, notes = dump_config(config), []
    norm = tree["gen"].get("norm")
    skips = isinstance(norm, dict) and norm["type"] == "clade_icpe"
    if source in ("nvlabs_spade", "clade") and counts_ade20k_from_0(config.data.labels):
        order = config.data.labels.channel_order
        assert order is not None
        tree["data"]["labels"] = _with_raw_ids(config.data.labels, order)
        if skips:
            norm["skip_ids"] = [order.index(i) for i in norm["skip_ids"]]
        notes.append(
            f"weights of {source} saw ADE20K's raw ids, from which the label table of --config subtracts one: the"
            " checkpoint's has 151 classes instead, other first, so that raw id r of a label map lights channel r. A"
            " config to fine-tune it with needs configs/labels/ade20k_release.yaml last in its base"
        )
    if source == "clade" and has_networks and skips and not norm["skip_ids"]:
        norm["skip_ids"] = [0]
        notes.append(
            "gen.norm.skip_ids: [0], since CLADE gives no position to pixels whose value in the file is 0. For weights"
            ' that were trained here, with positions, give --architecture with "skip_ids": [] as well'
        )
    return (parse_config(tree, source="--config") if notes else config), notes


def _with_raw_ids(labels: LabelSpec, order: Sequence[int]) -> dict[str, Any]:
    """Return the table in which raw id r is class r; the don't care of ``labels`` becomes a class, "other"."""
    known = labels.known_ids
    classes = {raw: order.index(int(labels.table[raw])) for raw in known}
    names, palette = (*labels.names, "other"), (*labels.palette, (0, 0, 0))
    return {
        "num_classes": len(order),
        "dont_care": False,
        "remap": {raw: index for raw, index in classes.items() if raw != index},
        "names": [names[channel] for channel in order] if labels.names else [],
        "palette": [list(palette[channel]) for channel in order] if labels.palette else [],
    }


LabelOrder = Literal["raw", "train"]


def exported_channels(target: str, labels: LabelSpec, label_order: LabelOrder) -> list[int] | None:
    """Return which of our label channels stands at each place of an exported network; None: all stay in place.

    Args:
        target: the other system. OASIS gets the classes in our order; its don't care moves by itself.
        labels: the table that the network was trained with.
        label_order: ``raw``: raw id r lights the same channel in the other system as here, which is possible if the raw
            ids from 0 on light each channel once; ``train``: channels stay train ids.
    """
    order = labels.channel_order if label_order == "raw" and target != "oasis" else None
    return None if order == sorted(order or ()) else order


def export_notes(target: str, config: RunConfig, label_order: LabelOrder) -> list[str]:
    """Return notes on the label maps that an exported network takes."""
    labels, notes = config.data.labels, []
    order = exported_channels(target, labels, label_order)
    num_channels = labels.num_classes + labels.dont_care
    table = labels.table.astype(np.int64)
    known = [raw for raw in labels.known_ids if table[raw] < num_channels]
    if order is not None:
        notes.append(
            f"label channels are in the order of raw ids, which {target}'s loader reads as channels: it takes the same"
            " label maps as this checkpoint (--label_order train: channels in the order of data.labels, for label maps"
            " of train ids)"
        )
    places = {channel: place for place, channel in enumerate(order or range(num_channels))}
    advice = "replace them" if order is not None else "write train ids (255: don't care)"
    if target == "oasis":
        if labels.dont_care:
            places, advice = {c: (c + 1) % num_channels for c in places}, "write train ids + 1 (0: don't care)"
        mode = "coco (id + 1, 255 -> 0)" if _counts_from_0(labels) else "ade20k or cityscapes (ids as they are)"
        if name := encoder_of_ours(config):
            notes.append(f"dis.encoder: {name} has no counterpart in OASIS: no best_D.pth")
        notes.append(
            f"label channels are don't care, then the classes: label maps are for OASIS's loader of dataset_mode {mode}"
            if labels.dont_care
            else "trained without don't care: set contain_dontcare_label False in OASIS, for which id 0 is don't care"
        )
    if wrong := [raw for raw in known if _channel(target, labels, raw) != places[int(table[raw])]]:
        ids = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
        notes.append(f"raw ids {ids} light another channel in {target}, or none: {advice} in the label maps for it")
    norm = config.gen.args.get("norm")
    if target == "clade" and norm is not None and norm.type == "clade_icpe":
        own, theirs = list(norm.args["skip_ids"]), [int(table[0])]
        if own != theirs:
            notes.append(
                f"CLADE gives pixels of raw id 0 no position, this generator was trained with gen.norm.skip_ids: {own}:"
                f" images differ there. Networks trained with {theirs} agree"
            )
    return notes


def _channel(target: str, labels: LabelSpec, raw: int) -> int | None:
    """Return the channel that a raw id lights in another system; None: none, or its loader fails."""
    if target == "imaginaire":
        return raw if raw < labels.num_classes else labels.num_classes if labels.dont_care else None
    if target == "oasis":
        channel = (0 if raw == 255 else raw + 1) if _counts_from_0(labels) else raw
        return channel if 0 <= channel < labels.num_classes + labels.dont_care else None
    if raw == 255:
        return labels.num_classes if labels.dont_care else None
    return raw if raw < labels.num_classes + labels.dont_care else None


def _counts_from_0(labels: LabelSpec) -> bool:
    """Whether raw id 0 is a class beside don't care, as in COCO-Stuff, and not don't care itself."""
    return labels.dont_care and labels.table[0] < labels.num_classes


def encoder_of_ours(config: RunConfig) -> str | None:
    """Name the discriminator's encoder if it is not OASIS's own of six blocks, the only one of other systems."""
    encoder = config.dis.args.get("encoder")
    if encoder is None or (encoder.type == "oasis" and encoder.args["num_blocks"] == 6):
        return None
    return f"oasis, num_blocks: {encoder.args['num_blocks']}" if encoder.type == "oasis" else str(encoder.type)
