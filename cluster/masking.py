"""Keep secrets out of what is written down: manifests, run records, reports, tracking and logs.

Two things are secrets: the text in a field whose name says so (`hf_token`, `db_password`,
`client_secret`, `api_key`; also as `name=value` inside a text), and the credentials inside a URI
(`s3://KEY:SECRET@bucket`, `https://host/?token=...`). Numbers are left alone: `max_tokens: 512`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"

_SECRET_WORDS = {"token", "password", "passwd", "passphrase", "secret", "credential", "apikey"}
_SECRET_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("auth", "key")}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_USER_INFO = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.\-]*://)(?:[^/\s@:]+:\S*|[^/\s?#]+)@")
_ASSIGNMENT = re.compile(r"(?P<name>[A-Za-z_][\w.\-]*)=(?P<value>[^\s&;,]+)")
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")
_QUERY = re.compile(
    r"(?P<name>[?&;][^=&;\s]*(?:token|secret|password|credential|signature|sig|key)[^=&;\s]*=)"
    r"[^&;\s#]+",
    re.IGNORECASE,
)


def is_secret_name(name: str) -> bool:
    """Whether a field of this name holds a secret: by whole words, so `tokenizer` does not."""
    words = [word.lower() for word in _WORD.findall(name)]
    singular = [word[:-1] if word.endswith("s") else word for word in words]
    pairs = zip(words, singular[1:], strict=False)  # `access_keys`: only the last is a plural
    return not _SECRET_WORDS.isdisjoint([*words, *singular]) or any(
        p in _SECRET_PAIRS for p in pairs
    )


def mask_text(text: str) -> str:
    """`text` with `***` for the credentials inside its URIs and the values of secret names.

    `hf_token=abc` is masked; `max_tokens=512` is not.
    """
    if "=" in text:
        text = _ASSIGNMENT.sub(_mask_assignment, text)
    if "://" in text:
        text = _QUERY.sub(rf"\g<name>{MASK}", _USER_INFO.sub(rf"\g<scheme>{MASK}@", text))
    return text


def _mask_assignment(found: re.Match[str]) -> str:
    secret = is_secret_name(found["name"]) and not _NUMBER.fullmatch(found["value"])
    return f"{found['name']}={MASK}" if secret else found[0]


def mask_secrets(value: Any, name: str = "") -> Any:
    """A copy of a tree of mappings and lists in which every secret text reads `***`.

    `name` is the field that holds `value`; lists and mappings under a secret name are secret too.
    """
    if isinstance(value, Mapping):
        return {
            key: mask_secrets(item, name if is_secret_name(name) else str(key))
            for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [mask_secrets(item, name) for item in value]
    if not isinstance(value, str):
        return value
    return MASK if value and is_secret_name(name) else mask_text(value)
