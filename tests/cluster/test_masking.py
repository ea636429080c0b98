"""Secrets in names, in URIs and in texts; and what is no secret."""

from __future__ import annotations

import pytest

from goldcrest.cluster.masking import is_secret_name, mask_secrets, mask_text


@pytest.mark.parametrize(
    "name",
    ["token", "hf_token", "HF_TOKEN", "hubToken", "password", "db_passwords", "client-secret"]
    + ["api_key", "apiKey", "aws_access_key", "credentials", "private_key"],
)
def test_secret_names(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["tokenizer", "key", "keys", "monkey", "secretary", "passes"])
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


def test_an_empty_secret_stays_empty() -> None:
    assert mask_secrets({"token": ""}) == {"token": ""}
