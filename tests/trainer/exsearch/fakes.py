"""Trajectories of scripted policies in the embedded world's tokens, and a model small enough to enumerate."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from data_preprocess.world import build as world
from tests.agent.fakes import DictSearch, docs
from verl.agent.grammar.exsearch import ExSearchConfig, ExSearchGrammar
from verl.agent.loop import run
from verl.agent.protocols import Generation, Sampling
from verl.errors import EngineError
from verl.types import Question, Trajectory

MODEL = Path(world.__file__).parent / "checkpoints" / "searcher"
TOKENIZER = AutoTokenizer.from_pretrained(MODEL)
SEARCH_CONFIG = ExSearchConfig(
    topk=2,
    shown=2,
    max_turns=4,
    max_generation_tokens=64,
    max_observation_tokens=200,
    max_prompt_tokens=200,
    max_context_tokens=900,
    prompt="compact",
)
SEARCH = DictSearch({"a": docs("a1", "a2"), "b": docs("b1")})
END = "<|im_end|>"


def question(number: int, *answers: str) -> Question:
    return Question(f"t/{number}", f"Who is {number}?", answers or ("Rome",), "test", gold_titles=("Ta1",))


class Scripted:
    """Says what `script` returns for a question's n-th trajectory, line by line; an exception in it is raised."""

    def __init__(self, script: Callable[[str, int], Sequence[str | Exception]]) -> None:
        self._script = script
        self._running: dict[int | None, list[str | Exception]] = {}
        self._started: dict[str, int] = {}
        self.calls = 0

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        self.calls += 1
        task = id(asyncio.current_task())
        if task not in self._running:
            text = TOKENIZER.decode(prompt_ids)
            asked = text.partition("<question>\n")[2].partition("\n")[0]
            number = self._started[asked] = self._started.get(asked, -1) + 1
            self._running[task] = list(self._script(asked, number))
        line = self._running[task].pop(0)
        if not self._running[task]:
            del self._running[task]
        if isinstance(line, Exception):
            raise line
        ids = tuple(TOKENIZER.encode(line + END, add_special_tokens=False))
        return Generation(ids, (-0.5,) * len(ids), line, "stop", 0)


GONE = EngineError("gone")


def said(*lines: str) -> list[str]:
    return list(lines)


async def play(asked: Question, *lines: str | Exception) -> Trajectory:
    engine = Scripted(lambda text, number: list(lines))
    return await run(asked, ExSearchGrammar(SEARCH_CONFIG), engine, SEARCH, TOKENIZER, Sampling(1.0))


def tiny_model(folder: Path, seed: int = 0) -> str:
    """Write a random model over the world's vocabulary."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        eos_token_id=TOKENIZER.eos_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)
