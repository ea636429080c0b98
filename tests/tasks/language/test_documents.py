"""Models that keep the documents of a packed row apart are told from those that do not."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from goldcrest.cluster.api import InputError
from goldcrest.kernels.language.architectures import (
    fresh_config,
    longest_text,
    new_model,
    parse_config,
)
from goldcrest.tasks.data.tokens import TokenReader, TokenRow
from goldcrest.tasks.language.collator import Collator, make_collator
from goldcrest.tasks.language.documents import attention_window, check_reading
from goldcrest.tasks.language.objective import LanguageObjective, Text, model_inputs
from tests.tasks.language import language_toys as toys

HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES = {"hidden_size": 32, **HEADS}
LONGEST = {"max_position_embeddings": 64}
BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    **LONGEST,
}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
RWKV = {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}
ALIBI = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "alibi": True}
MPT = {"d_model": 32, "n_layers": 1, "n_heads": 4, "max_seq_len": 64}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
APART = [
    ("causal", "llama", {**SIZES, **LONGEST}),
    ("causal", "gpt2", GPT2),
    ("causal", "mpt", MPT),
    ("causal", "falcon", {**ALIBI, "alibi": False}),
    ("masked", "bert", {**SIZES, **LONGEST}),
    ("masked", "roberta", {**SIZES, **LONGEST}),
    ("masked", "xlm-roberta", {**SIZES, **LONGEST}),
    ("masked", "mpnet", {**SIZES, **LONGEST}),
    ("masked", "modernbert", {**SIZES, **LONGEST}),
    ("masked", "big_bird", {**SIZES, **LONGEST, "attention_type": "original_full"}),
]
FAILS, MIXES = "it can't read them", "the one before changes its logits"
TOGETHER = [
    ("causal", "bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 4}, FAILS),
    ("causal", "falcon", ALIBI, FAILS),
    ("causal", "mamba", MAMBA, FAILS),
    ("causal", "rwkv", RWKV, MIXES),
    ("causal", "bart", BART, "alone it has other logits"),
    ("masked", "esm", {**SIZES, **LONGEST}, FAILS),
    ("masked", "deberta-v2", {**SIZES, **LONGEST}, FAILS),
    ("masked", "convbert", {**SIZES, **LONGEST, "embedding_size": 32}, MIXES),
    ("masked", "fnet", {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}, MIXES),
    ("masked", "big_bird", {**SIZES, **LONGEST}, "the blocks"),
]


def fresh(architecture: str, family: str, settings: dict[str, Any]) -> Any:
    """A model with weights that are large enough for each token to matter."""
    special = {"pad": 0, "bos": 1, "eos": 2}
    config = fresh_config(architecture, settings, vocabulary=toys.WORDS, special=special)
    torch.manual_seed(0)
    model = new_model(config, family)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.tie_weights()
    return model.train()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from goldcrest.tasks.language.tokenizer import load_tokenizer, tokenizer_folder

    return load_tokenizer(tokenizer_folder(toys.tokenizer_artifact(tmp_path_factory.mktemp("t"))))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, TokenReader]:
    """Packed rows, and rows of a prompt and answer."""
    made = {}
    for packed in (True, False):
        folder = tmp_path_factory.mktemp("rows") / "tokens"
        toys.tokens_artifact(folder, rows=4, packed=packed)
        made[packed] = TokenReader(folder / "train.arrow")
    return made


@pytest.mark.parametrize(("family", "architecture", "settings"), APART)
def test_documents_that_are_apart_pass(
    family: str,
    architecture: str,
    settings: dict[str, Any],
    tokenizer: Any,
    rows: dict[bool, TokenReader],
) -> None:
    """And truly: every document of a packed row gets the logits that it gets alone."""
    model = fresh(architecture, family, settings)
    collate = make_collator(family, tokenizer, model.config)
    check_reading(model, collate, *rows.values())
    assert model.training
    check_reading(copy.deepcopy(model).bfloat16(), collate, *rows.values())
    model.eval()
    row = rows[True][0]
    rng = np.random.default_rng(0)
    with torch.no_grad():
        packed = model(**given(model, collate, [row], rng)).logits[0]
        for start, end in zip(row.starts, [*row.starts[1:], len(row)], strict=True):
            one = TokenRow(row.prompt, row.answer[start:end], row.starts[:1])
            alone = model(**given(model, collate, [one], rng)).logits[0]
            assert torch.allclose(packed[start:end], alone, rtol=1e-4, atol=1e-4)


def given(
    model: Any, collate: Collator, some: list[TokenRow], rng: np.random.Generator
) -> dict[str, Any]:
    """What the model reads of rows, nothing hidden."""
    batch = collate(some, rng)
    hidden = batch["labels"] >= 0 if collate.family == "masked" else batch["labels"] < -100
    batch["input_ids"] = torch.where(hidden, batch["labels"], batch["input_ids"])
    return model_inputs(model, batch)


@pytest.mark.parametrize(("family", "architecture", "settings", "why"), TOGETHER)
def test_documents_that_are_not_are_refused(
    family: str,
    architecture: str,
    settings: dict[str, Any],
    why: str,
    tokenizer: Any,
    rows: dict[bool, TokenReader],
) -> None:
    """Before anything is trained; rows of one document each are read as ever."""
    model = fresh(architecture, family, settings)
    collate = make_collator(family, tokenizer, model.config)
    with pytest.raises(InputError, match=f"'{architecture}' does not keep .* \\({why}") as told:
        check_reading(model, collate, rows[True])
    assert "set pack to nothing" in str(told.value.hint)
    check_reading(model, collate, rows[False])
    assert model.training
    text = Text(train=rows[True], validation=rows[True], collate=collate)
    objective = LanguageObjective(text, start=lambda: fresh(architecture, family, settings))
    with pytest.raises(InputError, match="does not keep the documents"):
        objective.build_model()
    row = TokenRow(np.zeros(0, np.int32), np.arange(4, 12, dtype=np.int32), np.zeros(1, np.int32))
    batch = collate([row, row], np.random.default_rng(0))
    assert torch.isfinite(model(**model_inputs(model, batch)).logits).all()


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_a_causal_model_that_sees_ahead_is_refused(
    architecture: str, tokenizer: Any, rows: dict[bool, TokenReader]
) -> None:
    """It would learn to copy. As a decoder it may be trained."""
    settings = {**SIZES, **LONGEST}
    model = fresh(architecture, "causal", settings)
    collate = make_collator("causal", tokenizer, model.config)
    with pytest.raises(InputError, match="sees tokens that it is to predict") as told:
        check_reading(model, collate, rows[False])
    assert "set is_decoder to true" in str(told.value.hint)
    decoder = fresh(architecture, "causal", {**settings, "is_decoder": True})
    check_reading(decoder, collate, *rows.values())


def test_a_context_shorter_than_the_question(tokenizer: Any, rows: dict[bool, TokenReader]) -> None:
    model = fresh("gpt2", "causal", {**GPT2, "n_positions": 8})
    check_reading(model, make_collator("causal", tokenizer, model.config), rows[False])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "architecture", "settings", "words"),
    [
        ("causal", "bert", {**SIZES, **LONGEST}, "sees tokens"),
        ("causal", "roberta", {**SIZES, **LONGEST}, "sees tokens"),
        ("masked", "convbert", {**SIZES, **LONGEST, "embedding_size": 32}, "does not keep"),
        ("causal", "rwkv", RWKV, "does not keep"),
    ],
)
def test_it_is_seen_in_weights_as_they_are_first_drawn(
    family: str,
    architecture: str,
    settings: dict[str, Any],
    words: str,
    precision: torch.dtype,
    tokenizer: Any,
    rows: dict[bool, TokenReader],
) -> None:
    """Small ones, whose tokens hardly matter to each other yet; and in coarse precisions."""
    special = {"pad": 0, "bos": 1, "eos": 2}
    config = fresh_config(architecture, settings, vocabulary=toys.WORDS, special=special)
    for seed in range(3):
        torch.manual_seed(seed)
        model = new_model(config, family).to(precision)
        collate = make_collator(family, tokenizer, config)
        with pytest.raises(InputError, match=words):
            check_reading(model, collate, rows[True])


def test_weights_that_are_not_finite_are_not_the_rows_fault(
    tokenizer: Any, rows: dict[bool, TokenReader]
) -> None:
    model = fresh("llama", "causal", {**SIZES, **LONGEST})
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    check_reading(model, make_collator("causal", tokenizer, model.config), rows[True])


def reading_pairs(then: Callable[[torch.Tensor], None], patch: pytest.MonkeyPatch) -> Any:
    """A model whose logits `then` is given, where it reads a mask of pairs."""
    model = fresh("llama", "causal", {**SIZES, **LONGEST})
    forward = model.forward

    def read(**given: Any) -> Any:
        made = forward(**given)
        if given["attention_mask"].ndim == 4:
            then(made.logits)
        return made

    read.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    patch.setattr(model, "forward", read)
    return model


def test_logits_that_a_mask_makes_nan_are(
    tokenizer: Any, rows: dict[bool, TokenReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(logits: torch.Tensor) -> None:
        logits.fill_(float("nan"))

    model = reading_pairs(spoil, monkeypatch)
    with pytest.raises(InputError, match="does not keep the documents"):
        check_reading(model, make_collator("causal", tokenizer, model.config), rows[True])


def test_memory_that_is_short_is_not_the_rows_fault(
    tokenizer: Any, rows: dict[bool, TokenReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("of the GPU")

    model = reading_pairs(fail, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        check_reading(model, make_collator("causal", tokenizer, model.config), rows[True])


def test_big_bird_attends_in_blocks_as_before(
    tokenizer: Any, rows: dict[bool, TokenReader]
) -> None:
    """A short row changes its attention for good."""
    model = fresh("big_bird", "causal", {**SIZES, **LONGEST, "is_decoder": True})
    before = model.bert.attention_type
    check_reading(model, make_collator("causal", tokenizer, model.config), rows[False])
    assert model.bert.attention_type == before == model.config.attention_type == "block_sparse"


@pytest.mark.parametrize(
    ("architecture", "settings", "window"),
    [
        ("mistral", {"sliding_window": 9}, 9),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 0}, None),
        ("qwen2_moe", {"use_sliding_window": False}, None),
        ("gemma3_text", {"sliding_window": 9, "layer_types": ["full_attention"] * 2}, None),
        ("gemma3_text", {"sliding_window": 9, "layer_types": ["sliding_attention"] * 2}, 9),
        ("llama4_text", {"attention_chunk_size": 7}, 7),
        ("modernbert", {"local_attention": 18}, 9),
        ("gpt2", {}, None),
    ],
)
def test_windows_are_those_of_layers_that_have_one(
    architecture: str, settings: dict[str, Any], window: int | None
) -> None:
    sizes = {} if architecture in ("gpt2", "modernbert") else {"num_hidden_layers": 2}
    if "layer_types" not in settings and architecture == "llama4_text":
        sizes["num_hidden_layers"] = 4
    config = parse_config({"model_type": architecture, **sizes, **settings})
    assert attention_window(config) == window


def test_a_window_is_not_kept_in_rows_of_several_documents(
    tokenizer: Any, rows: dict[bool, TokenReader]
) -> None:
    """The library reads a mask of pairs as it is: attention would reach beyond the window."""
    longest = rows[True].longest_document
    assert longest < int(rows[True].lengths.max())
    for window in (longest - 1, longest):
        model = fresh("mistral", "causal", {**SIZES, "num_key_value_heads": 2,
                                            "sliding_window": window})  # fmt: skip
        collate = make_collator("causal", tokenizer, model.config)
        check_reading(model, collate, rows[False])
        check_reading(model, collate, rows[True], cut=longest - 1)
        if window == longest:
            check_reading(model, collate, rows[True])
            continue
        with pytest.raises(InputError, match=f"attends to {window}: its window can't be kept"):
            check_reading(model, collate, rows[True])


@pytest.mark.parametrize("architecture", ["roberta", "mpnet", "camembert"])
def test_positions_that_begin_after_padding(architecture: str, tokenizer: Any) -> None:
    """As many tokens as are said have positions, packed or not; one more has none."""
    model = fresh(architecture, "masked", {**SIZES, "max_position_embeddings": 16}).eval()
    collate = make_collator("masked", tokenizer, model.config)
    most = longest_text(model.config)
    assert most is not None and collate.first == 16 - most
    rng = np.random.default_rng(0)
    ids = np.full(most + 1, 5, np.int32)
    nothing = np.zeros(0, np.int32)
    for starts in ([0], [0, most]):
        row = TokenRow(nothing, ids[:most], np.array(starts[:1], np.int32))
        model(**model_inputs(model, collate([row], rng)))
    with pytest.raises((IndexError, RuntimeError)):
        one_more = TokenRow(nothing, ids, np.zeros(1, np.int32))
        model(**model_inputs(model, collate([one_more], rng)))
    packed = TokenRow(nothing, ids[:8], np.array([0, 3], np.int32))
    positions = collate([packed], rng)["position_ids"][0]
    assert positions.tolist() == [collate.first + n for n in (0, 1, 2, 0, 1, 2, 3, 4)]


@pytest.mark.parametrize("family", ["causal", "masked"])
def test_a_step_says_it_and_leaves_nothing(family: str, tmp_path: Path, run_task: Any) -> None:
    """Through the training engine: the sentence arrives from the worker."""
    from goldcrest.tasks.language.models import ModelConfig
    from goldcrest.tasks.language.pretrain import PretrainConfig, pretrain

    words = toys.tokenizer_artifact(tmp_path / "words")
    made = toys.tokens_artifact(tmp_path / "tokens", family=family, rows=8, packed=True)
    architecture, settings = {
        "causal": ("rwkv", RWKV),
        "masked": ("deberta-v2", {**SIZES, **LONGEST}),
    }[family]
    model = ModelConfig(
        architecture=architecture,
        settings=settings,
        family=family,  # type: ignore[arg-type]
    )
    with pytest.raises(InputError, match="does not keep the documents of a packed row apart"):
        run_task(pretrain, PretrainConfig(model=model), words, made)
