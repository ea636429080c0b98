"""The plan of a run: for every step, whether its result is there and, if not, why it will run.

step      state   why
prepare   cached  made 2026-11-21 in run 20261121-0203-speaker-1f3a
features  run     config `deltas` changed 2 -> 1
ivector   run     upstream `features` will run
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from goldcrest.cluster.api import canonical_json
from goldcrest.cluster.artifact import Artifact
from goldcrest.cluster.dag import Step, walk
from goldcrest.cluster.keys import Fingerprints
from goldcrest.cluster.masking import mask_secrets
from goldcrest.cluster.profile import placements
from goldcrest.cluster.source_hash import source_hash

if TYPE_CHECKING:
    from goldcrest.cluster.profile import Profile
    from goldcrest.cluster.store import Store

NEVER_RAN = "never ran"
SOURCE_CHANGED = "source changed, version not bumped"
_SHOWN = 40  # characters of a config value in a reason
_CHANGES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """A step with its state before the run."""

    step: Step
    state: Literal["cached", "run"]
    reason: str
    notice: str = ""  # something to know that changes nothing
    artifact: Artifact | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values for `plan --json` and run records."""
        resources = self.step.resources
        return {
            "name": self.step.name,
            "task": self.step.task_name,
            "key": self.step.key,
            "state": self.state,
            "reason": self.reason,
            "notice": self.notice,
            "inputs": dict(self.step.inputs),
            "resources": {"cpus": resources.cpus, "gpus": resources.gpus},
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All steps of a pipeline, inputs first."""

    pipeline: str
    steps: tuple[PlannedStep, ...]

    @property
    def to_run(self) -> tuple[PlannedStep, ...]:
        """The steps whose results are not in the store."""
        return tuple(planned for planned in self.steps if planned.state == "run")

    def as_json(self) -> dict[str, Any]:
        """Plain values: {"pipeline", "steps": [...]}."""
        return {"pipeline": self.pipeline, "steps": [step.as_json() for step in self.steps]}

    def text(self) -> str:
        """A table for people, without colours."""
        rows = [("step", "state", "why")]
        for planned in self.steps:
            notice = f"; {planned.notice}" if planned.notice else ""
            rows.append((planned.step.name, planned.state, planned.reason + notice))
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
        count = len(self.to_run)
        lines.append(f"{count} of {len(self.steps)} steps will run")
        return "\n".join(lines)

    def mermaid(self) -> str:
        """The DAG as a Mermaid flowchart; steps that will run are drawn with a thick border."""
        ids = {planned.step.name: f"s{index}" for index, planned in enumerate(self.steps)}
        lines = ["flowchart LR"]
        for planned in self.steps:
            label = f"{planned.step.name}<br/>{planned.state}: {planned.reason}"
            lines.append(f'  {ids[planned.step.name]}["{_mermaid_text(label)}"]:::{planned.state}')
        for planned in self.steps:
            for parameter, source in planned.step.inputs.items():
                if source is not None:
                    arrow = f'-- "{_mermaid_text(parameter)}" -->'
                    lines.append(f"  {ids[source]} {arrow} {ids[planned.step.name]}")
        lines.append("  classDef cached fill:#e8f0e8,stroke:#7a9a7a")
        lines.append("  classDef run fill:#fff4d6,stroke:#b08a2e,stroke-width:3px")
        return "\n".join(lines)


def make_plan(
    pipeline: Any,
    config: Any,
    store: Store,
    *,
    profile: Profile | None = None,
    fingerprints: Fingerprints | None = None,
    verify: bool = True,
) -> Plan:
    """Build the pipeline's DAG and look every step up in the store.

    `pipeline` is a module (or object) with `build(config)`. With `verify`, every member of a cached
    artifact is checked; a damaged one is quarantined and planned to run again.
    """
    steps = walk(
        pipeline.build(config),
        fingerprints=fingerprints or Fingerprints(),
        overrides=placements(config, profile),
    )
    return Plan(
        pipeline=pipeline_name(pipeline), steps=tuple(_plan_steps(steps, store, verify=verify))
    )


def pipeline_name(pipeline: Any) -> str:
    """The last part of a pipeline module's name."""
    return str(getattr(pipeline, "__name__", type(pipeline).__name__)).rpartition(".")[2]


def _plan_steps(steps: Sequence[Step], store: Store, *, verify: bool) -> Iterator[PlannedStep]:
    history = _History(store)
    will_run: dict[str, bool] = {}
    for step in steps:
        artifact = store.find(step.key, verify=verify)
        will_run[step.name] = artifact is None
        if artifact is not None:
            yield PlannedStep(
                step=step,
                state="cached",
                reason=_cached_reason(artifact.manifest),
                notice=_source_notice(step, artifact.manifest),
                artifact=artifact,
            )
        else:
            reason = history.damage(step.key) or _why(step, history.nearest(step), will_run)
            yield PlannedStep(step=step, state="run", reason=reason)


def _cached_reason(manifest: Mapping[str, Any]) -> str:
    created, run = str(manifest.get("created", ""))[:19], manifest.get("run")
    return f"made {created}" + (f" in run {run}" if run else "")


def _source_notice(step: Step, manifest: Mapping[str, Any]) -> str:
    made_from = manifest.get("source")
    changed = made_from and made_from != source_hash(step.task.function.__module__)
    return SOURCE_CHANGED if changed else ""


class _History:
    """What the store knows about earlier results; read only when something is missing."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._entries: list[dict[str, Any]] | None = None
        self._damaged: dict[str, str] | None = None

    def damage(self, key: str) -> str:
        """Why the artifact of `key` was quarantined, "" if it was not."""
        if self._damaged is None:
            rows = self._store.quarantined()
            self._damaged = {str(row["key"]): str(row["reason"]) for row in rows}
        reason = self._damaged.get(key)
        return f"damaged: {reason}" if reason is not None else ""

    def nearest(self, step: Step) -> dict[str, Any] | None:
        """The manifest of this step's result that differs least, the newest of such."""
        if self._entries is None:
            self._entries = list(self._store.entries())
        same = [
            manifest
            for manifest in self._entries
            if manifest.get("task") == step.task_name and manifest.get("step") == step.name
        ]
        same.sort(key=lambda manifest: str(manifest.get("created", "")), reverse=True)
        return min(same, key=lambda manifest: len(_differences(step, manifest)), default=None)


def _why(step: Step, before: Mapping[str, Any] | None, will_run: Mapping[str, bool]) -> str:
    """Why a step runs whose key the store does not have."""
    if before is None:
        return NEVER_RAN
    differences = _differences(step, before)
    own = [text for kind, text in differences if kind != "input"]
    if own:
        more = len(own) - _CHANGES_SHOWN
        return "; ".join(own[:_CHANGES_SHOWN]) + (f"; and {more} more" if more > 0 else "")
    changed = [name for kind, name in differences if kind == "input"]
    running = [step.inputs[name] for name in changed]
    upstream = [name for name in dict.fromkeys(running) if name is not None and will_run[name]]
    if upstream:
        return "upstream " + ", ".join(f"`{name}`" for name in upstream) + " will run"
    if changed:
        return "input " + ", ".join(f"`{name}`" for name in changed) + " changed"
    return "keys are made in a new way"


def _differences(step: Step, before: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(kind, text) of everything in a key that differs; for inputs the text is the parameter."""
    found: list[tuple[str, str]] = []
    if before.get("version") != step.task.version:
        found.append(("version", f"version changed {before.get('version')} -> {step.task.version}"))
    for place, old, new in _changed_fields(
        before.get("config") or {}, mask_secrets(step.canonical), ""
    ):
        if _is_files(old) or _is_files(new):
            found.append(("files", f"input files of `{place}` changed"))
        else:
            found.append(("config", f"config `{place}` changed {_short(old)} -> {_short(new)}"))
    if step.task.seeded and before.get("seed") != step.seed:
        found.append(("seed", f"seed changed {before.get('seed')} -> {step.seed}"))
    inputs = before.get("inputs") or {}
    for parameter, key in step.input_keys.items():
        if inputs.get(parameter) != key:
            found.append(("input", parameter))
    return found


_ABSENT = object()


def _changed_fields(old: Any, new: Any, place: str) -> Iterator[tuple[str, Any, Any]]:
    """(dotted place, old, new) of every leaf that differs; a list is one leaf."""
    both_maps = isinstance(old, Mapping) and isinstance(new, Mapping)
    if both_maps and not (_is_files(old) or _is_files(new)):
        for name in dict.fromkeys([*new, *old]):
            inner = f"{place}.{name}" if place else str(name)
            yield from _changed_fields(old.get(name, _ABSENT), new.get(name, _ABSENT), inner)
    elif old is _ABSENT or new is _ABSENT or canonical_json(old) != canonical_json(new):
        yield place, old, new


def _is_files(value: Any) -> bool:
    """Whether a canonical value is the fingerprint of input files (or a list of such)."""
    if isinstance(value, list):
        return any(_is_files(inner) for inner in value)
    return isinstance(value, Mapping) and set(value) == {"content", "files"}


def _short(value: Any) -> str:
    if value is _ABSENT:
        return "(not there)"
    text = canonical_json(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


_MERMAID_ESCAPES: tuple[tuple[str, str], ...] = (("#", "#35;"), ('"', "#quot;"), ("`", "'"))


def _mermaid_text(text: str) -> str:
    for character, escaped in _MERMAID_ESCAPES:
        text = text.replace(character, escaped)
    return text
