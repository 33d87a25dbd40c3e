"""stream: the iterator that `LLM.stream` returns."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Iterator

from distributed_sparse.client.client import Client
from distributed_sparse.client.output_builder import OutputBuilder
from distributed_sparse.outputs import RequestOutput
from distributed_sparse.protocol.client import NewRequest, RequestUpdate


class Stream:
    """A request's growing outputs. Iterate once, with `for` or `async for`; the last output is `finished`."""

    def __init__(self, llm: object, client: Client, request: NewRequest, builder: OutputBuilder) -> None:
        self.request_id = request.request_id
        self._llm = llm  # keeps the engine from being collected while its stream is read
        self._client = client
        self._builder = builder
        self._updates = client.submit([request])

    def __iter__(self) -> Iterator[RequestOutput]:
        try:
            while not self._builder.output.finished:
                yield self._take(self._updates.get())
        finally:
            self.close()

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        self._updates.on_put = lambda: loop.call_soon_threadsafe(ready.set)
        try:
            while not self._builder.output.finished:
                try:
                    update = self._updates.get(block=False)
                except queue.Empty:
                    await ready.wait()
                    ready.clear()
                    continue
                yield self._take(update)
        finally:
            self.close()

    def close(self) -> None:
        """Abort the request if it still runs. Does nothing in a forked child."""
        if self._client.origin.is_here and not self._builder.output.finished:
            self._client.abort([self.request_id])

    def _take(self, update: RequestUpdate) -> RequestOutput:
        self._builder.add(update)
        if update.finished:
            self._builder.raise_error()
        return self._builder.snapshot()
