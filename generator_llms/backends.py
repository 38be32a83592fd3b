"""Backends from a configuration: here keys are read and SDKs imported, when a client is built and only if needed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from generator_llms.anthropic_backend import ANTHROPIC_VERSION, AnthropicBackend
from generator_llms.backend import Backend
from generator_llms.config import LOCAL_URL, GeneratorConfig
from generator_llms.openai_backend import OpenAIBackend
from generator_llms.wires import HttpWire, SdkWire
from verl.errors import ConfigError

ANTHROPIC_URL = "https://api.anthropic.com"
_LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1", "0.0.0.0")
_KEY_VARIABLES = {
    "openai": "OPENAI_API_KEY",
    "azure": "AZURE_OPENAI_API_KEY",
    "anthropic": "ANTHROPIC_API_KEY",
    "bedrock": "AWS_BEARER_TOKEN_BEDROCK",
}


def open_backends(config: GeneratorConfig, environment: Mapping[str, str]) -> list[Backend]:
    """Return a backend for every endpoint; nothing is connected yet.

    Raises:
        ConfigError: a key, a region or a package is missing.
    """
    return [_open(config, url, environment) for url in config.urls]


def _open(config: GeneratorConfig, url: str, environment: Mapping[str, str]) -> Backend:
    if config.backend == "openai":
        return OpenAIBackend(HttpWire(url, _key(config, url, environment), not _is_local(url)), config)
    if config.backend == "azure":
        return OpenAIBackend(_azure(config, url, environment), config)
    if config.backend == "anthropic":
        return AnthropicBackend(_anthropic(config, ANTHROPIC_URL if url == LOCAL_URL else url, environment), config)
    return AnthropicBackend(_bedrock(config, None if url == LOCAL_URL else url, environment), config)


def _azure(config: GeneratorConfig, url: str, environment: Mapping[str, str]) -> SdkWire:
    openai = importlib.import_module("openai")
    key = _key(config, url, environment)
    client = openai.AsyncAzureOpenAI(
        azure_endpoint=url, api_version=config.api_version, api_key=key, **_sdk_options(openai, url)
    )
    return SdkWire(url, client, openai, key)


def _anthropic(config: GeneratorConfig, url: str, environment: Mapping[str, str]) -> SdkWire:
    anthropic = _sdk("anthropic", config)
    key = _key(config, url, environment)
    version = {"anthropic-version": config.api_version or ANTHROPIC_VERSION}
    client = anthropic.AsyncAnthropic(
        api_key=key, base_url=url, default_headers=version, **_sdk_options(anthropic, url)
    )
    return SdkWire(url, client, anthropic, key)


def _bedrock(config: GeneratorConfig, url: str | None, environment: Mapping[str, str]) -> SdkWire:
    anthropic = _sdk("anthropic", config)
    region = config.aws_region or environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if not region:
        raise ConfigError("backend=bedrock has no region; set aws_region, or the environment variable AWS_REGION")
    key = environment.get(_key_variable(config))
    if key:
        credentials: dict[str, str | None] = {"api_key": key}
        errors: tuple[type[Exception], ...] = ()
    else:
        _need_boto3(config)
        credentials = {
            "aws_access_key": environment.get("AWS_ACCESS_KEY_ID"),
            "aws_secret_key": environment.get("AWS_SECRET_ACCESS_KEY"),
            "aws_session_token": environment.get("AWS_SESSION_TOKEN"),
        }
        errors = (RuntimeError, importlib.import_module("botocore.exceptions").BotoCoreError)
    where = url or f"https://bedrock-runtime.{region}.amazonaws.com"
    client = anthropic.AsyncAnthropicBedrock(
        aws_region=region, base_url=where, **credentials, **_sdk_options(anthropic, where)
    )
    return SdkWire(where, client, anthropic, key or "", errors)


def _need_boto3(config: GeneratorConfig) -> None:
    if importlib.util.find_spec("boto3") is None:
        raise ConfigError(
            "backend=bedrock signs requests with boto3, which is not installed; pip install boto3, or put a Bedrock "
            f"API key into {_key_variable(config)}"
        )


def _sdk(name: str, config: GeneratorConfig) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as cause:
        raise ConfigError(f"backend={config.backend} needs the package {name}: {cause}; pip install {name}") from cause


def _sdk_options(sdk: Any, url: str) -> dict[str, Any]:
    client = sdk.DefaultAsyncHttpxClient(trust_env=not _is_local(url))
    return {"max_retries": 0, "timeout": None, "http_client": client}


def _key(config: GeneratorConfig, url: str, environment: Mapping[str, str]) -> str:
    variable = _key_variable(config)
    key = environment.get(variable) or ("EMPTY" if _is_local(url) else "")
    if not key:
        raise ConfigError(
            f"{url} is not local and the environment variable {variable} is not set; put the key there, or name "
            "another variable in api_key_env"
        )
    return key


def _key_variable(config: GeneratorConfig) -> str:
    return config.api_key_env or _KEY_VARIABLES[config.backend]


def _is_local(url: str) -> bool:
    # A proxy from the environment could not reach this machine's own ports.
    return urlsplit(url).hostname in _LOCAL_HOSTS
