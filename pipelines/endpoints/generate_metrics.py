"""Metrics of generated text: tokens, and how long readers wait for them.

They are measured where the HTTP side hands text on, so waiting for a free model is part of them.
"""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Histogram

_FIRST = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_NEXT = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


class GenerateMetrics:
    """Counters and histograms, by the name of the model."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._tokens = Counter(
            "goldcrest_tokens", "Tokens read and written", ["model", "kind"], registry=registry
        )
        self._first = Histogram(
            "goldcrest_first_token_seconds",
            "Time from a streamed request to its first text",
            ["model"],
            buckets=_FIRST,
            registry=registry,
        )
        self._next = Histogram(
            "goldcrest_next_token_seconds",
            "Mean time of a streamed answer's further tokens",
            ["model"],
            buckets=_NEXT,
            registry=registry,
        )

    def used(self, model: str, *, prompt: int, completion: int) -> None:
        """Tokens of a request, also of one that was broken off."""
        self._tokens.labels(model, "prompt").inc(prompt)
        self._tokens.labels(model, "completion").inc(completion)

    def stream(self, model: str) -> StreamClock:
        """A clock that starts now."""
        return StreamClock(self._first.labels(model), self._next.labels(model))


class StreamClock:
    """The times of one streamed answer."""

    def __init__(self, first: Histogram, further: Histogram) -> None:
        self._first, self._further = first, further
        self._began = self._last = time.perf_counter()
        self._tokens = 0
        self._first_at: float | None = None

    def heard(self, tokens: int) -> None:
        """Text has come that took so many tokens."""
        self._last = time.perf_counter()
        if self._first_at is None:
            self._first_at = self._last
            self._first.observe(self._last - self._began)
        else:
            self._tokens += tokens

    def ended(self) -> None:
        """The answer is over, or its reader gone."""
        if self._first_at is not None and self._tokens:
            self._further.observe((self._last - self._first_at) / self._tokens)
