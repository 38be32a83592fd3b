"""Clients of every backend against one fake server, and its replies in each protocol."""

from __future__ import annotations

import os
from typing import Any

from generator_llms.client import GeneratorClient
from generator_llms.config import GeneratorConfig
from generator_llms.retry import RetryPolicy
from tests.generator_llms.fake_server import FakeServer, Reply, chat, claude

BACKENDS = ("openai", "azure", "anthropic", "bedrock")
KEYS = {
    "OPENAI_API_KEY": "sk-secret",
    "AZURE_OPENAI_API_KEY": "sk-secret",
    "ANTHROPIC_API_KEY": "sk-secret",
    "AWS_BEARER_TOKEN_BEDROCK": "sk-secret",
    "AWS_REGION": "eu-test-1",
}


def client_of(backend: str, server: FakeServer, **changes: Any) -> GeneratorClient:
    """Return a client that asks again after milliseconds."""
    settings: dict[str, Any] = {"timeout_s": 5.0, "retry_window_s": 5.0, "model": "tiny", "check_model": True}
    settings |= {"base_url": server.url if backend == "openai" else server.root, "backend": backend}
    if backend == "azure":
        settings["api_version"] = "2024-10-21"
    settings |= changes
    config = GeneratorConfig(**settings)
    retry = RetryPolicy(config.retry_window_s, config.malformed_retries, first_wait_s=0.002, longest_wait_s=0.01)
    return GeneratorClient(config, environment={**os.environ, **KEYS}, retry=retry)


def said(backend: str, text: str, **more: Any) -> Reply:
    """Build a reply of `text` in the backend's protocol."""
    return claude(text, **more) if backend in ("anthropic", "bedrock") else chat(text, **more)
