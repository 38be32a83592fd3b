"""Give up what nobody waits for any more."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from verl.retrieval.wire import RefusedRequest

T = TypeVar("T")


async def while_connected(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Return what comes of the work, but cancel it when the client leaves, so that its place goes to others.

    Args:
        receive: of a request whose body was read to its end; all that can come is the end of the connection.

    Raises:
        RefusedRequest: the client left; also what `work` raises.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(receive())
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise RefusedRequest(400, "disconnected", "the connection closed before the answer was there")
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
