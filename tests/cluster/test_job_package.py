"""What a job takes along: ignore rules as git has them, links, stores, sizes, the same bytes."""

from __future__ import annotations

import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from goldcrest.cluster.errors import InputError
from goldcrest.cluster.job_package import check_size, collect, including, is_store, write_zip
from goldcrest.cluster.store import Store

ROOT = Path(__file__).parents[2]


def tree(root: Path, **files: str) -> Path:
    """Files under `root`; `__` in a name is a slash."""
    for name, content in files.items():
        write(root, name.replace("__", "/"), content)
    return root


def write(root: Path, name: str, content: str = "x") -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(content)


def names(root: Path, *excludes: str) -> list[str]:
    return [file.name for file in collect(root, excludes).files]


def test_code_goes_and_what_is_no_code_stays(tmp_path: Path) -> None:
    kept = ["pkg/a.py", "tasks/data/corpus.py", "configs/x.yaml", "notes/build/plan.md"]
    left = [
        ".git/config", ".venv/bin/python", "pkg/__pycache__/a.pyc", "build/lib/a.py", "data/a.wav",
        "mlruns/0/meta.yaml", "sub/.env", "deploy/host.key", ".mypy_cache/x", "x.egg-info/PKG-INFO",
    ]  # fmt: skip
    for name in kept + left:
        write(tmp_path, name)
    assert names(tmp_path) == sorted(kept)


TOKENS = ("token", "sub/token", "pkg/token/token", "api.token", "auth_token")
NO_TOKENS = ("auth_token/a.py", "pkg/token/a.py", "pkg/token/deep/b.py", "token.py", "tokens")


def test_files_called_token_stay_and_folders_of_that_name_go(tmp_path: Path) -> None:
    for name in (*NO_TOKENS, *TOKENS[:-1], "sub/auth_token", "pkg/token/host.key"):
        write(tmp_path, name)
    assert names(tmp_path) == sorted(NO_TOKENS)
    assert "pkg/token/a.py" not in names(tmp_path, "token/")


def test_git_does_not_take_the_tokens_that_the_docs_have_one_make(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    said = subprocess.run(
        ["git", "-C", str(tmp_path), "check-ignore", "--no-index", *TOKENS, *NO_TOKENS],
        capture_output=True,
        text=True,
    )
    assert said.stdout.split() == list(TOKENS)


def test_a_file_that_is_asked_for_goes_once(tmp_path: Path) -> None:
    for name in ("a.py", "build/profile.yaml", ".goldcrest/store/runs/s/best.yaml", "z.py"):
        write(tmp_path, name)
    package = collect(tmp_path)
    assert including(package, tmp_path / "a.py") == (package, "a.py")
    for name in ("build/profile.yaml", ".goldcrest/store/runs/s/best.yaml"):
        package, called = including(package, tmp_path / name)
        assert called == name
    sent = [file.name for file in package.files]
    assert sent == [".goldcrest/store/runs/s/best.yaml", "a.py", "build/profile.yaml", "z.py"]
    write_zip(package, tmp_path / "package.zip")
    assert zipfile.ZipFile(tmp_path / "package.zip").namelist() == sent


def test_a_file_from_outside_has_a_place_of_its_own(tmp_path: Path) -> None:
    """Of a store elsewhere, say; the tree's own files of that name are never sent."""
    tree = tmp_path / "tree"
    for name in ("a.py", ".submitted/config.yaml", "sub/.submitted/x"):
        write(tree, name, "of the tree")
    write(tmp_path, "store/best.yaml", "of the store")
    package = collect(tree)
    assert [file.name for file in package.files] == ["a.py", "sub/.submitted/x"]
    package, called = including(package, tmp_path / "store" / "best.yaml", "config.yaml")
    assert called == ".submitted/config.yaml"
    write_zip(package, tmp_path / "package.zip")
    with zipfile.ZipFile(tmp_path / "package.zip") as packed:
        assert sorted(packed.namelist()) == [called, "a.py", "sub/.submitted/x"]
        assert packed.read(called) == b"of the store"


def test_ignore_files_speak_of_their_own_folder(tmp_path: Path) -> None:
    for name in ("a.tmp", "keep.tmp", "sub/a.tmp", "sub/deep/b.bin", "other/b.bin", "sub/b.txt"):
        write(tmp_path, name)
    write(tmp_path, ".gitignore", "*.tmp\n!keep.tmp\n")
    write(tmp_path, "sub/.rayignore", "*.bin\n!a.tmp\n")
    found = [name for name in names(tmp_path) if not name.endswith("ignore")]
    assert found == ["keep.tmp", "other/b.bin", "sub/a.tmp", "sub/b.txt"]
    assert "other/b.bin" not in names(tmp_path, "other/")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.sampled_from(
            ["*.a", "!x.a", "/p/", "q/", "p/**/x.b", "!p/x.a", "x.*", "**/q", "p/q/*", "# no"]
        ),
        max_size=4,
    )
)
def test_ignore_rules_are_those_of_git(
    tmp_path_factory: pytest.TempPathFactory, rules: list[str]
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for name in ("x.a", "x.b", "p/x.a", "p/x.b", "p/q/x.a", "p/q/r/x.b", "q/x.a", "q/p/x.b"):
        write(root, name)
    write(root, ".gitignore", "\n".join(rules) + "\n")
    git = ["git", "-C", str(root), "-c", "core.excludesFile="]
    subprocess.run([*git, "init", "-q"], check=True)
    listed = subprocess.run(
        [*git, "ls-files", "--others", "--exclude-standard", "-z"], check=True, capture_output=True
    )
    assert names(root) == sorted(listed.stdout.decode().rstrip("\0").split("\0"))


def test_a_store_is_known_by_its_layout_and_left_out(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "results" / "mine")
    with store.lease("0" * 64, owner="test"):
        store.run_folder("first")
    (tmp_path / "results" / "mine" / "artifacts").mkdir(exist_ok=True)
    write(tmp_path, "results/notes.md")
    package = collect(tmp_path)
    assert is_store(tmp_path / "results" / "mine")
    assert package.stores == ("results/mine",)
    assert [file.name for file in package.files] == ["results/notes.md"]


def test_links_inside_are_copied_and_links_outside_are_named(tmp_path: Path) -> None:
    root = tree(tmp_path / "tree", code__a="print()")
    write(tmp_path, "secret/id.txt", "outside")
    (root / "alias").symlink_to("code")
    (root / "code" / "round").symlink_to("..")
    (root / "leak").symlink_to(tmp_path / "secret")
    (root / "broken").symlink_to("nowhere")
    package = collect(root)
    assert [file.name for file in package.files] == ["alias/a", "code/a"]
    assert package.links_out == ("leak",)


def test_a_link_brings_nothing_that_is_left_out_under_its_own_name(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    for name in (".env", ".git/config", "data/x/a.wav", "pkg/a.py", "pkg/own.txt", "deep/s.bin"):
        write(root, name)
    for name in ("artifacts", "leases", "runs"):
        write(root, f"results/{name}/file")
    write(root, ".gitignore", "/pkg/own.txt\nlisting\n")
    write(root, "deep/.gitignore", "*.bin\n")
    write(root, "lists/listing")
    targets = {
        "settings": ".env", "history": ".git", "again": "settings", "sound": "data/x",
        "wave": "data/x/a.wav", "binary": "deep/s.bin", "run": "results/runs",
        "list": "lists/listing", "pkg/up": "../data",
    }  # fmt: skip
    for name, target in targets.items():
        (root / name).symlink_to(target)
    (root / "alias").symlink_to("pkg")  # a folder that goes, a file in it that does not
    package = collect(root)
    found = [file.name for file in package.files if not file.name.endswith(".gitignore")]
    assert found == ["alias/a.py", "pkg/a.py"]
    assert package.links_out == ()


def test_a_link_to_itself_is_no_file(tmp_path: Path) -> None:
    write(tmp_path, "a.py")
    (tmp_path / "loop").symlink_to("loop")
    assert names(tmp_path) == ["a.py"]


@pytest.mark.parametrize(
    ("call", "where", "named"),
    [
        ("iterdir", "private", "private"),
        ("is_dir", "private/artifacts", "private"),  # is it a store?
        ("is_dir", "private/own.py", "private"),
        ("is_file", "private/own.py", "private/own.py"),
        ("read_text", "private/.gitignore", "private/.gitignore"),
    ],
)
def test_what_cannot_be_looked_at_is_named_and_can_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, where: str, named: str
) -> None:
    """Of another user, or gone since its folder was read. (As root every file can be read.)"""
    for name in ("a.py", "private/own.py", "private/.gitignore"):
        write(tmp_path, name)
    refuse(monkeypatch, call, tmp_path / where)
    with pytest.raises(InputError) as refused:
        collect(tmp_path)
    assert refused.value.message == f"cannot read {tmp_path / named}: Permission denied"
    assert "--exclude" in str(refused.value.hint)
    assert [file.name for file in collect(tmp_path, ["private/"]).files] == ["a.py"]


def refuse(monkeypatch: pytest.MonkeyPatch, call: str, where: Path) -> None:
    """Let a method of paths fail for one of them."""
    real = getattr(Path, call)

    def method(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == where:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, call, method)


def test_a_file_that_cannot_be_packed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree(tmp_path / "tree", a="1", b="2", c="3")
    package = collect(root)
    (root / "b").unlink()
    with pytest.raises(InputError) as refused:
        write_zip(package, tmp_path / "package.zip")
    assert refused.value.message == f"cannot read {root / 'b'}: No such file or directory"
    assert "--exclude" in str(refused.value.hint)
    with pytest.raises(FileNotFoundError):  # no fault of the tree's
        write_zip(package, tmp_path / "nowhere" / "package.zip")


def test_a_socket_and_a_pipe_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    write(tmp_path, "a.py")
    assert names(tmp_path) == ["a.py"]


def test_a_large_tree_is_refused_with_the_names_of_what_is_large(tmp_path: Path) -> None:
    write(tmp_path, "model.bin", "x" * 5000)
    for index in range(50):
        write(tmp_path, f"clips/{index}.txt", "x" * 60)
    write(tmp_path, "a.py")
    package = collect(tmp_path)
    assert package.size == 8001
    assert package.largest() == [("model.bin", 5000), ("clips/", 3000), ("a.py", 1)]
    with pytest.raises(InputError) as refused:
        check_size(package, 4000)
    assert "model.bin (5 kB), clips/ (3 kB)" in refused.value.message
    assert "--exclude" in str(refused.value.hint)
    check_size(package, 8001)


def test_nothing_to_send_and_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to send"):
        check_size(collect(tmp_path))
    with pytest.raises(InputError, match="is not a folder"):
        collect(tmp_path / "missing")


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    root = tree(tmp_path / "tree", pkg__a="1", run="#!")
    (root / "run").chmod(0o755)
    write_zip(collect(root), tmp_path / "one.zip")
    os.utime(root / "pkg" / "a", (1, 1))
    size = write_zip(collect(root), tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    assert size == (tmp_path / "two.zip").stat().st_size
    with zipfile.ZipFile(tmp_path / "two.zip") as archive:
        assert archive.namelist() == ["pkg/a", "run"]
        assert archive.getinfo("run").external_attr >> 16 == 0o755


def test_this_checkout_is_small_and_holds_the_package_under_its_import_name() -> None:
    package = collect(ROOT)
    found = {file.name for file in package.files}
    assert {"goldcrest/cluster/run.py", "cluster/run.py", "configs/speaker/tiny.yaml"} <= found
    assert not [name for name in found if name.startswith((".git/", ".venv/"))]
    check_size(package, 20_000_000)
