"""What a decoder is fed is the same in training, in every measure and in generation.

mBART and PLBart shift labels in a way of their own: the label that ends a text goes first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from goldcrest.cluster.api import InputError
from goldcrest.kernels.language.architectures import decoder_start, parse_config
from goldcrest.kernels.language.losses import cross_entropy, predictions
from goldcrest.kernels.metrics.perplexity import seq2seq_sums
from goldcrest.kernels.quantization.int8_sensitivity import mean_loss
from goldcrest.tasks.data.tokens import TokenReader
from goldcrest.tasks.language.bundle import LanguageModel
from goldcrest.tasks.language.collator import make_collator
from goldcrest.tasks.language.generation import GenerationSettings, Generator
from goldcrest.tasks.language.harness_model import BundleModel
from goldcrest.tasks.language.int4_trials import measure
from goldcrest.tasks.language.models import ModelConfig, build_model, model_config
from goldcrest.tasks.language.objective import model_inputs
from goldcrest.tasks.language.quality import loss_batch
from tests.tasks.language import language_toys as toys
from tests.tasks.language.test_documents import BART, LONGEST, SIZES, fresh

ARCHITECTURES = {"bart": BART, "mbart": BART, "plbart": BART, "t5": toys.T5}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from goldcrest.tasks.language.tokenizer import load_tokenizer, tokenizer_folder

    return load_tokenizer(tokenizer_folder(toys.tokenizer_artifact(tmp_path_factory.mktemp("w"))))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_measure_feeds_the_decoder_what_training_does(
    architecture: str, words: Any, tmp_path: Path
) -> None:
    model = fresh(architecture, "seq2seq", ARCHITECTURES[architecture]).eval()
    toys.tokens_artifact(tmp_path / "rows", family="seq2seq", rows=6)
    reader = TokenReader(tmp_path / "rows" / "train.arrow")
    rows = [reader[number] for number in range(len(reader))]
    facts = {"family": "seq2seq", "name": "dense", "architecture": architecture, "bos": False}
    bundle = LanguageModel(facts, model, words)
    collate = make_collator("seq2seq", words, model.config)
    batch = loss_batch(bundle, collate, rows)
    with torch.no_grad():
        logits = model(**model_inputs(model, batch)).logits
        trained = float(cross_entropy(*predictions(logits, batch["labels"], shifted=False)))
        assert mean_loss(model, [batch]) == pytest.approx(trained, rel=1e-5)
    sums = seq2seq_sums(model, batch)
    assert float(sums.nll.sum() / sums.tokens.sum()) == pytest.approx(trained, rel=1e-5)
    assert measure(model, [batch], "seq2seq")["loss"] == pytest.approx(trained, rel=1e-5)
    asked = [(("", ""), row.prompt.tolist(), row.answer.tolist()) for row in rows]
    scored = BundleModel(bundle, batch_size=4)._loglikelihood_tokens(asked)
    total = -sum(value for value, _ in scored) / sum(len(row.answer) for row in rows)
    assert total == pytest.approx(trained, rel=1e-5)


@pytest.mark.parametrize("architecture", ["mbart", "plbart"])
def test_and_so_does_generation(architecture: str, words: Any, tmp_path: Path) -> None:
    """What greedy decoding writes is what the harness finds most probable at every step."""
    model = fresh(architecture, "seq2seq", BART).eval()
    facts = {"family": "seq2seq", "name": "dense", "architecture": architecture, "bos": False}
    bundle = LanguageModel(facts, model, words)
    prompt = [5, 9, 12, 2]
    (made,) = Generator(bundle).generate([prompt], GenerationSettings(max_new_tokens=6))
    assert len(made.tokens) > 1
    ((_, greedy),) = BundleModel(bundle)._loglikelihood_tokens(
        [(("", ""), prompt, list(made.tokens))]
    )
    assert greedy


@pytest.mark.parametrize("architecture", ["bert", "roberta", "xlm-roberta", "camembert", "llama"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_decoder_writes_what_it_scores_highest(architecture: str, batch: int, words: Any) -> None:
    """RoBERTa's kind counts positions from its padding on, in generation too; so does a batch whose
    prompts differ in length."""
    settings = {**SIZES, **LONGEST} | ({} if architecture == "llama" else {"is_decoder": True})
    model = fresh(architecture, "causal", settings).eval()
    facts = {"family": "causal", "name": "dense", "architecture": architecture, "bos": False}
    bundle = LanguageModel(facts, model, words)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, toys.WORDS, size).tolist() for size in (3, 5, 1, 4, 2, 6, 3, 7)]
    Generator(bundle)  # another of the same model changes nothing
    generator = Generator(bundle, batch_size=batch)
    made = generator.generate(prompts, GenerationSettings(max_new_tokens=6))
    for prompt, each in zip(prompts, made, strict=True):
        if not each.tokens:  # the end of text came first
            continue
        asked = [(("", ""), prompt, list(each.tokens))]
        ((_, greedy),) = BundleModel(bundle)._loglikelihood_tokens(asked)
        assert greedy
    assert sum(len(each.tokens) for each in made) > len(prompts)


def test_a_start_that_is_named_for_generation_only_is_trained_with(
    words: Any, tmp_path: Path
) -> None:
    model = fresh("bart", "seq2seq", BART)
    model.save_pretrained(tmp_path)
    for name, start in (("config", None), ("generation_config", 7)):
        file = tmp_path / f"{name}.json"
        told = json.loads(file.read_text("utf-8")) | {"decoder_start_token_id": start}
        file.write_text(json.dumps(told), "utf-8")
    config = model_config(ModelConfig(path=str(tmp_path), family="seq2seq"), words)
    assert make_collator("seq2seq", words, config).start == 7
    taken = build_model(ModelConfig(path=str(tmp_path), family="seq2seq"), config)  # as it is
    assert make_collator("seq2seq", words, taken.config).start == 7


def test_a_decoder_without_a_token_to_start_with_is_refused(words: Any) -> None:
    config = parse_config({"model_type": "mbart", "decoder_start_token_id": 5})
    assert decoder_start(config) == 5
    config = parse_config({"model_type": "mbart", "bos_token_id": 3})
    assert decoder_start(config) == 3
    config.bos_token_id = None
    with pytest.raises(InputError, match="names no decoder_start_token_id, so its decoder has"):
        make_collator("seq2seq", words, config)
