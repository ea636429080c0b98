"""Server-sent events: an answer that comes piece by piece over plain HTTP.

Each event is JSON in a `data:` line with an empty line after it, as the HTML standard has it
(https://html.spec.whatwg.org/multipage/server-sent-events.html). JSON never holds a bare line
break, so one line is always enough. Some clients also break lines where `str.splitlines` does: what
JSON may leave bare of that is escaped.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import StreamingResponse

EVENT_STREAM = "text/event-stream"
DONE = b"data: [DONE]\n\n"  # how clients of OpenAI's interface know that nothing is missing
_BREAKS = {ord(each): f"\\u{ord(each):04x}" for each in "\x85\u2028\u2029"}


class EventStream(StreamingResponse):
    """An answer made of events that nothing on the way should keep back or store."""

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the latter: nginx
        super().__init__(events, media_type=EVENT_STREAM, headers=headers)


def event(content: Any) -> bytes:
    """One event that holds `content` as JSON."""
    text = json.dumps(content, ensure_ascii=False).translate(_BREAKS)
    return b"data: " + text.encode() + b"\n\n"


def last_event(content: Any) -> dict[str, Any]:
    """The ASGI message that sends one more event and ends the answer."""
    return {"type": "http.response.body", "body": event(content), "more_body": False}


def is_event_stream(start: MutableMapping[str, Any]) -> bool:
    """Whether an `http.response.start` message begins a stream of events."""
    headers = Headers(raw=list(start.get("headers", ())))
    return headers.get("content-type", "").partition(";")[0].strip() == EVENT_STREAM
