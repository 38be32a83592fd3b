from __future__ import annotations

from collections.abc import Callable

import pytest

from verl.retrieval import compiled


def test_what_was_compiled_need_not_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def njit(cache: bool = False, **options: object) -> Callable[[object], object]:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: (function, options)

    monkeypatch.setattr(compiled, "njit", njit)
    assert compiled.compiled(len, fastmath=True) == (len, {"nogil": True, "fastmath": True})
