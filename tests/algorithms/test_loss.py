import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests.algorithms.reference import Case, aggregated, cases, picked, ppo_token
from verl.algorithms.loss import entropy, gspo_policy_loss, ppo_policy_loss, value_loss
from verl.algorithms.masked import AGGREGATIONS

NAN = float("nan")
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def test_ppo_by_hand() -> None:
    # ratios 1.5, 1.5, 0.5, 0.5, 4, 1 under clips 0.8 .. 1.3 and dual clip 3
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5, 4.0, 1.0, NAN]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, -1.0, 2.0, NAN]])
    mask = torch.tensor([[True] * 6 + [False]])
    loss, stats = ppo_policy_loss(ratios.log(), torch.zeros(1, 7), advantages, mask, 0.2, 0.3, dual_clip=3.0)
    # -1.3 (clipped), 1.5, -0.5, 0.8 (clipped), 3 (dual clipped, else 4), -2
    assert loss.item() == pytest.approx(1.5 / 6, abs=1e-6)
    assert stats["clip_fraction"].item() == pytest.approx(2 / 6, abs=1e-6)
    assert stats["dual_clip_fraction"].item() == pytest.approx(1 / 6, abs=1e-6)
    assert stats["ratio_mean"].item() == pytest.approx(9 / 6, abs=1e-6)
    assert stats["approx_kl"].item() == pytest.approx(-math.log(1.5 * 1.5 * 0.5 * 0.5 * 4) / 6, abs=1e-6)
    loss, stats = ppo_policy_loss(ratios.log(), torch.zeros(1, 7), advantages, mask, 0.2, 0.3)
    assert loss.item() == pytest.approx(2.5 / 6, abs=1e-6)
    assert stats["dual_clip_fraction"].item() == 0.0


@settings(max_examples=50, deadline=None)
@given(cases(), st.sampled_from([None, 1.5]), st.booleans())
def test_ppo_equals_the_reference(case: Case, dual: float | None, weighted: bool) -> None:
    logprobs, old, advantages, weights = (case.normal(i).masked_fill(~case.mask, NAN) for i in range(4))
    per_token = [
        [(w if weighted else 1.0) * ppo_token(math.exp(new - before), a, 0.2, 0.4, dual)
         for new, before, a, w in zip(*rows, strict=True)]
        for rows in zip(*(picked(x, case.mask) for x in (logprobs, old, advantages, weights)), strict=True)
    ]  # fmt: skip
    for aggregation in AGGREGATIONS:
        loss, _ = ppo_policy_loss(
            logprobs, old, advantages, case.mask, 0.2, 0.4, dual, aggregation, weights=weights if weighted else None
        )
        assert loss.item() == pytest.approx(aggregated(per_token, aggregation), abs=1e-9, rel=1e-9)


def test_ppo_weights_per_sequence_scale_its_tokens() -> None:
    zeros, mask = torch.zeros(2, 2), torch.ones(2, 2)
    advantages = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    loss, _ = ppo_policy_loss(zeros, zeros, advantages, mask, 0.2, 0.2, weights=torch.tensor([[2.0], [0.5]]))
    assert loss.item() == -(3 * 2 + 7 * 0.5) / 4


def test_ppo_survives_an_absurd_ratio() -> None:
    logprobs = torch.tensor([[500.0, -500.0]], requires_grad=True)
    loss, stats = ppo_policy_loss(logprobs, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2), 0.2, 0.2)
    loss.backward()
    assert math.isfinite(loss.item())
    assert math.isfinite(stats["ratio_mean"].item())
    assert logprobs.grad.isfinite().all()


def test_gspo_by_hand() -> None:
    # sequence ratios: sqrt(2 * 8) = 4, clipped to 1.5; and 1 over one token; the third sequence is empty
    ratios = torch.tensor([[2.0, NAN, 8.0], [1.0, NAN, NAN], [NAN, NAN, NAN]])
    advantages = torch.tensor([[1.0, NAN, 1.0], [-2.0, NAN, NAN], [NAN, NAN, NAN]])
    loss, stats = gspo_policy_loss(ratios.log(), torch.zeros(3, 3), advantages, ~ratios.isnan(), 0.5, 0.5)
    assert loss.item() == pytest.approx((-1.5 + 2.0) / 2, abs=1e-6)
    assert stats["clip_fraction"].item() == 0.5
    assert stats["ratio_mean"].item() == pytest.approx(2.5, abs=1e-6)
    assert stats["approx_kl"].item() == pytest.approx(-math.log(4) / 2, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_gspo_equals_the_reference(case: Case) -> None:
    logprobs, old = (case.normal(i).masked_fill(~case.mask, NAN) for i in range(2))
    scores = case.scores()
    terms = [
        [ppo_token(math.exp(sum(n - o for n, o in zip(new, before, strict=True)) / len(new)), score, 0.2, 0.4, None)]
        for new, before, score in zip(picked(logprobs, case.mask), picked(old, case.mask), scores.tolist(), strict=True)
        if new
    ]
    advantages = scores[:, None].expand(case.mask.shape)
    loss, _ = gspo_policy_loss(logprobs, old, advantages, case.mask, 0.2, 0.4)
    assert loss.item() == pytest.approx(aggregated(terms, "token_mean"), abs=1e-9, rel=1e-9)


def test_value_loss_by_hand() -> None:
    values = torch.tensor([[1.0, 3.0, 0.5, NAN]])
    old_values = torch.tensor([[1.0, 1.0, 1.0, NAN]])
    returns = torch.tensor([[2.0, 3.0, 0.0, NAN]])
    mask = torch.tensor([[True, True, True, False]])
    loss, stats = value_loss(values, old_values, returns, mask, clip=0.25)
    # errors: 1 either way; 0 against (1.25 - 3)^2; 0.25 against 0.75^2
    assert loss.item() == pytest.approx(0.5 * (1 + 3.0625 + 0.5625) / 3, abs=1e-6)
    assert stats["clip_fraction"].item() == pytest.approx(2 / 3, abs=1e-6)
    assert stats["value_mean"].item() == pytest.approx(1.5, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(cases(), st.floats(0, 2))
def test_value_loss_equals_the_reference(case: Case, clip: float) -> None:
    values, old, returns = (case.normal(i).masked_fill(~case.mask, NAN) for i in range(3))
    rows = zip(*(picked(x, case.mask) for x in (values, old, returns)), strict=True)
    errors = [
        [max((v - r) ** 2, (min(max(v, o - clip), o + clip) - r) ** 2) for v, o, r in zip(*row, strict=True)]
        for row in rows
    ]
    loss, _ = value_loss(values, old, returns, case.mask, clip)
    assert loss.item() == pytest.approx(aggregated(errors, "token_mean") / 2, abs=1e-12, rel=1e-12)


Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, "float | Tensor | None"], tuple[Tensor, dict[str, Tensor]]]


def _ppo(aggregation: str) -> Loss:
    return lambda x, old, target, weights, mask, count: ppo_policy_loss(
        x, old, target, mask, 0.2, 0.4, 1.5, aggregation, normalizer=count, weights=weights
    )


LOSSES: dict[str, Loss] = {f"ppo_{aggregation}": _ppo(aggregation) for aggregation in AGGREGATIONS} | {
    "gspo": lambda x, old, target, weights, mask, count: gspo_policy_loss(
        x, old, target, mask, 0.2, 0.4, normalizer=count, weights=weights
    ),
    "value": lambda x, old, target, weights, mask, count: value_loss(x, old, target, mask, 0.5, normalizer=count),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def _with_gradient(name: str, *inputs: Tensor, count: float | Tensor | None = None) -> tuple[Tensor, Tensor, dict]:
    x = inputs[0].detach().clone().requires_grad_()
    loss, stats = LOSSES[name](x, *inputs[1:], count)
    loss.backward()
    return loss.detach(), x.grad, stats


@every_loss
@settings(max_examples=25, deadline=None)
@given(cases(), st.data())
def test_micro_batches_add_up_to_the_mini_batch(name: str, case: Case, data: st.DataObject) -> None:
    inputs = (*(case.normal(i) for i in range(4)), case.mask)
    per_sequence = name == "gspo" or "seq_mean" in name
    count = case.mask.any(dim=1).sum() if per_sequence else float(case.mask.sum())
    whole, gradient, _ = _with_gradient(name, *inputs)
    cut = data.draw(st.integers(0, len(case.mask)))
    parts = [
        _with_gradient(name, *(x[rows] for x in inputs), count=count) for rows in (slice(0, cut), slice(cut, None))
    ]
    assert_close(parts[0][0] + parts[1][0], whole, **EXACT)
    assert_close(torch.cat((parts[0][1], parts[1][1])), gradient, **EXACT)


@every_loss
@settings(max_examples=25, deadline=None)
@given(cases(), st.data())
def test_padding_batch_order_and_precision_do_not_matter(name: str, case: Case, data: st.DataObject) -> None:
    inputs = (*(case.normal(i) for i in range(4)), case.mask)
    loss, gradient, stats = _with_gradient(name, *inputs)

    wide = [torch.nn.functional.pad(x, (2, 3), value=0 if x is case.mask else NAN) for x in inputs]
    failed = [torch.cat((x, torch.full_like(x[:1], 0 if x.dtype == torch.bool else NAN))) for x in wide]
    padded, padded_gradient, padded_stats = _with_gradient(name, *failed)
    assert_close(padded, loss, **EXACT)
    assert_close(padded_gradient, torch.nn.functional.pad(gradient, (2, 3, 0, 1)), **EXACT)
    assert_close(padded_stats, stats, **EXACT)

    order = torch.tensor(data.draw(st.permutations(range(len(case.mask)))))
    shuffled, shuffled_gradient, _ = _with_gradient(name, *(x[order] for x in inputs))
    assert_close(shuffled, loss, **EXACT)
    assert_close(shuffled_gradient, gradient[order], **EXACT)

    single = [x if x.dtype == torch.bool else x.float() for x in inputs]
    exact, exact_gradient, _ = _with_gradient(name, *(x if x.dtype == torch.bool else x.double() for x in single))
    rounded, rounded_gradient, _ = _with_gradient(name, *single)
    assert rounded.dtype == torch.float32
    assert_close(rounded.double(), exact, atol=1e-6, rtol=1e-6)
    assert_close(rounded_gradient.double(), exact_gradient, atol=1e-6, rtol=1e-6)


@every_loss
def test_gradient_by_finite_differences(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    x, *others = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(4))
    mask = torch.rand(4, 6, generator=generator) < 0.6
    mask[2] = False
    assert torch.autograd.gradcheck(lambda y: LOSSES[name](y, *others, mask, None)[0], (x.requires_grad_(),))


@every_loss
def test_only_the_first_input_gets_a_gradient_and_stats_are_detached(name: str) -> None:
    inputs = [torch.randn(2, 3, generator=torch.Generator().manual_seed(i), requires_grad=True) for i in range(4)]
    loss, stats = LOSSES[name](*inputs, torch.ones(2, 3), None)
    loss.backward()
    assert inputs[0].grad.abs().sum().item() > 0
    assert [x.grad for x in inputs[1:]] == [None] * 3
    assert all(value.shape == () and not value.requires_grad for value in stats.values())


@every_loss
@pytest.mark.parametrize("count", [None, 0.0])
def test_an_empty_mask_gives_zero_loss_and_zero_gradient(name: str, count: float | None) -> None:
    inputs = [torch.full((2, 3), NAN) for _ in range(4)]
    loss, gradient, stats = _with_gradient(name, *inputs, torch.zeros(2, 3), count=count)
    assert loss.item() == 0.0
    assert gradient.tolist() == [[0.0] * 3] * 2
    assert all(value.item() == 0.0 for value in stats.values())


def test_losses_reject_bad_arguments() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"clip_low=-0.1"):
        ppo_policy_loss(x, x, x, x, -0.1, 0.2)
    with pytest.raises(ValueError, match=r"dual_clip=1.0; expected more than 1"):
        ppo_policy_loss(x, x, x, x, 0.2, 0.2, dual_clip=1.0)
    with pytest.raises(ValueError, match=r"advantages \(2, 1\)"):
        ppo_policy_loss(x, x, x[:, :1], x, 0.2, 0.2)
    with pytest.raises(ValueError, match=r"weights has shape \(2,\); expected \(2, 3\) or \(2, 1\)"):
        ppo_policy_loss(x, x, x, x, 0.2, 0.2, weights=torch.ones(2))
    with pytest.raises(ValueError, match="clip_high=nan"):
        gspo_policy_loss(x, x, x, x, 0.2, NAN)
    with pytest.raises(ValueError, match="clip=-1 is negative"):
        value_loss(x, x, x, x, -1)


def test_entropy_by_hand() -> None:
    logits = torch.tensor([[3.0, 3.0, 3.0, 3.0], [0.0, math.log(3), -torch.inf, -torch.inf], [80.0, 0.0, 0.0, 0.0]])
    skewed = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert_close(entropy(logits), torch.tensor([math.log(4), skewed, 0.0]), atol=1e-6, rtol=0)
    assert entropy(logits[0]).shape == ()
    assert entropy(logits[:0]).shape == (0,)


@pytest.mark.parametrize("chunk", [1, 15, 2**20])
def test_entropy_gradient_by_finite_differences(chunk: int) -> None:
    logits = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: entropy(x, chunk=chunk), (logits.requires_grad_(),))
    assert torch.autograd.gradcheck(lambda x: entropy(x.transpose(0, 1)[:, 1:], chunk=chunk).square(), (logits,))


def test_entropy_of_an_impossible_token_has_a_finite_gradient() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    entropy(logits).sum().backward()
    reference = torch.tensor([[0.0, 1.0]], requires_grad=True)
    torch.distributions.Categorical(logits=reference).entropy().sum().backward()
    assert_close(logits.grad[:, :2], reference.grad, atol=1e-6, rtol=0)
    assert logits.grad[0, 2].item() == 0.0


def test_entropy_of_bfloat16_logits_is_computed_in_float32() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    result = entropy(logits)
    expected = torch.distributions.Categorical(logits=logits.detach().double()).entropy()
    assert_close(result.double(), expected, atol=1e-5, rtol=0)
    result.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def test_entropy_keeps_nothing_of_vocabulary_size_but_the_logits() -> None:
    logits = torch.randn(4, 50, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        entropy(logits)
    assert [x.data_ptr() for x in kept if x.numel() >= logits.numel()] == [logits.data_ptr()]
