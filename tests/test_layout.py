"""SemanticLayout against the plain one-hot computations it stands for."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from imaginaire_spade.layout import LayoutSpec, NoiseRegions, SemanticLayout, borders


def random_layout(spec: LayoutSpec, n: int, h: int, w: int, seed: int = 0) -> SemanticLayout:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, spec.num_classes + 1, (n, h, w), generator=g).to(torch.int16)
    edges = torch.randint(0, 2, (n, h, w), generator=g).to(torch.uint8) if spec.has_edges else None
    distances = torch.rand(n, 2, h, w, generator=g) * 2 - 1 if spec.has_distances else None
    return SemanticLayout(spec, labels, edges, distances)


def plain_one_hot(layout: SemanticLayout) -> torch.Tensor:
    channels = [(layout.labels == c).float() for c in range(layout.spec.num_label_channels)]
    if layout.edges is not None:
        channels.append(layout.edges.float())
    return torch.stack(channels, 1)


@settings(max_examples=40, deadline=None)
@given(
    num_classes=st.integers(1, 300),
    dont_care=st.booleans(),
    edges=st.booleans(),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    new=st.tuples(st.integers(1, 70), st.integers(1, 70)),
)
def test_one_hot_and_resizing_equal_the_plain_computation(num_classes, dont_care, edges, size, new):
    layout = random_layout(LayoutSpec(num_classes, dont_care, edges), 2, *size)
    dense = plain_one_hot(layout)
    assert torch.equal(layout.one_hot(), dense)
    resized = layout.resized(*new)
    assert torch.equal(resized.one_hot(), F.interpolate(dense, size=new, mode="nearest"))
    assert layout.resized(*new) is resized  # cached


def kinds_of_noise(n: int, dims: int, h: int, w: int, seed: int = 0) -> dict[str, tuple]:
    """Each kind of noise: as given to a layout, and the map it stands for."""
    g = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, 3, dims, generator=g)
    index = torch.randint(0, 3, (n, h, w), generator=g).to(torch.int16)
    per_pixel = vectors[torch.arange(n)[:, None, None], index.long()].permute(0, 3, 1, 2)
    z = vectors[:, 0].clone()
    return {
        "image": (z, z[:, :, None, None].expand(-1, -1, h, w)),
        "region": (NoiseRegions(vectors, index), per_pixel),
        "pixel": (per_pixel.contiguous(), per_pixel),
    }


@pytest.mark.parametrize("kind", ["image", "region", "pixel"])
@pytest.mark.parametrize("dense", [False, True])
def test_noise_comes_first_and_is_resized_and_sliced_as_labels_are(kind, dense):
    plain = random_layout(LayoutSpec(5, True, True), 3, 12, 14)
    noise, expected = kinds_of_noise(3, 4, 12, 14)[kind]
    own = SemanticLayout.from_dense(plain.spec, plain.one_hot()) if dense else plain
    layout = own.with_noise(noise)
    assert layout.spec == LayoutSpec(5, True, True, num_noise_channels=4) and layout.spec.num_channels == 11
    assert layout.is_discrete == (not dense and kind != "pixel") and own.noise is None
    whole = torch.cat([expected, plain.one_hot()], 1)
    assert torch.equal(layout.one_hot(), whole) and torch.equal(layout[1:3].one_hot(), whole[1:3])
    for size in ((5, 7), (24, 14)):
        assert torch.equal(layout.resized(*size).one_hot(), F.interpolate(whole, size=size, mode="nearest"))
    if not dense:
        assert torch.equal(layout.dense_channels(torch.float32), torch.cat([expected, whole[:, -1:]], 1))
    assert torch.equal(layout[2:].resized(6, 7)[:1].one_hot(), whole[2:, :, ::2, ::2])
    assert all(tensor.is_meta for tensor in layout.to("meta").tensors())
    with pytest.raises(ValueError, match="does not belong to labels"):
        plain[:2].with_noise(noise)


def test_dense_layouts_keep_their_gradient():
    spec = LayoutSpec(3, True, True)
    semantics = torch.rand(2, 5, 8, 8, requires_grad=True)
    layout = SemanticLayout.from_dense(spec, semantics)
    assert torch.equal(layout.labels, semantics[:, :4].argmax(1))
    layout.resized(4, 4).one_hot().sum().backward()
    assert semantics.grad is not None and semantics.grad.sum() == 2 * 5 * 16


def test_a_slice_has_its_images_labels_edges_and_distances():
    layout = random_layout(LayoutSpec(4, True, True, True), 6, 5, 7)
    part = layout[1:4]
    assert len(part) == 3
    for own, whole in zip(part.tensors(), layout.tensors(), strict=True):
        assert torch.equal(own, whole[1:4])


def test_edges_follow_the_labels_at_their_full_size():
    spec = LayoutSpec(4, True, True)
    labels = random_layout(spec, 6, 12, 14).labels
    drawn = SemanticLayout(spec, labels, borders(labels))
    for views in (
        lambda x: x,
        lambda x: x[1:3],
        lambda x: x.to("cpu"),
        lambda x: x.resized(6, 7),
        lambda x: x[1:3][1:],
    ):
        layout = SemanticLayout(spec, labels, "labels")
        assert layout.tensors() == [labels] and layout.is_discrete
        view, expected = views(SemanticLayout(spec, labels, "labels")), views(drawn)
        assert torch.equal(view.edges, expected.edges) and torch.equal(view.one_hot(), expected.one_hot())
        assert len(view.tensors()) == 2 and view.edges is view.edges  # drawn once
    assert not torch.equal(drawn.resized(6, 7).edges, borders(drawn.resized(6, 7).labels))
    moved = SemanticLayout(spec, labels, "labels").to("meta")
    assert len(moved.tensors()) == 1 and moved.edges.device.type == "meta"  # drawn where they are needed
    with pytest.raises(ValueError, match="edges given"):
        SemanticLayout(LayoutSpec(4), labels, "labels")


def test_distances_are_resized_as_the_labels_are():
    layout = random_layout(LayoutSpec(4, has_distances=True), 2, 13, 17)
    for size in ((5, 17), (26, 8)):
        expected = F.interpolate(layout.distances, size=size, mode="nearest")
        assert torch.equal(layout.resized(*size).distances, expected)
    with pytest.raises(ValueError, match="do not belong to labels"):
        SemanticLayout(layout.spec, layout.labels, None, layout.distances[..., :5])


@pytest.mark.parametrize(
    ("labels", "edges", "message"),
    [
        (torch.zeros(1, 4, 4), None, "uint8 or int16"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.uint8), None, "uint8 or int16"),
        (torch.zeros(1, 4, 4, dtype=torch.uint8), None, "edges missing"),
        (torch.zeros(1, 4, 4, dtype=torch.uint8), torch.zeros(1, 4, 5), "differ in shape"),
    ],
)
def test_wrong_tensors_are_named(labels, edges, message):
    with pytest.raises(ValueError, match=message):
        SemanticLayout(LayoutSpec(3, has_edges=True), labels, edges)
