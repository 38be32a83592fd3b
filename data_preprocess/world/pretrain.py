"""Pretrain the tiny model on lessons: a plain loop over packed batches, AdamW, warm-up, constant rate, linear decay.

The initialisation is structured in one respect: layer 0's heads start as "look o tokens back" heads, which
Qwen2's query and key biases can express exactly under rotary positions. Finding these heads is what a plain start
spends most of its plateau on.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from data_preprocess.world.lessons import Lesson, LessonMaker

logger = logging.getLogger(__name__)

ROPE_THETA = 1e6  # leaves most rotary planes nearly still over a context, free to match content
MICRO_BATCH_TOKENS = 1024
FACT_WEIGHT = 3.0  # a looked-up fact is one token in ten, and all of the difficulty


@dataclass(frozen=True)
class PretrainConfig:
    """How long and how hard to train.

    Attributes:
        tokens: total budget of tokens, padding not counted.
        batch_tokens: tokens of one step.
        decay: share of the budget, at the end, over which the rate falls linearly to zero.
        searching: share of steps that are s3 trajectories; the rest is question answering.
        max_documents: the curriculum's last level.
        level: the curriculum's first level (documents in a context).
    """

    tokens: int = 30_000_000
    batch_tokens: int = 8192
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    decay: float = 0.4
    searching: float = 0.3
    max_documents: int = 9
    level: int = 1
    seed: int = 0


def tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int, hidden: int = 128, layers: int = 4) -> Qwen2ForCausalLM:
    """Return a fresh Qwen2 of about one million parameters with untied embeddings."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    look_back(model, offsets=range(1, hidden // 32 + 1))
    return model


@torch.no_grad()
def look_back(model: Qwen2ForCausalLM, offsets: range, sharpness: float = 7.0, frequencies: int = 6) -> None:
    """Bias head h of layer 0 to attend exactly `offsets[h]` tokens back.

    With query bias A·(1, 0) and key bias A·(cos oθ, sin oθ) in each rotary plane, the score of a key at distance d
    is A² Σ_i cos θ_i(o − d), which is largest at d = o.
    """
    attention = model.model.layers[0].self_attn
    head_dim = attention.head_dim
    half = head_dim // 2
    theta = ROPE_THETA ** (-torch.arange(half) / half)
    for head, offset in enumerate(offsets):
        start = head * head_dim
        query = attention.q_proj.bias[start : start + head_dim]
        key = attention.k_proj.bias[start : start + head_dim]
        query[:frequencies] = sharpness
        key[:frequencies] = sharpness * torch.cos(offset * theta[:frequencies])
        key[half : half + frequencies] = sharpness * torch.sin(offset * theta[:frequencies])


def pack(lessons: list[Lesson], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Right-pad lessons to `(ids, labels, facts)`, (B, S) each; labels are -100 where nothing is learned."""
    longest = max(len(lesson.ids) for lesson in lessons)
    ids = torch.full((len(lessons), longest), pad, dtype=torch.int64)
    labels = torch.full((len(lessons), longest), -100, dtype=torch.int64)
    facts = torch.zeros((len(lessons), longest), dtype=torch.bool)
    for row, lesson in enumerate(lessons):
        tokens = torch.tensor(lesson.ids)
        ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens)] = torch.where(torch.tensor(lesson.learned, dtype=torch.bool), tokens, -100)
        facts[row, : len(tokens)] = torch.tensor(lesson.facts, dtype=torch.bool)
    return ids, labels, facts


def lesson_loss(model: nn.Module, ids: Tensor, labels: Tensor, facts: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy over learned tokens, facts weighted, and how many looked-up facts are predicted right.

    Rows are right-padded and attention is causal, so no mask is needed: nothing real ever sees padding.
    """
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    target = labels[:, 1:]
    learned = target != -100
    logits = model.lm_head(hidden[learned]).float()
    fact = facts[:, 1:][learned]
    losses = nn.functional.cross_entropy(logits, target[learned], reduction="none")
    right = logits.argmax(-1) == target[learned]
    return (losses * _weights(fact)).sum(), right[fact].sum()


def _weights(fact: Tensor) -> Tensor:
    return 1.0 + (FACT_WEIGHT - 1.0) * fact


def accumulate(model: nn.Module, lessons: list[Lesson], pad: int) -> tuple[float, float]:
    """Add the gradient of one step's mean loss; return the loss and the share of facts predicted right (NaN of none).

    Lessons of like length go through the model together, because padding would cost as much as tokens do.
    """
    learned = [f for lesson in lessons for f, mark in zip(lesson.facts[1:], lesson.learned[1:], strict=True) if mark]
    total = _weights(torch.tensor(learned)).sum().item()
    loss_sum = right_sum = 0.0
    for rows in _of_like_length(lessons):
        with torch.autocast("cpu", torch.bfloat16, enabled=computes_in_bfloat16()):
            loss, right = lesson_loss(model, *pack(rows, pad))
        (loss / total).backward()
        loss_sum, right_sum = loss_sum + loss.item(), right_sum + right.item()
    return loss_sum / total, right_sum / sum(learned) if any(learned) else math.nan


def computes_in_bfloat16() -> bool:
    """Whether this CPU has bfloat16 arithmetic; one that has not takes ten times as long for it as for float32."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _of_like_length(lessons: list[Lesson]) -> list[list[Lesson]]:
    """Cut lessons, sorted by length, into groups of at most MICRO_BATCH_TOKENS, padding included."""
    groups: list[list[Lesson]] = []
    for lesson in sorted(lessons, key=lambda lesson: len(lesson.ids)):
        if not groups or len(lesson.ids) * (len(groups[-1]) + 1) > MICRO_BATCH_TOKENS:
            groups.append([])
        groups[-1].append(lesson)
    return groups


def learning_rate(config: PretrainConfig, step: int, done: float) -> float:
    """Warm-up over steps, constant, then linear decay to zero over the last share `decay` of the budget."""
    warm = min(1.0, (step + 1) / config.warmup_steps)
    return config.learning_rate * warm * min(1.0, (1.0 - done) / max(config.decay, 1e-9))


def pretrain(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    config: PretrainConfig,
    save: Path | None = None,
    draw: Callable[[LessonMaker, int], list[Lesson]] | None = None,
) -> None:
    """Train `model` in place; `draw(maker, level)` gives one step's lessons (default: the shared curriculum)."""
    maker = LessonMaker(tokenizer, config.seed)
    draw = draw or (lambda m, level: mixed_lessons(m, level, config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    level, recent = config.level, deque(maxlen=20)
    tokens, step, started = 0, 0, time.monotonic()
    while tokens < config.tokens:
        lessons = draw(maker, level)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, tokens / config.tokens)
        loss, right = accumulate(model, lessons, tokenizer.pad_token_id)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += sum(len(lesson.ids) for lesson in lessons)
        step += 1
        if not math.isnan(right):
            recent.append(right)
        if len(recent) == 20 and sum(recent) / 20 > 0.8 and level < config.max_documents:
            level += 1
            recent.clear()
        if step % 25 == 0:
            logger.info(
                "step %d tokens %.2fM loss %.3f facts %.3f level %d norm %.2f %.0f tok/s",
                *(step, tokens / 1e6, loss, sum(recent) / max(len(recent), 1), level, norm.item()),
                tokens / (time.monotonic() - started),
            )
            if not math.isfinite(loss):
                raise FloatingPointError(f"loss became {loss} at step {step}; lower the learning rate")
        if save and step % 200 == 0:
            save_model(model, tokenizer, save)
    if save:
        save_model(model, tokenizer, save)


def mixed_lessons(maker: LessonMaker, level: int, config: PretrainConfig) -> list[Lesson]:
    """One step's lessons: s3 trajectories, or contexts of up to `level` documents (30 % of the steps easier ones)."""
    if maker.rng.random() < config.searching:
        return fill(maker.searching, config.batch_tokens)
    documents = level if maker.rng.random() < 0.7 else maker.rng.randint(1, level)
    return fill(lambda: maker.answering(documents), config.batch_tokens)


def fill(draw: Callable[[], Lesson], tokens: int) -> list[Lesson]:
    """Draw lessons until they hold at least `tokens` tokens."""
    lessons, total = [], 0
    while total < tokens:
        lessons.append(draw())
        total += len(lessons[-1].ids)
    return lessons


def save_model(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face checkpoint: weights in bfloat16, which halves it; its config says float32 to compute in."""
    copy = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=copy)
    tokenizer.save_pretrained(folder)
