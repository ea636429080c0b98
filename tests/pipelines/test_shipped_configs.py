"""Every shipped YAML is loaded against its class, and its plan can be made."""

from __future__ import annotations

from pathlib import Path

import pytest

from goldcrest.cluster.config_file import load_config
from goldcrest.cluster.dag import walk
from goldcrest.cluster.keys import Fingerprints
from goldcrest.pipelines import speaker

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("path", sorted((CONFIGS / "speaker").glob("*.yaml")), ids=lambda p: p.stem)
def test_speaker_configs_load_and_build(path: Path) -> None:
    cfg = load_config(speaker.Config, file=path)
    nodes = speaker.build(cfg)
    assert len(nodes) == len(cfg.compare) + 3  # and the three bundles


def test_the_variants_are_there() -> None:
    names = {path.stem for path in (CONFIGS / "speaker").glob("*.yaml")}
    assert {"tiny", "base", "paper", "real"} <= names


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pretrain": {"margin": "ce"}}, "must be the same"),
        ({"compare": [{"method": "cimc"}]}, "called alike"),
        ({"rounds": 2, "pretrain": {"labels": True}}, "once on true labels"),
        ({"clustering": {"clusters": 1}}, "greater than or equal to 2"),
        ({"features": {"augment": {"speed": [1.1, 0.9]}}}, "a range is"),
    ],
)
def test_configs_that_would_fail_late_are_refused_early(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        speaker.Config(**change)


def test_every_field_is_documented() -> None:
    """Descriptions carry the unit; a field without one is not finished."""
    from goldcrest.cluster.api import Config

    seen: set[type] = set()

    def check(cls: type[Config]) -> None:
        if cls in seen:
            return
        seen.add(cls)
        for name, field in cls.model_fields.items():
            assert field.description, f"{cls.__name__}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
                check(field.annotation)

    check(speaker.Config)
    assert len(seen) > 8


def test_rounds_and_candidates_have_names_and_labels_of_their_own() -> None:
    base = load_config(speaker.Config, file=CONFIGS / "speaker" / "tiny.yaml").model_dump()
    two = base | {"rounds": 2, "candidates": {"changes": [{}, {"mu": 2.0}], "seeds": 2}}
    cfg = speaker.Config.model_validate(two)
    steps = walk(speaker.build(cfg), fingerprints=Fingerprints(Path("/nowhere/cache")))
    clusterings = [step for step in steps if step.task.name == "cluster"]
    assert len([step for step in clusterings if step.name.startswith("candidate")]) == 8
    assert {"cluster", "cluster-round-2", "reference-round-2"} <= {step.name for step in steps}
    labels = [step.config.label or step.config.method for step in clusterings]  # type: ignore[attr-defined]
    assert len(set(labels)) == len(labels)
    with pytest.raises(ValueError, match="nu"):
        speaker.Config.model_validate(base | {"candidates": {"changes": [{"nu": 1}]}})
