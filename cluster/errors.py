"""Errors for people: what was wrong, where, what to do."""

from __future__ import annotations


class GoldcrestError(Exception):
    """An error with a sentence for the user and, where there is one, a remedy in `hint`."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message} ({self.hint})"

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(cls: type[GoldcrestError], message: str, hint: str | None) -> GoldcrestError:
    return cls(message, hint=hint)


class InputError(GoldcrestError):
    """The user's input (config, path, corpus, flag) is wrong; nothing was started or written."""


class StepError(GoldcrestError):
    """A step failed: `message` says in words what happened to it."""


class StoreError(GoldcrestError):
    """The artifact store is unusable, full, or holds something damaged."""
