"""``python -m benchmarks``: one table, measured in one run, every figure beside the plain dense path's."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch

from benchmarks import data, generator, growth, inference, iteration, measure, norms, oasis
from benchmarks.layouts import default_folder
from benchmarks.measure import Row, matmul_peak_tflops
from imaginaire_spade.errors import positive_integer, run_command_line
from imaginaire_spade.processes import keep_large_buffers

SECTIONS = ("norms", "generator", "inference", "iteration", "oasis", "growth")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all but growth)"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=positive_integer, help="CPU threads (default: torch's)")
    parser.add_argument("--label_maps", type=Path, metavar="DIR", help="label maps of COCO-Stuff (default: drawn ones)")
    parser.add_argument("--repeats", type=positive_integer, default=5)
    parser.add_argument("--quick", action="store_true", help="narrow networks, small pictures: does everything run?")
    parser.add_argument(
        "--load", action="store_true", help="beside another busy process too, in turns: how much of each ratio is left"
    )
    parser.add_argument(
        "--processor_time", action="store_true", help="not the elapsed time: for a machine with other work"
    )
    parser.add_argument("--vgg", action="store_true", help="the iteration with the perceptual loss too")
    parser.add_argument("--data_root", type=Path, metavar="RAW", help="raw folder: building and loading it too")
    parser.add_argument(
        "--data_config", type=Path, default=data.CAMVID, metavar="C.yaml", help="its label table (default: CamVid's)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures")
    arguments = parser.parse_args()
    if unknown := set(arguments.sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if arguments.label_maps and not any(arguments.label_maps.glob("*.png")):
        parser.error(f"--label_maps {arguments.label_maps}: no PNG there; give the folder of label maps itself")
    keep_large_buffers()  # as train.py and inference.py do
    raw = data.open_raw(arguments.data_root, arguments.data_config) if arguments.data_root else None
    clock = time.process_time if arguments.processor_time else time.perf_counter
    measure.conditions = measure.Conditions(arguments.load, clock)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device, folder, repeats = (
        torch.device(arguments.device),
        arguments.label_maps or default_folder(),
        arguments.repeats,
    )
    filters = 8 if arguments.quick else 64
    size = 64 if arguments.quick else 256
    wanted = arguments.sections or SECTIONS[:-1]
    facts = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "clock": clock.__name__,
        "label_maps": "drawn" if folder is None else f"{len(list(folder.glob('*.png')))} files",
        "allocator": {name: os.environ[name] for name in os.environ if name.startswith("MALLOC_")},
    }
    if device.type == "cuda":
        facts["bf16 matmul peak"] = f"{matmul_peak_tflops(device):.0f} TFLOP/s"
    print(", ".join(f"{name}: {value}" for name, value in facts.items()))
    rows: list[Row] = []

    def show(found: list[Row]) -> None:
        rows.extend(found)
        print(*found, sep="\n", flush=True)

    if "norms" in wanted:
        show(norms.measure(folder, device, repeats, 2 if arguments.quick else len(norms.CASES)))
    if "generator" in wanted:
        shapes = ((1, size, size), (8, size, size), (1, size, 2 * size))
        for shape in shapes[: 1 if arguments.quick else None]:
            show(generator.measure(folder, device, repeats, filters, (shape,)))
    if "inference" in wanted:
        show(inference.measure(folder, device, repeats, filters, size, arguments.quick))
    if "iteration" in wanted:
        batch = 16 if device.type == "cuda" and not arguments.quick else 1
        for vgg in (False, True) if arguments.vgg else (False,):
            case = iteration.Case(folder, device, filters, size, batch, bf16=device.type == "cuda", vgg=vgg)
            show(iteration.measure(case, repeats, ["SPADE"] if arguments.quick else iteration.VARIANTS))
    if "oasis" in wanted:
        show(oasis.inference(folder, device, repeats, filters, size))
        show(oasis.iteration(folder, device, repeats, filters, size))
    if "growth" in wanted:
        for found in growth.measure(folder, device, repeats, filters, size, arguments.quick):
            show(found)
    tables = data.compare(*raw) if raw else {}
    if arguments.json:
        content = {"facts": facts, "rows": [row.plain() for row in rows], "data": tables}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command_line(main)
