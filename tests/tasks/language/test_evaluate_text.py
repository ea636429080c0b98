"""Evaluation of tiny bundles: against losses and answers that are made here, another way."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from goldcrest.cluster.api import Artifact, InputError, Output, StepError
from goldcrest.cluster.events import RunResult
from goldcrest.tasks.data.tokens import TokenReader
from goldcrest.tasks.language import quality
from goldcrest.tasks.language.bundle import bundle_bytes, load_bundle, read_description
from goldcrest.tasks.language.evaluate import EvaluateTextConfig, evaluate_text
from goldcrest.tasks.language.evaluation_figures import families, shown_metrics
from goldcrest.tasks.language.examples import Example
from goldcrest.tasks.language.generation import GenerationSettings, Generator
from goldcrest.tasks.language.prepare import TextConfig, prepare_text
from goldcrest.tasks.language.publish import PublishTextConfig, publish_text
from goldcrest.tasks.language.quality import prompt_of
from goldcrest.tasks.language.speed import SpeedConfig, _fitting, measure_here, measure_speed
from goldcrest.tasks.language.tokenizer import TokenizerConfig, tokenizer
from goldcrest.tasks.language.tokens import TokensConfig, tokens
from tests.kernels.language import tiny_models
from tests.tasks.conftest import RunTask, runner
from tests.tasks.language.test_language_bundle import written
from tests.tasks.language.writing_models import (
    BundleToyConfig,
    bundle_toy,
    letter_tokenizer,
)

GREEDY = GenerationSettings(max_new_tokens=8)
CONFIG = EvaluateTextConfig(
    metrics=("exact_match", "chrf"),
    generation=GREEDY,
    bootstrap=20,
    shown=3,
    shard_rows=7,
    batch_rows=3,
    batch_prompts=4,
    speed=None,
)


@dataclass
class Chain:
    """Artifacts of a small run whose right answers are what the dense model writes."""

    run: RunTask
    corpus: Artifact
    tokens: Artifact
    dense: Artifact
    sparse: Artifact
    tokenizer: Path

    def evaluate(self) -> Artifact:
        """Both bundles on everything there is."""
        models = {"dense": self.dense, "sparse_60": self.sparse}
        return self.run(evaluate_text, CONFIG, self.corpus, self.tokens, **models)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("evaluate")
    run = runner(folder)
    letters = folder / "letters"
    letter_tokenizer().save_pretrained(letters)
    dense = run(bundle_toy, BundleToyConfig(tokenizer=str(letters)))
    made = BundleToyConfig(name="sparse_60", sparsity=0.6, tokenizer=str(letters))
    sparse = run(bundle_toy, made)
    corpus = run(prepare_text, TextConfig(paths=(str(_texts(folder, dense)),), test_share=0.3))
    encoder = run(tokenizer, TokenizerConfig(method="load", path=str(letters)), corpus)
    rows = run(tokens, TokensConfig(length=40), corpus, encoder)
    return Chain(run, corpus, rows, dense, sparse, letters)


def _texts(folder: Path, dense: Artifact) -> Path:
    """Prompts of random letters, answered by the dense model itself."""
    rng = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    prompts = ["".join(rng.choice(letters, int(rng.integers(2, 9)))) for _ in range(60)]
    generator = Generator(load_bundle(dense.path))
    answers = generator.generate([f"{prompt}\n" for prompt in prompts], GREEDY)
    path = folder / "texts.jsonl"
    rows = [
        json.dumps({"prompt": prompt, "answer": answer.text})
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer.text.strip()
    ]
    path.write_text("\n".join(rows))
    return path


@pytest.fixture(scope="module")
def evaluation(chain: Chain) -> Artifact:
    return chain.evaluate()


def test_quality_of_the_bundles(chain: Chain, evaluation: Artifact) -> None:
    made = evaluation
    language = made.metrics["language"]
    dense, sparse = language["dense"], language["sparse_60"]
    assert dense["exact_match"] == 100
    assert dense["exact_match_ci"] == [100, 100]
    assert dense["unanswered"] == sparse["unanswered"] == 0
    assert 0 <= sparse["exact_match"] < 100
    assert sparse["chrf"] < dense["chrf"] == pytest.approx(100)

    reader = TokenReader(chain.tokens.file("test.arrow"))
    assert dense["rows"] == dense["examples"] == len(reader) > 3
    nll, count = _by_hand(chain.dense, reader)
    assert dense["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    letters = int(reader.characters.sum())
    assert dense["bits_per_char"] == pytest.approx(nll / math.log(2) / letters, rel=1e-5)
    assert dense["bits_per_byte"] == dense["bits_per_char"]
    assert dense["perplexity_ci"][0] < dense["perplexity"] < dense["perplexity_ci"][1]

    against = made.metrics["language_minus_dense"]
    assert set(against) == {"sparse_60"}
    difference = sparse["perplexity"] - dense["perplexity"]
    assert against["sparse_60"]["perplexity"] == pytest.approx(difference)
    low, high = against["sparse_60"]["perplexity_ci"]
    assert low <= high

    losses = made.table("losses").to_pylist()
    assert len(losses) == 2 * len(reader)
    assert sum(row["nll"] for row in losses if row["model"] == "dense") == pytest.approx(nll)
    texts = made.table("answers").to_pylist()
    assert [row["model"] for row in texts] == 3 * ["dense", "sparse_60"]
    assert texts[0]["answer"] in texts[0]["references"]
    assert {"figures/quality_by_sparsity.png", "figures/quality_by_size.png"} <= set(
        made.manifest["files"]
    )
    sizes = made.metrics["models"]["sparse_60"]
    assert sizes["bytes"] == bundle_bytes(chain.sparse.path)
    assert sizes["weight_bytes"] < made.metrics["models"]["dense"]["weight_bytes"]
    assert sizes["sparsity"] == pytest.approx(0.6, abs=0.02)
    assert sizes["bits"] == 32


def _by_hand(bundle: Artifact, reader: TokenReader) -> tuple[float, int]:
    """NLL and tokens of all rows by the model's own loss, one row at a time."""
    model = load_bundle(bundle.path).model
    nll, count = 0.0, 0
    for place in range(len(reader)):
        row = reader[place]
        ids = torch.tensor([*row.prompt.tolist(), *row.answer.tolist()])[None]
        labels = ids.clone()
        labels[0, : len(row.prompt)] = -100
        with torch.no_grad():
            nll += len(row.answer) * float(model(input_ids=ids, labels=labels).loss)
        count += len(row.answer)
    return nll, count


def test_the_same_key_gives_the_same_bytes(chain: Chain, evaluation: Artifact) -> None:
    again = chain.evaluate()
    assert again.manifest["files"] == evaluation.manifest["files"]
    assert again.metrics == evaluation.metrics


def test_examples_are_drawn_by_the_seed(chain: Chain) -> None:
    drawn = {}
    for seed in (0, 1):
        few = CONFIG.model_copy(update={"loss_rows": 4, "metrics": (), "shown": 5})
        inputs = (chain.corpus, chain.tokens)
        made = chain.run(evaluate_text, few, *inputs, seed=seed, dense=chain.dense)
        assert made.metrics["language"]["dense"]["rows"] == 4
        drawn[seed] = (made.table("losses")["row"], made.table("answers")["id"])
        assert len(drawn[seed][1]) == 5
    assert drawn[0][0] != drawn[1][0]
    assert drawn[0][1] != drawn[1][1]


def test_speed_and_memory_are_those_of_a_process_of_its_own(chain: Chain) -> None:
    """What this process holds does not enter the peak of the other."""
    hog = np.ones(100_000_000)  # 800 MB
    found = measure_speed(chain.dense.path, SpeedConfig(prompt_tokens=5, new_tokens=3, repeats=2))
    assert hog[-1] == 1
    assert 0 < found["before_loading_mb"] <= found["peak_mb"] < 800
    for name in ("first_token_ms", "next_token_ms", "tokens_per_second", "load_seconds"):
        assert found[name] > 0
    assert (found["threads"], found["prompt_tokens"], found["new_tokens"]) == (1, 5, 3)


def test_a_runs_json_holds_quality_size_and_speed_of_every_model(chain: Chain) -> None:
    """The names that others read; a run merges the metrics of its steps and what was measured."""
    speed = SpeedConfig(prompt_tokens=4, new_tokens=2, repeats=1)
    config = CONFIG.model_copy(update={"metrics": (), "shown": 0, "speed": speed})
    made = chain.run(evaluate_text, config, chain.corpus, chain.tokens, sparse_60=chain.sparse)
    result = RunResult(
        run="r", pipeline="language", status="succeeded", seconds=1.0, steps=[],
        metrics=made.metrics, measurements=made.manifest["measurements"],
    )  # fmt: skip
    told = json.loads(json.dumps(result.as_json(), allow_nan=False))["metrics"]
    sizes = {"bytes", "parameters", "sparsity", "bits"}
    measured = {"tokens_per_second", "first_token_ms", "next_token_ms", "peak_mb"}
    assert set(told["language"]) == set(told["models"]) == {"sparse_60"}
    language, model = told["language"]["sparse_60"], told["models"]["sparse_60"]
    assert language["perplexity"] > 1 and language["bits_per_char"] > 0
    assert sizes | measured <= set(model)
    assert all(model[key] > 0 for key in sizes | measured)


def test_what_can_not_be_measured_is_said(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"could not be measured: .*bundle\.json can't be read"):
        measure_speed(tmp_path, SpeedConfig())


@pytest.mark.parametrize(
    ("limit", "family", "expected"),
    [
        (None, "causal", (32, 32)),
        (64, "causal", (32, 32)),
        (40, "causal", (20, 20)),
        (16, "causal", (8, 8)),
        (2, "causal", (1, 2)),
        (24, "seq2seq", (24, 24)),  # each side has positions of its own
        (24, "masked", (24, 24)),
    ],
)
def test_what_is_timed_fits_the_context(
    limit: int | None, family: str, expected: tuple[int, int]
) -> None:
    made = _fitting(SpeedConfig(), limit, family)
    assert (made.prompt_tokens, made.new_tokens) == expected
    short = SpeedConfig(prompt_tokens=4, new_tokens=32)
    made = _fitting(short, limit, family)
    assert made.prompt_tokens == min(4, limit or 4) or limit == 2
    assert family != "causal" or limit in (None, 2) or made.new_tokens == min(32, limit - 4)


@pytest.mark.parametrize("positions", [3, 20])
def test_speed_of_a_short_context(chain: Chain, tmp_path: Path, positions: int) -> None:
    """Of 20 positions, say, where 32 tokens are wanted after 32 others."""
    folder = written(tmp_path / "short", tiny_models.gpt2(n_positions=positions))
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(chain.tokenizer, folder / "tokenizer")
    found = measure_here(folder, SpeedConfig(repeats=1), "cpu")
    assert found["prompt_tokens"] + found["new_tokens"] == positions


@pytest.mark.parametrize(("architecture", "family"), [("t5", "seq2seq"), ("bert", "masked")])
def test_other_families(
    chain: Chain, architecture: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder-decoder is scored and writes; a masked model is scored only."""
    toy = BundleToyConfig(architecture=architecture, tokenizer=str(chain.tokenizer))
    model = chain.run(bundle_toy, toy)
    encoder = chain.run(
        tokenizer, TokenizerConfig(method="load", path=str(chain.tokenizer)), chain.corpus
    )
    rows = chain.run(tokens, TokensConfig(family=family, length=40), chain.corpus, encoder)
    said: list[str] = []
    monkeypatch.setattr(Output, "progress", lambda _, share, text="": said.append(text))
    made = chain.run(evaluate_text, CONFIG, chain.corpus, rows, dense=model)
    left_out = "masked models write no answers: exact_match, chrf left out"
    assert (left_out in said) == (family == "masked")
    found = made.metrics["language"]["dense"]
    assert found["perplexity"] > 1
    assert 0 < found["entropy"] <= math.log(64)
    assert ("exact_match" in found) == (family == "seq2seq")
    assert ("answers.parquet" in made) == (family == "seq2seq")


def test_plain_text_is_continued_to_be_read(chain: Chain, tmp_path: Path) -> None:
    path = tmp_path / "plain.txt"
    path.write_text("\n\n".join(f"text{n} " + "abc " * 20 for n in range(30)))
    corpus = chain.run(prepare_text, TextConfig(paths=(str(path),)))
    plain = CONFIG.model_copy(update={"metrics": ()})
    made = chain.run(evaluate_text, plain, corpus, chain.tokens, dense=chain.dense)
    assert "examples" not in made.metrics["language"]["dense"]
    texts = made.table("answers").to_pylist()
    assert 1 <= len(texts) <= 3
    assert texts[0]["references"][0].startswith(texts[0]["prompt"])
    # A config for tasks, with metrics, does not fail on it at the end of all training.
    again = chain.run(evaluate_text, CONFIG, corpus, chain.tokens, dense=chain.dense)
    assert again.metrics["language"] == made.metrics["language"]
    assert again.table("answers").to_pylist() == texts


def test_metrics_need_a_prompt_with_an_answer(chain: Chain, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f'{{"prompt": "a{n}", "answer": "b"}}\n' for n in range(30)))
    corpus = chain.run(prepare_text, TextConfig(paths=(str(path),), test_share=0))
    with pytest.raises(StepError, match="no prompt with an answer, which exact_match, chrf"):
        chain.run(evaluate_text, CONFIG, corpus, chain.tokens, dense=chain.dense)


def test_a_prompt_beyond_the_context_has_no_answer_and_is_counted(
    chain: Chain, tmp_path: Path
) -> None:
    """GPT-2 has 64 positions. The token rows drop the example; the evaluation goes on as well."""
    prompts = [f"{n:02d}" * times for n in range(40) for times in (1, 35)]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": each, "answer": "c"}) for each in prompts))
    corpus = chain.run(prepare_text, TextConfig(paths=(str(path),), test_share=0.3))
    encoder = chain.run(
        tokenizer, TokenizerConfig(method="load", path=str(chain.tokenizer)), corpus
    )
    encoded = chain.run(tokens, TokensConfig(length=40), corpus, encoder)
    model = chain.run(
        bundle_toy, BundleToyConfig(architecture="gpt2", tokenizer=str(chain.tokenizer))
    )
    metrics = ("exact_match", "bleu", "chrf", "ter", "rouge1", "rougeL", "wer", "cer")
    config = CONFIG.model_copy(update={"metrics": metrics, "shown": 100})
    made = chain.run(evaluate_text, config, corpus, encoded, dense=model)
    found = made.metrics["language"]["dense"]
    shown = made.table("answers").to_pylist()
    long = [row for row in shown if len(row["prompt"]) > 64]
    assert 0 < len(long) < len(shown) == found["examples"]
    assert found["unanswered"] == len(long)
    assert [row for row in shown if not row["answer"]] == long


@pytest.mark.parametrize("text", ["鶲" * 500, "🐦" * 500, "ไทย" * 500, "слово " * 500, "ab" * 500])
def test_a_text_is_continued_from_little_with_or_without_spaces(text: str) -> None:
    """A token is a byte at the least, so half the context of 256 is left for the answer."""
    prompt = prompt_of(Example("1", "", text))
    assert text.startswith(prompt)
    assert 64 < len(prompt.encode()) <= 128
    assert prompt_of(Example("1", "asked", text)) == "asked"


def test_no_model_and_no_rows_are_said(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StepError, match="no model"):
        chain.run(evaluate_text, CONFIG, chain.corpus, chain.tokens)
    gsm8k = CONFIG.model_copy(update={"metrics": ("gsm8k",)})
    for work in ("row_losses", "answers"):  # it is said before any model has run
        monkeypatch.delattr(quality, work)
    with pytest.raises(StepError, match=r"gsm8k can't be computed: .*no final number"):
        chain.run(evaluate_text, gsm8k, chain.corpus, chain.tokens, dense=chain.dense)
    with pytest.raises(ValueError, match="named twice"):
        EvaluateTextConfig(metrics=("bleu", "bleu"))


def test_a_published_bundle_says_what_was_measured(chain: Chain, evaluation: Artifact) -> None:
    found = evaluation
    config = PublishTextConfig(licence="CC0")
    made = chain.run(publish_text, config, chain.sparse, found)
    facts = read_description(made.path)
    assert facts["measured"]["perplexity"] == found.metrics["language"]["sparse_60"]["perplexity"]
    assert facts["measured"]["bytes"] == found.metrics["models"]["sparse_60"]["bytes"]
    card = made.file("MODEL_CARD.md").read_text()
    assert "| exact_match | " in card
    assert "95 % interval" in card
    assert "Licence: CC0." in card
    loaded, original = load_bundle(made.path), load_bundle(chain.sparse.path)
    ids = torch.arange(5)[None]
    assert torch.equal(loaded.model(ids).logits, original.model(ids).logits)
    with pytest.raises(StepError, match="knows no model 'other'; it has: dense, sparse_60"):
        chain.run(publish_text, PublishTextConfig(name="other"), chain.sparse, found)


def test_prompts_begin_as_the_rows_do(chain: Chain) -> None:
    """A model that was trained without bos is measured, and published, without it."""
    encoder = chain.run(
        tokenizer, TokenizerConfig(method="load", path=str(chain.tokenizer)), chain.corpus
    )
    rows = chain.run(tokens, TokensConfig(length=40, bos=False), chain.corpus, encoder)
    config = CONFIG.model_copy(update={"metrics": ()})
    found = chain.run(evaluate_text, config, chain.corpus, rows, dense=chain.dense)
    made = chain.run(publish_text, PublishTextConfig(), chain.dense, found)
    generator = Generator(load_bundle(made.path))
    assert generator.encode("ab") == load_bundle(made.path).tokenizer("ab")["input_ids"]
    shown = found.table("answers").to_pylist()
    again = generator.generate([row["prompt"] for row in shown], GREEDY)
    assert [row["answer"] for row in shown] == [each.text for each in again]
    begun = Generator(load_bundle(chain.dense.path))
    other = begun.generate([row["prompt"] for row in shown], GREEDY)
    assert [each.text for each in other] != [each.text for each in again]


def test_a_damaged_bundle_is_named_before_anything_runs(chain: Chain, tmp_path: Path) -> None:
    copy = chain.run(bundle_toy, BundleToyConfig(tokenizer=str(chain.tokenizer)))
    (copy.path / "bundle.json").write_text("{}")
    with pytest.raises(Exception, match=r"bundle\.json"):
        chain.run(evaluate_text, CONFIG, chain.corpus, chain.tokens, dense=copy)


def test_figures_know_families_by_their_percentages() -> None:
    names = ["dense", "sparse_50", "ce_75", "sparse_75.5", "int8"]
    assert families(names) == {
        "dense": ["dense"],
        "sparse": ["sparse_50", "sparse_75.5"],
        "ce": ["ce_75"],
        "int8": ["int8"],
    }
    values: dict[str, dict[str, Any]] = {
        "a": {"perplexity": 2.0, "perplexity_ci": [1, 3], "entropy": 1, "entropy_ci": [1, 1]},
        "b": {"bleu": 2.0, "bleu_ci": [1, 3], "examples": 4},
    }
    assert shown_metrics(values) == ["perplexity", "bleu"]


def test_a_model_that_does_not_fit_the_rows_is_refused_with_a_sentence(chain: Chain) -> None:
    from goldcrest.tasks.language.collator import make_collator
    from goldcrest.tasks.language.quality import LossShard, row_losses

    bundle = load_bundle(chain.dense.path)
    bundle.tokenizer.mask_token = None
    with pytest.raises(InputError, match="needs a tokenizer with a mask token"):
        make_collator("masked", bundle.tokenizer, bundle.model.config)
    config = BundleToyConfig(architecture="whisper", tokenizer=str(chain.tokenizer))
    speech = chain.run(bundle_toy, config)
    rows = LossShard(speech.path, chain.tokens.file("test.arrow"), np.arange(2), 2, "cpu")
    with pytest.raises(InputError, match="have no features, and a speech model reads audio"):
        row_losses(rows)
