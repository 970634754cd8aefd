"""The table path against the dense path it replaces."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from imaginaire_spade import patterns
from imaginaire_spade.models.tables import sum_rows
from imaginaire_spade.patterns import Lookup, find_neighbourhoods


def code_map(n: int, h: int, w: int, num_codes: int, block: int, seed: int) -> torch.Tensor:
    """Blocks of block x block equal codes."""
    g = torch.Generator().manual_seed(seed)
    small = torch.randint(0, num_codes, (n, -(-h // block), -(-w // block)), generator=g)
    return small.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :h, :w].to(torch.int16)


def windows(maps: torch.Tensor, kernel_size: int, outside: int) -> torch.Tensor:
    """The plain computation: [N, H, W] -> [N, H, W, k * k]."""
    padded = F.pad(maps, (kernel_size // 2,) * 4, value=outside)
    return padded.unfold(1, kernel_size, 1).unfold(2, kernel_size, 1).flatten(3)


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 3),
    h=st.integers(1, 14),
    w=st.integers(1, 14),
    num_codes=st.sampled_from([1, 2, 3, 40, 2000, 30000]),
    block=st.integers(1, 6),
    kernel_size=st.sampled_from([1, 3, 5, 7]),
    seed=st.integers(0, 2**31),
)
def test_every_window_is_found_again_and_only_once(n, h, w, num_codes, block, kernel_size, seed):
    codes = code_map(n, h, w, num_codes, block, seed)
    found = find_neighbourhoods(codes, num_codes, kernel_size)
    wide = 2 * kernel_size - 1
    around = found.inner[found.outer][found.index]  # [N, H, W, k * k, k * k]
    places = torch.arange(wide**2).view(1, wide, wide)
    order = windows(places, kernel_size, -1)[0]
    order = order[kernel_size // 2 : wide - kernel_size // 2, kernel_size // 2 : wide - kernel_size // 2].flatten(0, 1)
    assert torch.equal(around, windows(codes.long(), wide, num_codes)[..., order])

    plain = windows(codes, wide, num_codes).flatten(0, 2)
    used = found.index.unique()
    assert len(used) == len(plain.unique(dim=0))
    assert len(found.outer.unique(dim=0)) == len(found.outer)


@settings(max_examples=50, deadline=None)
@given(places=st.integers(1, 50), terms=st.integers(1, 5), rows=st.integers(1, 60), seed=st.integers(0, 2**31))
def test_sums_of_rows_and_their_gradient_are_the_plain_ones(places, terms, rows, seed):
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(0, rows, (places, terms), generator=g)
    table = torch.randn(rows, 3, generator=g, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(places, 3, generator=g, dtype=torch.float64)
    fast, plain = sum_rows(table, Lookup(index, rows)), table[index].sum(1)
    torch.testing.assert_close(fast, plain)
    (a,), (b,) = (torch.autograd.grad((y * weights).sum(), table) for y in (fast, plain))
    torch.testing.assert_close(a, b)


def test_ids_that_do_not_fit_one_integer_are_packed_in_steps():
    g = torch.Generator().manual_seed(0)
    columns = list(torch.randint(0, 3, (9, 500), generator=g) * (2**30 // 2))
    ids, count = patterns._number(columns, 2**30 + 1)
    rows, plain = torch.stack(columns, 1).unique(dim=0, return_inverse=True)
    assert count == len(rows) and torch.equal(ids, plain)
