"""Compression of an ECAPA-TDNN: size, speed and accuracy of dense, sparse and INT8.

    python -m pytest tests/bench/test_int8_bench.py -s

prints the figures; the assertions are the claims: the INT8 tensors are at least 3.5 times smaller
than float32, are not slower, and cost at most one point of EER on a generated speaker task. The
short form claims the size alone, and prints the speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from goldcrest.kernels.distillation import squarehead
from goldcrest.kernels.margin import aam
from goldcrest.kernels.metrics.verification import equal_error_rate
from goldcrest.kernels.quantization.quantize_ecapa import Settings, quantize_ecapa
from goldcrest.kernels.sparsity import masks, packing, sparsegpt
from goldcrest.kernels.sparsity.model import prunable, prune_model
from goldcrest.kernels.speaker.ecapa_tdnn import EcapaSettings, EcapaTdnn


def tensor_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def fastest(candidates: list[Callable[[], object]], rounds: int) -> list[float]:
    """Least CPU seconds of each, taken in turns: a busy machine slows all of them alike."""
    times = [[] for _ in candidates]
    for _ in range(rounds):
        for taken, candidate in zip(times, candidates, strict=True):
            start = time.thread_time()
            candidate()
            taken.append(time.thread_time() - start)
    return [min(taken) for taken in times]


def compare_networks(channels: int, wide: int, *, lengths: tuple[int, ...], rounds: int) -> float:
    """Sizes compared, speeds printed; times faster than float32 at the worst number of frames."""
    faster = []
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = EcapaTdnn(EcapaSettings(channels=channels, mfa_channels=wide)).eval()
        calibration = [(torch.randn(4, 40, 200), None)]
        small = quantize_ecapa(model, calibration, Settings(weights="rtn", smooth=False))
        ratio = tensor_bytes(model.state_dict()) / tensor_bytes(small.tensors())
        assert ratio >= 3.5
        for frames in lengths:
            x = torch.randn(1, 40, frames)
            with torch.no_grad():
                dense, int8 = fastest([lambda x=x: model(x), lambda x=x: small(x)], rounds)
            print(
                f"\nC={channels} T={frames}: float32 {1e3 * dense:.1f} ms, int8 {1e3 * int8:.1f} ms"
                f" ({dense / int8:.2f}x faster, {ratio:.2f}x smaller)",
                end="",
            )
            faster.append(dense / int8)
    finally:
        torch.set_num_threads(threads)
    return min(faster)


def test_int8_is_smaller() -> None:
    compare_networks(128, 384, lengths=(200,), rounds=3)


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "wide"), [(128, 384), (256, 768), (512, 1536)])
def test_int8_is_smaller_and_not_slower(channels: int, wide: int) -> None:
    assert compare_networks(channels, wide, lengths=(200, 300, 400), rounds=15) >= 1


# --- accuracy on generated speakers ---------------------------------------------------------

FEATURES, SPEAKERS, FRAMES = 20, 40, 60


def utterances(speakers: Tensor, generator: torch.Generator) -> Tensor:
    """Frames of speakers given by (n, 2, FEATURES): a mean and a deviation per feature.

    Sessions add an offset as large as what tells speakers apart, so errors remain.
    """
    mean, deviation = speakers[:, 0, :, None], speakers[:, 1, :, None].exp()
    noise = torch.randn(len(speakers), FEATURES, FRAMES, generator=generator)
    session = torch.randn(len(speakers), FEATURES, 1, generator=generator)
    return 0.35 * mean + deviation * noise + 0.5 * session


def draw_speakers(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, 2, FEATURES, generator=generator) * torch.tensor([1.0, 0.3])[:, None]


def train(
    model: EcapaTdnn,
    head: aam.Head,
    speakers: Tensor,
    steps: int,
    rate: float,
    generator: torch.Generator,
    *,
    held: masks.Masks | None = None,
    teacher: EcapaTdnn | None = None,
) -> None:
    """Some steps of AAM-softmax, with SquareHead from a teacher and masks held if given."""
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], rate)
    model.train()
    for _ in range(steps):
        labels = torch.randint(0, len(speakers), (32,), generator=generator)
        x = utterances(speakers[labels], generator)
        embedding, features = model.blocks(x)
        loss = head(embedding, labels)
        if teacher is not None:
            with torch.no_grad():
                wanted = teacher.blocks(x)[1]
            loss = loss + squarehead.loss(
                [f.transpose(1, 2) for f in wanted],
                [f.transpose(1, 2) for f in features],
                None,
                squarehead.Settings(),
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if held is not None:
            masks.hold(model, held)
    model.eval()


def error_rate(embed: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor) -> float:
    """EER in percent over all pairs."""
    with torch.no_grad():
        vectors = F.normalize(embed(x), dim=1)
    first, second = torch.triu_indices(len(x), len(x), 1)
    scores = (vectors @ vectors.t())[first, second]
    return 100 * equal_error_rate(scores.numpy(), (labels[first] == labels[second]).numpy())


@pytest.mark.slow
def test_sparse_and_int8_cost_at_most_a_point_of_eer() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    settings = EcapaSettings(
        input_dim=FEATURES, channels=64, mfa_channels=96, attention_channels=16, se_channels=16,
        embedding_dim=32,
    )  # fmt: skip
    dense = EcapaTdnn(settings)
    head = aam.Head(32, SPEAKERS, aam.Settings())
    speakers = draw_speakers(SPEAKERS, generator)
    train(dense, head, speakers, 150, 2e-3, generator)

    calibration = [utterances(speakers, generator) for _ in range(8)]

    def calibrate(model: nn.Module) -> Iterator[None]:
        for batch in calibration:
            model(batch)
            yield None

    sparse = deepcopy(dense)
    names = [n for n in prunable(sparse) if ".gate." not in n and n != "enter.conv"]
    held = prune_model(sparse, [names], calibrate, "sparsegpt", 0.75, sparsegpt.Settings())
    train(sparse, head, speakers, 60, 1e-3, generator, held=held, teacher=dense)
    batches = [(batch, None) for batch in calibration]
    models = {
        "dense": dense,
        "sparse": sparse,
        "int8": quantize_ecapa(dense, batches),
        "sparse int8": quantize_ecapa(sparse, batches),
    }
    unseen = draw_speakers(60, generator)
    labels = torch.arange(60).repeat_interleave(8)
    x = utterances(unseen[labels], generator)
    eer = {name: error_rate(model, x, labels) for name, model in models.items()}
    print("\nEER % on unseen generated speakers:", {k: round(v, 2) for k, v in eer.items()})
    assert masks.realised_sparsity(sparse, names) >= 0.749
    assert 2 < eer["dense"] < 35  # neither trivial nor untrained
    assert eer["int8"] <= eer["dense"] + 1
    assert eer["sparse"] <= eer["dense"] + 1
    assert eer["sparse int8"] <= eer["dense"] + 1
    tensors = models["sparse int8"].tensors()
    codes = [name for name, t in tensors.items() if t.dtype == torch.int8 and t.ndim == 3]
    packed = tensor_bytes(packing.pack_state(tensors, codes))
    dense_bytes = tensor_bytes(dense.state_dict())
    print("bytes:", {"dense": dense_bytes, "int8": tensor_bytes(tensors), "packed": packed})
    assert packed < tensor_bytes(tensors)
