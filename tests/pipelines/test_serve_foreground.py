"""How `goldcrest serve` swaps models, with HTTP replicas that refuse to."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest

from goldcrest.cluster.errors import GoldcrestError
from goldcrest.cluster.profile import Profile
from goldcrest.cluster.serving_process import Serving
from goldcrest.pipelines import serve_foreground
from goldcrest.pipelines.cli_common import Answer
from goldcrest.pipelines.endpoints.bundles import MODELS
from goldcrest.pipelines.endpoints.speaker import SERVED, SpeakerSettings
from goldcrest.pipelines.endpoints.speaker_choice import ModelChoice


class Replicas(Serving):
    """Replicas that take every model, but the first `failing` times that they should reload."""

    def __init__(self, state: Path, failing: int) -> None:
        super().__init__(host="127.0.0.1", port=1)
        self._state = state
        self._failing = failing
        self.reloaded: list[str] = []

    def written(self) -> str:
        """Which content the list of models names."""
        return ModelChoice.read({"file": str(self._state / MODELS)}).bundles["one"].name

    def deploy(self, application: Any) -> None:
        """Nothing is started."""

    def drain(self, endpoint: str, seconds: float) -> int:
        """Nobody is inside."""
        return 0

    def everywhere(self, deployment: str, method: str, *values: Any, seconds: float) -> list[Any]:
        """Note which bundles a replica that reloads finds."""
        if method == "reload":
            self.reloaded.append(self.written())
            if len(self.reloaded) <= self._failing:
                raise GoldcrestError("SpeakerEndpoint.reload failed: no answer")
        return [{"model": "any"}]


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
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failing: int,
    words: str,
) -> None:
    """What is written down, and found after a crash, is what the replicas are told last."""
    state, bundle = tmp_path / "state", tmp_path / "bundle"
    replicas, signals = Replicas(state, failing), {"reload"}
    monkeypatch.setattr(serve_foreground, "serving", lambda *_, **__: nullcontext(replicas))
    monkeypatch.setattr(serve_foreground, "check_room", lambda *_, **__: None)
    monkeypatch.setattr(serve_foreground, "_signals", lambda: nullcontext(signals))
    contents, unused = iter(("old", "new")), cast("Any", None)
    kind = dataclasses.replace(
        SERVED,
        application=lambda _: unused,
        members=lambda _: [],
        identity=lambda _: f"{next(contents)}@{bundle}",
    )

    def look() -> ModelChoice:
        signals.add("stop")  # after this swap
        return choice

    choice = ModelChoice(bundles={"one": bundle})
    settings = SpeakerSettings(state_folder=state)
    foreground = serve_foreground.Foreground(Answer(), kind, settings, look, json_file=None)
    foreground.run(Profile(), host="127.0.0.1", port=1, choice=choice)
    captured = capsys.readouterr()
    assert words in " ".join((captured.out + captured.err).split())
    assert replicas.reloaded == (["new", "old"] if failing else ["new"])
    assert replicas.written() == ("old" if failing else "new")
