"""Segmentation scores: the confusion matrix, what a segmenter's classes mean, and where predictions come from."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import write_png
from hypothesis import given, settings
from hypothesis import strategies as st

from imaginaire_spade.errors import ConfigError, DataError, LabelError
from imaginaire_spade.evaluation.images import SourceImage
from imaginaire_spade.evaluation.report import Protocol, Report
from imaginaire_spade.evaluation.segmentation import (
    Confusion,
    NetworkSegmentation,
    Segmentation,
    StoredSegmentation,
    match_labels,
    read_mapping,
)
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.pretrained.segmenters import Segmenter, hugging_face_segmenter

TABLE = LabelSpec(num_classes=4, ignore=(255,), names=("sky", "road", "traffic sign", "tree"))


def ids(*rows: str) -> np.ndarray:
    return np.array([[int(i) for i in row] for row in rows], np.uint8)


# ------------------------------------------------------------------------------------------------ the matrix


def test_a_matrix_worked_out_by_hand():
    # Classes 0, 1, 2; 3 = without a class in the truth, outside the table in the prediction. Class 2 never occurs.
    confusion = Confusion.of(ids("0011", "0031"), ids("0010", "1233"), 3)
    assert confusion.counts.tolist() == [[2, 1, 1, 0], [1, 1, 0, 1], [0, 0, 0, 0]]
    assert (confusion.pixels, confusion.ignored) == (7, 1)
    assert confusion.pixel_accuracy == 3 / 7
    assert confusion.iou[:2].tolist() == [2 / 5, 1 / 4] and np.isnan(confusion.iou[2])
    assert confusion.mean_iou == (2 / 5 + 1 / 4) / 2


def test_classes_that_the_segmenter_lacks_are_left_out_of_the_truth():
    confusion = Confusion.of(ids("0011"), ids("0101"), 2, unscored=(1,))
    assert confusion.counts.tolist() == [[1, 1, 0], [0, 0, 0]] and confusion.ignored == 2
    assert confusion.mean_iou == 0.5  # class 1 does not occur any more


def test_nothing_to_score_is_not_a_number():
    empty = Confusion.of(ids("22"), ids("01"), 2)
    assert np.isnan(empty.pixel_accuracy) and np.isnan(empty.mean_iou) and empty.ignored == 2


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(0, 2**32 - 1), st.integers(1, 6), st.data())
def test_parts_add_up_to_the_whole_and_agree_with_the_definition(num_classes, seed, count, data):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, num_classes + 1, (count, 5, 7))
    predicted = np.where(rng.random(truth.shape) < 0.5, truth, rng.integers(0, num_classes + 1, truth.shape))
    unscored = tuple(data.draw(st.sets(st.integers(0, num_classes - 1))))
    parts = [Confusion.of(t, p, num_classes, unscored) for t, p in zip(truth, predicted, strict=True)]
    at = data.draw(st.integers(0, count))
    zero = Confusion.zero(num_classes)
    total = sum(parts[at:], zero) + sum(parts[:at], zero)  # another order, other groups
    whole = Confusion.of(truth.reshape(-1, 7), predicted.reshape(-1, 7), num_classes, unscored)
    assert np.array_equal(total.counts, whole.counts) and total.ignored == whole.ignored
    assert total.pixels + total.ignored == truth.size
    counted = ~np.isin(truth, [*unscored, num_classes])
    for index in range(num_classes):
        true, guess = (truth == index) & counted, (predicted == index) & counted
        expected = (true & guess).sum() / (true | guess).sum() if true.any() else np.nan
        assert np.isclose(total.iou[index], expected, equal_nan=True)
    if counted.any():
        assert np.isclose(total.pixel_accuracy, (truth == predicted)[counted].mean())


# ------------------------------------------------------------------------------------------------ names


def test_labels_are_matched_by_name():
    train_ids, unscored = match_labels(["Road", "tree; palm tree", "Traffic-Sign ", "car", "SKY"], TABLE)
    assert train_ids.tolist() == [1, 3, 2, 4, 0] and unscored == ()


def test_a_stated_mapping_joins_leaves_out_and_goes_before_names():
    stated = {"tree": ["grass", "bush"], "traffic sign": None, 1: "street"}
    train_ids, unscored = match_labels(["sky", "street", "grass", "bush", "road"], TABLE, stated)
    assert train_ids.tolist() == [0, 1, 3, 3, 4] and unscored == (2,)


def test_without_names_ids_serve():
    nameless = LabelSpec(num_classes=3)
    assert match_labels(["a", "b", "c"], nameless)[0].tolist() == [0, 1, 2]
    assert match_labels([f"LABEL_{i}" for i in range(4)], TABLE)[0].tolist() == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match=r"2 labels and the label table 3 classes, and the table has no names"):
        match_labels(["a", "b"], nameless)


@pytest.mark.parametrize(
    ("names", "stated", "message"),
    [
        (["sky", "road", "traffic sgn"], None, r"2 of the 4 classes of the table: traffic sign \(did you mean 'traffic"
         r" sgn'\?\), tree\. Write --segmenter_labels FILE, .*: traffic sign: LABEL OF THE SEGMENTER, or traffic sign:"
         " null"),
        (["sky", "road"], {"traffic sgin": None}, r"'traffic sgin' is no class of the label table \(did you mean"),
        (["sky", "road"], {"tree": "rod"}, r"tree: .* has no label 'rod' \(did you mean 'road'\?\)"),
        (["sky", "road"], {"tree": 7}, "has no label 7"),
        (["sky", "road", "plant"], {"tree": "plant", "traffic sign": "plant"}, "'plant' .* would be both tree and"),
    ],
)  # fmt: skip
def test_labels_that_do_not_match_are_said_in_words(names, stated, message):
    with pytest.raises(ConfigError, match=message):
        match_labels(names, TABLE, stated)


def test_a_mapping_is_read_from_yaml_and_json(tmp_path):
    for name, text in (
        ("map.yaml", "tree: [grass, 3]\nsky: null\n"),
        ("map.json", '{"tree": ["grass", 3], "sky": null}'),
    ):
        (tmp_path / name).write_text(text)
        assert read_mapping(tmp_path / name) == {"tree": ["grass", 3], "sky": None}
    (tmp_path / "list.yaml").write_text("[1]")
    for name, message in (("list.yaml", "must be a mapping"), ("nowhere.yaml", "cannot be read")):
        with pytest.raises(ConfigError, match=message):
            read_mapping(tmp_path / name)


# ------------------------------------------------------------------------------------------------ predictions


def by_redness(names: tuple[str, ...]) -> Segmenter:
    """A network that reads the class off the red channel, at half the picture's size."""

    def scores(photo: np.ndarray) -> torch.Tensor:
        red = torch.from_numpy(photo[::2, ::2, 0].astype(np.int64))
        return torch.nn.functional.one_hot(red.clamp(max=len(names) - 1), len(names)).permute(2, 0, 1).float()

    return Segmenter(names, scores, "by redness", "0" * 64)


def image_of(classes: np.ndarray, truth: np.ndarray) -> SourceImage:
    """A grey image of these levels, and the label map that belongs to it."""
    return SourceImage(torch.from_numpy(np.stack([classes.astype(np.uint8)] * 3)), label_map=truth)


def report_of(segmentation: Segmentation, generated: Confusion, real: Confusion) -> Report:
    stamp = dict.fromkeys(field.name for field in fields(Protocol))
    return segmentation.add_to(Report({}, Protocol(**stamp), {}), generated, real)


def test_generated_and_real_stand_side_by_side():
    labels = LabelSpec(num_classes=3, names=("a", "b", "c"), ignore=(255,))
    segmentation = NetworkSegmentation(by_redness(("c", "b", "a")), labels)
    truth = np.kron(ids("01", "13"), np.ones((4, 4), np.uint8))  # 3: don't care
    real = segmentation.judge("real", "x", image_of(2 - np.minimum(truth, 2), truth))
    # Half the size of the label map; the quarter of class a is taken for c.
    levels = np.kron(ids("01", "10"), np.ones((2, 2), np.uint8))
    generated = segmentation.judge("generated", "x", image_of(levels, truth))
    assert (real.mean_iou, generated.mean_iou) == (1.0, 0.5)
    report = report_of(segmentation, generated, real)
    assert report.scores == {
        "pixel_accuracy": 2 / 3, "miou": 0.5, "pixel_accuracy_real": 1.0, "miou_real": 1.0,
    }  # fmt: skip
    details = report.details["segmentation"]
    assert [(c["name"], c["iou"], c["iou_real"], c["mistaken_for"]) for c in details["classes"]] == [
        ("a", 0.0, 1.0, "c"), ("b", 1.0, 1.0, None),
    ]  # fmt: skip
    assert details["absent_classes"] == ["c"] and details["unscored_classes"] == []
    assert (details["pixels"], details["ignored_pixels"]) == (48, 16)
    stamp = report.protocol.segmentation
    assert details["segmenter"] == "by redness" and stamp.startswith(f"sha256 {'0' * 64}, input")
    other = NetworkSegmentation(by_redness(("a", "b", "c")), labels)
    assert report_of(other, generated, real).protocol.segmentation != stamp
    assert report_of(segmentation, generated + generated, real).warnings == (
        "segmentation: 2 generated images, but 1 of their photos could be read",
    )


def test_a_photo_is_judged_at_the_size_of_the_generated_image():
    labels = LabelSpec(num_classes=2, names=("a", "b"))
    seen = []
    segmenter = by_redness(("a", "b"))
    spy = replace(segmenter, scores=lambda photo: seen.append(photo.shape) or segmenter.scores(photo))
    image = image_of(np.zeros((8, 12)), np.zeros((6, 6), int))
    NetworkSegmentation(spy, labels).judge("real", "x", image, size=(4, 6))
    assert seen == [(4, 6, 3)]


def test_stored_id_maps(tmp_path):
    labels = LabelSpec(num_classes=3, ignore=(255,))
    write_png(tmp_path / "maps/seq/x.png", ids("02", "10"))
    segmentation = StoredSegmentation(tmp_path / "maps", tmp_path / "maps", labels)
    picture = np.zeros((4, 4, 3), np.uint8)
    predicted = segmentation.predict("real", "seq/x", picture, (4, 4))
    assert predicted.tolist() == np.kron(ids("02", "10"), np.ones((2, 2), int)).tolist()
    real = segmentation.judge("real", "seq/x", image_of(np.zeros((4, 4)), ids("02", "10")))
    one, other = (report_of(segmentation, real, judged) for judged in (real, Confusion.zero(3)))
    assert one.scores["miou_real"] == 1.0 and one.protocol.segmentation != other.protocol.segmentation
    segmentation.check(["seq/x"])
    with pytest.raises(
        DataError, match=r"no predicted id map for 1 of 2 samples, such as seq/y\. Expected .*seq/y\.png"
    ):
        segmentation.check(["seq/x", "seq/y"])
    write_png(tmp_path / "maps/z.png", ids("07"))
    with pytest.raises(LabelError, match=r"z\.png: label value\(s\) 7 outside the table"):
        StoredSegmentation(tmp_path / "maps", tmp_path / "maps", labels).predict("generated", "z", picture, (1, 2))
    with pytest.raises(DataError, match="no such folder of predicted id maps"):
        StoredSegmentation(tmp_path / "maps", tmp_path / "nowhere", labels)


def test_a_mask_classifying_network_of_hugging_face_gives_the_librarys_own_ids(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the package transformers (extra eval) is not installed")
    torch.manual_seed(0)
    backbone = transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.MaskFormerConfig(
        backbone_config=backbone, num_labels=3, fpn_feature_size=32, mask_feature_size=32,
        decoder_config=transformers.DetrConfig(d_model=32, decoder_layers=1, decoder_attention_heads=1,
                                               decoder_ffn_dim=16, num_queries=5),
    )  # fmt: skip
    transformers.MaskFormerForInstanceSegmentation(config).save_pretrained(tmp_path)
    processor = transformers.MaskFormerImageProcessor(size={"height": 64, "width": 64}, do_reduce_labels=False)
    processor.save_pretrained(tmp_path)
    segmenter = hugging_face_segmenter(str(tmp_path), torch.device("cpu"))
    photo = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    network = transformers.MaskFormerForInstanceSegmentation.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        outputs = network(**processor(images=photo, return_tensors="pt"))
    (expected,) = processor.post_process_semantic_segmentation(outputs, [(40, 56)])
    assert (segmenter.label(photo) == expected.numpy()).mean() > 0.98  # the library resizes masks before the sigmoid
    assert len(segmenter.sha256) == 64 and '"image_mean"' in segmenter.preprocessing
    assert segmenter.label(photo).shape == (40, 56)
