"""SparseGPT and the methods beside it, against exact surgery, least squares and brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from goldcrest.kernels import sparsity
from goldcrest.kernels.sparsity import magnitude, masks, obs, sparsegpt, wanda
from goldcrest.kernels.sparsity.hessian import inverse_factor


def problem(
    seed: int, rows: int = 16, columns: int = 32, tokens: int = 96
) -> tuple[Tensor, Tensor]:
    """A random layer and the H of correlated inputs: eight factors, noise of their size."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(8, tokens, generator=generator, dtype=torch.float64)
    loadings = torch.randn(columns, 8, generator=generator, dtype=torch.float64)
    x = loadings @ factors
    x += 8**0.5 * torch.randn(columns, tokens, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, 2 * x @ x.t()


def layer_error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    difference = pruned - weight
    return 0.5 * float(((difference @ hessian) * difference).sum())


def test_pruning_the_first_column_is_the_surgeons_update() -> None:
    """Expected: the OBS formula with the whole inverse (spec, property 1)."""
    weight, hessian = problem(0)
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[:, 0] = False
    pruned, _ = sparsegpt.prune_with_mask(weight, hessian, mask, sparsegpt.Settings())
    inverse = torch.linalg.inv(inverse_factor(hessian).damped)
    for row, got in zip(weight, pruned, strict=True):
        expected, _ = obs.surgeon_step(row, inverse, 0)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)


def test_pruning_a_prefix_of_columns_is_exact_least_squares() -> None:
    """Expected: the normal equations solved on the columns that stay (property 1)."""
    weight, hessian = problem(1)
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[:, :11] = False
    pruned, _ = sparsegpt.prune_with_mask(weight, hessian, mask, sparsegpt.Settings(block=4))
    expected = obs.least_squares(weight, inverse_factor(hessian).damped, mask)
    torch.testing.assert_close(pruned, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("own", [True, False])
def test_error_lies_between_least_squares_and_no_correction(own: bool) -> None:
    """Property 1 for general masks: SparseGPT's own, and random ones.

    The spec speaks of "a few %" above exact least squares; on these inputs (half of the variance
    shared) it is 24 % with its own masks and 30 % with random ones: columns on the left of a
    pruned one cannot help any more.
    """
    best = ours = uncorrected = 0.0
    for seed in range(20):
        weight, hessian = problem(seed)
        setting = sparsegpt.Settings(block=16)
        _, mask = sparsegpt.prune(weight, hessian, sparsity=0.5, settings=setting)
        if not own:
            mask = torch.rand(16, 32, generator=torch.Generator().manual_seed(seed)) > 0.5
        pruned, _ = sparsegpt.prune_with_mask(weight, hessian, mask, setting)
        damped = inverse_factor(hessian).damped
        best += layer_error(weight, obs.least_squares(weight, damped, mask), damped)
        ours += layer_error(weight, pruned, damped)
        uncorrected += layer_error(weight, weight * mask, damped)
    assert best <= ours < 1.4 * best
    assert ours < 0.9 * uncorrected


def test_beats_magnitude_on_correlated_inputs() -> None:
    """The spec found 300 of 300 random 16 x 32 layers (property 2); 100 here."""
    for seed in range(100):
        weight, hessian = problem(seed)
        ours, _ = sparsegpt.prune(weight, hessian, sparsity=0.5, settings=sparsegpt.Settings())
        theirs, _ = magnitude.prune(weight, hessian, sparsity=0.5, settings=magnitude.Settings())
        assert layer_error(weight, ours, hessian) < layer_error(weight, theirs, hessian)


def test_uncorrelated_inputs_give_magnitude_pruning() -> None:
    """With H = I nothing can be corrected and scores are squares (property 2)."""
    weight, _ = problem(3)
    eye = torch.eye(32, dtype=torch.float64)
    ours, mask = sparsegpt.prune(weight, eye, sparsity=0.6, settings=sparsegpt.Settings())
    theirs, expected = magnitude.prune(weight, eye, sparsity=0.6, settings=magnitude.Settings())
    assert torch.equal(mask, expected)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("block", [1, 5, 32])
def test_loss_identity(block: int) -> None:
    """sum 0.5 e^2 = 0.5 tr(dW H dW^T), damped H (spec 3.2, property 3)."""
    weight, hessian = problem(4)
    mask = torch.rand(16, 32, generator=torch.Generator().manual_seed(0)) > 0.4
    pruned, loss = sparsegpt.prune_with_mask(weight, hessian, mask, sparsegpt.Settings(block=block))
    damped = inverse_factor(hessian).damped
    assert loss == pytest.approx(layer_error(weight, pruned, damped), rel=1e-9)


@pytest.mark.parametrize("block", [1, 3, 7, 32, 100])
def test_block_size_does_not_matter_under_a_given_mask(block: int) -> None:
    """Expected: the column-by-column twin (property 4)."""
    weight, hessian = problem(5)
    mask = torch.rand(16, 32, generator=torch.Generator().manual_seed(1)) > 0.5
    setting = sparsegpt.Settings(block=block)
    pruned, _ = sparsegpt.prune_with_mask(weight, hessian, mask, setting)
    expected = sparsegpt.prune_with_mask_reference(weight, hessian, mask, setting)
    torch.testing.assert_close(pruned, expected, rtol=0, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(
    method=st.sampled_from(sparsity.methods()),
    rows=st.integers(1, 9),
    columns=st.integers(1, 21),
    share=st.floats(0, 1),
)
def test_realised_sparsity_is_exact(method: str, rows: int, columns: int, share: float) -> None:
    """round(s n) zeros, never one more or less, at s = 0 and s = 1 too (property 5)."""
    weight, hessian = problem(rows * 100 + columns, rows, columns, 64)
    rule = sparsity.load(method)
    pruned, mask = rule.prune(weight, hessian, sparsity=share, settings=rule.Settings())
    assert int((~mask).sum()) == round(share * (rows * columns))
    assert torch.equal(pruned != 0, mask)


@pytest.mark.parametrize("method", ["sparsegpt", "magnitude", "wanda"])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)])
def test_pattern_holds_in_every_run(method: str, pattern: tuple[int, int]) -> None:
    weight, hessian = problem(6)
    setting = sparsity.load(method).Settings(pattern=list(pattern))  # JSON gives lists
    pruned, mask = sparsity.load(method).prune(weight, hessian, sparsity=0.0, settings=setting)
    assert masks.follows_pattern(mask, pattern)
    assert float((pruned == 0).double().mean()) == pattern[0] / pattern[1]


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_pruning_again_at_the_same_level_changes_nothing(pattern: tuple[int, int] | None) -> None:
    weight, hessian = problem(7)
    setting = sparsegpt.Settings(block=8, pattern=pattern)
    once, _ = sparsegpt.prune(weight, hessian, sparsity=0.5, settings=setting)
    twice, _ = sparsegpt.prune(once, hessian, sparsity=0.5, settings=setting)
    assert torch.equal(once, twice)


def test_masks_nest_only_when_zeros_are_kept() -> None:
    """Corrections revive zeros before later blocks are scored (spec, property 12)."""
    revived = 0
    for seed in range(5):
        weight, hessian = problem(seed)
        for keep in (False, True):
            setting = sparsegpt.Settings(block=8, keep_zeros=keep)
            half, first = sparsegpt.prune(weight, hessian, sparsity=0.5, settings=setting)
            # A training step moves the weights between levels.
            half = half * (1 + 0.3 * torch.sin(torch.arange(32.0, dtype=torch.float64)))
            _, second = sparsegpt.prune(half, hessian, sparsity=0.75, settings=setting)
            alive_again = int((second & ~first).sum())
            if keep:
                assert alive_again == 0
                assert int((~second).sum()) == round(0.75 * 16 * 32)
            revived += alive_again
    assert revived > 0


@pytest.mark.parametrize("block", [4, 8, 32])
@pytest.mark.parametrize("pattern", [None, (3, 4)])
def test_zeros_that_stay_are_compensated_like_any_others(
    block: int, pattern: tuple[int, int] | None
) -> None:
    """Expected: `prune_with_mask` under the mask that came out, whatever the block (property 4).

    Corrections land on zeros to the right; taking them out again is pruning, with its update.
    """
    weight, hessian = problem(11)
    half, first = sparsegpt.prune(weight, hessian, sparsity=0.5, settings=sparsegpt.Settings())
    setting = sparsegpt.Settings(block=block, pattern=pattern, keep_zeros=True)
    pruned, mask = sparsegpt.prune(half, hessian, sparsity=0.8, settings=setting)
    expected, _ = sparsegpt.prune_with_mask(half, hessian, mask, setting)
    torch.testing.assert_close(pruned, expected, rtol=0, atol=1e-12)
    assert not (mask & ~first).any()


def test_exact_surgeon_is_at_least_as_good_per_row() -> None:
    """OBS chooses and corrects row by row with exact inverses: lower error on average."""
    exact = approximate = 0.0
    for seed in range(10):
        weight, hessian = problem(seed, 8, 16)
        exact += layer_error(
            weight, obs.prune(weight, hessian, sparsity=0.5, settings=obs.Settings())[0], hessian
        )
        approximate += layer_error(
            weight,
            sparsegpt.prune(weight, hessian, sparsity=0.5, settings=sparsegpt.Settings())[0],
            hessian,
        )
    assert exact < approximate


def test_exact_surgeon_ends_at_the_least_squares_of_its_mask() -> None:
    """OBS steps compose: the result is the optimum for the mask they end with."""
    weight, hessian = problem(8, 4, 12)
    pruned, mask = obs.prune(weight, hessian, sparsity=0.5, settings=obs.Settings())
    expected = obs.least_squares(weight, inverse_factor(hessian).damped, mask)
    torch.testing.assert_close(pruned, expected, rtol=0, atol=1e-8)


def test_wanda_scores_by_hand() -> None:
    """|w| ||x||: norms 1 and 10 turn the order of the weights 3 and 1 around."""
    hessian = torch.diag(torch.tensor([2.0, 200.0]))  # H = 2 X X^T
    pruned, _ = wanda.prune(
        torch.tensor([[3.0, 1.0]]), hessian, sparsity=0.5, settings=wanda.Settings()
    )
    assert pruned.tolist() == [[0.0, 1.0]]


def test_global_magnitude_prunes_the_layer_of_small_weights_harder() -> None:
    """Expected: brute force, one sort over both layers."""
    weights = {"small": torch.arange(1.0, 9.0)[None], "large": torch.arange(5.0, 13.0)[None]}
    shares = magnitude.layer_sparsities(weights, 0.5, magnitude.Settings(scope="global"))
    # The 8 smallest of 1..8 and 5..12: 1, 2, 3, 4, 5, 5, 6, 6.
    assert shares == {"small": 6 / 8, "large": 2 / 8}


def test_a_pattern_has_no_global_scope() -> None:
    with pytest.raises(ValueError, match="every layer alike"):
        magnitude.Settings(scope="global", pattern=(2, 4))


def test_dead_inputs_and_rank_deficient_hessians_are_survived() -> None:
    """Fewer tokens than inputs, one input never active, another the copy of a third (spec 8)."""
    weight, _ = problem(9)
    x = torch.randn(32, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[3], x[5] = 0.0, x[4]
    hessian = 2 * x @ x.t()
    pruned, mask = sparsegpt.prune(
        weight, hessian, sparsity=0.5, settings=sparsegpt.Settings(damping=0.0)
    )
    assert torch.isfinite(pruned).all()
    assert (pruned[:, 3] == 0).all()
    assert int((~mask).sum()) == 256


def test_damping_rises_until_the_factor_exists_then_falls_back_to_the_diagonal() -> None:
    indefinite = torch.tensor([[1.0, 1.5], [1.5, 1.0]], dtype=torch.float64)
    raised = inverse_factor(indefinite, 0.01)
    assert 0.5 < raised.damping <= 1.0
    hopeless = torch.tensor([[1.0, 9.0], [9.0, 1.0]], dtype=torch.float64)
    assert inverse_factor(hopeless, 0.01).damping == float("inf")


def test_factor_is_of_the_inverse() -> None:
    _, hessian = problem(10)
    factor = inverse_factor(hessian)
    torch.testing.assert_close(
        factor.upper.t() @ factor.upper, torch.linalg.inv(factor.damped), rtol=1e-9, atol=1e-12
    )
    assert torch.equal(factor.upper, factor.upper.triu())


def test_errors_say_what_is_wrong() -> None:
    weight, hessian = problem(0)
    with pytest.raises(ValueError, match="share in"):
        sparsegpt.prune(weight, hessian, sparsity=1.5, settings=sparsegpt.Settings())
    with pytest.raises(ValueError, match="does not fit"):
        sparsegpt.prune(weight[:, :5], hessian, sparsity=0.5, settings=sparsegpt.Settings())
    with pytest.raises(ValueError, match="NaN"):
        inverse_factor(hessian * float("nan"))
    with pytest.raises(ValueError, match="unknown pruning method 'sparsgpt'"):
        sparsity.load("sparsgpt")
    with pytest.raises(ValueError, match="multiple"):
        sparsegpt.Settings(block=6, pattern=(2, 4))
