"""The training engine's configuration, apart from the engine: tasks import it without ray."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from goldcrest.cluster.markers import DoesNotChangeResult


class TrainingConfig(BaseModel):
    """How the engine trains an objective. The learning rate is the peak of its schedule."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    epochs: int = Field(10, ge=1, description="passes over the examples")
    batch_size: int = Field(
        64, ge=1, description="examples per optimizer step, over all workers and micro-batches"
    )
    micro_batch_size: int | None = Field(
        None, ge=1, description="examples per worker and forward pass; None: batch_size / workers"
    )
    batch_units: int | None = Field(
        None,
        ge=1,
        description="instead of batch_size: the largest step in the units of an objective whose "
        "examples differ in size (tokens), padding counted; examples of like size go together",
    )
    micro_batch_units: int | None = Field(
        None,
        ge=1,
        description="with batch_units: units per worker and forward pass; None: one pass a worker",
    )
    drop_last: bool = Field(True, description="leave out the last, smaller batch of an epoch")
    optimizer: Literal["adamw", "adam", "sgd"] = Field("adamw", description="optimizer")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Adam's decay rates")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD")
    weight_decay: float = Field(0.0, ge=0, description="weight decay (decoupled for adamw)")
    schedule: Literal["constant", "linear", "cosine", "exponential", "onecycle"] = Field(
        "constant", description="shape of the learning rate after the warm-up"
    )
    warmup_steps: int = Field(0, ge=0, description="optimizer steps of linear warm-up")
    decay: float = Field(
        0.97, gt=0, le=1, description="factor per epoch of the exponential schedule"
    )
    final_learning_rate: float = Field(
        0.0, ge=0, description="learning rate at the end of linear, cosine and onecycle schedules"
    )
    clip_norm: float | None = Field(None, gt=0, description="largest global gradient norm")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="compute precision")
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage")
    offload_optimizer: bool = Field(False, description="keep optimizer state in CPU memory")
    offload_parameters: bool = Field(
        False, description="keep the weights in CPU memory until they are needed (zero_stage 3)"
    )
    workers: int = Field(1, ge=1, description="data-parallel training processes")
    cpus_per_worker: float = Field(1.0, ge=0, description="CPU cores per training process")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs per training process")
    on_nan: Literal["fail", "skip"] = Field(
        "fail", description="a loss that is not finite: stop with an error, or skip the step"
    )
    max_failures: Annotated[int, DoesNotChangeResult] = Field(
        3, ge=0, description="restarts after a worker or node that failed"
    )
    max_preemptions: Annotated[int, DoesNotChangeResult] = Field(
        -1,
        ge=-1,
        description="restarts after a node was taken away with notice (spot machines, drained "
        "nodes), counted apart from failures; -1: no limit",
    )
    checkpoint_every: Annotated[int, DoesNotChangeResult] = Field(
        1, ge=1, description="epochs between checkpoints inside the step"
    )

    @model_validator(mode="after")
    def _one_way_to_count(self) -> Self:
        if self.batch_units is None and self.micro_batch_units is not None:
            raise ValueError("micro_batch_units divides batch_units, which is not set")
        if self.batch_units is not None and self.micro_batch_size is not None:
            raise ValueError(
                "micro_batch_size divides batch_size, but batch_units is set: use micro_batch_units"
            )
        return self
