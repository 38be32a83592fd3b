"""The only multi-turn loop: question in, trajectory out, one coroutine per trajectory.

Tokens in, tokens out: what the engine sampled is appended to the context as it was sampled, and environment text is
tokenised once, when it is inserted. A service that fails (the retriever, the engine, a model that the grammar asks)
ends the trajectory as data (`Stop.FAILED` with the cause); every other exception is a bug and propagates.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from verl.agent.grammar.base import Action, Grammar, Message, Observation
from verl.agent.protocols import Generation, PolicyEngine, Sampling, Search, bound_to
from verl.errors import EngineError, GeneratorError, GrammarError, RetrieverError
from verl.types import Question, Role, SearchResult, Segment, Stop, Trajectory, Turn

logger = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that the loop uses."""

    chat_template: Any
    eos_token: Any
    eos_token_id: Any

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> Any: ...

    def encode(self, text: str, **kwargs: Any) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> str: ...


async def run(
    question: Question,
    grammar: Grammar,
    engine: PolicyEngine,
    search: Search,
    tokenizer: Tokenizer,
    sampling: Sampling,
) -> Trajectory:
    """Search for one question.

    Args:
        sampling: temperature, top-p, top-k and seed; stop strings and token budgets are the grammar's. With a seed,
            every generation of the trajectory gets its own seed derived from it.

    Returns:
        The trajectory, also when the retriever or the engine failed (`stop` is FAILED, `error` holds the cause, and
        the turns up to there are kept).

    Raises:
        GrammarError: the tokenizer has no chat template.
    """
    return await _Episode(question, grammar, engine, search, tokenizer, sampling).play()


async def gather(
    questions: Iterable[Question],
    grammar: Grammar,
    engine: PolicyEngine,
    search: Search,
    tokenizer: Tokenizer,
    sampling: Sampling,
    concurrency: int = 64,
) -> AsyncIterator[Trajectory]:
    """Run many questions, at most `concurrency` at a time, and yield trajectories as they finish.

    Questions are drawn lazily. With a seed, the n-th question gets its own seed derived from it, so that repetitions
    of one question differ. Trajectories still running when the consumer stops are cancelled.

    Raises:
        ValueError: `concurrency` is below 1.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency={concurrency}; expected at least 1")
    pending = enumerate(questions)
    running: set[asyncio.Task[Trajectory]] = set()
    try:
        while True:
            while len(running) < concurrency and (drawn := next(pending, None)) is not None:
                index, question = drawn
                own = replace(sampling, seed=derive_seed(sampling.seed, index))
                running.add(asyncio.create_task(run(question, grammar, engine, search, tokenizer, own)))
            if not running:
                return
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def derive_seed(seed: int | None, index: int) -> int | None:
    """Return the seed of the index-th part of something seeded; None stays None."""
    if seed is None:
        return None
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=4).digest(), "big")


@dataclass(frozen=True, slots=True)
class _Sampled:
    """One turn as the policy wrote it."""

    segments: tuple[Segment, ...]
    text: str
    action: Action


class _Episode:
    """The state of one trajectory while it runs."""

    def __init__(
        self,
        question: Question,
        grammar: Grammar,
        engine: PolicyEngine,
        search: Search,
        tokenizer: Tokenizer,
        sampling: Sampling,
    ) -> None:
        self.question = question
        self.grammar = grammar
        self.engine = engine
        self.search = bound_to(search, question)
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.prompt_ids = chat_prompt(tokenizer, grammar.prompt_messages(question))
        self.context = list(self.prompt_ids)
        self.rebuilt: tuple[int, ...] = ()
        self.turns: list[Turn] = []
        self.generations = 0

    async def play(self) -> Trajectory:
        """Run to the end; a failed service ends it too."""
        try:
            stop = await self._play_turns()
        except (RetrieverError, EngineError, GeneratorError) as error:
            cause = f"{type(error).__name__}: {error}"
            logger.warning("question %s failed in turn %d: %s", self.question.id, len(self.turns), cause)
            return Trajectory(self.question, self.prompt_ids, tuple(self.turns), Stop.FAILED, error=cause)
        documents = self.grammar.assemble(self.question, self.turns)
        return Trajectory(self.question, self.prompt_ids, tuple(self.turns), stop, documents)

    async def _play_turns(self) -> Stop:
        limits = self.grammar.limits
        if len(self.prompt_ids) > limits.prompt_tokens:
            logger.warning(
                "question %s: its prompt of %d tokens exceeds prompt_tokens=%d; not searched",
                self.question.id,
                len(self.prompt_ids),
                limits.prompt_tokens,
            )
            return Stop.LENGTH
        for index in range(limits.searches + 1):
            may_search = index < limits.searches
            action = await self._policy_turn(may_search)
            if not action.finished and len(self.context) >= limits.context_tokens:
                return Stop.LENGTH
            result = await self._retrieve(action.query)
            if action.finished:
                self.turns[-1] = replace(self.turns[-1], result=result)
                return Stop.FINISHED
            if may_search and not await self._respond(result):
                return Stop.LENGTH
        return Stop.TURN_LIMIT

    async def _policy_turn(self, may_search: bool) -> Action:
        """Sample one turn and append it; a query that may not be sent is dropped from the action."""
        sampled = await self._sample()
        action = sampled.action if may_search else replace(sampled.action, query=None)
        self.turns.append(
            Turn(
                segments=sampled.segments,
                text=sampled.text,
                query=action.query,
                selected=action.selected,
                finished=action.finished,
                invalid=action.invalid,
                answer=action.answer,
                note=action.note,
                fault=action.fault,
                prompt_ids=self.rebuilt,
            )
        )
        self.rebuilt = ()
        return action

    async def _sample(self) -> _Sampled:
        """Sample until the turn holds an action, or ends otherwise than at a stop string, or its budget is used."""
        limits = self.grammar.limits
        segments: list[Segment] = []
        ids: list[int] = []
        while True:
            budget = min(limits.generation_tokens - len(ids), limits.context_tokens - len(self.context))
            generation = await self._generate(budget)
            segments.append(Segment(generation.ids, Role.POLICY, generation.logprobs, generation.weight_version))
            ids.extend(generation.ids)
            self.context.extend(generation.ids)
            text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            action = self.grammar.parse(self.question, self.turns, text)
            unread = action.invalid and not action.finished
            if not (unread and self._at_stop_string(generation) and 0 < len(generation.ids) < budget):
                return _Sampled(tuple(segments), text, action)

    async def _generate(self, budget: int) -> Generation:
        seed = derive_seed(self.sampling.seed, self.generations)
        self.generations += 1
        sampling = replace(self.sampling, max_tokens=budget, stop=self.grammar.stop, seed=seed)
        return await self.engine.generate(tuple(self.context), sampling)

    def _at_stop_string(self, generation: Generation) -> bool:
        """Whether a stop string, not the end of the sequence, ended this generation."""
        return generation.finish == "stop" and any(stop in generation.text for stop in self.grammar.stop)

    async def _retrieve(self, query: str | None) -> SearchResult | None:
        if query is None:
            return None
        results = await self.search([query], self.grammar.limits.topk)
        if len(results) != 1:
            raise RetrieverError(f"search returned {len(results)} results for 1 query; expected one per query")
        return results[0]

    async def _respond(self, result: SearchResult | None) -> bool:
        """Append the environment's answer to the last turn; False when the context has no room for it.

        The turn's result is what the policy was shown: without the documents that did not fit, and None when the
        block did not fit the context.
        """
        observation = await self.grammar.observe(self.question, self.turns, result)
        if observation.rebuild is not None:
            ids, shown = self._fit(len(observation.items), partial(self._conversation, observation.rebuild))
            if len(ids) > self.grammar.limits.prompt_tokens:
                logger.info("question %s: no room for a conversation of %d tokens", self.question.id, len(ids))
                return False
            self.turns[-1] = self._shown(self.turns[-1], result, len(observation.items), shown)
            self.context, self.rebuilt = ids, tuple(ids)
            return True
        ids, shown = self._fit(len(observation.items), partial(self._inserted, observation))
        if len(self.context) + len(ids) >= self.grammar.limits.context_tokens:
            logger.info("question %s: no room for an observation of %d tokens", self.question.id, len(ids))
            return False
        turn = self._shown(self.turns[-1], result, len(observation.items), shown)
        self.turns[-1] = replace(turn, segments=(*turn.segments, Segment(tuple(ids), Role.ENVIRONMENT)))
        self.context.extend(ids)
        return True

    def _shown(self, turn: Turn, result: SearchResult | None, items: int, shown: int) -> Turn:
        """Return the turn with what of its result the policy is shown."""
        dropped = items - shown
        if result is not None and dropped:
            logger.info("question %s: %d documents did not fit the observation", self.question.id, dropped)
            result = replace(result, documents=result.documents[:shown], scores=result.scores[:shown])
        return replace(turn, result=result, dropped=dropped)

    def _fit(self, items: int, tokens: Callable[[int], tuple[list[int], int]]) -> tuple[list[int], int]:
        """Tokenise with as many leading items as the bound allows; return the ids and that number."""
        shown = items
        while True:
            ids, bound = tokens(shown)
            if len(ids) <= bound or shown == 0:
                return ids, shown
            shown -= 1

    def _conversation(self, rebuild: Callable[[int], list[Message]], shown: int) -> tuple[list[int], int]:
        return list(chat_prompt(self.tokenizer, rebuild(shown))), self.grammar.limits.prompt_tokens

    def _inserted(self, observation: Observation, shown: int) -> tuple[list[int], int]:
        text = observation.text(shown)
        if observation.as_user:
            text = user_turn(self.tokenizer, text, closed=self.context[-1] == self.tokenizer.eos_token_id)
        return self.tokenizer.encode(text, add_special_tokens=False), self.grammar.limits.observation_tokens


_ASSISTANT_MARK = "\u2403assistant\u2403"


def user_turn(tokenizer: Tokenizer, content: str, closed: bool) -> str:
    """Return what the chat template writes between an assistant's words and the assistant's next ones.

    Args:
        content: what the user says in between.
        closed: the assistant's end-of-turn token is in the context already, because the policy sampled it.

    Raises:
        GrammarError: the template does not show an assistant's words as they are, or no user turn after them.
    """
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": _ASSISTANT_MARK},
        {"role": "user", "content": content},
    ]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    _, found, tail = rendered.partition(_ASSISTANT_MARK)
    if not found or content.strip() not in tail:
        raise GrammarError("the chat template renders no user turn after an assistant's; use another tokenizer")
    end = tokenizer.eos_token or ""
    return tail.removeprefix(end) if closed else tail


def chat_prompt(tokenizer: Tokenizer, messages: list[Message]) -> tuple[int, ...]:
    """Return the token ids of a conversation, up to where the assistant speaks, or goes on if it spoke last.

    Raises:
        GrammarError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise GrammarError("the tokenizer has no chat template; use an instruct model or set tokenizer.chat_template")
    turn = "continue_final_message" if messages[-1]["role"] == "assistant" else "add_generation_prompt"
    ids = tokenizer.apply_chat_template(messages, **{turn: True}, tokenize=True, return_dict=False)
    return tuple(ids)
