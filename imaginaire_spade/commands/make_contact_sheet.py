"""Draw label maps, real and generated images side by side, for a folder of generated images."""

import itertools
from pathlib import Path

from imaginaire_spade.cli import CommandParser, add_shared_flags
from imaginaire_spade.errors import DataError


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--config", required=True, help="YAML with data.labels: a run's config or a label table")
    parser.add_argument("--data_root", required=True, help="folder or LMDB with images and seg_maps")
    parser.add_argument("--generated", required=True, type=Path, help="what inference.py wrote")
    parser.add_argument("--output", required=True, type=Path, help="sheet, .jpg or .png")
    parser.add_argument("--rows", type=int, default=12, help="samples on the sheet, spread over the data (default 12)")
    parser.add_argument("--columns", type=int, default=2, help="samples side by side (default 2)")
    add_shared_flags(parser, "--set")
    parser.add_argument("--import", metavar="MODULE", help="accepted and ignored: no components are used here")
    arguments = parser.parse_args()

    from imaginaire_spade.config_files import load_data
    from imaginaire_spade.data.dataset import LabelMapDataset
    from imaginaire_spade.data.photos import decode_photo, photo_preview, show
    from imaginaire_spade.files import resize_image, write_image
    from imaginaire_spade.sheets import draw_contact_sheet, legend_of

    data = load_data(arguments.config, arguments.overrides)
    labels = data.labels
    dataset = LabelMapDataset([arguments.data_root], labels, images=data.images, suffixes=data.suffixes)

    made = [(index, found) for index, key in enumerate(dataset.keys) if (found := _image(arguments.generated, key))]
    if not made:
        raise DataError(
            f"{arguments.generated}: no image of any of the {len(dataset)} samples of {arguments.data_root}. Give the"
            " --output_dir that inference.py was run with on the same data"
        )
    wanted = min(len(made), arguments.rows * arguments.columns)
    chosen = [made[round(i * (len(made) - 1) / max(1, wanted - 1))] for i in range(wanted)]
    cells, names, maps = [], [], []
    for index, path in chosen:
        sample = dataset[index]
        assert sample.image is not None
        real = photo_preview(sample.image, dataset.images).permute(1, 2, 0).numpy()
        generated = show(decode_photo(path.read_bytes(), str(path), dataset.images), dataset.images)
        generated = resize_image(generated, *real.shape[:2])
        maps.append(sample.labels.numpy())
        cells.append([labels.colourise(maps[-1]), real, generated])
        names.append(sample.key)
    columns = min(arguments.columns, len(cells))
    starts = range(0, len(cells), columns)
    rows = [list(itertools.chain(*cells[start : start + columns])) for start in starts]
    titles, named = ["label map", "real", "generated"] * columns, [names[start : start + columns] for start in starts]
    sheet = draw_contact_sheet(rows, titles, named, legend_of(labels, maps))
    write_image(arguments.output, sheet)
    print(f"{len(chosen)} samples: {arguments.output}")


def _image(folder: Path, key: str) -> Path | None:
    candidates = [folder / f"{key}.{extension}" for extension in ("png", "jpg", "tif", "npy")]
    return next((path for path in candidates if path.is_file()), None)
