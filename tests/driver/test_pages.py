"""Pages are given out once, shared by count, and free again when nobody holds them."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from distributed_sparse.driver.pages import PageAllocator, pages_for


@pytest.mark.parametrize(("num_tokens", "pages"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_a_page_is_counted_as_soon_as_one_token_needs_it(num_tokens: int, pages: int) -> None:
    assert pages_for(num_tokens, 16) == pages


def test_every_page_but_the_null_page_is_given_out_once() -> None:
    allocator = PageAllocator(8)
    assert allocator.total == 7
    given = allocator.take(3) + allocator.take(4)
    assert sorted(given) == [1, 2, 3, 4, 5, 6, 7]
    assert allocator.used == 7


def test_a_cache_of_the_null_page_alone_is_refused() -> None:
    for num_pages in (0, 1):
        with pytest.raises(ValueError, match=f"num_pages={num_pages} leaves no page.*raise kv_cache_memory_bytes"):
            PageAllocator(num_pages)


def test_a_reservation_that_does_not_fit_changes_nothing() -> None:
    allocator = PageAllocator(8)
    assert allocator.reserve(5)
    assert not allocator.reserve(3)
    assert allocator.reserved == 5
    assert allocator.reserve(2)
    allocator.unreserve(7)
    assert allocator.reserved == 0


def test_a_shared_page_is_free_when_its_last_holder_drops_it() -> None:
    allocator = PageAllocator(4)
    page = allocator.take(1)
    allocator.share(page)
    allocator.share(page)
    for _ in range(2):
        allocator.release(page)
        assert allocator.used == 1
    allocator.release(page)
    assert allocator.used == 0


def test_misuse_is_caught_where_it_happens() -> None:
    allocator = PageAllocator(4)
    page = allocator.take(1)
    allocator.release(page)
    with pytest.raises(AssertionError, match="released twice"):
        allocator.release(page)
    with pytest.raises(AssertionError, match="has no references"):
        allocator.share(page)
    with pytest.raises(AssertionError, match="without a reservation"):
        allocator.take(4)
    with pytest.raises(AssertionError, match=r"unreserve\(1\) with 0 reserved"):
        allocator.unreserve(1)


class Pages(RuleBasedStateMachine):
    """Any order of take, share and release, beside a plain count of holders."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(12)
        self.holders: Counter[int] = Counter()

    @rule(target=held, count=st.integers(0, 5))
    def take(self, count: int) -> list[int]:
        count = min(count, self.allocator.total - self.allocator.used)
        pages = self.allocator.take(count)
        assert len(set(pages)) == count
        assert not any(self.holders[page] for page in pages), "a page that is held was given out again"
        self.holders.update(pages)
        return pages

    @rule(target=held, pages=held)
    def share(self, pages: list[int]) -> list[int]:
        pages = [page for page in pages if self.holders[page]]
        self.allocator.share(pages)
        self.holders.update(pages)
        return pages

    @precondition(lambda self: +self.holders)
    @rule(pages=consumes(held))
    def release(self, pages: list[int]) -> None:
        self.allocator.release(pages)
        self.holders.subtract(pages)

    @invariant()
    def no_page_is_lost_and_the_null_page_is_never_given(self) -> None:
        assert self.allocator.used == len(+self.holders)
        assert set(+self.holders) <= set(range(1, 12))


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)
