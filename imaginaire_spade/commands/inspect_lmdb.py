"""Show what an LMDB (ours or imaginaire's) or a raw folder holds: counts, sizes, shares of classes, damage.

--verify checks every sample as build_lmdb.py does. The script can also draw samples and the legend, and extract one
sample.

python scripts/inspect_lmdb.py datasets/my/train                           # from the manifest, at once
python scripts/inspect_lmdb.py datasets/my/train --verify                  # checksums, and every value decoded
python scripts/inspect_lmdb.py datasets/my/train --legend legend.png --contact_sheet sheet.png
python scripts/inspect_lmdb.py datasets/my/train --extract 0001 --output_dir out
"""

from pathlib import Path

from imaginaire_spade.cli import CommandParser
from imaginaire_spade.errors import DataError


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("root", type=Path, help="LMDB root, or a folder of images/, seg_maps/ ...")
    parser.add_argument("--config", help="YAML with data.labels (default: the table that the data set was built with)")
    parser.add_argument("--verify", action="store_true", help="compare checksums, decode everything; exit 2 on damage")
    parser.add_argument(
        "--skip_bad", action="store_true", help="with --verify: list what is damaged in ROOT.bad_files.txt, and go on"
    )
    parser.add_argument("--num_workers", type=int, help="processes that read (default: min(8, cores))")
    parser.add_argument("--legend", type=Path, help="image to write: id, colour, name and share of every class")
    parser.add_argument("--contact_sheet", type=Path, help="image to write: label maps and photos")
    parser.add_argument("--rows", type=int, default=6, help="samples on the contact sheet (default: 6)")
    parser.add_argument("--extract", metavar="KEY", help="write the files of this sample")
    parser.add_argument("--output_dir", type=Path, default=Path(), help="where --extract writes (default: here)")
    arguments = parser.parse_args()

    from imaginaire_spade.config_files import load_data
    from imaginaire_spade.data.label_files import read_labels
    from imaginaire_spade.data.lmdb_source import MANIFEST
    from imaginaire_spade.data.photos import built_spec, decode_photo, is_upright, measured, read_header, show
    from imaginaire_spade.files import read_json, write_bytes, write_image
    from imaginaire_spade.labels import LabelSpec
    from imaginaire_spade.lmdb_builder.build import extract, look_through, open_data, stored_labels, stored_types
    from imaginaire_spade.lmdb_builder.shard import bad_files, summary
    from imaginaire_spade.sheets import draw_class_chart, draw_contact_sheet, legend_of

    root = arguments.root
    if arguments.extract:
        for path in extract(root, arguments.extract, arguments.output_dir):
            print(path)
        return
    data = load_data(arguments.config) if arguments.config else None
    labels = data.labels if data else stored_labels(root)
    known = read_json(root / MANIFEST) if (root / MANIFEST).is_file() else {}
    source = open_data(root, data)
    if "class_shares" in known and labels:
        try:
            print(summary(known, labels, root))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(f"{root / MANIFEST}: damaged ({error!r}): build the data set again") from None
    else:
        print(f"{len(source.keys)} samples of {', '.join(stored_types(source, data))}: {root} (no manifest of ours)")
    shares = list(known["class_shares"] or []) if "class_shares" in known else []
    if arguments.verify or (arguments.legend and not shares):
        contents = look_through(root, labels, arguments.num_workers, data)
        sizes = ", ".join(f"{size} ({count})" for size, count in contents.sizes.most_common(5))
        for data_type, num_bytes in contents.num_bytes.items():
            print(f"{data_type}: {num_bytes / 1e6:.1f} MB")
        print(f"read {contents.num_samples} samples; sizes (height x width): {sizes}")
        if contents.problems and arguments.skip_bad:
            listed = bad_files(root.resolve())
            write_bytes(listed, "".join(f"{problem}\n" for problem in contents.problems).encode())
            print(f"{len(contents.problems)} problem(s), listed in {listed}")
        elif contents.problems:
            table, checked = labels or LabelSpec(num_classes=1), contents.num_samples
            messages = table.join_complaints(contents.problems, checked)
            first = "\n  ".join(messages[:20])
            more = "\n--skip_bad lists all of them in a file" if len(messages) > 20 else ""
            raise DataError(f"{root}: {len(contents.problems)} problem(s):\n  {first}{more}")
        else:
            print("everything decodes, checksums agree" if known else "everything decodes (no checksums to compare)")
        if labels:
            total = max(1, contents.class_pixels.total())
            shares = [contents.class_pixels[i] / total for i in range(labels.num_classes + 1)]
    if not (arguments.legend or arguments.contact_sheet):
        return
    if not labels:
        raise DataError(f"{root}: no label table is stored there: give --config")
    if arguments.legend:
        write_image(arguments.legend, draw_class_chart(labels, shares))
        print(f"legend: {arguments.legend}")
    if arguments.contact_sheet:
        step = max(1, len(source.keys) // arguments.rows)
        types = [t for t in ("seg_maps", "images") if source.has(t)]
        images = measured(built_spec(root) if known or not data else data.images, [root])
        rows, maps, keys = [], [], source.keys[::step][: arguments.rows]
        for key in keys:
            cells, size = [], None
            for t in types:
                where, content = source.describe(key, t), source.read(key, t)
                if t == "seg_maps":
                    ids = labels.to_train_ids(read_labels(content, where, labels), where)
                    maps.append(ids)
                    cells.append(labels.colourise(ids))
                    size = cells[0].shape[:2]
                else:
                    upright = is_upright(read_header(content, where), images, size, where)
                    cells.append(show(decode_photo(content, where, images, upright=upright), images))
            rows.append(cells)
        titles = [{"seg_maps": "label map", "images": "photo"}[t] for t in types]
        sheet = draw_contact_sheet(rows, titles, [[key] for key in keys], legend_of(labels, maps))
        write_image(arguments.contact_sheet, sheet)
        print(f"contact sheet: {arguments.contact_sheet}")
