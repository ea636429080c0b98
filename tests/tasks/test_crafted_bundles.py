"""Well-formed safetensors with the wrong content: each is refused in words when it is loaded.

Bundles carry no checksums of their own (the store's manifest does, and whoever crafts a file can
write that too), so the file itself is all that a loader can judge.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from goldcrest.cluster.api import InputError
from goldcrest.cluster.artifact import Output
from goldcrest.cluster.runtime import LocalRuntime
from goldcrest.kernels.language.architectures import own_state
from goldcrest.kernels.quantization import int8_transformer
from goldcrest.kernels.quantization.quantize_ecapa import quantize_ecapa
from goldcrest.kernels.speaker.ecapa_tdnn import EcapaSettings, EcapaTdnn
from goldcrest.kernels.weight_only import transformer as weight_only
from goldcrest.kernels.weight_only.grid import GridSettings
from goldcrest.tasks.language import bundle as language
from goldcrest.tasks.speaker import bundle as speaker
from goldcrest.tasks.speaker.frontend import FrontEndConfig
from tests.kernels.language import tiny_models
from tests.pipelines.speaker_server import NETWORK

State = dict[str, Tensor]
FORMS = (
    *("speaker-dense", "speaker-sparse", "speaker-int8"),
    *("language-dense", "language-sparse", "language-int8", "language-int4"),
)


def half_zero(state: State) -> list[str]:
    """Every second weight of the matrices set to zero; their names."""
    names = [name for name, value in state.items() if value.ndim >= 2]
    for name in names:
        state[name] = state[name].clone()
        state[name].view(-1)[::2] = 0
    return names


def write_speaker(folder: Path, form: Any) -> None:
    """A tiny speaker bundle."""
    front_end = FrontEndConfig()
    settings = EcapaSettings(input_dim=front_end.network_dimensions, **NETWORK)
    network = EcapaTdnn(settings).eval()
    state, facts = network.state_dict(), {}
    if form == "int8":
        made = quantize_ecapa(network, [(torch.randn(4, settings.input_dim, 40), None)])
        state, facts = made.tensors(), {"int8": made.config()}
    speaker.write_bundle(
        Output(folder, runtime=LocalRuntime()),
        name=form,
        tensors=state,
        network=dataclasses.asdict(settings),
        front_end=front_end.model_dump(mode="json"),
        facts=facts,
        packed=half_zero(state) if form == "sparse" else None,
    )


def write_language(folder: Path, form: str) -> None:
    """A tiny Llama's bundle with a stand-in for the tokenizer's files, which models don't read."""
    tokenizer = folder.parent / f"{folder.name}-tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    model = tiny_models.llama().eval()
    facts: dict[str, Any] = {}
    batches = [tiny_models.batch("llama")]
    if form == "int8":
        facts["quantization"] = int8_transformer.quantize(model, batches)
    elif form == "int4":
        grid = GridSettings(group_size=16)
        facts["quantization"] = weight_only.quantize(model, batches, method="rtn", grid=grid)
    state = own_state(model)
    if form == "int8":
        state = int8_transformer.state(model, facts["quantization"])
    language.write_bundle(
        Output(folder, runtime=LocalRuntime()),
        name=form,
        family="causal",
        config=model.config,
        tensors=state,
        tokenizer=tokenizer,
        facts=facts,
        packed=half_zero(state) if form == "sparse" else None,
    )


def load(folder: Path) -> None:
    """What serving and evaluation do with a bundle's weights."""
    if folder.name.startswith("speaker"):
        speaker.load_bundle(folder)
    else:
        language.load_model(folder)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound bundle of each form."""
    root = tmp_path_factory.mktemp("bundles")
    torch.manual_seed(0)
    for name in FORMS:
        kind, form = name.split("-")
        (root / name).mkdir()
        (write_speaker if kind == "speaker" else write_language)(root / name, form)
        load(root / name)
    return root


Craft = Callable[[str], tuple[Path, State]]


@pytest.fixture
def craft(originals: Path, tmp_path: Path) -> Craft:
    """`craft(form)` -> a copy of the bundle, and its tensors to change and write again."""

    def copy(form: str) -> tuple[Path, State]:
        folder = tmp_path / form
        shutil.copytree(originals / form, folder)
        state = load_file(folder / "model.safetensors")
        return folder, {name: value.clone() for name, value in state.items()}

    return copy


def refused(folder: Path, state: State, words: str) -> None:
    """The bundle with these tensors is refused in a sentence with these words."""
    save_file(state, folder / "model.safetensors")
    with pytest.raises(InputError, match=words) as told:
        load(folder)
    assert folder.name in str(told.value)


# ----------------------------------------------------------------------------------- tensors

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "double": Tensor.double,
    "half": Tensor.half,
    "int64": Tensor.long,
    "bool": Tensor.bool,
    "complex": lambda x: x.to(torch.complex64),
    "one more": lambda x: torch.cat([x.reshape(-1), x.reshape(-1)[:1]]),
    "empty": lambda x: x.reshape(-1)[:0],
    "one number": lambda x: x.reshape(-1)[:1],
    "one dimension more": lambda x: x[None],
    "nan": lambda x: torch.where(torch.arange(x.numel()).reshape(x.shape) == 0, torch.nan, x),
    "infinite": lambda x: torch.full_like(x, -torch.inf),
}


def roles(state: State) -> list[str]:
    """Names of the tensors of the first block, and of those outside of blocks."""
    return [name for name in state if not any(f".{number}." in name for number in range(1, 9))]


SOME_OR_ALL = pytest.mark.parametrize(
    "every", [pytest.param(6, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]
)


@SOME_OR_ALL
@pytest.mark.parametrize("form", FORMS)
def test_no_tensor_can_be_another(craft: Craft, form: str, every: int) -> None:
    """A tensor with one change after the other: all pairs would be thousands of loads."""
    folder, state = craft(form)
    for name, change in zip(roles(state)[::every], itertools.cycle(CHANGES), strict=False):
        before = state[name]
        floats = change in ("nan", "infinite")
        if floats and not before.is_floating_point():
            continue
        made = CHANGES[change](before).contiguous()
        if (made.shape, made.dtype) == (before.shape, before.dtype) and not floats:
            continue
        packed = name.endswith((".bitmask", ".values", ".shape"))
        weight = name.rpartition(".")[0] if packed else name
        refused(folder, {**state, name: made}, weight.replace(".", r"\."))


@SOME_OR_ALL
@pytest.mark.parametrize("form", FORMS)
def test_no_tensor_can_be_missing_and_none_can_be_more(craft: Craft, form: str, every: int) -> None:
    folder, state = craft(form)
    for name in roles(state)[::every]:
        refused(folder, {n: v for n, v in state.items() if n != name}, "lack|missing|unknown")
    refused(folder, {**state, "more": torch.zeros(3)}, "unknown weight 'more'")


LIES: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "below zero": ("shape", lambda x: -x, "is damaged"),
    "of other sizes": ("shape", lambda x: x.flip(0) * torch.tensor([2] + [1] * (len(x) - 1)), ""),
    "too large for any machine": ("shape", lambda x: x * 2**30, "is damaged"),
    "that overflows": ("shape", lambda x: torch.full_like(x, 2**62), "is damaged"),
    "of a thousand dimensions": ("shape", lambda x: torch.cat([x, x.new_ones(1000)]), ""),
    "that is no row": ("shape", lambda x: x[None], "is damaged"),
    "that is a number": ("shape", lambda x: x[0].clone(), "is damaged"),
    "with a bit more": ("bitmask", lambda x: torch.full_like(x, 255), "is damaged"),
    "without values": ("values", lambda x: x[:0], "is damaged"),
    "with a value more": ("values", lambda x: torch.cat([x, x[:1]]), "is damaged"),
    "with values in rows": ("values", lambda x: x[:, None], "is damaged"),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("form", ["speaker-sparse", "language-sparse"])
def test_a_packed_weight_cannot_lie(craft: Craft, form: str, lie: str) -> None:
    folder, state = craft(form)
    weight = next(name.removesuffix(".bitmask") for name in state if name.endswith(".bitmask"))
    part, change, words = LIES[lie]
    name = f"{weight}.{part}"
    refused(folder, {**state, name: change(state[name]).contiguous()}, f"'{weight}'.*{words}")


@pytest.mark.parametrize("form", ["speaker-sparse", "language-sparse"])
def test_a_weight_is_packed_or_plain(craft: Craft, form: str) -> None:
    folder, state = craft(form)
    weight = next(name.removesuffix(".bitmask") for name in state if name.endswith(".bitmask"))
    refused(folder, {**state, weight: torch.zeros(2)}, f"'{weight}' is there twice")


NUMBERS = [
    ("speaker-int8", "enter.zero_point", 128, "code 0..127, not 128"),
    ("speaker-int8", "layers.0.leave.zero_point", -1, "code 0..127, not -1"),
    ("speaker-int8", "aggregate.input_step", 0, "above 0"),
    ("language-int8", "q_proj.input_scale", 0, "'.*q_proj' is damaged: scale must be positive"),
    ("language-int8", "q_proj.input_zero_point", 128, "'.*q_proj' is damaged: zero_point"),
    ("language-int4", "q_proj.header", 2**40, "'.*q_proj' is damaged: the header"),
]


@pytest.mark.parametrize(("form", "tensor", "number", "words"), NUMBERS)
def test_numbers_that_cannot_be_are_refused(
    craft: Craft, form: str, tensor: str, number: int, words: str
) -> None:
    folder, state = craft(form)
    name = next(name for name in state if name.endswith(tensor))
    refused(folder, {**state, name: torch.full_like(state[name], number)}, words)


# ------------------------------------------------------------------------------------ headers


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    """What a header says of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS: dict[str, Any] = {
    "overlapping": {"a": entry([2], 0, 8), "b": entry([2], 4, 12)},
    "the same bytes": {"a": entry([3], 0, 12), "b": entry([3], 0, 12)},
    "a hole": {"a": entry([1], 0, 4), "b": entry([1], 8, 12)},
    "backwards": {"a": entry([1], 12, 8), "b": entry([3], 0, 12)},
    "beyond the end": {"a": entry([4], 0, 16)},
    "bytes left over": {"a": entry([2], 0, 8)},
    "below zero": {"a": entry([3], -12, 0)},
    "a shape that lies": {"a": entry([300], 0, 12)},
    "a shape that overflows": {"a": entry([2**40, 2**40], 0, 12)},
    "a shape below zero": {"a": entry([-3], 0, 12)},
    "an unknown precision": {"a": entry([3], 0, 12, "F33")},
    "a precision that torch lacks": {"a": entry([24], 0, 12, "F4")},
    "no offsets": {"a": {"dtype": "F32", "shape": [3]}},
    "a list": [entry([3], 0, 12)],
    "deep": None,
}


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("form", ["speaker-dense", "language-int4"])
def test_a_crafted_header_is_refused(craft: Craft, form: str, header: str) -> None:
    folder, _ = craft(form)
    told = json.dumps(HEADERS[header]).encode() if HEADERS[header] else b"[" * 100_000
    content = struct.pack("<Q", len(told)) + told + bytes(12)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=rf"{form}/model\.safetensors can't be read"):
        load(folder)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**62, 2**63, 2**64 - 1])
@pytest.mark.parametrize("form", ["speaker-dense", "language-dense"])
def test_a_header_of_any_length_is_refused(craft: Craft, form: str, length: int) -> None:
    folder, _ = craft(form)
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(InputError, match=r"model\.safetensors can't be read"):
        load(folder)
