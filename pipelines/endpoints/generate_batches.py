"""Who generates next to whom: a replica's few threads, and prompts that share a batch.

A thread is a place: so many answers are made at a time, what comes later waits in order of arrival,
and a place is free when the model has really stopped, not when its reader has left.

Greedy prompts with the same settings that wait at the same time run through the model as one batch
(dynamic batching). Nobody waits for a batch to fill. Sampled ones never share: their random draws
are theirs alone.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from goldcrest.tasks.language.generation import (
    Generation,
    GenerationSettings,
    Generator,
    Piece,
)


class _Ask:
    """One prompt, as tokens, that waits for its answer, or is being answered."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.prompt = prompt
        self.answer: Future[Generation] = Future()
        self.left = False  # its reader has gone


class _Batch(threading.Event):
    """Asks that run together; set when the last reader has left."""

    def __init__(self, asks: list[_Ask]) -> None:
        super().__init__()
        self.asks = asks

    def is_set(self) -> bool:
        """What the model asks after each token."""
        return all(ask.left for ask in self.asks)


class Batches:
    """The generations of one replica."""

    def __init__(self, *, places: int, max_batch: int) -> None:
        """`places` generations run at a time; a batch has `max_batch` prompts at most."""
        self._threads = ThreadPoolExecutor(places, thread_name_prefix="generate")
        self._max_batch = max_batch
        self._waiting: defaultdict[Hashable, list[_Ask]] = defaultdict(list)
        self._lock = threading.Lock()

    async def answer(
        self, model: str, generator: Generator, prompt: Sequence[int], settings: GenerationSettings
    ) -> Generation:
        """The answer to one prompt. Cancelling stops the model once no other prompt needs it."""
        ask = _Ask(prompt)
        greedy = settings.temperature == 0
        alike: Hashable = (model, settings.model_dump_json()) if greedy else ask
        with self._lock:
            self._waiting[alike].append(ask)
        # One turn for each ask; whoever's turn comes first takes the others along.
        self._threads.submit(self._turn, alike, generator, settings)
        try:
            return await asyncio.wrap_future(ask.answer)
        finally:
            ask.left = True

    async def pieces(
        self, generator: Generator, prompt: Sequence[int], settings: GenerationSettings
    ) -> AsyncGenerator[list[Piece], None]:
        """The answer to one prompt while it is made: what is new since the reader last asked."""
        loop = asyncio.get_running_loop()
        made: asyncio.Queue[Piece | None] = asyncio.Queue()
        cancelled = threading.Event()

        def put(piece: Piece | None) -> None:
            with suppress(RuntimeError):  # the loop has ended, and the reader with it
                loop.call_soon_threadsafe(made.put_nowait, piece)

        def work() -> None:
            try:
                for piece in generator.stream(prompt, settings, cancelled):
                    put(piece)
            finally:
                put(None)

        working = self._threads.submit(work)
        try:
            while True:
                new = [await made.get()]
                while not made.empty():
                    new.append(made.get_nowait())
                pieces = [piece for piece in new if piece is not None]
                if pieces:
                    yield pieces
                if new[-1] is None:
                    break
            await asyncio.wrap_future(working)  # raises what the model has raised
        finally:
            cancelled.set()
            working.cancel()  # if it still waits for a place

    def _turn(self, alike: Hashable, generator: Generator, settings: GenerationSettings) -> None:
        """In a thread: answer what waits under one key."""
        with self._lock:
            waiting = self._waiting.pop(alike, [])
            asks, later = waiting[: self._max_batch], waiting[self._max_batch :]
            if later:
                self._waiting[alike] = later
        asks = [ask for ask in asks if ask.answer.set_running_or_notify_cancel()]
        if not asks:
            return
        _make(asks, generator, settings)


def _make(asks: list[_Ask], generator: Generator, settings: GenerationSettings) -> None:
    """Answer asks as one batch, or one by one where that fails: one of them may be to blame."""
    try:
        prompts = [ask.prompt for ask in asks]
        answers = generator.generate(prompts, settings, _Batch(asks))
    except BaseException as error:  # noqa: BLE001 - raised again where the answer is awaited
        if len(asks) == 1:
            asks[0].answer.set_exception(error)
            return
    else:
        for ask, answer in zip(asks, answers, strict=True):
            ask.answer.set_result(answer)
        return
    for ask in asks:  # out of the handler: what the batch held in memory is free again
        _make([ask], generator, settings)
