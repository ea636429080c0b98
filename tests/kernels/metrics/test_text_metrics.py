"""Metrics of text against hand-worked values, the libraries' own scores and naive loops."""

from __future__ import annotations

import functools
from decimal import Decimal

import cloudpickle
import jiwer
import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.kernels.metrics import additive, answers, rouge, transcription, translation

ANSWERS = ["the cat sat on the mat", "a dog barked", "it rains in the north today", ""]
REFERENCES = [
    ["the cat sat on the mat", "the cat is on the mat"],
    ["the dog barked loudly"],
    ["it rains in the south today", "today it rains in the north", "rain in the north"],
    ["nothing was said"],
]


def test_mean_and_its_interval_against_the_normal_approximation() -> None:
    hits = (np.arange(400) % 4 == 0).astype(float)
    metric = additive.mean(hits, 100.0)
    assert metric.value == 25.0
    low, high = additive.bootstrap_interval(metric, replicates=2000)
    # Binomial: 1.96 * sqrt(0.25 * 0.75 / 400) = 4.24 %.
    assert low == pytest.approx(25 - 4.24, abs=0.6)
    assert high == pytest.approx(25 + 4.24, abs=0.6)


def test_an_interval_is_the_same_for_the_same_seed_and_holds_the_value() -> None:
    metric = translation.bleu(ANSWERS * 10, REFERENCES * 10)
    one = additive.bootstrap_interval(metric, replicates=50, seed=3)
    assert one == additive.bootstrap_interval(metric, replicates=50, seed=3)
    assert one != additive.bootstrap_interval(metric, replicates=50, seed=4)
    assert one[0] < metric.value < one[1]


def test_blocks_of_replicates_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = additive.mean(np.random.default_rng(0).random(30))
    whole = additive.bootstrap_interval(metric, replicates=40)
    monkeypatch.setattr(additive, "_BLOCK", 90)
    assert additive.bootstrap_interval(metric, replicates=40) == whole


def test_a_paired_difference_is_narrower_than_the_two_apart() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(size=300)
    one, other = additive.mean(hard), additive.mean(hard + 0.1 + 0.01 * rng.normal(size=300))
    low, high = additive.bootstrap_difference(other, one)
    assert 0.09 < low < high < 0.11
    apart = additive.bootstrap_interval(one)
    assert high - low < 0.2 * (apart[1] - apart[0])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: additive.mean(np.zeros(0)).value, "no example"),
        (lambda: additive.bootstrap_interval(additive.mean(np.zeros(0))), "no example"),
        (lambda: additive.bootstrap_interval(additive.mean(np.ones(3)), replicates=0), "at least"),
        (lambda: additive.bootstrap_interval(additive.mean(np.ones(3)), level=1.0), "level"),
        (
            lambda: additive.bootstrap_difference(
                additive.mean(np.ones(3)), additive.mean(np.ones(4))
            ),
            "3 and 4",
        ),
        (lambda: translation.bleu(["a"], [[]]), "no reference"),
        (lambda: transcription.word_error_rate(["a"], [[]]), "no reference"),
        (lambda: answers.gsm8k(["#### 1"], [["one"]]), "reference 0 has no final number"),
    ],
)
def test_what_can_not_be_computed_is_said(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (translation.bleu, sacrebleu.metrics.BLEU(force=True)),
        (translation.chrf, sacrebleu.metrics.CHRF()),
        (translation.ter, sacrebleu.metrics.TER()),
    ],
)
def test_translation_metrics_are_sacrebleus(ours: object, theirs: object) -> None:
    most = max(len(each) for each in REFERENCES)
    streams = [[each[i] if i < len(each) else None for each in REFERENCES] for i in range(most)]
    expected = theirs.corpus_score(ANSWERS, streams).score  # type: ignore[attr-defined]
    metric = ours(ANSWERS, REFERENCES)  # type: ignore[operator]
    assert metric.value == pytest.approx(expected)
    assert metric.statistics.shape[0] == len(ANSWERS)


def test_bleu_of_an_exact_answer_is_100_and_of_nothing_0() -> None:
    assert translation.bleu([REFERENCES[0][1]], [REFERENCES[0]]).value == pytest.approx(100)
    assert translation.bleu([""], [["a b c d"]]).value == 0
    assert translation.ter(["a b c d"], [["a b c d"]]).value == 0


def test_rouge_by_hand() -> None:
    # 3 of 3 words found, 3 of 4 covered: F = 2 * 1 * 0.75 / 1.75; one of two bigrams, of three.
    answer, reference = ["the dog barked"], [["the old dog barked"]]
    assert rouge.rouge_n(1, answer, reference).value == pytest.approx(100 * 1.5 / 1.75)
    precision, recall = 1 / 2, 1 / 3
    f = 2 * precision * recall / (precision + recall)
    assert rouge.rouge_n(2, answer, reference).value == pytest.approx(100 * f)
    assert rouge.rouge_l(answer, reference).value == pytest.approx(100 * 1.5 / 1.75)
    several = [["nothing alike here at all", "the dog barked"]]
    assert rouge.rouge_n(2, answer, several).value == pytest.approx(100)


def test_rouge_is_that_of_googles_package() -> None:
    """Values of rouge-score 0.1.2, `RougeScorer([...]).score_multi(references, answer)`."""
    answer = "The lazy fox, aged 3, jumped over the dog's bed and over the other dog."
    references = ["A lazy fox jumps over the bed of the dog", "It jumped over the dog and the fox."]
    assert rouge.rouge_n(1, [answer], [references]).value == pytest.approx(700 / 12)
    assert rouge.rouge_n(2, [answer], [references]).value == pytest.approx(300 / 11)
    assert rouge.rouge_l([answer], [references]).value == pytest.approx(700 / 13)


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="abc ", max_size=20), st.text(alphabet="abc ", max_size=20))
def test_rouge_is_a_symmetric_share(one: str, other: str) -> None:
    for kind in (functools.partial(rouge.rouge_n, 1), rouge.rouge_l):
        value = kind([one], [[other]]).value
        assert 0 <= value <= 100
        assert value == pytest.approx(kind([other], [[one]]).value)


def test_word_error_rate_by_hand_and_by_jiwer() -> None:
    spoken = ["the cat sat", "hello there world", "one two"]
    heard = ["the bat sat down", "hello world", "one two"]
    # 1 substitution + 1 insertion, 1 deletion, 0 of 3 + 3 + 2 words.
    metric = transcription.word_error_rate(heard, [[each] for each in spoken])
    assert metric.value == pytest.approx(100 * 3 / 8)
    assert metric.value == pytest.approx(100 * jiwer.wer(spoken, heard))
    characters = transcription.character_error_rate(heard, [[each] for each in spoken])
    assert characters.value == pytest.approx(100 * jiwer.cer(spoken, heard))
    assert transcription.word_error_rate(["a b"], [["x y", "a b"]]).value == 0
    assert transcription.word_error_rate([""], [["a b"]]).value == 100
    assert transcription.word_error_rate(["a b"], [[""]]).value == 200  # no word to divide by


def test_plain_words_keep_the_vowels_of_hindi() -> None:
    assert transcription.plain_words("  Hello,  World! ") == "hello world"
    assert transcription.plain_words("नमस्ते, दुनिया।") == "नमस्ते दुनिया"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 * 7 = 42\n#### 42", 42),
        ("#### 1,234.50", Decimal("1234.5")),
        ("#### $-3 dollars", -3),
        ("#### -$3", -3),
        ("####7.", 7),
        ("#### .5", Decimal("0.5")),
        ("#### 1\n#### 2", 1),
        ("the answer is 42", None),
        ("#### none", None),
        ("", None),
    ],
)
def test_final_numbers(text: str, number: object) -> None:
    assert answers.final_number(text) == number


@settings(max_examples=50, deadline=None)
@given(st.integers(-(10**12), 10**12), st.text(alphabet="ab 1#\n", max_size=20))
def test_a_final_number_is_found_behind_any_working(number: int, working: str) -> None:
    text = working.replace("####", "") + f" = {number}\n#### {number:,} "
    if "####" not in working:
        assert answers.final_number(text) == number


def test_gsm8k_counts_numbers_and_exact_match_words() -> None:
    solutions = ["so 2\n#### 2.0", "#### 3", "I do not know"]
    assert answers.gsm8k(solutions, [["x\n#### 2"], ["#### 4"], ["#### 5"]]).value == (
        pytest.approx(100 / 3)
    )
    assert answers.exact_match([" a  b\n", "a"], [["x", "a b"], ["A"]]).value == 50


def test_metrics_travel_between_processes() -> None:
    metric = translation.bleu(ANSWERS, REFERENCES)
    assert cloudpickle.loads(cloudpickle.dumps(metric)).value == metric.value
