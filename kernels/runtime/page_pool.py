"""Pages that are free, and sequences' pages by number. Nothing here touches memory."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """`num_pages` pages of `page_size` tokens. The page given back last is taken next."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_free = [True] * num_pages

    @property
    def free(self) -> int:
        """How many pages nobody has."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """`count` pages. Raises RuntimeError when so many are not free."""
        if count > len(self._free):
            raise RuntimeError(f"{count} pages were asked for, {len(self._free)} of {self.num_pages} are free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._is_free[page] = False
        return pages

    def give_back(self, pages: Iterable[int]) -> None:
        """Raises RuntimeError for a page that is free already."""
        for page in pages:
            if self._is_free[page]:
                raise RuntimeError(f"page {page} was given back twice")
            self._is_free[page] = True
            self._free.append(page)
