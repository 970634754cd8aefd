"""Synthesizer: three lines of Python give the pictures that the command line writes."""

import numpy as np
import pytest
import torch
from conftest import write_png
from PIL import Image
from test_inference import TREE, changed, save

from imaginaire_spade import Synthesizer
from imaginaire_spade.errors import CheckpointError, ConfigError, DataError, LabelError
from imaginaire_spade.labels import edges_from_ids

PALETTE = [[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0], [7, 8, 9]]
LABELS = np.kron(np.random.default_rng(0).integers(0, 5, (5, 7)), np.ones((8, 8))).astype(np.uint8)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def styled(folder) -> Synthesizer:
    """With style code, encoder and edges."""
    tree = changed(TREE, data__labels__palette=PALETTE, data__labels__names=list("abcde"))
    return Synthesizer.load(save(folder / "checkpoint_000000002400.pt", tree), device="cpu", size="own")


@pytest.fixture(scope="module")
def plain(folder) -> Synthesizer:
    """Without style code, encoder, edges and palette."""
    tree = changed(TREE, gen__style_dims=0, encoder=None, data__edges="none")
    return Synthesizer.load(str(save(folder / "plain.pt", tree)), device="cpu", size="own")


def test_every_kind_of_label_map_gives_its_kind_and_the_same_picture(styled, folder):
    picture = styled(LABELS, seed=3)
    assert picture.dtype == np.uint8 and picture.shape == (*LABELS.shape, 3)
    colours = styled.labels.colourise(LABELS)
    palette = Image.fromarray(LABELS, "P")
    palette.putpalette(bytes(np.array(PALETTE, np.uint8)))
    for same in (LABELS.astype(np.int64), LABELS.astype(np.uint16), LABELS[:, ::-1][:, ::-1], colours):
        assert np.array_equal(styled(same, seed=3), picture)
    file = Image.open(write_png(folder / "labels.png", LABELS.astype(np.uint16)))
    for same in (Image.fromarray(LABELS), palette, Image.fromarray(colours), file):
        made = styled(same, seed=3)
        assert isinstance(made, Image.Image) and made.mode == "RGB"
        assert np.array_equal(np.asarray(made), picture), same
    assert not np.array_equal(styled(LABELS, seed=4), picture)
    assert styled(LABELS[:1, :3]).shape == (1, 3, 3)


def test_files_tensors_lists_and_batches_of_label_maps(styled, plain, folder):
    picture, other = styled(LABELS, seed=3), np.rot90(LABELS, 2)
    path = write_png(folder / "labels_file.png", LABELS)
    for file in (path, str(path)):
        made = styled(file, seed=3)
        assert isinstance(made, Image.Image) and np.array_equal(np.asarray(made), picture)
    assert np.array_equal(styled(torch.from_numpy(LABELS), seed=3), picture)
    pair = styled([LABELS, Image.fromarray(LABELS), LABELS[:8]], seed=3)
    assert isinstance(pair[1], Image.Image) and pair[2].shape == (8, 56, 3)
    assert all(np.array_equal(np.asarray(one), picture) for one in pair[:2])
    for batch in (np.stack([LABELS, other]), torch.from_numpy(np.stack([LABELS, other])).long()):
        made = styled(batch, seed=3)
        assert made.shape == (2, *picture.shape)
        assert np.array_equal(made[0], picture) and np.array_equal(made[1], styled(other, seed=3))
    soft = np.eye(5, dtype=np.float32)[LABELS].transpose(2, 0, 1)
    assert np.array_equal(plain(np.stack([soft, soft]))[1], plain(torch.from_numpy(soft)))
    with pytest.raises(DataError, match=r"nowhere\.png: No such file"):
        styled(folder / "nowhere.png")
    with pytest.raises(ConfigError, match="belong to one label map"):
        styled([LABELS], edges=LABELS)
    for nothing in ([], np.zeros((0, 8, 8), np.uint8)):
        with pytest.raises(DataError, match="an empty list or batch"):
            styled(nothing)


def test_it_says_what_it_is(styled, plain):
    assert styled.labels.names == tuple("abcde") and styled.size == (64, 64)
    assert (styled.has_style_encoder, styled.style_dims, styled.wants_edges) == (True, 4, True)
    assert (plain.has_style_encoder, plain.style_dims, plain.wants_edges) == (False, 0, False)
    assert np.array_equal(plain(LABELS, seed=1), plain(LABELS))


def test_edges_are_given_or_drawn(styled):
    drawn = styled(LABELS)
    edges = edges_from_ids(LABELS)
    assert np.array_equal(styled(LABELS, edges=edges * 255), drawn)
    assert np.array_equal(styled(LABELS, edges=Image.fromarray(edges > 0)), drawn)
    assert np.array_equal(styled(LABELS, instances=LABELS.astype(np.int32) * 1000 + 7), drawn)
    assert not np.array_equal(styled(LABELS, edges=np.zeros_like(LABELS)), drawn)
    assert not np.array_equal(styled(LABELS, instances=np.zeros_like(LABELS)), drawn)


def test_the_style_of_a_picture(styled, folder):
    photo = np.random.default_rng(1).integers(0, 256, (100, 130, 3), dtype=np.uint8)
    code = styled.encode(photo)
    assert code.shape == (4,) and code.dtype == np.float32
    made = styled(LABELS, style=photo)
    for same in (Image.fromarray(photo), write_png(folder / "photo.png", photo), code):
        assert np.array_equal(styled(LABELS, style=same, seed=9), made)
    assert not np.array_equal(styled(LABELS, style=code + 2), made)


def test_one_mistake_one_message(styled, plain):
    photo = np.zeros((80, 80, 3), np.uint8)
    cases = [
        (plain, (LABELS + 9,), {}, LabelError, r"the label map: label value\(s\) 9, 10, 11.* outside the table"),
        (plain, (LABELS.astype(int) - 40000,), {}, LabelError, r"label values -40000\.\.-39996; ids are -32768"),
        (plain, (LABELS.astype(int) - 1,), {}, LabelError, r"label value\(s\) -1 outside the table"),
        (plain, (LABELS.astype(int) * 70000,), {}, LabelError, r"label values 0\.\.280000"),
        (plain, (photo,), {}, LabelError, "an RGB colour image, but label maps hold class ids"),
        (plain, (np.zeros((4, 4, 4), np.uint8),), {}, LabelError, "a label map of 4 channels"),
        (styled, (photo + 33,), {}, LabelError, r"palette does not have: \(33, 33, 33\), 100 % of the pixels"),
        (plain, (LABELS / 2,), {}, DataError, r"the label map: an array of float64 \[40, 56\]; give integers"),
        (plain, (LABELS[:0],), {}, DataError, r"\[0, 56\]"),
        (plain, ("a.png",), {}, DataError, r"^a\.png: No such file"),
        (plain, (7,), {}, DataError, "the label map: a int; give a numpy array, a PIL image or a file"),
        (plain, (Image.new("RGBA", (8, 8)),), {}, DataError, "a PIL image of mode RGBA; give one of 1, L, P, RGB"),
        (plain, (LABELS,), {"seed": "x"}, ConfigError, "seed: 'x'; give a whole number"),
        (plain, (LABELS,), {"edges": LABELS}, ConfigError, "edges: this generator takes label maps alone"),
        (plain, (LABELS,), {"style": photo}, CheckpointError, "without a style encoder; it takes no style at all"),
        (plain, (LABELS,), {"style": np.zeros(4)}, CheckpointError, "style: this generator takes no style code"),
        (styled, (LABELS,), {"style": np.zeros(3)}, DataError, "a code of 3 numbers; this generator takes 4"),
        (styled, (LABELS,), {"style": np.full(4, np.nan)}, DataError, "numbers that are not finite"),
        (styled, (LABELS,), {"style": photo / 2}, DataError, r"style: an array of float64 \[80, 80, 3\]"),
        (styled, (LABELS,), {"style": "gone.jpg"}, DataError, r"style image gone\.jpg: cannot be read"),
        (styled, (LABELS,), {"edges": LABELS[1:]}, DataError, r"edges \[39, 56\] and the label map \[40, 56\] differ"),
        (styled, (LABELS,), {"edges": LABELS, "instances": LABELS}, ConfigError, "both given"),
    ]  # fmt: skip
    for synthesizer, arguments, keywords, kind, message in cases:
        with pytest.raises(kind, match=message):
            synthesizer(*arguments, **keywords)
    with pytest.raises(CheckpointError, match=r"gone\.pt: no such file"):
        Synthesizer.load("gone.pt")
