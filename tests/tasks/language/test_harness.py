"""EleutherAI's harness on a tiny bundle, with tasks and data written here; no hub."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tasks.conftest import RunTask, runner
from tests.tasks.language.writing_models import (
    BundleToyConfig,
    bundle_toy,
    letter_tokenizer,
    tiny_bundle,
)

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from goldcrest.cluster.api import Artifact, InputError, StepError
from goldcrest.tasks.language.bundle import LanguageModel, load_bundle
from goldcrest.tasks.language.generation import GenerationSettings, Generator
from goldcrest.tasks.language.harness import HarnessConfig, harness, plain_metrics
from goldcrest.tasks.language.harness_model import BundleModel
from goldcrest.tasks.language.quantize_int4 import Int4Config, quantize_int4
from goldcrest.tasks.language.quantize_int8 import QuantizeInt8Config, quantize_int8
from tests.tasks.language.language_toys import tokens_artifact

ROWS = [
    {"question": "ab", "choices": ["cd", "ef", "x"], "gold": 1, "text": "abcdefgh"},
    {"question": "hello", "choices": ["q", "rst"], "gold": 0, "text": "hello\nworld"},
    {"question": "z", "choices": ["zz", "yy"], "gold": 1, "text": "q" * 100},
]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
"""
WRITING = """
task: tiny_writing
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_gen_toks: 5, until: ["\\n"]}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunTask:
    return runner(tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module")
def bundle(run: RunTask, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    letters = tmp_path_factory.mktemp("tokenizer")
    letter_tokenizer().save_pretrained(letters)
    return run(bundle_toy, BundleToyConfig(architecture="gpt2", tokenizer=str(letters)))


def log_probability(model: LanguageModel, context: list[int], ids: list[int]) -> float:
    """Token by token, one forward pass each."""
    total = 0.0
    for place, token in enumerate(ids):
        given = torch.tensor([context + ids[:place]])
        with torch.no_grad():
            total += float(model.model(given).logits[0, -1].log_softmax(-1)[token])
    return total


def request(kind: Any, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_log_likelihoods_token_by_token(architecture: str) -> None:
    model = tiny_bundle(architecture)
    adapter = BundleModel(model, batch_size=2)
    pairs = [("ab", "cd"), ("a", "xyz"), ("longer one ", "b"), ("", "q")]
    found = adapter.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        before = adapter.tok_encode(context) if context else [adapter.prefix_token_id]
        ids = adapter.tok_encode(continuation, add_special_tokens=False)
        if context.endswith(" "):  # the harness moves it into the continuation
            before = adapter.tok_encode(context.rstrip())
            ids = adapter.tok_encode(" " + continuation, add_special_tokens=False)
        if architecture == "llama":
            expected = log_probability(model, before, ids)
        else:
            with torch.no_grad():
                loss = model.model(
                    input_ids=torch.tensor([before]), labels=torch.tensor([ids])
                ).loss
            expected = -len(ids) * float(loss)
        assert value == pytest.approx(expected, abs=1e-3)
        assert isinstance(greedy, bool)


def test_what_greedy_decoding_writes_is_greedy() -> None:
    model = tiny_bundle("llama")
    (answer,) = Generator(model).generate(["ab"], GenerationSettings(max_new_tokens=3))
    adapter = BundleModel(model)
    context = adapter.tok_encode("ab")
    ((value, greedy),) = adapter._loglikelihood_tokens([(("", ""), context, list(answer.tokens))])
    assert greedy
    assert value == pytest.approx(log_probability(model, context, list(answer.tokens)), abs=1e-3)


def test_long_texts_are_predicted_token_by_token_in_windows() -> None:
    """GPT-2's 64 positions, 100 letters: 64 from bos on, then 36 behind the 29 before them."""
    model = tiny_bundle("gpt2")
    adapter = BundleModel(model, batch_size=2)
    text = "".join(chr(97 + i % 26) for i in range(100))
    ids = adapter.tok_encode(text, add_special_tokens=False)
    (found,) = adapter.loglikelihood_rolling([request("loglikelihood_rolling", text)])
    expected = log_probability(model, [1], ids[:64]) + log_probability(model, ids[35:64], ids[64:])
    assert found == pytest.approx(expected, abs=1e-2)


def test_answers_are_the_generators() -> None:
    model = tiny_bundle("gpt2")
    adapter = BundleModel(model)
    kinds: list[dict[str, Any]] = [
        {"max_gen_toks": 6, "until": ["zz"]},
        {"max_gen_toks": 6, "do_sample": True, "temperature": 0.7, "until": []},
        {"max_gen_toks": 6, "until": ["zz"]},
    ]
    prompts = ["ab", "cd", "e" * 80]  # the last loses its beginning
    requests = [request("generate_until", *pair) for pair in zip(prompts, kinds, strict=True)]
    found = adapter.generate_until(requests)
    generator = Generator(model)
    greedy = GenerationSettings(max_new_tokens=6, stop=("zz",))
    cut = adapter.tok_encode(prompts[2])[-58:]
    assert [found[0], found[2]] == [
        each.text for each in generator.generate([prompts[0], cut], greedy)
    ]
    sampled = GenerationSettings(max_new_tokens=6, temperature=0.7)
    assert found[1] == generator.generate([prompts[1]], sampled)[0].text
    with pytest.raises(InputError, match="unknown generation settings: typical_p"):
        adapter.generate_until([request("generate_until", "a", {"typical_p": 0.5, "until": []})])


def test_a_chat_template_writes_special_tokens_itself() -> None:
    model = tiny_bundle("llama")
    model.tokenizer.chat_template = (
        "<s>{% for turn in messages %}{{ turn['content'] }}</s>{% endfor %}"
    )
    adapter = BundleModel(model, chat=True)
    text = adapter.apply_chat_template([{"role": "user", "content": "ab"}])
    letters = model.tokenizer("ab")["input_ids"]
    assert adapter.tok_encode(text) == [1, *letters, 2]
    ((value, _),) = adapter.loglikelihood([request("loglikelihood", text, "cd")])
    after = model.tokenizer("cd")["input_ids"]
    assert value == pytest.approx(log_probability(model, [1, *letters, 2], after), abs=1e-3)
    with pytest.raises(InputError, match="no chat template"):
        BundleModel(tiny_bundle("llama"), chat=True)


def test_local_tasks_on_a_bundle(run: RunTask, bundle: Artifact, tmp_path: Path) -> None:
    model = load_bundle(bundle.path)
    generator = Generator(model)
    greedy = GenerationSettings(max_new_tokens=5, stop=("\n",))
    for place, row in enumerate(ROWS):
        (answer,) = generator.generate([str(row["question"])], greedy)
        row["answer"] = answer.text.strip() if place else "something else"
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("writing", WRITING)):
        data = json.dumps(str(tmp_path / "rows.jsonl"))
        (tmp_path / f"{name}.yaml").write_text(text.replace("DATA", data))
    config = HarnessConfig(
        tasks=("tiny_choice", "tiny_rolling", "tiny_writing"), folder=str(tmp_path), bootstrap=10
    )
    made = run(harness, config, dense=bundle)
    found = made.metrics["harness"]["dense"]

    right = 0
    for row in ROWS:
        context = [1, *model.tokenizer(row["question"])["input_ids"]]
        values = [
            log_probability(model, context, model.tokenizer(choice)["input_ids"])
            for choice in row["choices"]  # type: ignore[attr-defined]
        ]
        right += max(range(len(values)), key=values.__getitem__) == row["gold"]
    assert found["tiny_choice"]["acc"] == pytest.approx(right / 3)
    assert found["tiny_writing"]["exact_match"] == pytest.approx(2 / 3)
    size = sum(len(str(row["text"])) for row in ROWS)
    texts = [request("loglikelihood_rolling", row["text"]) for row in ROWS]
    nll = -sum(BundleModel(model).loglikelihood_rolling(texts))
    assert found["tiny_rolling"]["byte_perplexity"] == pytest.approx(math.exp(nll / size), rel=1e-4)
    assert made.json("results")["dense"]["examples"]["tiny_choice"] == 3


def test_every_kind_of_bundle_is_scored(
    run: RunTask, bundle: Artifact, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Sparse, INT8 and INT4, in one step, each by what it computes itself."""
    letters = tmp_path_factory.mktemp("tokenizer")
    letter_tokenizer().save_pretrained(letters)
    rows = tokens_artifact(tmp_path / "rows")
    fewer = BundleToyConfig(architecture="gpt2", tokenizer=str(letters), sparsity=0.5)
    eight = QuantizeInt8Config(calibration=4, calibration_length=16)
    four = Int4Config(methods={"rtn": {}}, group_sizes=(32,), tolerance=1e9, calibration=2)
    bundles = {
        "dense": bundle,
        "sparse_50": run(bundle_toy, fewer),
        "int8": run(quantize_int8, eight, bundle, rows),
        "int4": run(quantize_int4, four, bundle, rows, None),
    }
    texts = ["abcdefgh", "hello"]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": each}) for each in texts))
    data = json.dumps(str(tmp_path / "rows.jsonl"))
    (tmp_path / "rolling.yaml").write_text(ROLLING.replace("DATA", data))
    config = HarnessConfig(tasks=("tiny_rolling",), folder=str(tmp_path), bootstrap=10)
    found = run(harness, config, **bundles).metrics["harness"]
    scores = {name: each["tiny_rolling"]["byte_perplexity"] for name, each in found.items()}
    assert len(set(scores.values())) == 4
    for name, made in bundles.items():
        model = load_bundle(made.path)
        ids = [model.tokenizer(text)["input_ids"] for text in texts]
        likely = sum(log_probability(model, [1], each) for each in ids)
        expected = math.exp(-likely / sum(map(len, texts)))
        assert scores[name] == pytest.approx(expected, rel=1e-3)


def test_what_the_harness_can_not_do_is_said(
    run: RunTask, bundle: Artifact, tmp_path: Path
) -> None:
    config = HarnessConfig(tasks=("tiny_choice",), folder=str(tmp_path))
    with pytest.raises(InputError, match="no task 'tiny_choice'; there are 0"):
        run(harness, config, dense=bundle)
    with pytest.raises(StepError, match="no model"):
        run(harness, config)
    assert harness.check is not None
    with pytest.raises(InputError, match="no task 'tiny_choice'; there are 0"):
        harness.check(config)  # before any step of a run
    (tmp_path / "choice.yaml").write_text(CHOICE)
    harness.check(config)
    with pytest.raises(InputError, match="does not write text"):
        BundleModel(tiny_bundle("bert"))


def test_a_missing_package_is_said_before_any_step_and_by_its_own(
    run: RunTask, bundle: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    config = HarnessConfig(tasks=("tiny_choice",))
    assert harness.check is not None
    with pytest.raises(InputError, match=r"not installed \(pip install 'goldcrest\[harness\]'"):
        harness.check(config)
    with pytest.raises(InputError, match="not installed"):
        run(harness, config, dense=bundle)


def test_metric_names_are_plain_and_numbers_finite() -> None:
    values = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": float("nan"),
        "exact_match,strict-match": 1,
        "exact_match_stderr,strict-match": "N/A",
    }
    assert plain_metrics(values) == {"acc": 0.5, "exact_match_strict_match": 1.0}
