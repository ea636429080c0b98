"""Products with codes (group sums, integers, torch's operator) against the decoded product."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from goldcrest.kernels.weight_only import matmul, torch_int4
from tests.kernels.weight_only.problems import act_order, generator, rounded, tokens

WEIGHTS = {
    "asym": lambda: rounded(0, 16, 96),
    "negative scales": lambda: rounded(7, 16, 64, scheme="sym_full"),
    "sym": lambda: rounded(1, 24, 64, scheme="sym"),
    "per channel": lambda: rounded(2, 16, 512, group_size=-1),
    "large groups": lambda: rounded(3, 8, 1024, group_size=512),
    "act order": act_order,
    "input scales": lambda: replace(rounded(4, 16, 64), input_scales=0.5 + torch.rand(64)),
}
OTHERS = {
    "ragged": lambda: rounded(5, 16, 72),
    "small groups": lambda: rounded(6, 5, 12, group_size=3, bits=7),
}


@pytest.mark.parametrize("case", [*WEIGHTS, *OTHERS])
def test_group_sums_equal_the_decoded_product(case: str) -> None:
    given_ = {**WEIGHTS, **OTHERS}[case]()
    x = torch.randn(7, given_.codes.shape[1])
    expected = matmul.matmul_reference(x.double(), given_)
    got = matmul.matmul(x, matmul.by_group(given_)).double()
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("case", [*WEIGHTS, *OTHERS])
def test_integer_product_is_exact(case: str) -> None:
    """Equals decoded inputs x decoded weights (property 4).

    With scales and inputs that are powers of two nothing rounds, so the two agree to the last bit.
    """
    given_ = {**WEIGHTS, **OTHERS}[case]()
    x = torch.randn(5, given_.codes.shape[1])
    grouped = matmul.by_group(given_)
    torch.testing.assert_close(
        matmul.int8_matmul(x, grouped), matmul.int8_matmul_reference(x, grouped),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip
    powers = replace(given_, scales=torch.full_like(given_.scales, 0.25), input_scales=None)
    x = torch.randint(0, 256, x.shape, generator=generator(0)) / 16.0
    for start in range(0, x.shape[1], 3):
        x[:, start] = 255 / 16  # every group spans 0..255/16: its step is 1/16
    grouped = matmul.by_group(powers)
    assert torch.equal(matmul.int8_matmul(x, grouped), matmul.int8_matmul_reference(x, grouped))


def test_eight_bit_inputs_are_close_to_float() -> None:
    given_, x = rounded(0, 32, 256), tokens(0, 40, 256)
    expected = matmul.matmul_reference(x, given_)
    got = matmul.int8_matmul(x, matmul.by_group(given_))
    assert float((got - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("case", WEIGHTS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_torchs_operator_equals_the_reference(case: str, dtype, tolerance: float) -> None:
    given_ = WEIGHTS[case]()
    x = torch.randn(5, given_.codes.shape[1])
    assert torch_int4.fits(given_)
    got = torch_int4.matmul(x.to(dtype), torch_int4.prepare(given_, dtype))
    assert got.dtype == dtype
    expected = matmul.matmul_reference(x, given_)
    assert float((got.float() - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("case", OTHERS)
def test_torchs_operator_refuses_what_does_not_fit(case: str) -> None:
    assert not torch_int4.fits(OTHERS[case]())
    with pytest.raises(ValueError, match="takes 4 bits and groups in multiples of 32"):
        torch_int4.prepare(OTHERS[case]())
