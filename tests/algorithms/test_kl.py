import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from verl.algorithms.kl import KL_KINDS, AdaptiveKLController, FixedKLController, kl_penalty


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", [0.5, -1.0, 0.0]),
        ("abs", [0.5, 1.0, 0.0]),
        ("k2", [0.125, 0.5, 0.0]),
        ("k3", [math.exp(-0.5) - 0.5, math.e - 2, 0.0]),
    ],
)
def test_kl_penalty_by_hand(kind: str, expected: list[float]) -> None:
    logprobs, ref_logprobs = torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([-1.5, -2.0, -2.0])
    assert_close(kl_penalty(logprobs, ref_logprobs, kind), torch.tensor(expected), atol=1e-6, rtol=0)


@settings(max_examples=50, deadline=None)
@given(st.floats(-8, 8), st.floats(-8, 8))
def test_k3_equals_its_formula_and_is_not_negative(logprob: float, ref_logprob: float) -> None:
    d = logprob - ref_logprob
    args = (torch.tensor(x, dtype=torch.float64) for x in (logprob, ref_logprob))
    result = kl_penalty(*args, "k3").item()
    assert result == pytest.approx(math.exp(-d) - 1 + d, rel=1e-9, abs=1e-12)
    assert result >= -1e-12


def test_k3_keeps_small_differences_in_float32() -> None:
    # d^2 / 2 = 5e-7 is lost in exp(-d) - 1 + d, whose float32 error is about 1e-7
    assert kl_penalty(torch.tensor(1e-3), torch.tensor(0.0), "k3").item() == pytest.approx(5e-7, rel=1e-3)


@pytest.mark.parametrize("kind", KL_KINDS)
def test_kl_penalty_gradient_by_finite_differences(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    logprobs, ref = (torch.randn(2, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: kl_penalty(a, b, kind), (logprobs, ref))


def test_kl_penalty_rejects_unknown_kinds_and_shapes() -> None:
    with pytest.raises(ValueError, match=r"'low_var' is unknown; use one of k1, abs, k2, k3"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "low_var")
    with pytest.raises(ValueError, match=r"\(2, 3\) and ref_logprobs \(3,\)"):
        kl_penalty(torch.zeros(2, 3), torch.zeros(3), "k1")


def test_fixed_controller_stays() -> None:
    controller = FixedKLController(0.001)
    controller.update(5.0, 512)
    assert controller.coef == 0.001


@pytest.mark.parametrize(
    ("current_kl", "expected"),
    [(6.0, 0.1), (6.6, 0.101), (60.0, 0.102), (5.4, 0.099), (0.0, 0.098)],
)
def test_adaptive_controller_by_hand(current_kl: float, expected: float) -> None:
    controller = AdaptiveKLController(init=0.1, target=6.0, horizon=10_000)
    controller.update(current_kl, n_steps=1000)
    assert controller.coef == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("make", [FixedKLController, lambda coef: AdaptiveKLController(coef, 0.1, 1000)])
def test_controllers_resume_from_a_checkpoint(make: type[FixedKLController]) -> None:
    whole, first, second = make(0.2), make(0.2), make(0.9)
    for controller in (whole, first):
        controller.update(0.3, 64)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for controller in (whole, second):
        controller.update(0.05, 64)
    assert second.coef == whole.coef


def test_controllers_reject_bad_numbers() -> None:
    with pytest.raises(ValueError, match="coef=-1 is no KL coefficient"):
        FixedKLController(-1)
    with pytest.raises(ValueError, match="init=nan"):
        AdaptiveKLController(math.nan, 1.0, 100)
    with pytest.raises(ValueError, match="target=0"):
        AdaptiveKLController(0.1, 0, 100)
    controller = AdaptiveKLController(0.1, 1.0, 100)
    with pytest.raises(ValueError, match="current_kl=nan is not finite"):
        controller.update(math.nan, 10)
    with pytest.raises(ValueError, match=r"n_steps=500 with horizon=100 .* raise horizon above 100"):
        controller.update(1.0, 500)
    with pytest.raises(ValueError, match=r"keys \['beta'\]; expected \['coef'\]"):
        controller.load_state_dict({"beta": 0.1})
    assert controller.coef == 0.1
