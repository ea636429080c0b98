"""What `goldcrest serve` refuses before it starts anything, and the Serve config that it writes."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from goldcrest.cluster.store import Store
from goldcrest.pipelines import cli
from tests.pipelines.speaker_server import make_bundle
from tests.pipelines.text_server import make_text_bundle

Call = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated bundle."""
    return make_bundle(tmp_path_factory.mktemp("bundles") / "one")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without a calibration."""
    return make_bundle(tmp_path_factory.mktemp("bundles") / "plain", thresholds={})


@pytest.fixture(scope="module")
def text_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a language model."""
    return make_text_bundle(tmp_path_factory.mktemp("bundles") / "text")


@pytest.fixture
def serve(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Call:
    """`goldcrest serve ...` -> exit code and what was said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOLDCREST_STORE", raising=False)

    def called(*arguments: str | Path) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["serve", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out + captured.err

    return called


def built(application: Any, args: dict[str, Any]) -> Any:
    """The application that Serve makes of a config's `args`."""
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    return call_user_app_builder_with_args_if_necessary(application, args)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "token is required"),
        (["--host", "192.168.1.7"], "token is required"),
        (["--token-file", "nowhere"], "cannot be read"),
        (["--far", "0.02"], "0.01, 0.05, 0.1"),
        (["--far", "2"], "far"),
        (["--threshold", "3"], "threshold"),
        (["--autoscale", "3:1"], "MIN:MAX"),
        (["--autoscale", "x"], "MIN:MAX"),
        (["-o", "max_secnds=3"], "max_seconds"),
        (["-o", "max_body_bytes=lots"], "max_body_bytes"),
        (["--profile", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_starts_nothing(
    serve: Call, bundle: Path, arguments: list[str], words: str
) -> None:
    code, said = serve(bundle, *arguments)
    assert code == 2, said
    assert words in said
    assert not Path(".goldcrest").exists()


def test_a_bundle_must_be_one(serve: Call, tmp_path: Path, bundle: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "bundle.json can't be read" in serve("empty")[1]
    assert "is not a folder" in serve("no/such")[1]
    assert "has no run 'run'" in serve("run:int8")[1]
    assert "two bundles are called 'dense'" in serve(bundle, bundle)[1]


def test_without_a_calibration_a_threshold_is_wanted(serve: Call, plain: Path) -> None:
    code, said = serve(plain)
    assert code == 2
    assert "--threshold" in said
    assert serve(plain, "--threshold", "0.4", "--write-config", "serve.yaml")[0] == 0


def test_a_bundle_of_a_run(serve: Call, bundle: Path, tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"))
    folder = store.run_folder("first")
    (folder / "run.json").write_text("{}")
    arguments = ("--store", tmp_path / "store", "--write-config", "serve.yaml")
    assert "has no result" in serve("first", *arguments)[1]
    bundles = {"dense": str(bundle), "gone": str(tmp_path / "gone")}
    (folder / "result.json").write_text(json.dumps({"bundles": bundles}))
    assert "is not there any more" in serve("first", *arguments)[1]  # the last is the default
    assert "it has: dense, gone" in serve("last:int8", *arguments)[1]
    assert serve("last:dense", *arguments)[0] == 0
    assert served(tmp_path / "serve.yaml")["bundles"] == {"dense": str(bundle)}


def served(path: Path) -> dict[str, Any]:
    """The user_config in a Serve config file."""
    (application,) = yaml.safe_load(path.read_text())["applications"]
    endpoint, models = application["deployments"]
    found: dict[str, Any] = endpoint["user_config"]
    assert models["user_config"] == found
    return found


def test_the_written_config_is_one_of_serve(serve: Call, bundle: Path, tmp_path: Path) -> None:
    """Checked by Serve's own schema, and its arguments by the application that it names."""
    from ray.serve.schema import ServeDeploySchema

    from goldcrest.pipelines.endpoints.speaker import SpeakerSettings, application
    from goldcrest.pipelines.endpoints.speaker_choice import ModelChoice

    code, said = serve(
        f"a={bundle}", "--far", "0.01", "--autoscale", "1:3", "--port", "8123", "--demo",
        "-o", "max_seconds=20", "--write-config", "serve.yaml",
    )  # fmt: skip
    assert code == 0, said
    tree = yaml.safe_load((tmp_path / "serve.yaml").read_text())
    checked = ServeDeploySchema.model_validate(tree)
    assert (checked.http_options.host, checked.http_options.port) == ("127.0.0.1", 8123)
    (found,) = checked.applications
    module, _, name = found.import_path.partition(":")
    assert (module, name) == (application.__module__, application.__name__)
    settings = SpeakerSettings.model_validate(found.args)
    assert (settings.replicas, settings.max_replicas, settings.max_seconds) == (1, 3, 20)
    choice = ModelChoice.read(served(tmp_path / "serve.yaml"))
    assert choice.bundles == {"a": bundle}
    assert choice.far == 0.01
    assert built(application, found.args) is not None


def test_a_language_bundle_gets_the_generate_endpoint(
    serve: Call, text_bundle: Path, tmp_path: Path
) -> None:
    from ray.serve.schema import ServeDeploySchema

    from goldcrest.pipelines.endpoints.bundles import BundleChoice
    from goldcrest.pipelines.endpoints.generate import GenerateSettings, application

    arguments = ("-o", "max_tokens=77", "--write-config", "serve.yaml")
    code, said = serve(f"a={text_bundle}", f"b={text_bundle}", *arguments)
    assert code == 0, said
    tree = yaml.safe_load((tmp_path / "serve.yaml").read_text())
    (found,) = ServeDeploySchema.model_validate(tree).applications
    assert found.import_path == "goldcrest.pipelines.endpoints.generate:application"
    settings = GenerateSettings.model_validate(found.args)
    assert settings.max_tokens == 77
    choice = BundleChoice.read(served(tmp_path / "serve.yaml"))
    assert choice.bundles == {"a": text_bundle, "b": text_bundle}
    assert built(application, found.args) is not None


def test_what_a_language_bundle_does_not_have(serve: Call, text_bundle: Path, bundle: Path) -> None:
    assert "--far is for bundles that verify speakers" in serve(text_bundle, "--far", "0.1")[1]
    assert "max_seconds" in serve(text_bundle, "-o", "max_seconds=3")[1]
    assert "of different kinds" in serve(f"a={text_bundle}", f"b={bundle}")[1]


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"family": "masked"}, "which writes no text"),
        ({"kind": "something"}, "kinds with an endpoint: speaker-embedding, language"),
        ({"kind": ["language"]}, "kinds with an endpoint"),
        ({"schema": 99}, "schema 99"),
    ],
)
def test_a_bundle_must_be_one_that_can_be_served(
    serve: Call, text_bundle: Path, tmp_path: Path, facts: dict[str, Any], words: str
) -> None:
    description = json.loads((text_bundle / "bundle.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "bundle.json").write_text(json.dumps({**description, **facts}))
    code, said = serve("other", "--write-config", "serve.yaml")
    assert code == 2, said
    assert words in said.replace("\n", " ")
    assert not (tmp_path / "serve.yaml").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 500_000, b"\xff", b"null"])
def test_a_description_that_is_none_is_refused(serve: Call, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "bundle.json").write_bytes(content)
    code, said = serve("other")
    assert code == 2
    assert "bundle.json" in said


def test_help_needs_neither_ray_nor_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys\n"
        "from goldcrest.pipelines import cli\n"
        "heavy = {'ray', 'torch', 'fastapi', 'mlflow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_moved_state_folder_takes_the_list_of_models_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas read it in a working directory of their own, so the name is absolute."""
    from goldcrest.cluster.serving import SCRATCH
    from goldcrest.pipelines.cli_serve import with_models_file
    from goldcrest.pipelines.endpoints.bundles import MODELS
    from goldcrest.pipelines.endpoints.speaker import SpeakerSettings

    monkeypatch.chdir(tmp_path)
    moved = with_models_file(SpeakerSettings(state_folder=Path("elsewhere")))
    assert moved.state_folder == tmp_path / "elsewhere"
    assert moved.models == {"file": str(tmp_path / "elsewhere" / SCRATCH / MODELS)}


def test_a_state_folder_has_one_server_at_a_time(
    serve: Call, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second one is refused before it deletes what the first may have to load again."""
    from goldcrest.pipelines import serve_foreground

    started: list[str] = []
    monkeypatch.setattr(serve_foreground, "serving", lambda *_, **__: started.append("serving"))
    copy = tmp_path / ".goldcrest" / "serve" / "serve-scratch" / "bundles" / "kept"
    copy.mkdir(parents=True)
    with serve_foreground.held(tmp_path / ".goldcrest" / "serve"):
        code, said = serve(bundle, "--port", "0")
    assert code == 2
    assert f"(process {os.getpid()})" in said
    assert "--state DIR" in said
    assert copy.is_dir()
    assert not started
    with serve_foreground.held(tmp_path / ".goldcrest" / "serve"):
        pass  # whoever has ended holds nothing


def test_a_taken_port_deletes_nothing(serve: Call, bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / ".goldcrest" / "serve" / "serve-scratch" / "bundles" / "kept"
    copy.mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, said = serve(bundle, "--port", str(taken.getsockname()[1]))
    assert code == 2
    assert "choose another --port" in said
    assert copy.is_dir()


def test_a_state_folder_that_cannot_be_made_is_named(serve: Call, bundle: Path) -> None:
    Path("file").touch()
    code, said = serve(bundle, "--state", "file/serve", "--port", "0")
    assert code == 2
    assert "the state folder" in said
    assert "--state DIR" in said
