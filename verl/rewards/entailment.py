"""Does one text entail another: a local NLI cross-encoder, or a comparison of words that needs no model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from verl.errors import ConfigError
from verl.rewards.evidence import Entailment
from verl.rewards.text import normalise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Pair = tuple[str, str]
_ENTAILMENT_LABELS = ("entailment", "entails", "entail")


@dataclass(frozen=True, slots=True)
class EntailmentConfig:
    """How entailment is told.

    Attributes:
        kind: `nli` asks a sequence-classification model, `same_normalised` compares normalised texts.
        model: of `nli`: folder of a checkpoint or hub name; one of its labels must be "entailment".
        device: of `nli`: as torch names it.
        batch_size: of `nli`: pairs in one forward pass.
        max_length: of `nli`: tokens of a pair; what is longer is cut at the end, counted and logged.
    """

    kind: Literal["nli", "same_normalised"] = "nli"
    model: str = "microsoft/deberta-base-mnli"
    device: str = "cpu"
    batch_size: int = 32
    max_length: int = 512

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")


def create_entailment(config: EntailmentConfig) -> Entailment:
    """Return what `config` describes; a model is loaded when it is first asked."""
    return NliEntailment(config) if config.kind == "nli" else same_normalised


async def same_normalised(pairs: Sequence[Pair]) -> tuple[float, ...]:
    """Return 1 for texts that are equal after normalisation, else 0: no paraphrase is recognised."""
    return tuple(float(normalise(first) == normalise(second)) for first, second in pairs)


class NliEntailment:
    """A cross-encoder for natural language inference; safe for concurrent callers, who take turns.

    It runs in a thread of its own, so that the event loop goes on. A pair's probability does not depend on what else is
    asked (but for rounding): padding is masked out.

    Attributes:
        truncated: pairs so far that were longer than `max_length`.
    """

    def __init__(self, config: EntailmentConfig) -> None:
        self.config = config
        self.truncated = 0
        # Not the event loop's threads: callers who wait for their turn would hold them all.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="entailment")
        self._loaded: _Loaded | None = None

    async def __call__(self, pairs: Sequence[Pair]) -> tuple[float, ...]:
        """Return the probability that the first text of each pair entails the second.

        Raises:
            ConfigError: the model does not load, or has no label for entailment.
        """
        if not pairs:
            return ()
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._probabilities, tuple(pairs))

    def _probabilities(self, pairs: Sequence[Pair]) -> tuple[float, ...]:
        self._loaded = self._loaded or _load(self.config)
        # Pairs of like length share a batch, so little is computed on padding.
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        found: dict[int, float] = {}
        for start in range(0, len(order), self.config.batch_size):
            rows = order[start : start + self.config.batch_size]
            found |= zip(rows, self._batch(self._loaded, [pairs[i] for i in rows]), strict=True)
        return tuple(found[i] for i in range(len(pairs)))

    def _batch(self, loaded: _Loaded, pairs: Sequence[Pair]) -> list[float]:
        import torch

        firsts, seconds = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        inputs = loaded.tokenizer(
            firsts, seconds, padding=True, truncation=True, max_length=self.config.max_length, return_tensors="pt"
        )
        if inputs["input_ids"].shape[1] >= self.config.max_length:
            self._count_truncated(loaded, firsts, seconds)
        with torch.inference_mode():
            logits = loaded.model(**inputs.to(self.config.device)).logits
        return torch.softmax(logits.float(), dim=-1)[:, loaded.label].tolist()

    def _count_truncated(self, loaded: _Loaded, firsts: list[str], seconds: list[str]) -> None:
        lengths = [len(ids) for ids in loaded.tokenizer(firsts, seconds, truncation=False)["input_ids"]]
        longer = sum(length > self.config.max_length for length in lengths)
        if longer and not self.truncated:
            logger.warning(
                "a pair of %d tokens is cut to max_length=%d (further ones are only counted)",
                max(lengths),
                self.config.max_length,
            )
        self.truncated += longer


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model in evaluation mode, its tokenizer, and the column of its logits that means entailment."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    label: int


def entailment_label(labels: Mapping[int, str], model: str) -> int:
    """Return the index of the label that means entailment; models of the same task order their labels differently.

    Raises:
        ConfigError: no label says so, or several do.
    """
    found = [index for index, name in labels.items() if name.strip().lower() in _ENTAILMENT_LABELS]
    if len(found) != 1:
        raise ConfigError(
            f"entailment.model={model} has the labels {', '.join(labels.values())}; expected one called entailment, "
            "name a model for natural language inference, or set id2label in its config.json"
        )
    return found[0]


def _load(config: EntailmentConfig) -> _Loaded:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        model = AutoModelForSequenceClassification.from_pretrained(config.model)
    except (OSError, ValueError) as cause:
        raise ConfigError(
            f"entailment.model={config.model} does not load ({cause}); give the folder of a sequence-classification "
            "model or a hub name, or set entailment.kind=same_normalised"
        ) from cause
    label = entailment_label(model.config.id2label, config.model)
    return _Loaded(model.eval().to(config.device), tokenizer, label)
