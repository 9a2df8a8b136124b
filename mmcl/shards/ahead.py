"""Reading ahead along a plan: remote samples are asked for before they are needed, within a budget of bytes.

Requests go out in rounds. The first holds the first batch alone, so that a run starts with what it needs; each later
one fills a window that doubles up to the budget, once half of it has been handed out: neighbours in a shard that fall
into one round share a request. A sample that alone exceeds the budget goes alone.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from mmcl.shards.files import is_remote
from mmcl.shards.reader import LocalShard, RawSample, ShardReader
from mmcl.shards.remote import ReadStoppedError, Stopwatch
from mmcl.shards.remote_shard import RemoteShard, Span, group_span, join_spans
from mmcl.types import MmclError, SampleError, Source

Place: TypeAlias = tuple[int, int, int]
"""(source, shard, index in the shard)"""

MAX_PEEKED = 4096
"""samples whose shards are opened ahead, and that a round holds, at most"""
_UNKNOWN_BYTES = 256 << 10
"""of a sample where the manifest does not tell how large its shard is"""


@dataclass(slots=True, eq=False)
class _Request:
    """One range of a shard, wanted by one or several samples."""

    shard: RemoteShard
    spans: list[Span]
    num_bytes: int
    users: int = 0
    done: Future[dict[Span, memoryview | SampleError]] = field(default_factory=Future)


@dataclass(slots=True, eq=False)
class Stored:
    """A sample of the plan; its bytes are here, or on their way."""

    reader: ShardReader
    shard: int
    index: int
    opened: LocalShard | RemoteShard | None = None
    problem: Exception | None = None
    """why its shard could not be opened"""
    spans: list[Span] = field(default_factory=list)
    requests: list[_Request] = field(default_factory=list)
    """one per span"""

    def key(self) -> str:
        """The key. Raises as ``ShardReader.read`` does."""
        if self.problem is not None:
            raise self.problem
        return self.reader.key(self.shard, self.index) if self.opened is None else self.opened.index.key(self.index)

    def read(self) -> RawSample:
        """The files, once they have come. Raises as ``ShardReader.read`` does."""
        key = self.key()
        if not isinstance(self.opened, RemoteShard) or not self.spans:
            return self.reader.read(self.shard, self.index)
        pieces = [request.done.result()[span] for request, span in zip(self.requests, self.spans, strict=True)]
        return RawSample(key, {**self.opened.unpack(self.index, self.spans, pieces)}, Source(self.shard, self.index))


class ReadAhead:
    """The samples of a plan in its order.

    Args:
        readers: one per source.
        places: the plan, a pure function of draws; read from another thread.
        first: samples of the first batch.
        skip: (source, shard, index, key) of samples that will not be read.
    """

    def __init__(
        self,
        readers: Sequence[ShardReader],
        places: Iterator[Place],
        *,
        first: int,
        skip: Callable[[int, int, int, str], bool] = lambda *_: False,
    ) -> None:
        self.options = readers[0].remote
        self.most_bytes = 0
        """asked for and not yet handed out, at any time so far"""
        self._readers, self._places, self._first, self._skip = readers, places, first, skip
        self._changed = threading.Condition()
        self._ready: deque[Stored] = deque()
        self._held: Stored | None = None
        self._bytes = 0
        self._ended: BaseException | bool = False
        self._pause = Stopwatch()
        self._rounds = 0
        self._peeked: deque[tuple[Place, Future[Any]]] = deque()
        self._peeked_bytes = 0
        self._opening: dict[tuple[int, int], tuple[Future[Any], int]] = {}
        """shards of peeked samples, and how many of these each has"""
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name="read-ahead", daemon=True)
            for _ in range(max(1, self.options.connections))
        ]
        for thread in self._threads:
            thread.start()
        threading.Thread(target=self._plan, name="read-ahead-plan", daemon=True).start()

    def next(self) -> Stored:
        """The next sample of the plan; what was handed out before may be freed."""
        with self._changed:
            self._release()
            self._changed.wait_for(lambda: self._ready or self._ended)
            if not self._ready:
                raise self._ended if isinstance(self._ended, BaseException) else IndexError("the plan has ended")
            self._held = self._ready.popleft()
            return self._held

    def close(self) -> None:
        """Stops asking; what is on its way is dropped."""
        self._pause.stop()
        with self._changed:
            self._changed.notify_all()
        for _ in self._threads:
            self._tasks.put(None)

    def _release(self) -> None:
        held, self._held = self._held, None
        for request in [] if held is None else held.requests:
            request.users -= 1
            if request.users == 0:
                self._bytes -= request.num_bytes
        self._changed.notify_all()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()

    def _submit(self, function: Callable[[], Any], future: Future[Any]) -> None:
        def task() -> None:
            try:
                if self._pause.stopped:
                    raise ReadStoppedError("reading was stopped")
                future.set_result(function())
            except BaseException as error:  # handed to whoever waits for it
                future.set_exception(error)

        if self._pause.stopped:  # the threads may have ended
            task()
        else:
            self._tasks.put(task)

    def _plan(self) -> None:
        """Rounds of requests, until there is no more to read or nobody to read for."""
        why: BaseException | bool = True
        try:
            window = self._round(0, least_count=self._first)
            while window and not self._pause.stopped:
                window = self._round(window)
        except BaseException as error:  # handed to whoever waits for the next sample
            why = error
        with self._changed:
            self._ended = why
            self._changed.notify_all()

    def _round(self, window: int, *, least_count: int = 0) -> int:
        """Asks for what fits into the window, or in the first round for the first batch; the window of the next one.

        0 at the end of the plan.
        """
        budget, is_first = self.options.read_ahead_bytes, window == 0
        taken = self._wait_for_room(window)
        limit, most = (budget, least_count) if is_first else (min(budget, window), MAX_PEEKED)
        admitted: list[Stored] = []
        wanted = 0
        while len(admitted) < most and not self._pause.stopped:
            self._peek(count=most - len(admitted) if is_first else 1, num_bytes=0 if is_first else 2 * limit)
            if not self._peeked:
                break
            (source, shard, index), opening = self._peeked[0]
            if admitted and not is_first and not opening.done():
                break  # the others need not wait for it
            stored = self._stored(source, shard, index, opening)
            size = sum(stop - start for start, stop in stored.spans)
            if taken + wanted + size > limit and (taken or wanted):
                break
            self._drop_peeked()
            wanted += size
            admitted.append(stored)
        self._issue(admitted, spare_bytes=max(0, budget - taken - wanted))
        if not admitted:
            if not self._peeked:
                return 0
            with self._changed:  # the next sample is larger than what is left of the window
                self._changed.wait_for(lambda: self._pause.stopped or self._bytes < taken)
            return window
        self._rounds += 1
        return max(1, wanted) if is_first else min(budget, max(2 * window, wanted))

    def _wait_for_room(self, window: int) -> int:
        """Waits until half of the window is free; bytes that are taken then.

        After the first round, until all of it has been handed out: no run reads more than its first batch at first.
        """
        with self._changed:
            if self._rounds == 1:
                self._changed.wait_for(lambda: self._pause.stopped or not (self._ready or self._bytes))
            else:
                half = window // 2
                self._changed.wait_for(
                    lambda: self._pause.stopped or (self._bytes <= half and len(self._ready) <= MAX_PEEKED // 2)
                )
            return self._bytes

    def _peek(self, *, count: int, num_bytes: int) -> None:
        """Opens the shards of the next samples: so many, or, as far as can be told, of so many bytes."""
        while len(self._peeked) < MAX_PEEKED and (len(self._peeked) < count or self._peeked_bytes < num_bytes):
            place = next(self._places, None)
            if place is None:
                return
            source, shard, _ = place
            reader = self._readers[source]
            opening, users = self._opening.get((source, shard)) or (Future(), 0)
            self._opening[source, shard] = opening, users + 1
            if users == 0:
                if is_remote(reader.manifest.url):
                    self._submit(partial(reader.open, shard), opening)
                else:
                    opening.set_result(None)
            self._peeked.append((place, opening))
            self._peeked_bytes += self._estimate(source, shard)

    def _drop_peeked(self) -> None:
        (source, shard, _), _ = self._peeked.popleft()
        self._peeked_bytes -= self._estimate(source, shard)
        opening, users = self._opening.pop((source, shard))
        if users > 1:
            self._opening[source, shard] = opening, users - 1

    def _estimate(self, source: int, shard: int) -> int:
        """Bytes of a sample of a shard that may not be open yet."""
        manifest = self._readers[source].manifest
        num_bytes, count = int(manifest.shard_bytes[shard]), int(manifest.sizes[shard])
        return num_bytes // max(1, count) if num_bytes > 0 else _UNKNOWN_BYTES

    def _stored(self, source: int, shard: int, index: int, opening: Future[Any]) -> Stored:
        stored = Stored(self._readers[source], shard, index)
        try:
            stored.opened = opening.result()
        except (SampleError, MmclError) as error:
            stored.problem = error
            return stored
        opened = stored.opened
        if not isinstance(opened, RemoteShard) or not 0 <= index < opened.index.num_samples:
            return stored
        members = opened.index.members(index)
        size = sum([member.num_bytes for member in members])
        if size <= stored.reader.max_sample_bytes and not self._skip(source, shard, index, opened.index.key(index)):
            stored.spans = opened.spans(index, members)
        return stored

    def _issue(self, admitted: list[Stored], *, spare_bytes: int) -> None:
        """One request for each group of neighbours, in the order in which they are needed."""
        spans: dict[RemoteShard, list[Span]] = {}
        for stored in admitted:
            if isinstance(stored.opened, RemoteShard):
                spans.setdefault(stored.opened, []).extend(stored.spans)
        requests: dict[tuple[RemoteShard, Span], _Request] = {}
        for shard, wanted in spans.items():
            for group in join_spans(set(wanted), spare_bytes=spare_bytes):
                first, last = group_span(group)
                spare_bytes -= max(0, last - first - sum(stop - start for start, stop in group))
                request = _Request(shard, group, last - first)
                requests.update(((shard, span), request) for span in group)
        ordered: dict[int, _Request] = {}
        for stored in admitted:
            if isinstance(stored.opened, RemoteShard):
                stored.requests = [requests[stored.opened, span] for span in stored.spans]
            for request in stored.requests:
                request.users += 1
                ordered.setdefault(id(request), request)
        with self._changed:
            self._bytes += sum(request.num_bytes for request in ordered.values())
            self.most_bytes = max(self.most_bytes, self._bytes)
            self._ready.extend(admitted)
            self._changed.notify_all()
        for request in ordered.values():
            self._submit(partial(self._fetch, request), request.done)

    def _fetch(self, request: _Request) -> dict[Span, memoryview | SampleError]:
        pieces = request.shard.fetch(request.spans, pause=self._pause)
        return dict(zip(request.spans, pieces, strict=True))
