"""The sample data set on disk. Owns its folders, file names and encodings, and the split over processes."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import cv2

from imaginaire_spade.data.image_files import encode_map
from imaginaire_spade.files import encode_image, write_bytes
from imaginaire_spade.scenes.scene import draw_scene


def write_sample_data(
    output_root: str | Path,
    num_train: int,
    num_val: int,
    height: int,
    width: int,
    seed: int,
    num_workers: int,
    *,
    on_written: Callable[[], object] = lambda: None,
) -> None:
    """Writes `output_root/{train,val}/{images,seg_maps,inst_maps,edge_maps}/scene_NNNNN.{jpg,png}`.

    Scenes 0..num_train-1 are for training, the next num_val for validation; NNNNN is that index. The bytes do not
    depend on num_workers (0 or 1: this process). on_written is called after each scene. Files that are there are
    replaced; the folder is not cleaned.
    """
    root = Path(output_root)
    for split in ("train", "val"):
        for folder in ("images", "seg_maps", "inst_maps", "edge_maps"):
            (root / split / folder).mkdir(parents=True, exist_ok=True)
    jobs = [(root / ("train" if i < num_train else "val"), seed, i, height, width) for i in range(num_train + num_val)]
    if num_workers <= 1:
        for job in jobs:
            _write_scene(job)
            on_written()
        return
    # not fork: a forked child of a process with OpenCV or torch threads can hang; not spawn: importing torch takes
    # seconds, which a fork server pays once for all workers
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(num_workers, cv2.setNumThreads, (1,)) as pool:
        for _ in pool.imap_unordered(_write_scene, jobs, chunksize=4):
            on_written()


def _write_scene(job: tuple[Path, int, int, int, int]) -> None:
    split, seed, index, height, width = job
    scene = draw_scene(seed, index, height, width)
    name = f"scene_{index:05d}"
    for path, content in (
        (split / "images" / f"{name}.jpg", encode_image(scene.image, ".jpg")),
        (split / "seg_maps" / f"{name}.png", encode_map(scene.labels)),
        (split / "inst_maps" / f"{name}.png", encode_map(scene.instances)),
        (split / "edge_maps" / f"{name}.png", encode_map(scene.edges)),
    ):
        write_bytes(path, content)
