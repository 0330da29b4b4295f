"""Pages of the cache of keys and values: which are free, whose they are, what they hold.

A page holds the entries of `page_size` consecutive tokens of one text. Pages of prompts can be
shared: a page that is full has a key made of all tokens from the beginning of the text to its end,
and a text that begins with the same tokens takes the page as it is. A shared page is only read.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


class PagePool:
    """Counts who holds each page of a cache, and finds pages by what they hold.

    A page is free, held by at least one text, or cached: held by none, and kept for its content
    until it is the least recently used one and another is needed.

    Args:
        total: number of pages; they are called 0 .. total - 1.
    """

    def __init__(self, total: int):
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._holders = [0] * total
        self._keys: list[bytes | None] = [None] * total
        self._pages: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that `take` can still give: the free ones and the cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """Pages that no text holds, kept for what they hold."""
        return len(self._cached)

    @property
    def used(self) -> int:
        """Pages that a text holds."""
        return self.total - self.available

    def holders(self, page: int) -> int:
        """Number of texts that hold a page."""
        return self._holders[page]

    def take(self) -> int | None:
        """A page for one text to write to; None where every page is held.

        The content of the least recently used cached page is forgotten if no page is free.
        """
        if self._free:
            page = self._free.pop()
        elif self._cached:
            page, _ = self._cached.popitem(last=False)
            key = self._keys[page]
            assert key is not None
            del self._pages[key]
            self._keys[page] = None
        else:
            return None
        self._holders[page] = 1
        return page

    def find(self, key: bytes) -> int | None:
        """The page with this key, which is not held by the caller yet; None: there is none."""
        return self._pages.get(key)

    def share(self, page: int) -> None:
        """Hold a page that `find` gave."""
        if self._holders[page] == 0:
            del self._cached[page]
        self._holders[page] += 1

    def publish(self, page: int, key: bytes) -> None:
        """Let others find a page that its holder has filled and will not write to again.

        Nothing happens where another page has the key.
        """
        if self._keys[page] is None and key not in self._pages:
            self._keys[page] = key
            self._pages[key] = page

    def release(self, pages: Iterable[int]) -> None:
        """Hold the pages of a text, in its order, no longer.

        The last ones are forgotten first: a page is found only by texts that have all those
        before it.
        """
        for page in reversed(list(pages)):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if self._keys[page] is None:
                self._free.append(page)
            else:
                self._cached[page] = None

    def check(self) -> None:
        """Assert that every page is in one state, for tests."""
        free, cached = set(self._free), set(self._cached)
        held = {page for page, count in enumerate(self._holders) if count}
        assert len(free) == len(self._free)
        assert not free & cached and not free & held and not cached & held
        assert free | cached | held == set(range(self.total))
        assert min(self._holders) >= 0
        assert {self._keys[page] for page in cached} <= set(self._pages)
        assert all(self._keys[page] == key for key, page in self._pages.items())
        assert all(self._keys[page] is None for page in free)


def page_keys(tokens: Sequence[int], page_size: int) -> list[bytes]:
    """The key of each page of a text, the last one of which need not be full: a digest of all
    tokens up to the page's end, or the text's.

    Digests are BLAKE2b's of 256 bits, each over the one before it and the page's tokens: two texts
    with one key are not to be found.
    """
    keys: list[bytes] = []
    before = b""
    for begin in range(0, len(tokens), page_size):
        content = array("q", tokens[begin : begin + page_size]).tobytes()
        before = hashlib.blake2b(before + content, digest_size=32).digest()
        keys.append(before)
    return keys


def pages_of(tokens: int, page_size: int) -> int:
    """Number of pages that the entries of `tokens` tokens take."""
    return -(-tokens // page_size)
