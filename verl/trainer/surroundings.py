"""What rollout workers play in, built inside each of them from plain configs: the trainer's only clients."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoTokenizer

from generator_llms.client import GeneratorClient
from generator_llms.config import GeneratorConfig
from generator_llms.judge import LLMJudge
from verl.agent.grammar.registry import SearchConfig, build_grammar
from verl.retrieval.client import RetrieverClient, RetrieverClientConfig
from verl.rewards.registry import RewardConfig, Scorer
from verl.workers.rollout import Surroundings


@dataclass(frozen=True)
class ServiceSurroundings:
    """A search protocol over retriever and frozen generator services; picklable, built where it is called."""

    tokenizer: str
    search: SearchConfig
    retriever: RetrieverClientConfig
    generator: GeneratorConfig
    reward: RewardConfig
    judge: bool

    def __call__(self) -> Surroundings:
        """Open the clients in the running event loop."""
        retriever = RetrieverClient(self.retriever)
        generator = GeneratorClient(self.generator)
        judge = LLMJudge(generator.complete) if self.judge else None
        scorer = Scorer(self.reward, generator.answer, judge)

        async def close() -> None:
            try:
                await retriever.aclose()
            finally:
                await generator.aclose()

        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        return Surroundings(build_grammar(self.search), retriever, scorer, tokenizer, close)
