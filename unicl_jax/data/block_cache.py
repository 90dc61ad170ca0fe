"""Blocks of files that were read last, for any number of threads."""

import concurrent.futures
import threading
from collections.abc import Callable, Hashable

_NUM_THREADS = 16  # that fetch ahead; remote files wait on the network


class BlockCache:
    """Keeps what was fetched until as many others were asked for since.

    Whoever asks first for a block fetches it, in its own thread; others that want it
    meanwhile wait for that. Different blocks are fetched side by side.
    """

    def __init__(self, fetch: Callable[[Hashable], bytes], num_blocks: int):
        """Holds nothing yet.

        Args:
          fetch: a block by its key; called from many threads.
          num_blocks: that are kept at most, at least 1.
        """
        self._fetch, self._num_blocks = fetch, max(1, num_blocks)
        self._lock = threading.Lock()
        self._blocks = {}  # key -> future bytes, the least recently asked for first
        self._pool = concurrent.futures.ThreadPoolExecutor(_NUM_THREADS, "fetch")

    def get(self, key: Hashable) -> bytes:
        """Returns a block, or raises what fetching it raised; errors are not kept."""
        block, is_new = self._entry(key)
        if is_new:
            self._fill(key, block)
        return block.result()

    def start(self, key: Hashable) -> None:
        """Has a block fetched in the background, if it is not here or under way."""
        block, is_new = self._entry(key)
        if not is_new:
            return
        try:
            self._pool.submit(self._fill, key, block)
        except RuntimeError as error:  # Python is about to end
            self._fail(key, block, error)
            raise

    def forget(self, key: Hashable) -> None:
        """Drops a block, so that it is fetched anew."""
        with self._lock:
            self._blocks.pop(key, None)

    def _entry(self, key):
        with self._lock:
            block = self._blocks.pop(key, None)
            is_new = block is None
            if is_new:
                block = concurrent.futures.Future()
            self._blocks[key] = block
            if len(self._blocks) > self._num_blocks:
                self._blocks.pop(next(iter(self._blocks)))
        return block, is_new

    def _fill(self, key, block):
        try:
            block.set_result(self._fetch(key))
        except BaseException as error:
            self._fail(key, block, error)

    def _fail(self, key, block, error):
        with self._lock:
            if self._blocks.get(key) is block:
                del self._blocks[key]
        block.set_exception(error)
