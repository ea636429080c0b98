"""Secrets in names, in URIs and in texts; and what is no secret."""

from __future__ import annotations

import json
import shlex

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from goldcrest.cluster.masking import (
    is_secret_name,
    mask_command,
    mask_secrets,
    mask_text,
    mask_words,
)


@pytest.mark.parametrize(
    "name",
    ["token", "hf_token", "HF_TOKEN", "hubToken", "password", "db_passwords", "client-secret"]
    + ["api_key", "apiKey", "aws_access_key", "credentials", "private_key", "api_tokens"]
    + ["Authorization", "Proxy-Authorization", "Set-Cookie", "cookies", "MYSQL_PWD", "dbPwd"],
)
def test_secret_names(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["tokenizer", "key", "keys", "monkey", "secretary", "passes"]
    + [
        "tokens",
        "pretrain_tokens",
        "max_tokens",
        "maxTokens",
        "max_new_tokens",
        "tokens_per_second",
    ]
    + ["pad_token", "bos_token_id", "bytes_per_token", "first_token_ms"]
    + ["author", "authors", "OLDPWD", "cwd"],
)
def test_names_that_hold_no_secret(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("s3://KEY:SE/CR+ET@bucket/a", "s3://***@bucket/a"),
        ("postgres://u:p@w@host/db", "postgres://***@host/db"),
        ("https://ghp_abc@github.com/x", "https://***@github.com/x"),
        ("s3://b/x?secret_key=zz&region=eu", "s3://b/x?secret_key=***&region=eu"),
        ("cannot reach http://u:p@h:80/ now", "cannot reach http://***@h:80/ now"),
        ("grow.hub_token=abc", "grow.hub_token=***"),
        ("max_tokens=512", "max_tokens=512"),
        ("tokens: 512, token_count: 3", "tokens: 512, token_count: 3"),
        ("hf_token=hf_abc,def", "hf_token=***"),
        ("DB_PASSWORD='my secret pw' next", "DB_PASSWORD=*** next"),
        ("DB_PASSWORD='my secret pw", "DB_PASSWORD=***"),
        (r"password=my\ pw next", "password=*** next"),
        ("'db.password=my pw' next", "'db.password=***' next"),
        ("password=123456", "password=***"),
        ("-o=grow.hub_token=abc", "-o=grow.hub_token=***"),
        ("api_key = abc # mine", "api_key = *** # mine"),
        ("hub_token: abc", "hub_token: ***"),
        ("a:\n  - password: my secret pw\nb: 1", "a:\n  - password: ***\nb: 1"),
        ('{"hub_token": "a b", "n": 3}', '{"hub_token": "***", "n": 3}'),
        ("{'hub_token':'it\\'s', 'n': 3}", "{'hub_token':'***', 'n': 3}"),
        ("n=3&token=a;b", "n=3&token=***"),
        ("Authorization: Bearer sk-123abc", "Authorization: ***"),
        ("curl -H 'Authorization: Bearer sk-1' http://h", "curl -H 'Authorization: ***' http://h"),
        ('{"Authorization": "Bearer sk-1", "n": 3}', '{"Authorization": "***", "n": 3}'),
        ("[('Authorization', 'Bearer sk-1')]", "[('Authorization', 'Bearer ***')]"),
        ("refused authorization = Bearer abc", "refused authorization = ***"),
        ("sent Cookie: a=b; c=d", "sent Cookie: ***"),
        ("with Basic dXNlcjpwYXNz, or bearer sk-1", "with Basic ***, or bearer ***"),
        ("the bearer of this", "the bearer of this"),
        ("the bearer https://example.org/2", "the bearer https://example.org/2"),
        ("Basic training of a basic wav2vec2", "Basic training of a basic wav2vec2"),
        ("login --token abc --retries 3", "login --token *** --retries 3"),
        ('login --hub.token "a b" now', "login --hub.token *** now"),
        ("['login', '--token', 'a b', 'now']", "['login', '--token', '***', 'now']"),
        ("login --password --verbose", "login --password --verbose"),
        ("--tokenizer bpe --max-tokens 5", "--tokenizer bpe --max-tokens 5"),
        ("serve --token-file /run/token", "serve --token-file /run/token"),
        ("MYSQL_PWD=abc mysql", "MYSQL_PWD=*** mysql"),
        ("UID=sa;PWD=abc", "UID=sa;PWD=***"),
        ("PWD=/home/x OLDPWD=/", "PWD=/home/x OLDPWD=/"),
        ("tokens=448", "tokens=448"),
        ("there is no token here", "there is no token here"),
        ("s3://bucket/a=b", "s3://bucket/a=b"),
        ("write to me@example.org", "write to me@example.org"),
    ],
)
def test_texts(text: str, masked: str) -> None:
    assert mask_text(text) == masked


def test_trees_are_masked_and_the_original_kept() -> None:
    tree = {"hf_token": "x", "tokenizer": "bpe", "n_tokens": 3, "a": [{"password": ["p", "q"]}]}
    assert mask_secrets(tree) == {
        "hf_token": "***",
        "tokenizer": "bpe",
        "n_tokens": 3,
        "a": [{"password": ["***", "***"]}],
    }
    assert tree["hf_token"] == "x"


def test_everything_under_a_secret_name_is_secret() -> None:
    assert mask_secrets({"credentials": {"user": "u", "more": {"x": "y"}}}) == {
        "credentials": {"user": "***", "more": {"x": "***"}}
    }


def test_headers_are_secret_and_the_folder_of_a_shell_is_none() -> None:
    tree = {"headers": {"Authorization": "Bearer sk-1", "Cookie": "a=b"}, "PWD": "/home/x"}
    masked = {**tree, "headers": {"Authorization": "***", "Cookie": "***"}}
    assert mask_secrets(tree) == masked


def test_an_empty_secret_stays_empty() -> None:
    assert mask_secrets({"token": ""}) == {"token": ""}


def test_numbers_are_secret_where_the_name_ends_with_the_word() -> None:
    tree = {"pin": 1234, "password": 1234, "hf_token": 55, "token_count": 5, "has_token": True}
    masked = {**tree, "password": "***", "hf_token": "***"}
    assert mask_secrets(tree) == masked


NAMES = st.sampled_from(
    ["hf_token", "DB_PASSWORD", "say.client-secret", "apiKey", "password", "MYSQL_PWD"]
    + ["Authorization", "Set-Cookie"]
)
VALUES = st.text("aZ09é语 ,;&#=:/+-'\"\\$()[]{}*%@~`", min_size=1, max_size=12).map(
    lambda text: f"QX{text}XQ"
)
"""Any text of one line, between two marks: neither may be seen any more."""


def hidden(text: str) -> bool:
    return "QX" not in text and "XQ" not in text


@given(NAMES, VALUES)
@example("DB_PASSWORD", 'QXit\'s "my" pw, a&b;cXQ')
def test_no_part_of_a_secret_is_left_on_a_command_line(name: str, value: str) -> None:
    words = ["goldcrest", "run", "-o", f"{name}={value}", "--store", "s3://bucket/store"]
    assert mask_words(words) == [*words[:3], f"{name}=***", *words[4:]]
    line = mask_command(shlex.join(words))
    assert hidden(line) and line.endswith("--store s3://bucket/store")


@given(NAMES, VALUES)
def test_no_part_of_an_option_s_secret_is_left(name: str, value: str) -> None:
    words = ["login", f"--{name}", value, "--store", "s3://bucket/store"]
    assert mask_words(words) == [*words[:2], "***", *words[3:]]
    assert hidden(mask_command(shlex.join(words)))
    assert hidden(mask_text(f"before {shlex.join(words)} after"))
    assert hidden(mask_text(f"the command {words!r} failed"))


@given(st.text("abc019._~+/-", min_size=20, max_size=40))
def test_no_part_of_a_long_bearer_token_is_left(value: str) -> None:
    assert hidden(mask_text(f"before Bearer QX{value}XQ after"))


@given(NAMES, VALUES)
@example("hf_token", r"QX #\'XQ")  # YAML doubles the quote, and a backslash before it means nothing
def test_no_part_of_a_quoted_secret_is_left_in_a_text(name: str, value: str) -> None:
    assert hidden(mask_text(f"before {name}={shlex.quote(value)} after"))
    assert hidden(mask_text(f"before {shlex.quote(f'{name}={value}')} after"))
    assert hidden(mask_text(f"the values { ({name: value})!r} were given"))
    for ascii_only in (True, False):
        masked = mask_text(json.dumps({name: value, "n": 3}, ensure_ascii=ascii_only))
        assert json.loads(masked) == {name: "***", "n": 3}
    assert hidden(mask_text(yaml.safe_dump({"a": {name: value}}, width=1000)))


@given(NAMES, st.text("ab01,;&#=:/+'\"\\", min_size=1, max_size=12))
def test_a_word_after_a_secret_s_name_is_masked_whole(name: str, value: str) -> None:
    assert hidden(mask_text(f"before {name}=QX{value}XQ after"))
    assert hidden(mask_text(f"before {name}: QX{value}XQ after"))


@given(st.text(max_size=40))
def test_masking_again_changes_nothing(text: str) -> None:
    once = mask_text(text)
    assert mask_text(once) == once
