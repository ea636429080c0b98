"""Keep secrets out of what is written down: manifests, run records, reports, tracking and logs.

Three things are secrets: what a field holds whose name says so (`hf_token`, `db_password`,
`client_secret`, `api_key`; also as `name=value`, `name: value` and `--name value` inside a text),
the credentials inside a URI (`s3://KEY:SECRET@bucket`, `https://host/?token=...`), and those of a
request (`Authorization: ...`, `Cookie: ...`, `Bearer ...`).

Models have tokens too: `max_tokens`, `tokens`, `pad_token` and `per_token` name no secret, and a
number is one only where the secret word is the name's last (`token=123`, not `token_count=5`).

Where a text does not say where a secret ends, rather too much of it is masked than too little.
"""

from __future__ import annotations

import base64
import binascii
import functools
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"

_SECRET_WORDS = {
    *("password", "passwd", "passphrase", "pwd", "secret", "credential", "apikey"),
    *("authorization", "cookie"),
}
_SECRET_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("auth", "key")}
_OF_MODELS = {
    *("bos", "cls", "eos", "eot", "mask", "pad", "prefix", "sep", "special", "start", "unk"),
    *("each", "first", "last", "max", "min", "n", "new", "next", "num", "on", "per", "stop"),
}
"""Words before `token` that make it one of a model."""
_OF_DOORS = {"access", "api", "auth", "bearer", "github", "hf", "hub", "ray", "refresh", "session"}
"""Words before `tokens` that make them secrets."""
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_USER_INFO = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.\-]*://)(?:[^/\s@:]+:\S*|[^/\s?#]+)@")
_HEADER = re.compile(r"(?:.*[._\-])?(?:authorization|cookies?)", re.IGNORECASE)
# By what a value looks like: "the bearer of this" and "Basic training" are none.
_BEARER = re.compile(
    r"\b(?P<scheme>bearer[ \t]+)(?=[\w.~+/\-]*\d|[\w.~+/\-]{20})[\w.~+/\-]+=*", re.IGNORECASE
)
_BASIC = re.compile(r"\b(?P<scheme>basic[ \t]+)(?P<value>[A-Za-z0-9+/]{4,}=*)", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")
_QUERY = re.compile(
    r"(?P<name>[?&;][^=&;\s]*(?:token|secret|password|credential|signature|sig|key)[^=&;\s]*=)"
    r"[^&;\s#]+",
    re.IGNORECASE,
)

# `name=`, `name = `, `name: `, `"name":"`; only from a word's beginning: a text is read once.
_NAMED = re.compile(
    r"""(?<![\w.\-])(?P<name>[\w.\-]+)(?P<closed>['"]?)"""
    r"""(?P<mark>=(?!=)|[ \t]+=[ \t]+|[ \t]*:[ \t]+|:(?=['"]))"""
)
# `--name value`, also where a list of words is shown: `'--name', 'value'`.
_OPTION = re.compile(
    r"""(?<![\w.\-])(?P<name>--\w[\w.\-]*)"""
    r"""(?:[ \t]+(?!--)|(?P<quote>['"]),[ \t]*(?=['"](?!--)))"""
)
# With the ways to have the quote itself inside: `\'`, and YAML's `''`.
_ONE_QUOTED = re.compile(
    r"""(?P<quote>['"])(?:\\.|(?!(?P=quote))[^\\\n]|(?P=quote){2})*(?P=quote)(?!(?P=quote))"""
)
# A word as a shell has it: quoted parts, and an open quote that takes the rest of the line.
_SHELL_WORD = re.compile(
    r"""(?:'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*"|['"][^\n]*|\\.|[^\s'"\\]|\\)+"""
)
_QUERY_VALUE = re.compile(r"[^&;\s#]+")
_LINE = re.compile(r"[^\n]+")
_URI_BEFORE = re.compile(r"://\S*[?&;]\Z")
_LOOK_BACK = 2000  # characters of a URI before a name in its query


@functools.lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether a field of this name holds a secret: by whole words, so `tokenizer` does not."""
    return any(_secret_at(_words(name)))


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name)]


def _secret_at(words: Sequence[str]) -> list[bool]:
    """For each word whether, after the one before it, it makes the name a secret's."""
    found = []
    for before, word in zip(["", *words], words, strict=False):
        single = word.removesuffix("s")
        found.append(
            not _SECRET_WORDS.isdisjoint((word, single))
            or (before, single) in _SECRET_PAIRS
            or (word == "token" and before not in _OF_MODELS)
            or (word == "tokens" and before in _OF_DOORS)
        )
    return found


@functools.lru_cache(maxsize=4096)
def _ends_secret(name: str) -> bool:
    """Whether a secret name ends with what makes it one; others count or measure something."""
    return _secret_at(_words(name))[-1:] == [True]


# -------------------------------------------------------------------------------------- texts


def mask_text(text: str) -> str:
    """`text` with `***` for the credentials inside its URIs and the values of secret names.

    `hf_token=abc`, `DB_PASSWORD='a b'` and `hub_token: abc` are masked; `max_tokens=512` is not.
    """
    lowered = text.lower()  # a look that is quick: logs are long
    if "bearer" in lowered or "basic" in lowered:
        text = _BEARER.sub(rf"\g<scheme>{MASK}", _BASIC.sub(_mask_basic, text))
    if "--" in text:
        text = _mask_options(text)
    if "=" in text or ":" in text:
        text = _mask_named(text)
    if "://" in text:
        text = _QUERY.sub(rf"\g<name>{MASK}", _USER_INFO.sub(rf"\g<scheme>{MASK}@", text))
    return text


def _mask_basic(found: re.Match[str]) -> str:
    """`Basic` and the base64 of `user:password`; another word stays."""
    try:
        credential = b":" in base64.b64decode(found["value"], validate=True)
    except binascii.Error:
        credential = False
    return found["scheme"] + MASK if credential else found[0]


def _mask_options(text: str) -> str:
    kept, place = [], 0
    while found := _OPTION.search(text, place):
        kept.append(text[place : found.end()])
        place = found.end()
        if not _ends_secret(found["name"]):  # `--token-file` holds a path
            continue
        end = _end(_ONE_QUOTED if found["quote"] else _SHELL_WORD, text, place)
        if end > place:
            quote = found["quote"] or ""
            kept.append(f"{quote}{MASK}{quote}")
            place = end
    return "".join(kept) + text[place:]


def _mask_named(text: str) -> str:
    kept, place = [], 0
    while found := _NAMED.search(text, place):
        kept.append(text[place : found.end()])
        place = found.end()
        if not is_secret_name(found["name"]):
            continue  # its value may itself be `name=value`
        end, shown = _value(text, found)
        if end > place and not _is_plain(found["name"], text[place:end]):
            kept.append(shown)
            place = end
    return "".join(kept) + text[place:]


def _value(text: str, found: re.Match[str]) -> tuple[int, str]:
    """Where the value of a secret name ends, and what to write instead of it."""
    start, begin = found.start(), found.end()
    before = text[start - 1 : start]
    if found["mark"] == "=" and _in_query(text, start):
        return _end(_QUERY_VALUE, text, begin), MASK
    if before in ("'", '"') and not found["closed"]:
        # All of `'name=value'` is quoted: as though the quote began after the mark.
        rest = before + text[begin : _end(_LINE, text, begin)]
        end = _end(_SHELL_WORD, rest, 0)
        return begin + end - 1, MASK + (before if rest[1:end].endswith(before) else "")
    line = text[text.rfind("\n", 0, start) + 1 : start]
    if ":" in found["mark"] and not line.strip(" \t-"):  # of YAML, where blanks need no quotes
        return _end(_LINE, text, begin), MASK
    quoted = _ONE_QUOTED.match(text, begin)
    if quoted and ":" in found["mark"]:  # of JSON, which goes on after it
        return quoted.end(), f"{quoted['quote']}{MASK}{quoted['quote']}"
    if _HEADER.fullmatch(found["name"]):  # the scheme, or one cookie, is only its first word
        return _end(_LINE, text, begin), MASK
    return _end(_SHELL_WORD, text, begin), MASK


def _end(pattern: re.Pattern[str], text: str, begin: int) -> int:
    found = pattern.match(text, begin)
    return found.end() if found else begin


def _in_query(text: str, start: int) -> bool:
    """Whether a name that begins at `start` is one in the query of a URI."""
    return _URI_BEFORE.search(text[max(0, start - _LOOK_BACK) : start]) is not None


def _is_plain(name: str, value: str) -> bool:
    """Whether a value is a number that its name counts, though a word in it is one of secrets, or
    the folder that a shell has in `PWD`."""
    plain = value.strip("'\"").rstrip(",;)]}")
    count = _NUMBER.fullmatch(plain) is not None and not _ends_secret(name)
    return count or _is_folder(name, plain)


def _is_folder(name: str, value: str) -> bool:
    """`PWD=/home/x` is where a shell is; `PWD=abc` is a password of a database."""
    return name == "PWD" and value.startswith("/")


# ------------------------------------------------------------------------------ command lines


def mask_words(words: Sequence[str]) -> list[str]:
    """The words of a command line, masked: of `SECRET_NAME=value` all that follows, blanks too."""
    return [
        MASK if _takes_a_secret(before) and not word.startswith("--") else _mask_word(word)
        for before, word in zip(["", *words], words, strict=False)
    ]


def _takes_a_secret(word: str) -> bool:
    """Whether a word is an option `--SECRET_NAME` whose value is the next word."""
    return re.fullmatch(r"--[\w.\-]+", word) is not None and _ends_secret(word)


def _mask_word(word: str) -> str:
    place = 0
    while found := _NAMED.search(word, place):
        place = found.end()
        secret = found["mark"] == "=" and is_secret_name(found["name"])
        if secret and not _in_query(word, found.start()):
            value = word[place:]
            return word if _is_plain(found["name"], value) or not value else word[:place] + MASK
    return mask_text(word)


def mask_command(line: str) -> str:
    """A command line as a shell reads it, masked; one that is none is masked as a text."""
    try:
        words = shlex.split(line)
    except ValueError:
        return mask_text(line)
    masked = mask_words(words)
    return line if masked == words else shlex.join(masked)


# -------------------------------------------------------------------------------------- trees


def mask_secrets(value: Any, name: str = "") -> Any:
    """A copy of a tree of mappings and lists in which every secret reads `***`.

    `name` is the field that holds `value`; lists and mappings under a secret name are secret too.
    """
    if isinstance(value, Mapping):
        return {
            key: mask_secrets(item, name if is_secret_name(name) else str(key))
            for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [mask_secrets(item, name) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return MASK if _ends_secret(name) else value
    if not isinstance(value, str):
        return value
    secret = value and is_secret_name(name) and not _is_folder(name, value)
    return MASK if secret else mask_text(value)
