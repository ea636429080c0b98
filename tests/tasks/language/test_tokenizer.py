"""Tokenizers: every text comes back, the same corpus gives the same bytes, nothing is run."""

from __future__ import annotations

import json
import string
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from goldcrest.cluster.api import Artifact, InputError
from goldcrest.tasks.data.tokens import TokenReader
from goldcrest.tasks.language.bundle import load_bundle
from goldcrest.tasks.language.prepare import TextConfig, prepare_text
from goldcrest.tasks.language.pretrain import PretrainConfig, pretrain
from goldcrest.tasks.language.tokenizer import (
    TokenizerConfig,
    encode_plain,
    load_tokenizer,
    tokenizer,
    tokenizer_folder,
)
from goldcrest.tasks.language.tokens import TokensConfig, tokens

RunTask = Callable[..., Artifact]
any_text = st.text(st.characters(blacklist_categories=["Cs"]), max_size=80)
spelled = st.lists(st.sampled_from(["</s>", "<s>", "<pad>", "<mask>", " ", "word", "é"]))


@pytest.fixture
def corpus(run_task: RunTask) -> Artifact:
    return run_task(prepare_text, TextConfig(embedded={"meanings": 80}))  # type: ignore[arg-type]


@pytest.fixture(params=["bpe", "bytes"])
def folder(request: pytest.FixtureRequest, run_task: RunTask, corpus: Artifact) -> Path:
    cfg = TokenizerConfig(method=request.param, vocab_size=400, mask="<mask>")
    return tokenizer_folder(run_task(tokenizer, cfg, corpus))


def test_every_text_comes_back(folder: Path) -> None:
    made = load_tokenizer(folder)

    @given(st.one_of(any_text, spelled.map("".join)))
    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
    def check(text: str) -> None:
        (found,) = encode_plain(made, [text])
        assert made.decode(found.ids) == text
        assert not {0, 1, 2, 3} & set(found.ids), "a text became a special token"

    check()
    assert made("</s>").input_ids == [made.eos_token_id]  # others still see special tokens


class SlowBackend:
    """Encodes nothing, slowly; `seen` holds the flag at the begin and the end of each call."""

    def __init__(self) -> None:
        self.encode_special_tokens = False
        self.seen: list[bool] = []

    def encode_batch(self, texts: list[str], **_: Any) -> list[Any]:
        self.seen.append(self.encode_special_tokens)
        time.sleep(0.01)
        self.seen.append(self.encode_special_tokens)
        return []


def test_threads_that_share_a_tokenizer_see_no_special_tokens() -> None:
    """None of them ends, with its own call, the others' reading of special tokens as letters."""
    backend = SlowBackend()
    shared: Any = SimpleNamespace(backend_tokenizer=backend)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: encode_plain(shared, ["</s>"]), range(12)))
    assert backend.seen == [True] * 24
    assert not backend.encode_special_tokens


def test_special_tokens_have_the_first_ids(folder: Path) -> None:
    made = load_tokenizer(folder)
    ids = (made.pad_token_id, made.bos_token_id, made.eos_token_id, made.mask_token_id)
    assert ids == (0, 1, 2, 3)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(folder)("a b").input_ids == made("a b").input_ids


def test_a_byte_is_its_value_behind_the_special_tokens(run_task: RunTask, corpus: Artifact) -> None:
    made = load_tokenizer(
        tokenizer_folder(run_task(tokenizer, TokenizerConfig(method="bytes"), corpus))
    )
    text = "".join(map(chr, range(256))) + "\u20ac\U0001f388"
    (found,) = encode_plain(made, [text])
    assert found.ids == [3 + byte for byte in text.encode()]
    assert len(made) == 259


def test_training_twice_gives_the_same_bytes(run_task: RunTask, corpus: Artifact) -> None:
    cfg = TokenizerConfig(vocab_size=420)
    one, two = (run_task(tokenizer, cfg, corpus) for _ in range(2))
    assert one.manifest["files"] == two.manifest["files"]
    assert one.metrics["tokenizer"]["vocabulary"] == 420
    assert one.metrics["tokenizer"]["bytes_per_token"] > 3


def test_further_corpora_are_trained_on(
    run_task: RunTask, corpus: Artifact, tmp_path: Path
) -> None:
    (tmp_path / "z.txt").write_text("\n\n".join(f"{n} zzzyzx zzzyzx" for n in range(99)))
    cfg = TextConfig(paths=(str(tmp_path / "z.txt"),), documents={"min_bytes": 30})  # type: ignore[arg-type]
    more = run_task(prepare_text, cfg)
    made = load_tokenizer(
        tokenizer_folder(run_task(tokenizer, TokenizerConfig(vocab_size=500), corpus, other=more))
    )
    assert len(encode_plain(made, [" zzzyzx"])[0].ids) == 1


def test_a_loaded_tokenizer_is_the_given_one(
    run_task: RunTask, corpus: Artifact, folder: Path
) -> None:
    given = load_tokenizer(folder).get_vocab()
    for path in (folder, folder.parent):  # its own folder, and that of a bundle around it
        again = run_task(tokenizer, TokenizerConfig(method="load", path=str(path)), corpus)
        assert load_tokenizer(tokenizer_folder(again)).get_vocab() == given


def edit(folder: Path, name: str, **changes: Any) -> None:
    content = json.loads((folder / name).read_text())
    for key, value in changes.items():
        content.pop(key, None)
        if value is not None:
            content[key] = value
    (folder / name).write_text(json.dumps(content))


def test_without_padding_its_eos_is_taken_and_without_eos_it_is_refused(
    run_task: RunTask, corpus: Artifact, folder: Path
) -> None:
    cfg = TokenizerConfig(method="load", path=str(folder))
    edit(folder, "tokenizer_config.json", pad_token=None)
    made = load_tokenizer(tokenizer_folder(run_task(tokenizer, cfg, corpus)))
    assert made.pad_token_id == made.eos_token_id == 2
    edit(folder, "tokenizer_config.json", eos_token=None)
    with pytest.raises(InputError, match="eos"):
        run_task(tokenizer, cfg, corpus)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A tiny BERT as the library saves one: its tokenizer has [CLS] and [SEP], no bos and eos."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [mark + letter for mark in ("", "##") for letter in string.ascii_lowercase]
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(words), intermediate_size=32, **shape)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def test_a_bert_is_loaded_with_its_tokenizer(
    run_task: RunTask, corpus: Artifact, bert: Path
) -> None:
    """What ends a text is [SEP], what begins it [CLS]."""
    given = run_task(tokenizer, TokenizerConfig(method="load", path=str(bert)), corpus)
    made = load_tokenizer(tokenizer_folder(given))
    assert (made.bos_token, made.eos_token, made.pad_token) == ("[CLS]", "[SEP]", "[PAD]")
    rows = run_task(tokens, TokensConfig(family="masked", length=512, bos=True), corpus, given)
    row = TokenReader(rows.file("train.arrow"))[0]
    assert row.answer[0] == made.cls_token_id
    assert made.sep_token_id in row.answer
    taken = {"path": str(bert), "family": "masked"}
    dense = run_task(pretrain, PretrainConfig(model=taken, training=None), given, None)
    bundle = load_bundle(dense.path)
    kept = BertForMaskedLM.from_pretrained(bert).state_dict()
    assert all(torch.equal(kept[name], value) for name, value in bundle.model.state_dict().items())
    assert bundle.tokenizer.eos_token == "[SEP]"


def test_code_that_comes_with_a_tokenizer_is_not_run(
    run_task: RunTask, corpus: Artifact, folder: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "run"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    edit(folder, "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Evil")
    load_tokenizer(folder)
    cfg = TokenizerConfig(method="load", path=str(folder))
    try:
        run_task(tokenizer, cfg, corpus)
    except InputError as error:
        assert str(folder) in str(error)
    assert not mark.exists()


def test_folders_and_names_without_a_tokenizer(
    run_task: RunTask, corpus: Artifact, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="can't be read"):
        load_tokenizer(tmp_path)
    for cfg in (
        TokenizerConfig(method="load", path=str(tmp_path)),
        TokenizerConfig(method="load", hub="nobody/has-this"),
    ):
        with pytest.raises(InputError, match="no tokenizer can be loaded"):
            run_task(tokenizer, cfg, corpus)


@pytest.mark.parametrize(
    ("given_settings", "why"),
    [
        ({"method": "load"}, "exactly one"),
        ({"method": "load", "path": "/a", "hub": "b"}, "exactly one"),
        ({"path": "/a"}, "neither"),
        ({"revision": "main"}, "revision"),
        ({"bos": "<pad>"}, "must differ"),
        ({"vocab_size": 100}, "greater than or equal"),
    ],
)
def test_configs_that_say_two_things(given_settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        TokenizerConfig(**given_settings)
