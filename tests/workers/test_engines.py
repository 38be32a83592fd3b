"""What the engines share, and the hf engine against a decode loop without cache or batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from tests.workers.tiny import save, tiny_model, tiny_tokenizer
from verl.agent.protocols import Generation, Sampling
from verl.errors import EngineError
from verl.workers.engine_hf import HFEngine
from verl.workers.engines import (
    EngineConfig,
    RolloutEngine,
    UpdateGate,
    checked_weights,
    create_engine,
    why_not_updatable,
)

TOKENIZER = tiny_tokenizer()
PROMPTS = [TOKENIZER.encode(text) for text in ("Who is the mentor of Ada?", "x", "Doc 1(Title: Bob) The rival of")]
MakeEngine = Callable[..., RolloutEngine]


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    return tiny_model(TOKENIZER)


@pytest.fixture(scope="module")
def folder(model: Qwen2ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("model"), model, TOKENIZER)


@pytest.fixture
def make(folder: str) -> MakeEngine:
    def make(path: str = folder, **changes: object) -> RolloutEngine:
        return create_engine(EngineConfig(model=path, kind="hf", dtype="float32", max_model_len=128, **changes))

    return make


@torch.no_grad()
def reference(model: Qwen2ForCausalLM, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy decoding, every step from scratch."""
    ids, logprobs = list(prompt), []
    for _ in range(count):
        row = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        ids.append(int(row.argmax()))
        logprobs.append(row.max().item())
    return ids[len(prompt) :], logprobs


def assert_is(generation: Generation, expected: tuple[list[int], list[float]]) -> None:
    assert generation.ids == tuple(expected[0])
    assert generation.logprobs == pytest.approx(expected[1], abs=1e-4)
    assert generation.text == TOKENIZER.decode(expected[0], skip_special_tokens=True)


async def test_greedy_in_a_batch_is_greedy_alone(make: MakeEngine, model: Qwen2ForCausalLM) -> None:
    engine = make()
    lengths = [12, 30, 1]
    answers = await asyncio.gather(
        *(engine.generate(p, Sampling(temperature=0.0, max_tokens=n)) for p, n in zip(PROMPTS, lengths, strict=True))
    )
    for prompt, length, answer in zip(PROMPTS, lengths, answers, strict=True):
        assert_is(answer, reference(model, prompt, length))
        assert (answer.finish, answer.weight_version) == ("length", 0)


async def test_requests_join_and_leave_a_running_batch(make: MakeEngine, model: Qwen2ForCausalLM) -> None:
    """More requests than fit, of different lengths, some of a single token, and some that come late."""
    engine = make(max_num_seqs=3)
    lengths = [9, 1, 1, 14, 3, 20, 1, 6, 2, 11]

    async def late(delay: float, i: int) -> Generation:
        await asyncio.sleep(delay)
        return await engine.generate(PROMPTS[i % 3], Sampling(temperature=0.0, max_tokens=lengths[i]))

    answers = await asyncio.gather(*(late(0.01 * (i // 4), i) for i in range(len(lengths))))
    for i, answer in enumerate(answers):
        assert_is(answer, reference(model, PROMPTS[i % 3], lengths[i]))


async def test_many_requests_of_one_token(make: MakeEngine, model: Qwen2ForCausalLM) -> None:
    engine = make(max_num_seqs=2)
    one = Sampling(temperature=0.0, max_tokens=1)
    answers = await asyncio.wait_for(asyncio.gather(*(engine.generate(PROMPTS[0], one) for _ in range(9))), 30)
    for answer in answers:
        assert_is(answer, reference(model, PROMPTS[0], 1))


async def test_a_stop_string_ends_at_the_token_that_completes_it(make: MakeEngine, model: Qwen2ForCausalLM) -> None:
    ids, logprobs = reference(model, PROMPTS[0], 40)
    texts = [TOKENIZER.decode(ids[:n], skip_special_tokens=True) for n in range(41)]
    plain = [n for n in range(8, 41) if texts[n][-3:].isascii() and len(texts[n]) > len(texts[n - 1])]
    stop = texts[plain[0]][-3:]
    first = next(n for n in range(41) if stop in texts[n])
    sampling = Sampling(temperature=0.0, max_tokens=40, stop=("never said", stop))
    answer = await make().generate(PROMPTS[0], sampling)
    assert_is(answer, (ids[:first], logprobs[:first]))
    assert answer.finish == "stop"


async def test_the_end_of_sequence_is_kept(model: Qwen2ForCausalLM, make: MakeEngine, tmp_path: Path) -> None:
    ids, logprobs = reference(model, PROMPTS[0], 30)
    end = ids.index(ids[5])
    ending = tiny_model(TOKENIZER)
    ending.generation_config.eos_token_id = [TOKENIZER.eos_token_id, ids[5]]
    engine = make(save(tmp_path, ending, TOKENIZER))
    answer = await engine.generate(PROMPTS[0], Sampling(temperature=0.0, max_tokens=30))
    assert_is(answer, (ids[: end + 1], logprobs[: end + 1]))
    assert answer.finish == "stop"


async def test_sampled_logprobs_are_those_of_the_scaled_model(make: MakeEngine, model: Qwen2ForCausalLM) -> None:
    answer = await make().generate(PROMPTS[0], Sampling(temperature=0.7, max_tokens=20, seed=1))
    ids = torch.tensor([[*PROMPTS[0], *answer.ids]])
    with torch.no_grad():
        scores = (model(input_ids=ids).logits[0] / 0.7).log_softmax(-1)
    start = len(PROMPTS[0])
    expected = [scores[start - 1 + i, token].item() for i, token in enumerate(answer.ids)]
    assert answer.logprobs == pytest.approx(expected, abs=1e-4)
    assert answer.ids != reference(model, PROMPTS[0], 20)[0]


async def test_a_seed_fixes_a_generation_whatever_runs_beside_it(make: MakeEngine) -> None:
    seeded = Sampling(temperature=1.0, max_tokens=15, seed=11)
    alone = await make().generate(PROMPTS[0], seeded)
    engine = make()
    other = Sampling(temperature=1.0, max_tokens=15)
    beside = await asyncio.gather(
        engine.generate(PROMPTS[2], other), engine.generate(PROMPTS[0], seeded), engine.generate(PROMPTS[0], other)
    )
    assert beside[1].ids == alone.ids
    assert beside[2].ids != alone.ids
    again = await asyncio.gather(*(make(seed=0).generate(PROMPTS[2], other) for _ in range(1)))
    assert again[0].ids == beside[0].ids


async def test_the_context_bounds_a_generation(make: MakeEngine, model: Qwen2ForCausalLM) -> None:
    prompt = PROMPTS[0] * 30
    answer = await make().generate(prompt[:120], Sampling(temperature=0.0, max_tokens=50))
    assert_is(answer, reference(model, prompt[:120], 8))
    assert answer.finish == "length"


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 5, "empty prompt"),
        ([1] * 128, 5, "leaves no room in max_model_len=128"),
        ([1], 0, "max_tokens=0"),
        ([10**6], 5, "outside the model's vocabulary of"),
    ],
)
async def test_requests_that_cannot_be_served(
    make: MakeEngine, prompt: list[int], max_tokens: int, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        await make().generate(prompt, Sampling(max_tokens=max_tokens))


async def test_a_cancelled_request_leaves_the_others(make: MakeEngine, model: Qwen2ForCausalLM) -> None:
    engine = make()
    left = asyncio.create_task(engine.generate(PROMPTS[2], Sampling(max_tokens=100)))
    stays = asyncio.create_task(engine.generate(PROMPTS[0], Sampling(temperature=0.0, max_tokens=10)))
    await asyncio.sleep(0)
    left.cancel()
    assert_is(await stays, reference(model, PROMPTS[0], 10))
    await asyncio.wait_for(engine.update_weights(model.named_parameters(), 1), timeout=30)


class Flaky(Qwen2ForCausalLM):
    """Fails while `broken`."""

    broken = True

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Run out of memory, or answer."""
        if self.broken:
            raise RuntimeError("out of memory")
        return super().forward(*arguments, **named)


async def test_a_failing_model_fails_its_callers_and_not_the_engine(folder: str) -> None:
    model = Flaky.from_pretrained(folder)
    engine = HFEngine(EngineConfig(model=folder, kind="hf", max_model_len=128), model, TOKENIZER)
    sampling = Sampling(max_tokens=3)
    answers = await asyncio.gather(*(engine.generate(p, sampling) for p in PROMPTS), return_exceptions=True)
    assert [str(answer) for answer in answers] == ["decoding failed: out of memory"] * 3
    model.broken = False
    assert len((await engine.generate(PROMPTS[0], sampling)).ids) == 3


async def test_new_weights_sample_like_a_new_engine(make: MakeEngine) -> None:
    engine = make()
    new = tiny_model(TOKENIZER, seed=1)
    before = asyncio.create_task(engine.generate(PROMPTS[0], Sampling(temperature=0.0, max_tokens=60)))
    await asyncio.sleep(0)
    update = asyncio.create_task(engine.update_weights(new.named_parameters(), 3))
    await asyncio.sleep(0)
    after = asyncio.create_task(engine.generate(PROMPTS[0], Sampling(temperature=0.0, max_tokens=10)))
    assert ((await before).weight_version, (await after).weight_version) == (0, 3)
    await update
    assert_is(await before, reference(tiny_model(TOKENIZER), PROMPTS[0], 60))
    assert_is(await after, reference(new, PROMPTS[0], 10))


async def test_tied_embeddings_follow_new_weights(make: MakeEngine, tmp_path: Path) -> None:
    engine = make(save(tmp_path, tiny_model(TOKENIZER, tied=True), TOKENIZER))
    new = tiny_model(TOKENIZER, seed=1, tied=True)
    await engine.update_weights(new.state_dict().items(), 1)
    answer = await engine.generate(PROMPTS[0], Sampling(temperature=0.0, max_tokens=10))
    assert_is(answer, reference(new, PROMPTS[0], 10))


async def test_wrong_weights_are_refused_and_change_nothing(make: MakeEngine, model: Qwen2ForCausalLM) -> None:
    engine = make()
    new = dict(tiny_model(TOKENIZER, seed=1).named_parameters())
    first = next(iter(new))
    with pytest.raises(EngineError, match="unknown parameter 'head'"):
        await engine.update_weights([*new.items(), ("head", new[first])], 1)
    with pytest.raises(EngineError, match="1 parameters did not come"):
        await engine.update_weights(list(new.items())[1:], 1)
    with pytest.raises(EngineError, match=r"has shape \(2,\); expected"):
        await engine.update_weights((new | {first: torch.zeros(2)}).items(), 1)
    assert engine.weight_version == 0
    assert_is(
        await engine.generate(PROMPTS[0], Sampling(temperature=0.0, max_tokens=5)), reference(model, PROMPTS[0], 5)
    )


def test_checked_weights_leaves_out_aliases_and_refuses_repetition() -> None:
    tied = tiny_model(TOKENIZER, tied=True)
    checked = checked_weights(tied, tied.state_dict().items())
    assert "lm_head.weight" in tied.state_dict() and "lm_head.weight" not in checked
    assert checked.keys() == dict(tied.named_parameters()).keys()
    pairs = list(tied.named_parameters())
    with pytest.raises(EngineError, match="came twice"):
        checked_weights(tied, [*pairs, pairs[0]])


async def test_a_closed_engine_says_so(make: MakeEngine) -> None:
    engine = make()
    await engine.close()
    with pytest.raises(EngineError, match="closed"):
        await engine.generate(PROMPTS[0], Sampling(max_tokens=1))


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"nothing.*cannot be loaded"):
        create_engine(EngineConfig(model=str(tmp_path / "nothing"), kind="hf"))


def test_only_tied_embeddings_on_a_cpu_are_refused() -> None:
    assert "untie the embeddings" in why_not_updatable(tied=True, on_cpu=True)
    assert why_not_updatable(tied=True, on_cpu=False) == why_not_updatable(tied=False, on_cpu=True) == ""


@pytest.mark.parametrize("wrong", [{"max_model_len": 0}, {"max_num_seqs": 0}, {"gpu_memory_utilization": 1.5}])
def test_a_wrong_config_names_the_field(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EngineConfig(model="m", **wrong)


async def test_the_gate_lets_an_update_in_before_later_generations() -> None:
    gate, log = UpdateGate(), []
    release = asyncio.Event()

    async def generation(name: str) -> None:
        async with gate.generation():
            log.append(name)
            await release.wait()

    async def update(name: str) -> None:
        async with gate.update():
            log.append(name)
            await asyncio.sleep(0)
            log.append(f"{name} done")

    tasks = []
    for part in (generation("a"), generation("b"), update("u"), generation("c"), update("v")):
        tasks.append(asyncio.create_task(part))
        await asyncio.sleep(0)
    assert log == ["a", "b"]
    release.set()
    await asyncio.gather(*tasks)
    assert log == ["a", "b", "u", "u done", "v", "v done", "c"]


async def test_the_gate_survives_cancellation_and_errors() -> None:
    gate = UpdateGate()
    held = asyncio.Event()

    async def generation() -> None:
        async with gate.generation():
            await held.wait()

    running = asyncio.create_task(generation())
    await asyncio.sleep(0)
    waiting = asyncio.create_task(gate.update().__aenter__())
    await asyncio.sleep(0)
    waiting.cancel()
    running.cancel()
    await asyncio.gather(waiting, running, return_exceptions=True)
    with pytest.raises(EngineError):
        async with gate.update():
            raise EngineError("refused")
    held.set()
    await asyncio.wait_for(generation(), timeout=5)


def test_the_tokenizer_of_the_tests_splits_tags() -> None:
    tokenizer: PreTrainedTokenizerFast = TOKENIZER
    assert len(tokenizer.encode("</query>")) > 1
