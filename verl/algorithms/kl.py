"""Estimators of the KL divergence to the reference policy, and controllers of its coefficient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

KLKind = Literal["k1", "abs", "k2", "k3"]
KL_KINDS: tuple[str, ...] = get_args(KLKind)

MAX_ERROR = 0.2


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: KLKind) -> Tensor:
    """Return the per-token estimate of KL(policy || reference) from sampled tokens (Schulman 2020).

    With d = logprobs - ref_logprobs: k1 = d (unbiased, the usual choice inside the reward), abs = |d|, k2 = d^2 / 2
    (as a loss, its gradient is that of the KL), k3 = exp(-d) - 1 + d (unbiased and never negative).

    Args:
        logprobs: any shape, under the policy.
        ref_logprobs: the same shape, under the reference.
        kind: one of `KL_KINDS`.

    Returns:
        The shape of the inputs, unmasked; differentiable in both.

    Raises:
        ValueError: unknown kind, or shapes that differ.
    """
    if kind not in _ESTIMATORS:
        raise ValueError(f"kl kind={kind!r} is unknown; use one of {', '.join(KL_KINDS)}")
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(
            f"logprobs {tuple(logprobs.shape)} and ref_logprobs {tuple(ref_logprobs.shape)} differ in shape; "
            "both must speak of the same tokens"
        )
    return _ESTIMATORS[kind](logprobs - ref_logprobs)


def _k3(d: Tensor) -> Tensor:
    # expm1 keeps the digits that exp(-d) - 1 loses for the small d of a policy close to its reference.
    return torch.expm1(-d) + d


_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: d,
    "abs": torch.abs,
    "k2": lambda d: d.square() / 2,
    "k3": _k3,
}


class KLController(Protocol):
    """Holds the KL coefficient and moves it after each step."""

    @property
    def coef(self) -> float:
        """The coefficient to use now."""
        ...

    def update(self, current_kl: float, n_steps: int) -> None:
        """Take note of the KL measured over `n_steps` samples."""
        ...

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint must hold."""
        ...

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore what `state_dict` returned."""
        ...


class FixedKLController:
    """A coefficient that stays what it is."""

    def __init__(self, coef: float) -> None:
        """Hold `coef`, at least 0."""
        self._coef = _checked("coef", coef)

    @property
    def coef(self) -> float:
        """The coefficient to use now."""
        return self._coef

    def update(self, current_kl: float, n_steps: int) -> None:
        """Leave the coefficient as it is."""

    def state_dict(self) -> dict[str, float]:
        """Return the coefficient."""
        return {"coef": self._coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the coefficient.

        Raises:
            ValueError: `state` is not what `state_dict` returned.
        """
        self._coef = _restored(state)


class AdaptiveKLController:
    """A proportional controller that steers the KL towards a target (Ziegler et al. 2019, section 2.2).

    After n samples: coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon.
    """

    def __init__(self, init: float, target: float, horizon: float) -> None:
        """Start from `init` (at least 0), for a `target` KL above 0; `horizon` is in samples, above 0.

        Raises:
            ValueError: a value out of range.
        """
        self._coef = _checked("init", init)
        if not target > 0 or not horizon > 0:
            raise ValueError(f"target={target}, horizon={horizon}; both must be above 0")
        self._target = target
        self._horizon = horizon

    @property
    def coef(self) -> float:
        """The coefficient to use now."""
        return self._coef

    def update(self, current_kl: float, n_steps: int) -> None:
        """Move the coefficient for a KL of `current_kl` measured over `n_steps` samples.

        Raises:
            ValueError: `current_kl` is not finite, or `n_steps` is so large that the coefficient could reach 0.
        """
        if not math.isfinite(current_kl):
            raise ValueError(f"current_kl={current_kl} is not finite; the step that produced it must not be used")
        if not 0 <= n_steps * MAX_ERROR < self._horizon:
            raise ValueError(
                f"n_steps={n_steps} with horizon={self._horizon} could turn the coefficient negative; "
                f"raise horizon above {n_steps * MAX_ERROR:g}"
            )
        error = min(max(current_kl / self._target - 1, -MAX_ERROR), MAX_ERROR)
        self._coef *= 1 + error * n_steps / self._horizon

    def state_dict(self) -> dict[str, float]:
        """Return the coefficient; target and horizon belong to the configuration."""
        return {"coef": self._coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the coefficient.

        Raises:
            ValueError: `state` is not what `state_dict` returned.
        """
        self._coef = _restored(state)


def _checked(name: str, coef: float) -> float:
    if not math.isfinite(coef) or coef < 0:
        raise ValueError(f"{name}={coef} is no KL coefficient; expected a finite number of at least 0")
    return float(coef)


def _restored(state: Mapping[str, float]) -> float:
    if set(state) != {"coef"}:
        raise ValueError(f"KL controller state has keys {sorted(state)}; expected ['coef'], as state_dict() returns")
    return _checked("coef", state["coef"])
