"""The search protocols by name: the config that describes each one, and how it becomes a grammar.

To add a protocol: write a grammar and a frozen config whose `protocol` is a `Literal` of its own name, add the config
to `SearchConfig` and an entry to `_GRAMMARS`. `search.protocol=NAME` then chooses it in every command.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl.agent.grammar.base import Complete, Grammar
from verl.agent.grammar.deepretrieval import DeepRetrievalConfig, DeepRetrievalGrammar
from verl.agent.grammar.exsearch import ExSearchConfig, ExSearchGrammar
from verl.agent.grammar.ircot import IRCoTConfig, IRCoTGrammar
from verl.agent.grammar.s3 import S3Config, S3Grammar
from verl.agent.grammar.search_o1 import SearchO1Config, SearchO1Grammar
from verl.agent.grammar.search_r1 import SearchR1Config, SearchR1Grammar
from verl.errors import ConfigError

SearchConfig = S3Config | SearchR1Config | SearchO1Config | IRCoTConfig | DeepRetrievalConfig | ExSearchConfig

_GRAMMARS: dict[type, Callable[[Any, Complete | None], Grammar]] = {
    S3Config: lambda config, _: S3Grammar(config),
    SearchR1Config: lambda config, _: SearchR1Grammar(config),
    SearchO1Config: SearchO1Grammar,
    IRCoTConfig: lambda config, _: IRCoTGrammar(config),
    DeepRetrievalConfig: lambda config, _: DeepRetrievalGrammar(config),
    ExSearchConfig: lambda config, _: ExSearchGrammar(config),
}


def build_grammar(config: SearchConfig, complete: Complete | None = None) -> Grammar:
    """Return the grammar that a protocol's config describes.

    Args:
        complete: the model that a protocol may ask besides the policy (Search-o1's condensing).

    Raises:
        ConfigError: the protocol needs `complete` and got none.
    """
    try:
        return _GRAMMARS[type(config)](config, complete)
    except ValueError as cause:
        raise ConfigError(str(cause)) from cause
