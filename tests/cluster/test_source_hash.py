"""The source hash follows imports through our own packages and ignores comments."""

from __future__ import annotations

from pathlib import Path

import pytest

from goldcrest.cluster import source_hash as module
from goldcrest.cluster.source_hash import source_hash


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small checkout: a task, a family of methods found by file name, a shared helper."""
    files = {
        "tasks/speaker/cluster.py": "from goldcrest.kernels import family\nimport numpy\nX = 1\n",
        "kernels/family/__init__.py": '"""A family."""\n',
        "kernels/family/first.py": "from goldcrest.kernels.shared import help_me\n",
        "kernels/family/second.py": "from . import first\n",
        "kernels/shared.py": "def help_me():\n    return 1\n",
        "kernels/unrelated.py": "Y = 1\n",
        "cluster/engine.py": "Z = 1\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    return tmp_path


def fresh() -> str:
    source_hash.cache_clear()
    module._parsed.cache_clear()
    return source_hash("goldcrest.tasks.speaker.cluster")


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("tasks/speaker/cluster.py", True),
        ("kernels/family/second.py", True),  # reached as a member of an imported package
        ("kernels/shared.py", True),  # reached through first.py
        ("kernels/unrelated.py", False),
        ("cluster/engine.py", False),
    ],
)
def test_code_that_is_reached_counts(tree: Path, name: str, counts: bool) -> None:
    before = fresh()
    path = tree / name
    path.write_text(path.read_text(encoding="utf-8") + "NEW = 2\n", encoding="utf-8")
    assert (fresh() != before) == counts


def test_comments_docstrings_and_layout_do_not_count(tree: Path) -> None:
    before = fresh()
    path = tree / "kernels/shared.py"
    path.write_text(
        '"""Doc."""\n# why\ndef help_me():\n    """Help."""\n\n    return 1\n', encoding="utf-8"
    )
    assert fresh() == before


def test_a_new_method_of_an_imported_family_counts(tree: Path) -> None:
    before = fresh()
    (tree / "kernels/family/third.py").write_text("W = 1\n", encoding="utf-8")
    assert fresh() != before


def test_a_task_outside_our_packages_has_a_hash() -> None:
    source_hash.cache_clear()
    assert source_hash("tests.cluster.engine_steps") != source_hash("no.such.module")
