"""The kinds of files that the fuzzer changes. To add one, write a function and name it in ``KINDS``."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import random
import tarfile
import tempfile
import zipfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import download_test_data
import numpy as np
import torch

from imaginaire_spade.build import check_run
from imaginaire_spade.config import RunConfig
from imaginaire_spade.config_files import dump_config, load_config, load_labels, parse_config
from imaginaire_spade.dataset_prep.annotations import paint
from imaginaire_spade.dataset_prep.archives import unpack
from imaginaire_spade.dataset_prep.prepare import _read_objects
from imaginaire_spade.evaluation.collection import Collection
from imaginaire_spade.evaluation.report import Protocol, Report, compare
from imaginaire_spade.evaluation.scores import FeatureStats
from imaginaire_spade.evaluation.segmentation import Confusion, match_labels, read_mapping
from imaginaire_spade.files import read_json
from imaginaire_spade.inference.model import Model
from imaginaire_spade.interop.checkpoint import architecture_config, networks_in, read_weights
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.training.checkpoint import load_checkpoint, write_checkpoint
from imaginaire_spade.training.state import new_train_state

from .fuzzer import Use

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = REPOSITORY / "configs/projects/spade/sample/small64.yaml"
TINY = (
    "gen.num_filters=1", "gen.norm.hidden_channels=2", "gen.noise_injection=false", "gen.upsampling=normal",
    "dis.num_filters=2", "dis.num_layers=2", "data.edges=none", "losses.perceptual=0", "data.val=null",
    "gen_opt.fused=off", "dis_opt.fused=off",
)  # fmt: skip


@cache
def tiny_config() -> RunConfig:
    return load_config(SMALL, TINY)


def config(folder: Path) -> tuple[Path, Use]:
    """A whole configuration."""
    path = folder / "c.yaml"
    text = SMALL.read_text(encoding="utf-8")
    for base in ("../_paper.yaml", "../../../labels/sample.yaml"):
        text = text.replace(base, str((SMALL.parent / base).resolve()))
    path.write_text(text, encoding="utf-8")
    return path, partial(_check, path)


def _check(path: Path) -> str:
    loaded = load_config(path)
    check_run(loaded, 1)
    return loaded.model_dump_json()


def resolved_config(folder: Path) -> tuple[Path, Use]:
    """A configuration with every key stated, as a log dir has it."""
    path = folder / "c.yaml"
    path.write_text(json.dumps(dump_config(tiny_config()), indent=1))
    return path, partial(_check, path)


def override(folder: Path) -> tuple[Path, Use]:
    """The text of --set."""
    path = folder / "set.txt"
    path.write_text("data.train.augmentations={resize_h_w: [64, 64], horizontal_flip: true}")
    return path, lambda: load_config(SMALL, [path.read_text(errors="replace")]).model_dump_json()


def label_table(folder: Path) -> tuple[Path, Use]:
    path = folder / "labels.yaml"
    path.write_bytes((REPOSITORY / "configs/labels/camvid.yaml").read_bytes())

    def use() -> Any:
        labels = load_labels(path)
        return labels.model_dump_json(), labels.table.tobytes(), labels.colours.tobytes()

    return path, use


def segmenter_labels(folder: Path) -> tuple[Path, Use]:
    path, labels = folder / "m.yaml", LabelSpec(num_classes=3, names=("sky", "car", "road"))
    path.write_text("sky: heaven\ncar: [auto, 2]\nroad: null\n")
    return path, lambda: str(match_labels(["heaven", "auto", "van"], labels, read_mapping(path)))


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


@cache
def tiny_content() -> dict[str, Any]:
    """A checkpoint after an iteration that moved every weight."""
    state = new_train_state(tiny_config(), torch.device("cpu"), 0)
    for network, optimizer in ((state.generator, state.gen_optimizer), (state.discriminator, state.dis_optimizer)):
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return {"config": dump_config(tiny_config()), "run": None, **state.state_dict()}


def checkpoint_without_sha256(folder: Path) -> tuple[Path, Use]:
    path = folder / "p.pt"
    write_checkpoint(path, tiny_content())
    path.with_name("p.pt.sha256").unlink()
    return path, partial(_weights, path)


def _weights(path: Path) -> str:
    model = Model.load(path, for_inference=False)
    return _digest(model.generator.state_dict()) + model.config.model_dump_json() + str(model.images_seen)


VALUES = (
    None, True, -1, 0, 10**30, 2.5, float("nan"), float("inf"), "x", "", (), [], {}, [[]], {"a": 1}, (1, 2),
    torch.zeros(()), torch.ones(3), torch.ones(2, 2).half(), torch.ones(2).to_sparse(),
    torch.ones(1).expand(1000, 1000), torch.zeros(0), torch.ones(2, dtype=torch.complex64),
)  # fmt: skip


def checkpoint_contents(folder: Path) -> tuple[Path, Use]:
    """A checkpoint that is whole, as a file: its bytes say which value in its tree becomes which other."""
    path, made = folder / "choice.txt", folder / "made.pt"
    path.write_bytes(b"")

    def use() -> str:
        tree = copy.deepcopy(tiny_content())
        if choice := path.read_bytes():
            rng = random.Random(choice)
            node: Any = tree
            while True:
                keys = list(node) if isinstance(node, dict) else range(len(node))
                key = rng.choice(keys)
                if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.15:
                    break
                node = node[key]
            if rng.random() < 0.2:
                del node[key]
            elif isinstance(node[key], torch.Tensor) and rng.random() < 0.5:
                node[key] = rng.choice(
                    (torch.Tensor.half, torch.Tensor.long, lambda t: t[None], lambda t: torch.atleast_1d(t)[..., :0])
                )(node[key])
            else:
                node[key] = copy.deepcopy(rng.choice(VALUES))
        write_checkpoint(made, tree)
        if random.Random(choice + b"x").random() < 0.5:
            return _weights(made)
        content = load_checkpoint(made)
        state = new_train_state(parse_config(content.get("config"), str(made)), torch.device("cpu"), 0)
        state.load_state_dict(content, str(made))
        for optimizer, network in ((state.gen_optimizer, state.generator), (state.dis_optimizer, state.discriminator)):
            for parameter in network.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        return str(state.images_seen)

    return path, use


def published(folder: Path) -> tuple[Path, Use]:
    path = folder / "m.safetensors"
    write_checkpoint(folder / "p.pt", tiny_content())
    Model.load(folder / "p.pt", for_inference=False).publish(path)
    return path, partial(_weights, path)


def foreign_weights(folder: Path) -> tuple[Path, Use]:
    path = folder / "latest_net_G.pth"
    torch.save({"fc.weight": torch.ones(4, 4), "fc.bias": torch.ones(4)}, path)
    return path, lambda: sorted(networks_in(read_weights(path), path)["generator"])


def architecture(folder: Path) -> tuple[Path, Use]:
    """The JSON beside another system's weights."""
    path = folder / "a.json"
    hyper = {
        "label_nc": 5, "contain_dontcare_label": True, "no_instance": True, "ngf": 4, "z_dim": 8, "use_vae": False,
        "crop_size": 64, "aspect_ratio": 1.0, "norm_G": "spectralspadesyncbatch3x3", "num_upsampling_layers": "normal",
        "netG": "spade", "semantic_nc": 6, "output_nc": 3, "num_D": 2, "n_layers_D": 4, "ndf": 4,
    }  # fmt: skip
    path.write_text(json.dumps(hyper))

    def use() -> str:
        made = architecture_config("nvlabs_spade", read_json(path), None)
        check_run(made, 1)
        return made.model_dump_json()

    return path, use


def statistics(folder: Path) -> tuple[Path, Use]:
    path, stats = folder / "s.npz", FeatureStats.of(torch.rand(9, 4))
    saved = Collection(
        "x", "0" * 64, 9, "8x8", "png", stats.gaussian(), stats, torch.rand(9, 4),
        confusion=Confusion(np.ones((2, 3), np.int64), 1, 9),
    )  # fmt: skip
    saved.save(path, {"network": {"name": "n"}, "reference_split": "val"})

    def use() -> Any:
        read = Collection.load(path)
        gaussian = read.gaussian
        numbers = [] if gaussian is None else [gaussian.mean.tolist(), gaussian.covariance.tolist()]
        return numbers, read.count, read.size, None if read.confusion is None else read.confusion.counts.tolist()

    return path, use


def report(folder: Path) -> tuple[Path, Use]:
    protocol = Protocol("0", "val", "0" * 64, 9, 9, "8x8", "8x8", "png", "png", feature_dim=64)
    for name, score in (("a", 1.5), ("b", 2.5)):
        Report({"fid": score, "kid": 0.5, "miou": 0.25}, protocol, {"fake": "x"}).save(folder / f"{name}.json")
    return folder / "a.json", lambda: compare((folder / "a.json", folder / "b.json"))


def instances(folder: Path) -> tuple[Path, Use]:
    """COCO's instances JSON."""
    path = folder / "i.json"
    image = {"id": 1, "file_name": "a.jpg", "height": 8, "width": 8}
    note = {"id": 1, "image_id": 1, "category_id": 1, "area": 12.0, "segmentation": [[1, 1, 5, 1, 5, 5]]}
    coded = {**note, "id": 2, "segmentation": {"size": [8, 8], "counts": [8, 8, 48]}, "iscrowd": 1}
    path.write_text(
        json.dumps({"images": [image], "annotations": [note, coded], "categories": [{"id": 1, "name": "c"}]})
    )

    def use() -> Any:
        drawn = []
        for (height, width), regions in _read_objects(path).values():
            if (height, width) == (8, 8):  # (``prepare`` compares it with the label map's)
                order = [(number, place, area) for number, (_, _, place, area) in enumerate(regions)]
                drawn.append(paint(order, (height, width), 0))
        return drawn

    return path, use


def _archive(folder: Path, mode: str) -> tuple[Path, Use]:
    path, body = folder / "a", b"".join(b"%d\n" % n for n in range(400))
    if mode.startswith("w:"):
        with tarfile.open(path, mode) as tar:
            for name in ("seg_maps/a.png", "images/a.png"):
                info = tarfile.TarInfo(name)
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    else:
        with zipfile.ZipFile(path, "w", int(mode)) as packed:
            for name in ("seg_maps/a.png", "images/a.png"):
                packed.writestr(name, body)

    def use() -> Any:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            unpack(path, Path(out))
            return sorted((str(f.relative_to(out)), f.read_bytes()) for f in Path(out).rglob("*") if f.is_file())

    return path, use


def archive_zip(folder: Path) -> tuple[Path, Use]:
    return _archive(folder, str(zipfile.ZIP_DEFLATED))


def archive_lzma(folder: Path) -> tuple[Path, Use]:
    return _archive(folder, str(zipfile.ZIP_LZMA))


def archive_tar(folder: Path) -> tuple[Path, Use]:
    return _archive(folder, "w:")


def archive_tgz(folder: Path) -> tuple[Path, Use]:
    return _archive(folder, "w:gz")


def archive_txz(folder: Path) -> tuple[Path, Use]:
    return _archive(folder, "w:xz")


def manifest(folder: Path) -> tuple[Path, Use]:
    path = folder / "m.json"
    archive = {"url": "http://host/path/data.zip", "sha256": "0" * 64, "folder": "cocostuff"}
    path.write_text(json.dumps({"spade": {"archives": [archive]}}))
    return path, lambda: download_test_data.read_archives(path, "spade")


KINDS = {
    config: False, resolved_config: False, override: False, label_table: False, segmenter_labels: False,
    checkpoint_without_sha256: True, checkpoint_contents: False, published: True, foreign_weights: False,
    architecture: False, statistics: False, report: False, instances: False, manifest: False,
    archive_zip: False, archive_lzma: False, archive_tar: False, archive_tgz: False, archive_txz: False,
}  # fmt: skip
"""Kind -> whether a checksum in the file covers it, so that a changed file is refused or understood as before."""
