"""JSON for records of runs: whatever an error message quotes, it can be written."""

from __future__ import annotations

import json
from typing import Any


def json_text(value: Any, **options: Any) -> str:
    """`value` as JSON that UTF-8 can hold, letters of all languages as they are.

    A message may quote half a surrogate pair, which JSON can name and UTF-8 can't: it is written as
    JSON's own escape. `options` are those of `json.dumps`.
    """
    text = json.dumps(value, ensure_ascii=False, **options)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
