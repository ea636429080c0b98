"""Settings of kernels in configs: completed, typed, cached by source."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from goldcrest.tasks import methods

MARGIN = "goldcrest.kernels.margin"


def test_defaults_are_filled_in() -> None:
    assert methods.complete_method(MARGIN, "aam", {"margin": 0.2}) == {"scale": 30.0, "margin": 0.2}


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        ("aamm", {}, "did you mean 'aam'"),
        ("_cosine", {}, "no method"),
        ("aam", {"margine": 1}, "did you mean 'margin'"),
        ("aam", {"margin": "wide"}, "margin: Input should be a valid number"),
        ("aam", {"margin": 9.0}, "margin must be"),
    ],
)
def test_what_is_wrong_is_named(method: str, given: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        methods.complete_method(MARGIN, method, given)


@pytest.mark.parametrize(
    ("family", "method", "given", "words"),
    [
        (
            "clustering",
            "ahc",
            {"linkag": "ward"},
            r"mean 'linkage'.*Allowed: norm, linkage",
        ),
        ("sparsity", "sparsegpt", {"dampin": 1}, "did you mean 'damping'"),
    ],
)
def test_every_family_is_checked_alike(
    family: str, method: str, given: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        methods.complete_method(f"goldcrest.kernels.{family}", method, given)


def test_settings_are_built_from_plain_values() -> None:
    given = {"mu": 1.2, "hidden": [8, 8], "terms": {"imsat": 1}}
    found = methods.complete_method("goldcrest.kernels.clustering", "cimc", given)
    assert (found["mu"], found["hidden"]) == (1.2, [8, 8])


def test_methods_are_the_files_with_settings() -> None:
    names = methods.method_names(MARGIN)
    assert {"aam", "am", "ce", "cosface", "adaface", "ocsoftmax"} <= set(names)
    assert not any(name.startswith("_") for name in names)


def test_the_second_answer_needs_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path))
    methods.complete_method(MARGIN, "aam", {})
    code = (
        "import sys; from goldcrest.tasks import methods;"
        f"print(methods.complete_method('{MARGIN}', 'aam', {{}}), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'scale': 30.0, 'margin': 0.1} False"


def test_a_torn_answer_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path))
    methods.complete_method(MARGIN, "aam", {})
    (answer,) = (tmp_path / "settings").glob("*.json")
    answer.write_text('{"sca')
    assert methods.complete_method(MARGIN, "aam", {})["scale"] == 30.0
