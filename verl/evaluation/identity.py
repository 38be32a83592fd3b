"""What a result depends on, in a form that survives restarts: which index answered, and which weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.parse import urljoin

import httpx

from verl.errors import RetrieverError

_READ_BYTES = 16 * 1024 * 1024
_TIMEOUT_S = 10.0


async def retriever_identity(url: str, transport: httpx.AsyncBaseTransport | None = None) -> str:
    """Return the engine and corpus fingerprint behind a `/retrieve` URL; the URL itself for servers that do not say.

    Ports change between runs and indexes change behind a port, so a URL alone does not identify results.

    Raises:
        RetrieverError: nothing answers there.
    """
    try:
        async with httpx.AsyncClient(transport=transport, timeout=_TIMEOUT_S, trust_env=False) as http:
            response = await http.get(urljoin(url, "health"))
    except httpx.TransportError as cause:
        raise RetrieverError(
            f"no retriever answers at {url} ({type(cause).__name__}: {cause}); start it first"
        ) from cause
    if response.status_code != 200 or "json" not in response.headers.get("content-type", ""):
        return url
    health = response.json()
    if not isinstance(health, dict) or not health.get("fingerprint"):
        return url
    return f"{health.get('retriever')}/{health['fingerprint']}"


def model_identity(model: str) -> str:
    """Return a digest of a checkpoint folder (names, sizes and the first 16 MiB of each file), or the hub name."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.is_file():
            digest.update(f"{path.name}:{path.stat().st_size}:".encode())
            with path.open("rb") as file:
                digest.update(file.read(_READ_BYTES))
    return digest.hexdigest()
