"""Speaker bundles: a folder that is enough to turn a waveform into an embedding.

bundle.json         schema, kind, name, architecture, network and front-end settings, facts
model.safetensors   weights: dense float32, bitmask-packed where sparse, int8 where quantized
head.safetensors    the training classifier (only to fine-tune further; not needed to serve)
calibration.json    thresholds of its scores (added by publish.py, where speakers are labelled)
MODEL_CARD.md       for people
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from goldcrest.cluster.api import Output
from goldcrest.tasks import bundles
from goldcrest.tasks.speaker.frontend import FrontEnd, FrontEndConfig
from goldcrest.tasks.speaker.network import network_settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from goldcrest.kernels.speaker.ecapa_tdnn import EcapaTdnn

SCHEMA = 1
KIND = "speaker-embedding"
LICENCE = "the model inherits the terms of the speech that it was trained on"
Form = Literal["dense", "sparse", "int8"]


@dataclass(frozen=True)
class SpeakerModel:
    """A loaded bundle: `embed_batch` maps B utterances' frames (T_b, F) float32 to (B, E) float32.

    An utterance's embedding does not depend on its batch beyond the rounding of float32: padded
    frames are masked.
    """

    facts: Mapping[str, Any]
    embed_batch: Callable[[Sequence[np.ndarray]], np.ndarray]
    front_end: FrontEnd

    def embed(self, frames: np.ndarray) -> np.ndarray:
        """(T, F) float32 -> (E,) float32."""
        return self.embed_batch([frames])[0]

    def embed_waveform(self, samples: np.ndarray) -> np.ndarray:
        """(N,) float32 at 16 kHz -> (E,) float32."""
        return self.embed(self.front_end.fbank(samples))


def write_bundle(
    out: Output,
    *,
    name: Form,
    tensors: Mapping[str, Tensor],
    network: Mapping[str, Any],
    front_end: Mapping[str, Any],
    facts: Mapping[str, Any],
    packed: list[str] | None = None,
) -> None:
    """Write a bundle into the step's artifact; `packed` names weights to store with bitmasks."""
    from goldcrest.kernels.sparsity.packing import pack_state

    out.tensors("model", pack_state(dict(tensors), packed) if packed else tensors)
    weights = [
        value
        for key, value in tensors.items()
        if value.is_floating_point() and not key.endswith(("running_mean", "running_var"))
    ]
    description = {
        "schema": SCHEMA,
        "kind": KIND,
        "name": name,
        "architecture": "ecapa-tdnn",
        "network": dict(network),
        "front_end": dict(front_end),
        "packed": packed or [],
        "parameters": sum(value.numel() for value in weights),
        "sparsity": zero_share(tensors),
        "sample_rate": 16_000,
        "licence": LICENCE,
        **facts,
    }
    out.json("bundle", description)
    out.text("MODEL_CARD.md", model_card(description))


def zero_share(tensors: Mapping[str, Tensor]) -> float:
    """Share of zeros among the weights with two dimensions or more, in [0, 1]."""
    matrices = [value for value in tensors.values() if value.ndim >= 2]
    total = sum(value.numel() for value in matrices)
    zeros = sum(int((value == 0).sum()) for value in matrices)
    return round(zeros / total, 6) if total else 0.0


def bundle_bytes(folder: Path) -> int:
    """Bytes of what serving needs: weights and description."""
    return sum((folder / name).stat().st_size for name in ("model.safetensors", "bundle.json"))


def read_description(folder: Path) -> dict[str, Any]:
    """The checked bundle.json of a folder; InputError names what is wrong."""
    return bundles.read_description(folder, kind=KIND, schema=SCHEMA)


def load_network(folder: Path) -> EcapaTdnn:
    """The float network of a dense or sparse bundle, in eval mode; InputError if it is not one."""
    import torch

    from goldcrest.kernels.speaker.ecapa_tdnn import EcapaTdnn

    with bundles.told_as_input(folder):
        settings = network_settings(read_description(folder)["network"])
        with torch.device("meta"):  # sizes are the file's claim: nothing is allocated for them
            network = EcapaTdnn(settings)
        state = bundles.load_state(folder)
        bundles.check_state(state, network.state_dict().items())
        network.load_state_dict(state, assign=True)
    return network.eval()


def load_bundle(folder: Path | str, device: str = "cpu") -> SpeakerModel:
    """Any speaker bundle, ready to embed on a device; InputError when it is not one.

    An INT8 bundle stays on the CPU: its operators are the CPU's.
    """
    import torch

    folder = Path(folder)
    facts = read_description(folder)
    module: nn.Module
    with bundles.told_as_input(folder):
        if facts["name"] == "int8":
            from goldcrest.kernels.quantization.int8_ecapa import Int8Ecapa, layout

            state = bundles.load_state(folder)
            bundles.check_state(state, layout(facts["int8"]))
            module, device = Int8Ecapa.from_tensors(state, facts["int8"]), "cpu"
        else:
            module = load_network(folder).to(device)
        front_end = FrontEnd(FrontEndConfig(**facts["front_end"]))

    def embed_alike(frames: Sequence[np.ndarray]) -> np.ndarray:
        """Utterances of similar length in one pass of the network."""
        lengths = [len(each) for each in frames]
        padded = torch.zeros(len(frames), frames[0].shape[1], max(lengths))
        for row, each in zip(padded, frames, strict=True):
            row[:, : len(each)] = torch.from_numpy(each).mT
        # Without padding there is nothing to mask: the plain path is the faster one.
        mask = None if min(lengths) == max(lengths) else torch.tensor(lengths, device=device)
        with torch.inference_mode():
            return module(padded.to(device), mask).float().cpu().numpy()

    def embed_batch(frames: Sequence[np.ndarray]) -> np.ndarray:
        """[(T_b, F)] -> (B, E)."""
        groups = alike([len(each) for each in frames])
        parts = np.concatenate([embed_alike([frames[i] for i in group]) for group in groups])
        vectors = np.empty_like(parts)
        vectors[np.concatenate(groups)] = parts
        return vectors

    return SpeakerModel(facts, embed_batch, front_end)


def alike(lengths: Sequence[int], *, padding: float = 0.25) -> list[list[int]]:
    """Places of `lengths` in groups whose longest is at most 1 + `padding` times the shortest."""
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and lengths[place] <= (1 + padding) * lengths[groups[-1][0]]:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def model_card(facts: Mapping[str, Any]) -> str:
    """MODEL_CARD.md of a bundle."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in _card_rows(facts))
    return f"""# {facts["name"]} speaker embedding model

An ECAPA-TDNN that turns 16 kHz mono speech into a vector of
{facts["network"]["embedding_dim"]} numbers; the cosine of two vectors tells whether the same
person spoke.

| what | value |
|---|---|
{rows}

Load it with `goldcrest.tasks.speaker.bundle.load_bundle(folder)`; its method
`embed_waveform(samples)` takes float samples in [-1, 1]. Lineage and the exact configuration are in
the manifest beside this card and in the run's report.

Intended use: comparing voices within the kind of recordings that it was trained on. Error rates
differ between languages, channels and groups of speakers; measure them on your own trials before
you rely on a threshold. Do not use it to identify people without their consent.

Licence: {facts["licence"]}.
"""


def _card_rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What the card's table says: form, sizes, training, and what was measured."""
    yield "form", facts["name"]
    yield "channels", facts["network"]["channels"]
    yield (
        "input",
        f"{facts['network']['input_dim']} x {facts['front_end']['network_input']} per 10 ms",
    )
    yield "parameters", f"{facts['parameters']:,}"
    yield "share of zero weights", facts["sparsity"]
    yield from sorted(facts.get("training", {}).items())
    measured = facts.get("measured", {})
    if "eer" in measured:
        low, high = measured["eer_ci"]
        yield (
            "equal error rate, unseen speakers",
            f"{measured['eer']:.2f} % (95 % interval {low:.1f} to {high:.1f}, "
            f"{measured['trials']:,} trials)",
        )
    if "eer_cosine" in measured:
        yield "the same by plain cosine, without AS-norm", f"{measured['eer_cosine']:.2f} %"
    if "bytes" in measured:
        yield "bytes of weights and description", f"{measured['bytes']:,}"
