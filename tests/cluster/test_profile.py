"""Cluster profiles: files, resources per step, and plans that no node can run."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from goldcrest.cluster.api import Config, InputError, Output, Resources, TrainingConfig, task
from goldcrest.cluster.dag import Step, walk
from goldcrest.cluster.keys import Fingerprints
from goldcrest.cluster.placement import NODE_ID, asked, own_resources, task_options
from goldcrest.cluster.profile import (
    NodeKind,
    Profile,
    StepResources,
    beside_its_workers,
    check_placement,
    lacking,
    parse_bytes,
    placements,
    running_nodes,
)
from tests.cluster.engine_steps import NumberConfig, TrainToyConfig, number, train_toy

CONFIGS = Path(__file__).parents[2] / "configs" / "cluster"


@task(cpus=1)
def train_and_hold(cfg: TrainToyConfig, out: Output) -> None:
    """Holds a core while its workers train."""


def steps(profile: Profile, *names: str) -> list[Step]:
    nodes = [number.bind(NumberConfig(), name=name) for name in names]
    return walk(nodes, fingerprints=Fingerprints(Path("/nowhere/c")), overrides=profile.overrides())


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_profiles_load(path: Path) -> None:
    assert Profile.load(path).name == path.stem


def test_a_mixed_cluster_sends_training_to_gpu_nodes_and_the_rest_to_cpu_nodes() -> None:
    profile = Profile.load(CONFIGS / "mixed.yaml")
    prepare, pretrain = steps(profile, "prepare", "pretrain")
    cpu = NodeKind(name="a", cpus=8, labels={"pool": "cpu"})
    gpu = NodeKind(name="b", cpus=8, gpus=1, labels={"pool": "gpu"})
    fits = [[not lacking(s.resources, node) for node in (cpu, gpu)] for s in (prepare, pretrain)]
    assert fits == [[True, False], [False, True]]


def test_the_pipelines_config_changes_what_tasks_ask_for_and_the_profile_wins() -> None:
    class Chain(Config):
        steps: dict[str, StepResources] = Field({})

    def placed(profile: Profile | None) -> Step:
        given = {"num*": {"cpus": 3, "memory": "1GB", "timeout": "90s"}}
        config = Chain.model_validate({"steps": given})
        (step,) = walk(
            [number.bind(NumberConfig(), name="number")],
            fingerprints=Fingerprints(Path("/nowhere/c")),
            overrides=placements(config, profile),
        )
        return step

    alone = placed(None)
    assert (alone.resources.cpus, alone.resources.memory, alone.timeout) == (3, 10**9, 90.0)
    other = placed(Profile.model_validate({"steps": {"number": {"cpus": 2, "timeout": 7200}}}))
    assert (other.resources.cpus, other.resources.memory, other.timeout) == (2, 10**9, 7200.0)
    (plain,) = steps(Profile(), "number")
    assert plain.timeout == number.timeout
    assert plain.key == alone.key == other.key  # where a step runs does not change what it makes
    with pytest.raises(ValidationError, match="is not a duration"):
        Chain.model_validate({"steps": {"number": {"timeout": "soon"}}})


def test_what_a_profile_gives_a_step_that_hands_out_work_is_for_its_workers() -> None:
    profile = Profile.load(CONFIGS / "mixed.yaml")
    node = train_toy.bind(TrainToyConfig(), name="pretrain")
    (step,) = walk(
        [node], fingerprints=Fingerprints(Path("/nowhere/c")), overrides=profile.overrides()
    )
    assert own_resources(step) == Resources(cpus=0, labels={"pool": "gpu"})
    own, worker = asked(step)
    assert own == own_resources(step)
    assert worker == Resources(cpus=1, gpus=1, labels={"pool": "gpu"})
    one_gpu = NodeKind(name="g", cpus=1, gpus=1, labels={"pool": "gpu"})
    check_placement([step], [one_gpu], profile)  # the step itself does not hold the one GPU
    with pytest.raises(InputError, match="step 'pretrain' asks for 1 GPUs"):
        check_placement([step], [NodeKind(name="c", cpus=8, labels={"pool": "gpu"})], profile)


def test_a_config_that_asks_for_gpus_is_refused_before_anything_starts() -> None:
    config = TrainToyConfig(training=TrainingConfig(gpus_per_worker=2))
    (step,) = walk([train_toy.bind(config)], fingerprints=Fingerprints(Path("/nowhere/c")))
    with pytest.raises(InputError, match="step 'train_toy' asks for 2 GPUs"):
        check_placement([step], [NodeKind(name="n", cpus=8)], Profile())


def step_that_trains(workers: int, profile: Profile | None = None) -> Step:
    config = TrainToyConfig(training=TrainingConfig(workers=workers))
    overrides = profile.overrides() if profile else []
    fingerprints = Fingerprints(Path("/nowhere/c"))
    (step,) = walk([train_toy.bind(config)], fingerprints=fingerprints, overrides=overrides)
    return step


def test_workers_that_must_share_a_node_are_refused_where_none_is_large_enough() -> None:
    nodes = [NodeKind(name="n1", cpus=2), NodeKind(name="n2", cpus=2)]
    step = step_that_trains(3)
    check_placement([step], nodes, Profile())  # spread over both they find room
    with pytest.raises(InputError, match=r"asks for 3 CPU cores \(n1 has 2\)"):
        check_placement([step], nodes, Profile(), one_node=True)
    check_placement([step_that_trains(2)], nodes, Profile(), one_node=True)


def test_more_workers_than_there_is_room_for_at_the_same_time_are_refused() -> None:
    """Ray Train would ask for them again and again; a cluster that grows may get them."""
    nodes = [NodeKind(name="n1", cpus=3), NodeKind(name="n2", cpus=1.5)]
    check_placement([step_that_trains(4)], nodes, Profile())
    with pytest.raises(InputError, match="with 5 workers at the same time, and 'this machine'"):
        check_placement([step_that_trains(5)], nodes, Profile())
    grows = Profile(autoscaler=[NodeKind(name="more", cpus=1)])
    check_placement([step_that_trains(5)], nodes, grows)
    # What the step itself holds is gone: on the node where that costs least.
    node = train_and_hold.bind(TrainToyConfig(training=TrainingConfig(workers=4)))
    (holder,) = walk([node], fingerprints=Fingerprints(Path("/nowhere/c")))
    with pytest.raises(InputError, match="has room for 3 of 1 CPU cores and 0 GPUs each"):
        check_placement([holder], nodes, Profile())


def test_a_step_with_its_workers_keeps_off_nodes_that_are_too_small_for_them() -> None:
    def node(name: str, cpus: float, **labels: str) -> NodeKind:
        return NodeKind(name=name, cpus=cpus, labels={NODE_ID: name, **labels})

    head, small, large = node("aa", 0), node("bb", 1), node("cc", 4)
    alone = Resources(cpus=0)
    assert beside_its_workers(step_that_trains(1), [small, large]) == alone
    assert beside_its_workers(step_that_trains(2), [head, small, large]) == Resources(
        cpus=0, labels={NODE_ID: "!in(aa,bb)"}
    )
    assert beside_its_workers(step_that_trains(2), [head, small]) == alone  # it says what it lacks
    profile = Profile.model_validate({"steps": {"*": {"labels": {"pool": "x"}}}})
    pool = [head, node("dd", 1, pool="x"), node("ee", 2, pool="x")]
    assert beside_its_workers(step_that_trains(2, profile), pool) == Resources(
        cpus=0, labels={"pool": "x", NODE_ID: "!in(dd)"}
    )
    (computes,) = steps(Profile(), "prepare")
    assert beside_its_workers(computes, [head, large]) == computes.resources


def test_later_patterns_win_and_only_given_fields_change() -> None:
    profile = Profile.model_validate(
        {"steps": {"*": {"cpus": 2, "memory": "2GiB"}, "pre*": {"cpus": 3}}}
    )
    first, second = steps(profile, "pretrain", "other")
    assert (first.resources.cpus, second.resources.cpus) == (3, 2)
    assert first.resources.memory == 2 * 1024**3


@pytest.mark.parametrize(
    ("text", "expected"),
    [("200MB", 200_000_000), ("2GiB", 2 << 30), ("1.5 kB", 1500), ("7", 7), ("3G", 3 * 10**9)],
)
def test_amounts_of_memory(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: {a: {gpu: 1}}", r"steps\.a\.gpu"),
        ("ray: {object_store_memory: lots}", "'lots' is not an amount of memory"),
        ("- a list", "must be a mapping"),
        ("ray: {address: [}", "is not YAML"),
    ],
)
def test_a_wrong_profile_is_told_with_file_and_field(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        Profile.load(path)
    assert "wrong.yaml" in str(caught.value)
    with pytest.raises(InputError, match="cannot read"):
        Profile.load(tmp_path / "absent.yaml")


def test_a_step_that_no_node_can_run_is_named_with_what_is_missing() -> None:
    profile = Profile.model_validate({"name": "lab", "steps": {"pretrain": {"gpus": 1, "cpus": 4}}})
    nodes = [NodeKind(name="n1", cpus=2), NodeKind(name="n2", cpus=8)]
    with pytest.raises(InputError) as caught:
        check_placement(steps(profile, "prepare", "pretrain"), nodes, profile)
    assert caught.value.message == (
        "step 'pretrain' asks for 1 GPUs (n2 has 0): no node of 'lab' can run it"
    )


def test_nodes_that_an_autoscaler_may_add_count() -> None:
    profile = Profile.model_validate(
        {"steps": {"*": {"gpus": 2}}, "autoscaler": [{"cpus": 8, "gpus": 4}]}
    )
    check_placement(steps(profile, "pretrain"), [NodeKind(name="head", cpus=2)], profile)


def test_a_run_starts_on_kubernetes_while_no_gpu_node_is_there() -> None:
    cpu = [NodeKind(name="head"), NodeKind(name="a", cpus=8, labels={"pool": "cpu"})]
    grows, fixed = (Profile.load(CONFIGS / f"{name}.yaml") for name in ("kuberay", "mixed"))
    assert grows.steps == fixed.steps
    check_placement(steps(grows, "prepare", "pretrain"), cpu, grows)
    with pytest.raises(InputError, match="step 'pretrain' asks for"):
        check_placement(steps(fixed, "prepare", "pretrain"), cpu, fixed)


def test_memory_accelerator_custom_resource_and_label_are_all_checked() -> None:
    wanted = Resources(
        memory=10**10, accelerator="A100", custom={"licence": 1}, labels={"zone": "!in(a, b)"}
    )
    node = NodeKind(name="n", cpus=1, memory=10**9, labels={"zone": "b"})
    assert lacking(wanted, node) == [
        "10 GB of memory (n has 1)",
        "a GPU of type A100",
        "1 of the resource 'licence'",
        "the label zone=!in(a, b)",
    ]
    enough = NodeKind(
        name="n", cpus=1, custom={"licence": 2, "accelerator_type:A100": 1}, labels={"zone": "c"}
    )
    assert lacking(wanted, enough) == []


def test_options_are_what_ray_calls_them() -> None:
    wanted = Resources(
        cpus=2, gpus=1, memory=5, accelerator="A100", custom={"x": 1}, labels={"pool": "gpu"}
    )
    assert task_options(wanted) == {
        "num_cpus": 2,
        "num_gpus": 1,
        "memory": 5,
        "accelerator_type": "A100",
        "resources": {"x": 1},
        "label_selector": {"pool": "gpu"},
    }


def test_running_nodes_are_seen(ray_cluster: None) -> None:
    (node,) = running_nodes()
    assert (node.cpus, node.gpus) == (2, 0)
