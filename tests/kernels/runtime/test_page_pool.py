"""Pages: no page has two owners, whatever is taken and given back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qoq.kernels.runtime.page_pool import PagePool


@given(st.integers(1, 40), st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60))
def test_no_page_has_two_owners(num_pages: int, steps: list[tuple[bool, int]]) -> None:
    pool, owned = PagePool(num_pages, 64), []
    for takes, number in steps:
        if takes and number <= pool.free:
            owned.append(pool.take(number))
        elif takes:
            with pytest.raises(RuntimeError, match="are free"):
                pool.take(number)
        elif owned:
            pool.give_back(owned.pop(number % len(owned)))
        held = [page for pages in owned for page in pages]
        assert len(held) == len(set(held))
        assert set(held) <= set(range(num_pages))
        assert pool.free == num_pages - len(held)
    for pages in owned:
        pool.give_back(pages)
    assert sorted(pool.take(num_pages)) == list(range(num_pages))


def test_pages_for_tokens() -> None:
    pool = PagePool(3, 64)
    assert [pool.pages_for(tokens) for tokens in (0, 1, 64, 65, 192)] == [0, 1, 1, 2, 3]


def test_a_page_is_given_back_once() -> None:
    pool = PagePool(2, 64)
    (page,) = pool.take(1)
    pool.give_back([page])
    with pytest.raises(RuntimeError, match=f"page {page} was given back twice"):
        pool.give_back([page])
