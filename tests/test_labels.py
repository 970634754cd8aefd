"""LabelSpec: the table, and what it says of label maps that do not fit it."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from imaginaire_spade.errors import LabelError
from imaginaire_spade.labels import LabelSpec, distinct_colours


def ids(*values: int, dtype: type = np.uint8) -> np.ndarray:
    return np.array([values], dtype)


def test_identity_ignore_and_remap():
    spec = LabelSpec(num_classes=3, ignore=(255, 0), remap={7: 0, 11: 2})
    assert spec.to_train_ids(ids(7, 1, 2, 11, 255, 0), "x").tolist() == [[0, 1, 2, 2, 3, 3]]


def test_train_ids_are_an_array_of_their_own():
    for values in ((0, 1, 2), (0, 1, 255)):
        raw = ids(*values)
        raw.flags.writeable = False  # as PIL gives it
        mapped = LabelSpec(num_classes=3, ignore=(255,)).to_train_ids(raw, "x")
        assert mapped.flags.writeable and not np.shares_memory(mapped, raw)


@pytest.mark.parametrize("num_classes, dtype", [(1, np.uint8), (254, np.uint8), (255, np.int16), (3000, np.int16)])
def test_dtype_holds_dont_care_beside_the_error_mark(num_classes, dtype):
    spec = LabelSpec(num_classes=num_classes, ignore=(65535,))
    mapped = spec.to_train_ids(ids(0, num_classes - 1, 65535, dtype=np.uint16), "x")
    assert mapped.dtype == dtype
    assert mapped.tolist() == [[0, num_classes - 1, num_classes]]
    assert spec.error_id not in range(num_classes + 1)


@given(st.integers(1, 400), st.sets(st.integers(0, 700)), st.lists(st.integers(0, 700), min_size=1, max_size=20))
def test_table_equals_its_definition(num_classes, ignore, values):
    spec = LabelSpec(num_classes=num_classes, ignore=tuple(ignore))
    wrong = [v for v in values if v >= num_classes and v not in ignore]
    raw = ids(*values, dtype=np.uint16)
    if wrong:
        with pytest.raises(LabelError, match=r"map\.png"):
            spec.to_train_ids(raw, "map.png")
    else:
        expected = [num_classes if v in ignore else v for v in values]
        assert spec.to_train_ids(raw, "map.png").tolist() == [expected]


@given(
    st.integers(1, 256),
    st.sampled_from([(), (255,), (255, 254), (0, 255), (7,)]),
    st.sampled_from([{}, {3: 0}, {200: 0}]),
    st.lists(st.sampled_from([0, 1, 2, 3, 7, 8, 200, 253, 254, 255]), min_size=1, max_size=20),
)
def test_bytes_map_as_the_table_says(num_classes, ignore, remap, values):
    spec = LabelSpec(num_classes=num_classes, ignore=ignore, remap=remap)
    expected = spec.table[values]
    if (expected == spec.error_id).any():
        with pytest.raises(LabelError, match=r"map\.png"):
            spec.to_train_ids(ids(*values), "map.png")
        expected = np.where(expected == spec.error_id, num_classes, expected)
    mapped = spec.to_train_ids(ids(*values), "map.png", unknown="dont_care")
    assert mapped.dtype == spec.dtype and mapped.tolist() == [expected.tolist()]


@pytest.mark.parametrize(
    "spec, raw, advice",
    [
        (LabelSpec(num_classes=5), ids(0, 1, 255), r"data\.labels\.ignore: \[255\]"),
        (LabelSpec(num_classes=2), ids(0, 255), r"remap: \{255: 1\}"),
        (LabelSpec(num_classes=5), ids(1, 2, 5), r"remap: \{1: 0, 2: 1.*num_classes: 6"),
        (LabelSpec(num_classes=5), ids(0, 1, 5), r"ignore: \[5\] if they mean .*larger num_classes"),
        (LabelSpec(num_classes=5), ids(0, 9, 200), r"9, 200 outside the table \(num_classes: 5\)"),
        (LabelSpec(num_classes=5), ids(0, 3000, dtype=np.uint16), "3000"),
        (LabelSpec(num_classes=2), np.zeros((2, 2, 3), np.uint8), r"data\.labels\.palette"),
        (LabelSpec(num_classes=2), np.zeros((2, 2, 4), np.uint8), "4 channels"),
    ],
)
def test_complaints_name_file_values_and_the_line_to_write(spec, raw, advice):
    with pytest.raises(LabelError, match=rf"(?s)seg/a\.png.*{advice}"):
        spec.to_train_ids(raw, "seg/a.png")


def test_rgb_maps_through_the_palette_and_back():
    spec = LabelSpec(num_classes=3, palette=((255, 0, 0), (0, 0, 255), (10, 20, 30)), ignore=(255,))
    train = np.array([[0, 1, 2, 3]], np.uint8)
    rgb = spec.colourise(train)
    assert rgb.tolist() == [[[255, 0, 0], [0, 0, 255], [10, 20, 30], [0, 0, 0]]]
    assert spec.to_train_ids(rgb, "x").tolist() == train.tolist()
    rgb[0, 0] = (254, 0, 0)
    with pytest.raises(LabelError, match=r"1 colour\(s\).*\(254, 0, 0\)"):
        spec.to_train_ids(rgb, "x")


def test_a_colour_of_two_classes_is_refused_where_it_occurs():
    spec = LabelSpec(num_classes=3, palette=((6, 230, 230), (9, 9, 9), (6, 230, 230)), names=("road", "sea", "tower"))
    sea = np.full((2, 2, 3), 9, np.uint8)
    assert spec.to_train_ids(sea, "x").tolist() == [[1, 1], [1, 1]]
    sea[1, 1] = (6, 230, 230)
    for method in (spec.to_train_ids, spec.count_pixels):
        with pytest.raises(LabelError, match=r"a\.png: the colour \(6, 230, 230\) .* 0 \(road\), 2 \(tower\)"):
            method(sea, "a.png")
    assert spec.to_train_ids(sea, "x", unknown="dont_care").tolist() == [[1, 1], [1, 3]]


def test_black_is_refused_where_no_pixel_may_be_without_a_class():
    spec = LabelSpec(num_classes=1, palette=((255, 0, 0),))
    with pytest.raises(LabelError, match="black"):
        spec.to_train_ids(np.zeros((1, 1, 3), np.uint8), "x")


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"ignore": (70000,)}, "70000"),
        ({"ignore": (-40000,)}, "-40000"),
        ({"remap": {9: 5}}, "train ids are 0..4"),
        ({"remap": {9: 1}, "ignore": (9,)}, "both"),
        ({"names": ("a",)}, "names has 1"),
        ({"palette": ((0, 0, 256),) * 5}, "0..255"),
        ({"ignores": (1,)}, "ignores"),
    ],
)
def test_impossible_tables_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        LabelSpec(num_classes=5, **keys)


def test_names_colours_and_pickling():
    spec = LabelSpec(num_classes=2, names=("sky", "sea"))
    assert [spec.name(i) for i in range(3)] == ["sky", "sea", "don't care"]
    assert spec.colours.shape == (3, 3) and spec.colours.dtype == np.uint8
    assert len(np.unique(distinct_colours(182), axis=0)) == 182
    _ = spec.table
    assert np.array_equal(pickle.loads(pickle.dumps(spec)).table, spec.table)  # noqa: S301 (our own bytes)
