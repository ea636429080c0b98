"""EleutherAI's lm-evaluation-harness on bundles, whatever precision they compute in.

Install it with the extra `harness`. Tasks are YAML files: local ones in `folder`, whose data may be
local too (`dataset_path: json`, `dataset_kwargs: {data_files: /path/rows.jsonl}`), or those that
come with the package, most of which fetch their data from the Hugging Face hub. A task file may
name Python functions, which run: use only tasks that you trust.

Metrics: harness.<model>.<task>.{<metric>, <metric>_stderr}. Artifact: results, the same as JSON
with the harness's version and the tasks' versions and numbers of examples.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from goldcrest.cluster.api import Artifact, Config, InputError, InputFiles, Output, StepError, task
from goldcrest.tasks.language.bundle import verified

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


class HarnessConfig(Config):
    """Which tasks, on how many examples."""

    tasks: tuple[str, ...] = Field(min_length=1, description="names of tasks or groups of tasks")
    folder: Annotated[str | None, InputFiles] = Field(
        None, description="folder with task files of your own; None: those of the package"
    )
    examples: int | None = Field(
        None, ge=1, description="examples per task, the first ones; None: all"
    )
    shots: int | None = Field(
        None, ge=0, description="solved examples in front of each question; None: as the task says"
    )
    batch_size: int = Field(8, ge=1, description="requests that run through the model together")
    bootstrap: int = Field(
        1000, ge=0, description="replicates of the standard errors that have no formula"
    )
    chat: bool = Field(False, description="put questions into the tokenizer's chat template")


def check_harness(cfg: HarnessConfig) -> None:
    """InputError where the package is missing, or for a task that it does not have."""
    check_installed()
    task_manager(cfg)


def check_installed() -> None:
    """InputError where the package is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "lm-evaluation-harness is not installed",
            hint="pip install 'goldcrest[harness]' on every node",
        )


def task_manager(cfg: HarnessConfig) -> TaskManager:
    """The tasks there are; InputError if those that are asked for are none of them."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=cfg.folder, include_defaults=cfg.folder is None)
    unknown = [name for name in cfg.tasks if name not in manager.all_tasks]
    if unknown:
        known = sorted(manager.all_tasks)
        some = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
        raise InputError(f"the harness has no task '{unknown[0]}'; there are {len(known)}: {some}")
    return manager


@task(cpus=0, timeout="24h", check=check_harness)
def harness(cfg: HarnessConfig, out: Output, **models: Artifact) -> None:
    """Evaluate every bundle of `models`, by name, with the harness."""
    if not models:
        raise StepError("there is no model to evaluate", hint="name at least one bundle")
    check_installed()
    folders = [verified(bundle) for bundle in models.values()]
    device = "cuda" if out.runtime.gpus else "cpu"
    work = functools.partial(evaluate_bundle, cfg=cfg, seed=out.seed, device=device)
    found = out.runtime.map(work, folders, gpus=out.runtime.gpus, note="harness")
    results = dict(zip(models, found, strict=True))
    out.json("results", results)
    out.metrics(harness={name: each["tasks"] for name, each in results.items()})


def evaluate_bundle(folder: Path, *, cfg: HarnessConfig, seed: int, device: str) -> dict[str, Any]:
    """Metrics by task of one bundle, and what they were computed on."""
    import lm_eval

    from goldcrest.tasks.language.harness_model import BundleModel
    from goldcrest.tasks.language.quality import load_on

    bundle = load_on(folder, device)
    found = lm_eval.simple_evaluate(
        model=BundleModel(bundle, batch_size=cfg.batch_size, seed=seed, chat=cfg.chat),
        tasks=list(cfg.tasks),
        num_fewshot=cfg.shots,
        limit=cfg.examples,
        bootstrap_iters=cfg.bootstrap,
        log_samples=False,
        apply_chat_template=cfg.chat,
        task_manager=task_manager(cfg),
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return {
        "tasks": {name: plain_metrics(values) for name, values in found["results"].items()},
        "versions": found["versions"],
        "examples": {name: each["effective"] for name, each in found["n-samples"].items()},
        "harness": lm_eval.__version__,
    }


def plain_metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """The harness's "acc,none" and "exact_match_stderr,strict" as plain names of finite numbers."""
    plain = {}
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        finite = isinstance(value, int | float) and math.isfinite(value)
        if filtered and finite:
            name = metric if filtered == "none" else f"{metric}_{filtered.replace('-', '_')}"
            plain[name] = float(value)
    return plain
