"""DeepSpeed: import without side effects, our config in its words, engines, process groups.

Everything that knows how DeepSpeed is switched on is here; what knows its insides is in
`training_shards.py`. Versions 0.19.x; facts measured on 0.19.8 and a machine without a GPU:

- `import deepspeed` imports mlflow for its autotuner if it can: 4.0 of 4.6 s. We hide mlflow.
- the first engine on a CPU compiles a shared-memory collective with g++ (95 s). We switch it off.
- its own AdamW compiles too (185 s, 533 s with offload). We hand it torch's optimizers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from goldcrest.cluster.errors import InputError, StepError
from goldcrest.cluster.training_config import TrainingConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_deepspeed(*, gpu: bool) -> ModuleType:
    """Import DeepSpeed for the CPU or for CUDA, quietly and without compiling anything."""
    kind = "cuda" if gpu else "cpu"
    if "deepspeed" not in sys.modules:
        chosen = os.environ.get("DS_ACCELERATOR")
        os.environ["DS_ACCELERATOR"] = kind
        hide_mlflow = "mlflow" not in sys.modules
        if hide_mlflow:
            sys.modules["mlflow"] = None  # type: ignore[assignment]  # the documented "do not import"
        try:
            import deepspeed
        finally:
            if hide_mlflow:
                del sys.modules["mlflow"]
            if chosen is None:
                del os.environ["DS_ACCELERATOR"]
            else:
                os.environ["DS_ACCELERATOR"] = chosen
    import deepspeed
    import deepspeed.ops

    if deepspeed.accelerator.get_accelerator().device_name() != kind:
        raise StepError(
            f"DeepSpeed is already loaded for another device than '{kind}' in this process",
            hint="train on CPU and on GPU in separate processes",
        )
    # A private table of "can this op be compiled here"; without it we only lose the shortcut.
    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(compatible, dict) and not gpu:
        compatible["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


@contextlib.contextmanager
def foreign_warnings_silenced() -> Iterator[None]:
    """Silence what torch says to DeepSpeed about DeepSpeed's own calls; ours stay heard."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"`torch\.jit\..*` is deprecated", category=DeprecationWarning
        )
        warnings.filterwarnings(
            "ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning
        )
        yield


def effective_stage(config: TrainingConfig) -> int:
    """The ZeRO stage that runs. Reduced precision needs fp32 master weights next to the model's,
    and DeepSpeed's unpartitioned wrapper for them (stage 0) does not scale fp16 losses; stage 1 is
    the same arithmetic with the masters split over the workers, so stage 0 means stage 1 there."""
    return config.zero_stage if config.precision == "fp32" else max(1, config.zero_stage)


def deepspeed_config(
    config: TrainingConfig, *, micro_batch: int, accumulation: int
) -> dict[str, Any]:
    """`config` in DeepSpeed's words. Optimizer and schedule are ours and do not appear."""
    zero: dict[str, Any] = {"stage": effective_stage(config)}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.clip_norm or 0.0,
        "steps_per_print": None,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # SGD; our tests compare every stage with stage 0
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
    }


def build_optimizer(groups: list[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    """torch's own optimizer over the objective's groups; `lr_scale` stays in each group."""
    for group in groups:
        group.setdefault("lr_scale", 1.0)
        group.setdefault("weight_decay", config.weight_decay)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.learning_rate, betas=config.betas)


def check_settings(config: TrainingConfig) -> None:
    """Refuse in words what DeepSpeed or this machine cannot do."""
    if config.offload_optimizer and effective_stage(config) == 0:
        raise InputError("offload_optimizer needs zero_stage 1, 2 or 3", hint="set zero_stage=2")
    if config.offload_parameters and config.zero_stage != 3:
        raise InputError("offload_parameters needs zero_stage 3", hint="set zero_stage=3")
    if config.precision == "fp16" and not config.gpus_per_worker:
        supported = torch.ops.mkldnn._is_mkldnn_fp16_supported()
        if not supported:
            raise InputError("this CPU cannot compute in fp16", hint="use precision bf16 or fp32")


def start_engine(
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    *,
    micro_batch: int,
    accumulation: int,
) -> Any:
    """`deepspeed.initialize` on the process group that exists already."""
    deepspeed = load_deepspeed(gpu=config.gpus_per_worker > 0)
    with foreign_warnings_silenced():
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config(config, micro_batch=micro_batch, accumulation=accumulation),
        )
    return engine


@contextlib.contextmanager
def single_process_group(*, gpu: bool) -> Iterator[None]:
    """A process group of this process alone: no port, no environment, nothing left behind."""
    if dist.is_initialized():
        raise StepError(
            "this process already belongs to a torch.distributed group",
            hint="leave it first: torch.distributed.destroy_process_group()",
        )
    deepspeed = load_deepspeed(gpu=gpu)
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "0"
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        if deepspeed.comm.comm.cdb is None:
            dist.destroy_process_group()
        else:
            deepspeed.comm.destroy_process_group()
            # DeepSpeed keeps a handle on the dead group and would use it for the next one.
            deepspeed.comm.comm.cdb = None
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before
