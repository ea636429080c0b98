"""How `goldcrest serve` swaps models, with HTTP replicas that refuse to; what it may delete."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest

from goldcrest.cluster.errors import GoldcrestError, InputError
from goldcrest.cluster.profile import Profile
from goldcrest.cluster.serving import SCRATCH
from goldcrest.cluster.serving_process import Serving, serving
from goldcrest.pipelines import serve_foreground
from goldcrest.pipelines.cli_common import Answer
from goldcrest.pipelines.endpoints.bundles import MODELS, ServedKind
from goldcrest.pipelines.endpoints.speaker import SERVED, SpeakerSettings
from goldcrest.pipelines.endpoints.speaker_choice import ModelChoice


def copies(state: Path) -> set[str]:
    """The bundles that a server keeps copies of, by their content."""
    return {each.name for each in (state / SCRATCH / "bundles").glob("*")}


class Replicas(Serving):
    """Replicas that take every model, but the first `failing` times that they should reload."""

    def __init__(self, state: Path, failing: int) -> None:
        super().__init__(host="127.0.0.1", port=1)
        self._state = state
        self._failing = failing
        self.reloaded: list[str] = []
        self.copies: list[set[str]] = []  # that a replica which reloads finds

    def written(self) -> str:
        """Which content the list of models names."""
        return ModelChoice.read({"file": str(self._state / SCRATCH / MODELS)}).bundles["one"].name

    def deploy(self, application: Any) -> None:
        """Nothing is started."""

    def drain(self, endpoint: str, seconds: float) -> int:
        """Nobody is inside."""
        return 0

    def everywhere(self, deployment: str, method: str, *values: Any, seconds: float) -> list[Any]:
        """Note which bundles a replica that reloads finds."""
        if method == "reload":
            self.reloaded.append(self.written())
            self.copies.append(copies(self._state))
            if len(self.reloaded) <= self._failing:
                raise GoldcrestError("SpeakerEndpoint.reload failed: no answer")
        return [{"model": "any"}]


Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(replicas, state, bundle, contents)`: a server that finds each content in turn, takes it
    into service, and stops."""

    def ran(replicas: Replicas, state: Path, bundle: Path, contents: list[str]) -> None:
        signals, unused = {"reload"} if contents[1:] else {"stop"}, cast("Any", None)
        monkeypatch.setattr(serve_foreground, "serving", lambda *_, **__: nullcontext(replicas))
        monkeypatch.setattr(serve_foreground, "check_room", lambda *_, **__: None)
        monkeypatch.setattr(serve_foreground, "_signals", lambda: nullcontext(signals))
        monkeypatch.setattr(serve_foreground, "_POLL", 0.0)
        found = iter(contents)
        left = len(contents) - 1
        served: ServedKind = dataclasses.replace(
            SERVED,
            application=lambda _: unused,
            members=lambda _: ["bundle.json"],
            identity=lambda _: f"{next(found)}@{bundle}",
        )

        def look() -> ModelChoice:
            nonlocal left
            left -= 1
            signals.add("reload" if left else "stop")
            return choice

        choice = ModelChoice(bundles={"one": bundle})
        settings = SpeakerSettings(state_folder=state)
        foreground = serve_foreground.Foreground(Answer(), served, settings, look, json_file=None)
        foreground.run(Profile(), host="127.0.0.1", port=1, choice=choice)

    return ran


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """As much of a bundle as these tests read."""
    return make(tmp_path / "bundle")


def make(folder: Path) -> Path:
    """A folder with a file of a bundle."""
    folder.mkdir(parents=True)
    (folder / "bundle.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("failing", "words"),
    [
        (0, "now serving one"),
        (1, "the models are again those from before: SpeakerEndpoint.reload failed"),
        (2, "replicas may serve the old models or the new ones"),
    ],
)
def test_a_swap_that_fails_goes_back_and_says_what_is_true(
    tmp_path: Path,
    run: Run,
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
    failing: int,
    words: str,
) -> None:
    """What is written down, and found after a crash, is what the replicas are told last."""
    replicas = Replicas(tmp_path, failing)
    run(replicas, tmp_path, bundle, ["old", "new"])
    captured = capsys.readouterr()
    assert words in " ".join((captured.out + captured.err).split())
    assert replicas.reloaded == (["new", "old"] if failing else ["new"])
    assert replicas.written() == ("old" if failing else "new")


def test_what_was_swapped_out_is_deleted_one_swap_later(
    tmp_path: Path, run: Run, bundle: Path
) -> None:
    """Requests keep the model that they began with, and a replica may have to load it again."""
    replicas = Replicas(tmp_path, failing=0)
    run(replicas, tmp_path, bundle, ["a", "b", "c", "d"])
    assert replicas.copies == [{"a", "b"}, {"a", "b", "c"}, {"b", "c", "d"}]
    assert copies(tmp_path) == {"c", "d"}


def test_a_bundle_that_cannot_be_loaded_leaves_no_copy(
    tmp_path: Path, run: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise GoldcrestError("SpeakerModels.load failed")

    monkeypatch.setattr(serve_foreground.Foreground, "_preload", fail)
    run(Replicas(tmp_path, failing=0), tmp_path, bundle, ["a", "b", "c"])
    assert copies(tmp_path) == {"a"}


def test_a_state_folder_of_the_users_loses_nothing(tmp_path: Path, run: Run) -> None:
    """`goldcrest serve bundles/dense --state .`"""
    bundle = make(tmp_path / "bundles" / "dense")
    for name in ("bundles/other", "metrics/mine", "models.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    left = tmp_path / SCRATCH / "bundles" / "of-the-dead"
    left.mkdir(parents=True)
    run(Replicas(tmp_path, failing=0), tmp_path, bundle, ["old", "new"])
    assert (bundle / "bundle.json").is_file()
    for name in ("bundles/other", "metrics/mine", "models.json"):
        assert (tmp_path / name).read_text() == name
    assert not left.exists()


@pytest.mark.parametrize("given", [None, Path("mine")])
def test_metrics_lie_in_the_scratch_folder_unless_another_is_given(
    tmp_path: Path, bundle: Path, given: Path | None
) -> None:
    settings = SpeakerSettings(state_folder=tmp_path, metrics_folder=given)
    foreground = serve_foreground.Foreground(
        Answer(), SERVED, settings, lambda: ModelChoice(bundles={"one": bundle}), json_file=None
    )
    found = foreground._counting_in_scratch().metrics_folder
    assert found == (given or tmp_path / SCRATCH / "metrics")


@pytest.mark.parametrize("link", [False, True])
def test_a_bundle_in_the_scratch_folder_is_refused(tmp_path: Path, run: Run, link: bool) -> None:
    bundle = kept = make(tmp_path / SCRATCH / "bundles" / "a")
    if link:
        bundle = tmp_path / "linked"
        bundle.mkdir()
        (bundle / "bundle.json").symlink_to(kept / "bundle.json")
    with pytest.raises(InputError, match="which `goldcrest serve` empties") as refused:
        run(Replicas(tmp_path, failing=0), tmp_path, bundle, ["a"])
    assert "copy it elsewhere" in str(refused.value.hint)
    assert (kept / "bundle.json").is_file()


def test_the_port_closes_before_the_application_goes(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy that has lost its application answers 404 to what is a valid request."""
    from ray import serve

    def listening() -> bool:
        try:
            socket.create_connection(("127.0.0.1", running.port), timeout=10).close()
        except ConnectionRefusedError:
            return False
        return True

    def shutdown() -> None:
        listened.append(listening())
        shut_down()

    listened: list[bool] = []
    shut_down = serve.shutdown
    with serving(Profile(), host="127.0.0.1", port=0) as running:
        assert listening()
        monkeypatch.setattr(serve, "shutdown", shutdown)
    assert listened == [False]
