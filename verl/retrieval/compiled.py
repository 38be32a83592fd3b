"""Compile inner loops with numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a function at its first call, to run without Python's lock; kept for later processes where it can be."""
    try:
        return njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # there is no folder to keep it in
        return njit(nogil=True, **options)(function)
