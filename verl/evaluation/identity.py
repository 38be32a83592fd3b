"""What a result depends on, in a form that survives restarts: which index answered, and which weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.parse import urljoin

import httpx

from verl.errors import ConfigError, RetrieverError

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


def check_tokenizer(model: str, ids: int) -> None:
    """Refuse a tokenizer that has more ids than its model has embeddings: it belongs to another model.

    Args:
        model: checkpoint folder or hub name.
        ids: how many ids the tokenizer has, those that were added to it left out.

    Raises:
        ConfigError: the tokenizer is another model's, or the model's configuration cannot be read.
    """
    from transformers import AutoConfig  # takes seconds, and the other methods do without

    try:
        rows = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    except (OSError, ValueError) as cause:
        raise ConfigError(f"{model}: its config.json does not load ({cause}); give a complete checkpoint") from cause
    if ids > rows:
        raise ConfigError(
            f"{model}: its tokenizer has {ids} ids, but the model only {rows} embeddings; the folder holds the "
            "tokenizer of another model, copy that of the model that the checkpoint was trained from"
        )


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
