"""The integer ECAPA-TDNN against its float64 twin and the network it was made of."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from goldcrest.kernels.quantization.ecapa_calibration import observe, smooth_ecapa
from goldcrest.kernels.quantization.int8_ecapa import Int8Ecapa, layout
from goldcrest.kernels.quantization.integer_conv import IntegerConv, QuantizingConv
from goldcrest.kernels.quantization.quantize_ecapa import (
    Settings,
    quantize_ecapa,
    skippable,
)
from goldcrest.kernels.sparsity import packing
from goldcrest.kernels.speaker.ecapa_tdnn import EcapaSettings, EcapaTdnn

FEATURES = 20


def network(negative: bool = False, **changes) -> EcapaTdnn:
    """A small network whose BatchNorms have seen data and are anything but the identity."""
    torch.manual_seed(0)
    sizes = {"channels": 32, "mfa_channels": 48, "attention_channels": 16, "se_channels": 16}
    model = EcapaTdnn(EcapaSettings(input_dim=FEATURES, embedding_dim=24, **{**sizes, **changes}))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
                if negative:
                    module.weight[::5] *= -1
        for _ in range(20):
            model(utterances(8)[0])
    return model.eval()


def utterances(count: int, frames: int = 60) -> tuple[Tensor, Tensor]:
    """Features with a part that is constant over each utterance, as a speaker's is; lengths."""
    features = torch.randn(count, FEATURES, frames) + torch.randn(count, FEATURES, 1)
    return features, torch.randint(frames // 3, frames + 1, (count,))


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [utterances(16) for _ in range(4)]


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("channels", [(16, 16, 3), (20, 48, 5), (96, 8, 1)])
def test_integer_convolution_equals_its_reference(
    channels: tuple[int, int, int], dilation: int
) -> None:
    """Codes at random and at their extremes, zero point at the borders included."""
    inputs, outputs, taps = channels
    scale, bias = torch.rand(outputs) * 1e-3 + 1e-4, torch.randn(outputs)
    for largest in (False, True):
        weight = torch.randint(-127, 128, (outputs, inputs, taps)).to(torch.int8)
        codes = torch.randint(0, 128, (2, inputs, 1, 30)).to(torch.uint8)
        if largest:
            weight.fill_(127)
            codes.fill_(127)
        codes = codes.contiguous(memory_format=torch.channels_last)
        fast, twin = (
            IntegerConv(weight, scale, bias, zero_point=37, dilation=dilation, execution=execution)
            for execution in ("onednn", "reference")
        )
        for relu in (False, True):
            torch.testing.assert_close(
                fast.to_float(codes, relu=relu),
                twin.to_float(codes, relu=relu),
                rtol=1e-5,
                atol=1e-5,
            )
        # A value halfway between two codes may go to either side in float32.
        difference = fast.to_codes(codes).int() - twin.to_codes(codes).int()
        assert int(difference.abs().max()) <= 1
        assert float((difference != 0).double().mean()) < 0.01


def test_integer_convolution_is_a_fake_quantized_one() -> None:
    """Expected: torch's float convolution of dequantized codes, padded with true zeros."""
    weight = torch.randint(-127, 128, (6, 4, 3)).to(torch.int8)
    scale, step, zero = torch.rand(6) * 0.01, 0.05, 40
    x = torch.randn(2, 4, 25)
    conv = QuantizingConv(
        weight, scale * step, torch.zeros(6),
        input_step=torch.tensor([step]), zero_point=zero, execution="onednn",
    )  # fmt: skip
    rounded = ((x / step).round() + zero).clamp(0, 127).sub(zero) * step
    expected = F.conv1d(rounded, weight.float() * scale[:, None, None], padding=1)
    x4 = x[:, :, None].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        conv.to_float(x4, relu=False)[:, :, 0], expected, rtol=1e-4, atol=1e-4
    )


CASES = {
    "plain": ({}, Settings()),
    "round to nearest": ({}, Settings(weights="rtn")),
    "negative gains": ({"negative": True}, Settings(weights="rtn")),
    "tao pooling": ({"asp_variant": "tao"}, Settings(weights="rtn")),
    "other shape": ({"scale": 4, "dilations": (1, 2)}, Settings(weights="rtn")),
    "skipping": ({}, Settings(weights="rtn", skip=3)),
    "percentile": ({}, Settings(weights="rtn", ranges="percentile")),
    "unsmoothed": ({}, Settings(weights="rtn", smooth=False)),
}


@pytest.mark.parametrize("case", CASES)
def test_close_to_the_network_and_equal_to_the_float64_twin(case: str) -> None:
    changes, settings = CASES[case]
    model = network(**changes)
    quantized = quantize_ecapa(model, batches(), settings)
    features, lengths = utterances(12)
    with torch.no_grad():
        expected = model(features, lengths)
    got = quantized(features, lengths)
    assert relative_error(got, expected) < 0.1
    twin = Int8Ecapa.from_tensors(quantized.tensors(), quantized.config(), "reference")
    forms = {name: (each.shape, each.dtype) for name, each in layout(quantized.config())}
    assert forms == {name: (each.shape, each.dtype) for name, each in twin.tensors().items()}
    assert relative_error(got, twin(features, lengths)) < 0.01
    assert not any(p.requires_grad for p in quantized.parameters())


def test_padding_and_batching_change_nothing() -> None:
    """Each utterance alone gives the same integers, hence the same embedding."""
    quantized = quantize_ecapa(network(), batches(), Settings(weights="rtn"))
    features, lengths = utterances(6)
    together = quantized(features, lengths)
    for index, length in enumerate(lengths.tolist()):
        alone = quantized(features[index : index + 1, :, :length])
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-4)
    features[0, :, int(lengths[0]) :] = 1e4
    torch.testing.assert_close(quantized(features, lengths)[0], together[0])


def test_storage_round_trip_is_exact_and_small() -> None:
    """Through safetensors and JSON; weights are int8, nothing else is large."""
    model = network(channels=64, mfa_channels=128)
    quantized = quantize_ecapa(model, batches(), Settings(weights="rtn"))
    stored = quantized.tensors()
    again = Int8Ecapa.from_tensors(load(save(stored)), json.loads(json.dumps(quantized.config())))
    features, lengths = utterances(3)
    assert torch.equal(again(features, lengths), quantized(features, lengths))
    weights = {name: t for name, t in stored.items() if name.endswith(".weight")}
    assert all(t.dtype == torch.int8 for t in weights.values())
    dense = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    assert sum(t.numel() for t in weights.values()) == sum(p.numel() for p in dense.values())


def test_pruned_weights_stay_zero_and_pack() -> None:
    """INT8 with a bitmask: GPTQ, smoothing and folding leave zeros zero; 70 % sparse here."""
    model = network(channels=64, mfa_channels=128)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and ".gate." not in name:
                order = parameter.abs().flatten().argsort()
                parameter.flatten()[order[: round(0.7 * order.numel())]] = 0
    quantized = quantize_ecapa(model, batches(), Settings())
    tensors = quantized.tensors()
    assert (tensors["aggregate.weight"][model.aggregate.weight == 0] == 0).all()
    for k, group in enumerate(model.layers[1].res2.groups):
        assert (tensors[f"layers.1.res2.{k}.weight"][group.conv.weight == 0] == 0).all()
    names = [name for name, t in tensors.items() if t.dtype == torch.int8 and t.ndim == 3]
    packed = packing.pack_state(tensors, names)
    # 0.3 bytes of values and 1/8 of mask per weight.
    stored = sum(packed[f"{n}.bitmask"].numel() + packed[f"{n}.values"].numel() for n in names)
    assert stored < 0.5 * sum(tensors[n].numel() for n in names)
    again = Int8Ecapa.from_tensors(packing.unpack_state(packed), quantized.config())
    features, _ = utterances(2)
    assert torch.equal(again(features), quantized(features))


def test_smoothing_the_network_leaves_its_function() -> None:
    """In float, within 1e-4 of the unsmoothed embedding, while weights have moved."""
    model = network()
    features, lengths = utterances(5)
    with torch.no_grad():
        before = model(features, lengths)
        gain = model.enter.norm.weight.clone()
        smooth_ecapa(model, observe(model, batches(), Settings(), hessians=False), Settings())
        after = model(features, lengths)
    assert relative_error(after, before) < 1e-4
    assert not torch.allclose(gain, model.enter.norm.weight)


def test_the_model_is_left_alone() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantize_ecapa(model, batches(), Settings(weights="rtn"))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_skipping_everything_that_may_be_skipped_helps() -> None:
    model = network()
    features, lengths = utterances(12)
    with torch.no_grad():
        expected = model(features, lengths)
    errors = {}
    for names in ((), tuple(skippable(model))):
        setting = Settings(weights="rtn", skip_names=names)
        quantized = quantize_ecapa(model, batches(), setting)
        assert quantized.config()["skipped"] == sorted(names)
        errors[len(names)] = relative_error(quantized(features, lengths), expected)
    assert errors[len(skippable(model))] < errors[0]


def test_errors_say_what_is_wrong() -> None:
    model = network()
    with pytest.raises(ValueError, match="at least one calibration batch"):
        quantize_ecapa(model, [])
    with pytest.raises(ValueError, match="cannot skip nowhere"):
        quantize_ecapa(model, batches(), Settings(skip_names=("nowhere",)))
    with pytest.raises(ValueError, match=r"did you mean 'pooling.reduce'\?"):
        quantize_ecapa(model, batches(), Settings(skip_names=("pooling.reduse",)))
    quantized = quantize_ecapa(model, batches(), Settings(weights="rtn"))
    tensors = quantized.tensors()
    del tensors["layers.0.leave.gain"]
    with pytest.raises(ValueError, match=r"lack 'layers\.0\.leave\.gain'"):
        Int8Ecapa.from_tensors(tensors, quantized.config())
    with pytest.raises(ValueError, match="features must be"):
        quantized(torch.zeros(1, FEATURES + 1, 30))
    with pytest.raises(ValueError, match="lengths"):
        quantized(torch.zeros(1, FEATURES, 30), torch.tensor([31]))
    with pytest.raises(ValueError, match="ranges"):
        Settings(ranges="all")  # type: ignore[arg-type]
