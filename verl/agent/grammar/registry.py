"""The search protocols by name: the config that describes each one, and how it becomes a grammar.

To add a protocol: write a grammar and a frozen config whose `protocol` is a `Literal` of its own name, add the config
to `SearchConfig` and an entry to `_GRAMMARS`. `search.protocol=NAME` then chooses it in every command.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl.agent.grammar.base import Grammar
from verl.agent.grammar.s3 import S3Config, S3Grammar

SearchConfig = S3Config

_GRAMMARS: dict[type, Callable[[Any], Grammar]] = {S3Config: S3Grammar}


def build_grammar(config: SearchConfig) -> Grammar:
    """Return the grammar that a protocol's config describes."""
    return _GRAMMARS[type(config)](config)
