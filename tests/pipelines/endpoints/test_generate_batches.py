"""Who generates next to whom: shared batches, places, and models that stop when nobody reads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

import pytest
import torch

from goldcrest.cluster.errors import InputError
from goldcrest.pipelines.endpoints.generate_batches import Batches
from goldcrest.tasks.language.bundle import LanguageModel
from goldcrest.tasks.language.generation import GenerationSettings, Generator
from tests.tasks.language.writing_models import SPECIAL, tiny_bundle

SHORT = GenerationSettings(max_new_tokens=6)
ENDLESS = GenerationSettings(max_new_tokens=90_000)


class Watched(Generator):
    """A generator that notes its batches, and waits before each until the test says `go`."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(model)
        self.go = threading.Event()
        self.go.set()
        self.begun = threading.Event()
        self.batches: list[int] = []
        self.tokens = 0

    def generate(self, prompts: Sequence[Any], *more: Any, **named: Any) -> Any:
        """The batch's size is noted before, its number of tokens afterwards."""
        self.batches.append(len(prompts))
        self.begun.set()
        assert self.go.wait(30)
        made = super().generate(prompts, *more, **named)
        self.tokens += sum(len(each.tokens) for each in made)
        return made


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """A tiny Llama that writes letters and never a token that would end its text."""
    bundle = tiny_bundle("llama", max_position_embeddings=100_000)
    with torch.no_grad():
        bundle.model.lm_head.weight[: len(SPECIAL)] = 0
    long = GenerationSettings(max_new_tokens=200)
    assert Generator(bundle).generate(["The"], long)[0].finish_reason == "length"
    return bundle


@pytest.fixture
def generator(model: LanguageModel) -> Watched:
    """A generator of the test's own on the shared model."""
    return Watched(model)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test's coroutine, a minute at most."""
    asyncio.run(asyncio.wait_for(test(), 60))


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    while not holds():
        await asyncio.sleep(0.01)


def prompts(generator: Generator, count: int) -> list[list[int]]:
    """Prompts of different length."""
    return [generator.encode("The quick brown fox"[: 3 + 2 * n]) for n in range(count)]


def test_greedy_prompts_that_wait_share_a_batch(generator: Watched) -> None:
    batches = Batches(places=1, max_batch=16)
    asked = prompts(generator, 6)
    alone = [generator.generate([each], SHORT)[0] for each in asked]
    generator.batches.clear()
    generator.go.clear()

    async def test() -> None:
        asks = [asyncio.create_task(batches.answer("m", generator, asked[0], SHORT))]
        await until(lambda: bool(generator.batches))  # the first does not wait for others
        asks += [
            asyncio.create_task(batches.answer("m", generator, each, SHORT)) for each in asked[1:]
        ]
        await asyncio.sleep(0)
        generator.go.set()
        assert await asyncio.gather(*asks) == alone

    run(test)
    assert generator.batches == [1, 5]


def test_a_batch_has_room_for_so_many(generator: Watched) -> None:
    batches = Batches(places=1, max_batch=4)
    generator.go.clear()

    async def test() -> None:
        asks = [
            asyncio.create_task(batches.answer("m", generator, each, SHORT))
            for each in prompts(generator, 8) + prompts(generator, 2)
        ]
        await asyncio.sleep(0.05)
        generator.go.set()
        await asyncio.gather(*asks)

    run(test)
    assert sum(generator.batches) == 10
    assert max(generator.batches) == 4


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("m", SHORT), ("n", SHORT)),
        (("m", SHORT), ("m", SHORT.model_copy(update={"max_new_tokens": 7}))),
        (("m", SHORT), ("m", SHORT.model_copy(update={"stop": ("x",)}))),
        (("m", SHORT.model_copy(update={"temperature": 0.7, "seed": 3})),) * 2,
    ],
)
def test_what_differs_is_not_mixed(generator: Watched, one: Any, other: Any) -> None:
    """Nor what is sampled, even with the same seed: each prompt has the draws it has alone."""
    batches = Batches(places=1, max_batch=16)
    (prompt,) = prompts(generator, 1)
    alone = [generator.generate([prompt], chosen)[0] for _, chosen in (one, other)]
    generator.batches.clear()
    generator.go.clear()

    async def test() -> None:
        first = asyncio.create_task(
            batches.answer("m", generator, prompt, GenerationSettings(max_new_tokens=1))
        )
        await until(lambda: bool(generator.batches))
        asks = [
            asyncio.create_task(batches.answer(name, generator, prompt, chosen))
            for name, chosen in (one, other)
        ]
        await asyncio.sleep(0.01)
        generator.go.set()
        await first
        assert await asyncio.gather(*asks) == alone

    run(test)
    assert generator.batches == [1, 1, 1]


def test_the_model_stops_when_the_reader_has_left(generator: Watched) -> None:
    """One place: what comes next is answered only if the first has really stopped."""
    batches = Batches(places=1, max_batch=16)
    (prompt,) = prompts(generator, 1)

    async def test() -> None:
        endless = asyncio.create_task(batches.answer("m", generator, prompt, ENDLESS))
        await until(generator.begun.is_set)
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless
        assert len((await batches.answer("m", generator, prompt, SHORT)).tokens) == 6

    run(test)
    assert generator.tokens < 10_000


def test_who_stays_gets_the_whole_answer(generator: Watched) -> None:
    batches = Batches(places=1, max_batch=16)
    one, other = prompts(generator, 2)
    alone = generator.generate([other], SHORT)[0]
    generator.go.clear()

    async def test() -> None:
        first = asyncio.create_task(
            batches.answer("m", generator, one, GenerationSettings(max_new_tokens=1))
        )
        await until(generator.begun.is_set)
        asks = [
            asyncio.create_task(batches.answer("m", generator, each, SHORT))
            for each in (one, other)
        ]
        await asyncio.sleep(0.01)
        generator.go.set()
        await first
        asks[0].cancel()
        assert await asks[1] == alone

    run(test)


def test_who_leaves_while_waiting_is_never_begun(generator: Watched) -> None:
    batches = Batches(places=1, max_batch=16)
    (prompt,) = prompts(generator, 1)
    generator.go.clear()

    async def test() -> None:
        first = asyncio.create_task(batches.answer("m", generator, prompt, SHORT))
        await until(generator.begun.is_set)
        waiting = asyncio.create_task(batches.answer("m", generator, prompt, ENDLESS))
        await asyncio.sleep(0.01)
        waiting.cancel()
        generator.go.set()
        await first
        await batches.answer("m", generator, prompt, SHORT)

    run(test)
    assert generator.batches == [1, 1]


def test_pieces_are_the_answer(generator: Watched) -> None:
    batches = Batches(places=1, max_batch=16)
    (prompt,) = prompts(generator, 1)
    (whole,) = generator.generate([prompt], SHORT)

    async def test() -> None:
        found = [each async for new in batches.pieces(generator, prompt, SHORT) for each in new]
        assert "".join(each.text for each in found) == whole.text
        assert tuple(each.token for each in found if each.token is not None) == whole.tokens
        assert found[-1].finish_reason == whole.finish_reason

    run(test)


def test_a_stream_stops_when_its_reader_leaves(generator: Watched) -> None:
    batches = Batches(places=1, max_batch=16)
    (prompt,) = prompts(generator, 1)

    async def test() -> None:
        async with aclosing(batches.pieces(generator, prompt, ENDLESS)) as pieces:
            assert (await anext(pieces))[-1].finish_reason is None
        # The place is free again, so the thread has ended.
        assert len((await batches.answer("m", generator, prompt, SHORT)).tokens) == 6

    run(test)
    assert not [each for each in threading.enumerate() if each.name == "generate"]


def test_a_stream_that_still_waits_can_be_left(generator: Watched) -> None:
    batches = Batches(places=1, max_batch=16)
    (prompt,) = prompts(generator, 1)
    generator.go.clear()

    async def test() -> None:
        first = asyncio.create_task(batches.answer("m", generator, prompt, SHORT))
        await until(generator.begun.is_set)
        pieces = batches.pieces(generator, prompt, ENDLESS)
        waiting = asyncio.create_task(anext(pieces))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        generator.go.set()
        await first
        assert (await batches.answer("m", generator, prompt, SHORT)).tokens

    run(test)


def test_a_fault_of_one_prompt_is_nobody_elses(generator: Watched) -> None:
    """A batch that fails is run again prompt by prompt."""
    batches = Batches(places=1, max_batch=16)
    first, *asked = prompts(generator, 3)
    alone = [generator.generate([each], SHORT)[0] for each in asked]
    unknown = [10_000_000]  # no such token
    generator.batches.clear()
    generator.go.clear()

    async def test() -> None:
        ahead = asyncio.create_task(batches.answer("m", generator, first, SHORT))
        await until(lambda: bool(generator.batches))
        asks = [
            asyncio.create_task(batches.answer("m", generator, each, SHORT))
            for each in (asked[0], unknown, asked[1])
        ]
        await asyncio.sleep(0)
        generator.go.set()
        one, fault, other = await asyncio.gather(*asks, return_exceptions=True)
        assert [one, other] == alone
        assert isinstance(fault, InputError)
        await ahead

    run(test)
    assert generator.batches == [1, 3, 1, 1, 1]


def test_a_fault_reaches_everybody_who_waits(generator: Watched) -> None:
    batches = Batches(places=1, max_batch=16)
    (prompt,) = prompts(generator, 1)
    unknown = [10_000_000]  # no such token

    async def test() -> None:
        asks = [batches.answer("m", generator, unknown, SHORT) for _ in range(3)]
        found = await asyncio.gather(*asks, return_exceptions=True)
        assert all(isinstance(each, InputError) for each in found), found
        with pytest.raises(InputError, match="vocabulary"):
            async for _ in batches.pieces(generator, unknown, SHORT):
                pass
        assert (await batches.answer("m", generator, prompt, SHORT)).tokens  # and goes on

    run(test)
