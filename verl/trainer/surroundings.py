"""What rollout workers play in, built inside each of them from plain configs: the trainer's only clients."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from transformers import AutoTokenizer

from generator_llms.client import GeneratorClient
from generator_llms.config import GeneratorConfig
from generator_llms.judge import judge_by
from verl.agent.grammar.base import Message
from verl.agent.grammar.registry import SearchConfig, build_grammar
from verl.retrieval.client import RetrieverClientConfig
from verl.retrieval.engines.choice import open_search
from verl.retrieval.engines.literature import LiteratureConfig
from verl.retrieval.engines.sql import SqlEngine
from verl.rewards.evidence import Tools
from verl.rewards.registry import RewardConfig, Scorer
from verl.workers.rollout import Surroundings


@dataclass(frozen=True)
class ServiceSurroundings:
    """A search protocol over a search engine and a frozen generator; picklable, built where it is called.

    Attributes:
        literature: the literature service that is searched in place of the retriever; None for the retriever.
        processes: how many processes build these, which share what the literature service allows.
    """

    tokenizer: str
    search: SearchConfig
    retriever: RetrieverClientConfig
    generator: GeneratorConfig
    reward: RewardConfig
    judge: bool
    judge_generator: GeneratorConfig | None = None
    literature: LiteratureConfig | None = None
    processes: int = 1

    def __call__(self) -> Surroundings:
        """Open the clients in the running event loop."""
        search = open_search(self.retriever, self.literature, self.processes)
        generator = GeneratorClient(self.generator)
        judging = GeneratorClient(self.judge_generator) if self.judge_generator else generator
        judge = judge_by(judging) if self.judge else None
        sql = SqlEngine(self.reward.sql) if self.reward.sql else None
        tools = Tools(likelihood=generator.answer_logprobs, sampler=generator.samples, sql=sql)
        scorer = Scorer(self.reward, generator.answer, judge, tools)

        async def complete(messages: Sequence[Message]) -> str:
            return (await generator.complete(messages)).text

        async def close() -> None:
            async with AsyncExitStack() as stack:
                for client in dict.fromkeys((judging, generator, search, *([sql] if sql else []))):
                    stack.push_async_callback(client.aclose)

        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        return Surroundings(build_grammar(self.search, complete), search, scorer, tokenizer, close)
