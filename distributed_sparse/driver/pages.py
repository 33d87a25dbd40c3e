"""PageAllocator: reference counts of the KV cache pages. One for all ranks, which hold the same tokens at the same page ids."""

from __future__ import annotations

NULL_PAGE = 0
"""Page 0: target of padded rows, and placeholder in page tables for evicted pages. Never allocated."""


def pages_for(num_tokens: int, page_size: int) -> int:
    """Number of pages for `num_tokens` tokens."""
    return -(-num_tokens // page_size)


class PageAllocator:
    """Reference-counted pages 1..num_pages-1 with reservations. The null page is never allocated.

    On admission a request reserves every page that it may ever need, then takes pages one by one as its tokens are computed.
    So `take` cannot fail for an admitted request, and no running request is ever preempted.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages} leaves no page beside the null page; raise kv_cache_memory_bytes")
        self.total = num_pages - 1
        self.reserved = 0
        self._free = list(range(num_pages - 1, 0, -1))
        self._references = [0] * num_pages

    @property
    def used(self) -> int:
        """Pages held by at least one sequence."""
        return self.total - len(self._free)

    def reserve(self, count: int) -> bool:
        """Reserve `count` pages. Return False, changing nothing, if too few are left."""
        if self.reserved + count > self.total:
            return False
        self.reserved += count
        return True

    def unreserve(self, count: int) -> None:
        assert 0 <= count <= self.reserved, f"unreserve({count}) with {self.reserved} reserved"
        self.reserved -= count

    def take(self, count: int) -> list[int]:
        """Allocate `count` pages, each with one reference."""
        assert count <= len(self._free), f"take({count}) with {len(self._free)} free: a page was taken without a reservation"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: list[int]) -> None:
        """Add a reference to each of `pages`."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is shared but has no references"
            self._references[page] += 1

    def release(self, pages: list[int]) -> None:
        """Drop one reference to each of `pages`; a page without references becomes free.

        Runs of ascending pages are allocated again in that order, since a CPU reads consecutive pages faster.
        """
        for page in reversed(pages):
            assert self._references[page] > 0, f"page {page} is released twice"
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)
