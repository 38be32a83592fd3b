"""Order documents anew with a cross-encoder, which reads query and document together."""

from __future__ import annotations

import hashlib
import logging
import math
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

from verl.errors import ConfigError, RetrieverError
from verl.retrieval.batching import MicroBatcher
from verl.retrieval.engine import Engine, EngineInfo, as_live, check_topk, digest
from verl.retrieval.engine_thread import EngineThread
from verl.types import Document, SearchResult

if TYPE_CHECKING:
    import torch
    from sentence_transformers import CrossEncoder

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "cross-encoder/ms-marco-MiniLM-L12-v2"
RERANK_DEPTH = 50

_PAD_TO = 16
_ROWS = 4
_CPU_TOKENS = 1024
_GPU_TOKENS = 65536
_BATCH_PAIRS = 256

Pair = tuple[str, Document]


class Reranker(Protocol):
    """Something that says how well a document answers a query. May be called from several threads."""

    @property
    def model(self) -> str:
        """Name of the model, to be shown."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of everything that decides a score."""
        ...

    def score(self, pairs: Sequence[Pair]) -> Sequence[float]:
        """Return one score per pair, higher is better; no score depends on the other pairs."""
        ...


class CrossEncoderReranker:
    """A cross-encoder of sentence-transformers, loaded; scores are those of its `predict`.

    A pair is padded to a length that depends on that pair alone (a multiple of 16 tokens), only meets pairs of that
    length, and every forward pass has a multiple of 4 rows, because matrix libraries round otherwise for the rows that
    are left over. So a score does not depend on the pairs around it: on a CPU in float32, measured, not even in the
    last bit; on a GPU, where the model runs in float16, up to its rounding.

    A document is read as its title, if it has one, a line break and its text.

    Attributes:
        truncated: how many pairs were cut at `max_length` so far.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        device: str | None = None,
        batch_tokens: int | None = None,
        max_length: int = 512,
    ) -> None:
        """Load a model.

        Args:
            model: local folder or Hugging Face name of a cross-encoder with one score.
            device: a torch device; the first GPU if there is one, else the CPU, when None.
            batch_tokens: tokens, padding included, in one forward pass; at most 1,024 on a CPU, where more is no
                faster; 65,536 on a GPU when None.
            max_length: tokens of a pair that are read, at most what the model has positions for.

        Raises:
            ConfigError: the model cannot be loaded or is no cross-encoder with one score, the device is not there, or
                a number is too small.
        """
        if batch_tokens is not None and batch_tokens < 1:
            raise ConfigError(f"reranker batch_tokens={batch_tokens}; expected at least 1")
        if max_length < _PAD_TO:
            raise ConfigError(f"reranker max_length={max_length}; expected at least {_PAD_TO}")
        self.model = model
        self._network = _load(model, device)
        on_gpu = self._network.device.type == "cuda"
        self._batch_tokens = batch_tokens or (_GPU_TOKENS if on_gpu else _CPU_TOKENS)
        if not on_gpu:
            # Matrix products of more rows are summed in another order on some CPUs (seen with AVX2).
            self._batch_tokens = min(self._batch_tokens, _CPU_TOKENS)
        self._max_length = _max_length(self._network, max_length)
        self._fingerprint = _fingerprint(self._network, self._max_length)
        # The tokenizer keeps its truncation as a state, and a batch of one caller is enough for the machine.
        self._lock = threading.Lock()
        self.truncated = 0

    @property
    def fingerprint(self) -> str:
        """Of weights, tokenizer and settings; not of the machine."""
        return self._fingerprint

    def rerank(
        self, queries: Sequence[str], documents: Sequence[Sequence[Document]], topk: int
    ) -> list[SearchResult | RetrieverError]:
        """Return, for each query, the `topk` best of its own documents.

        Raises:
            RetrieverError: there is not one list of documents for each query.
        """
        if len(queries) != len(documents):
            raise RetrieverError(f"{len(documents)} lists of documents came for {len(queries)} queries")
        return rerank(self, queries, documents, topk)

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """Return one score per pair, higher is better."""
        scores = [0.0] * len(pairs)
        if not pairs:
            return scores
        with self._lock:
            encoded = self._tokenized(pairs)
            for rows in self._batches([len(ids) for ids in encoded["input_ids"]]):
                batch = {name: [values[row] for row in rows] for name, values in encoded.items()}
                for row, score in zip(rows, self._forward(batch), strict=True):
                    scores[row] = score
        return scores

    def _tokenized(self, pairs: Sequence[Pair]) -> dict[str, list[list[int]]]:
        """Return the model's inputs by name: one list of ids per pair, without padding."""
        encoded = self._network.tokenizer(
            [query for query, _ in pairs],
            [passage(document) for _, document in pairs],
            truncation="longest_first",
            max_length=self._max_length,
        )
        cut = sum(bool(encoding.overflowing) for encoding in encoded.encodings)
        if cut and not self.truncated:
            logger.warning("a pair is longer than %d tokens; read up to there and counted", self._max_length)
        self.truncated += cut
        return {name: encoded[name] for name in encoded if name != "attention_mask"}

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield row numbers in groups of equal padded length, the longest first, so that memory peaks at once."""
        groups: dict[int, list[int]] = {}
        for row, length in enumerate(lengths):
            groups.setdefault(_padded(length), []).append(row)
        for width in sorted(groups, reverse=True):
            rows = groups[width]
            size = max(_ROWS, self._batch_tokens // width // _ROWS * _ROWS)
            for start in range(0, len(rows), size):
                yield rows[start : start + size]

    def _forward(self, batch: dict[str, list[list[int]]]) -> list[float]:
        """Score pairs of one padded length."""
        import torch

        ids = batch["input_ids"]
        lengths, width = [len(row) for row in ids], _padded(len(ids[0]))
        extra = -len(ids) % _ROWS
        padding = {"input_ids": self._network.tokenizer.pad_token_id or 0}
        features: dict[str, torch.Tensor] = {}
        for name, rows in batch.items():
            filled = [row + [padding.get(name, 0)] * (width - len(row)) for row in rows]
            features[name] = torch.tensor(filled + filled[-1:] * extra, device=self._network.device)
        ends = torch.tensor(lengths + lengths[-1:] * extra, device=self._network.device)
        features["attention_mask"] = (torch.arange(width, device=ends.device) < ends.unsqueeze(1)).long()
        with torch.inference_mode():
            scores = self._network(features)["scores"].float()
            scores = self._network.activation_fn(scores).reshape(-1)
        return scores[: len(ids)].tolist()


class RerankEngine:
    """Another engine's best documents in the order of a cross-encoder; an `Engine` itself.

    Always the same number of documents is ordered, `depth` or the engine's own largest `topk`, so the result for a
    smaller `topk` is the head of the result for a larger one. Scores are the cross-encoder's.
    """

    def __init__(self, engine: Engine, reranker: Reranker, depth: int = RERANK_DEPTH) -> None:
        """Put a rerank stage on an engine, which then belongs to it: `close` closes it.

        Raises:
            ConfigError: `depth` is below 1.
        """
        if depth < 1:
            raise ConfigError(f"rerank depth={depth}; expected at least 1")
        self._engine = engine
        self._reranker = reranker
        inner = engine.info
        self._depth = min(depth, inner.max_topk)
        scoring = partial(EngineThread("rerank").call, reranker.score)
        self._scoring: MicroBatcher[Pair, float] = MicroBatcher(scoring, max_items=_BATCH_PAIRS, window_s=0.0)
        self._info = EngineInfo(
            name=f"{inner.name}+rerank",
            documents=inner.documents,
            max_topk=self._depth,
            corpus=inner.corpus,
            fingerprint=digest("rerank", inner.fingerprint, reranker.fingerprint, self._depth),
            details={**inner.details, "rerank_model": reranker.model, "rerank_depth": self._depth},
        )

    @property
    def info(self) -> EngineInfo:
        """What this is; its fingerprint covers the engine's and the cross-encoder's."""
        return self._info

    def search(self, queries: Sequence[str], topk: int) -> list[SearchResult | RetrieverError]:
        """Return one result per query, in order; see `Engine.search`."""
        check_topk(topk, self._info)
        found = self._engine.search(queries, self._depth)
        documents = [() if isinstance(result, RetrieverError) else result.documents for result in found]
        ranked = rerank(self._reranker, queries, documents, topk)
        return [
            first if isinstance(first, RetrieverError) else second for first, second in zip(found, ranked, strict=True)
        ]

    @property
    def live(self) -> bool:
        """Whether the engine is; see `verl.retrieval.engine.LiveEngine`."""
        return as_live(self._engine) is not None

    async def answer(self, query: str, topk: int) -> SearchResult | RetrieverError:
        """Return the result of one query, if the engine is live; pairs of concurrent calls are scored together."""
        check_topk(topk, self._info)
        live = as_live(self._engine)
        assert live is not None  # else nobody may ask so
        found = await live.answer(query, self._depth)
        if isinstance(found, RetrieverError):
            return found
        scores = await self._scoring.submit([(query, document) for document in found.documents])
        return ordered(query, found.documents, scores, topk)

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()


def rerank(
    reranker: Reranker, queries: Sequence[str], documents: Sequence[Sequence[Document]], topk: int
) -> list[SearchResult | RetrieverError]:
    """Score all pairs together, and return for each query the `topk` best of its own documents."""
    pairs = [(query, document) for query, own in zip(queries, documents, strict=True) for document in own]
    scores = iter(reranker.score(pairs))
    return [
        ordered(query, own, [next(scores) for _ in own], topk) for query, own in zip(queries, documents, strict=True)
    ]


def ordered(
    query: str, documents: Sequence[Document], scores: Sequence[float], topk: int
) -> SearchResult | RetrieverError:
    """Return the `topk` best; equal scores in the order of the documents' ids, then as they came."""
    if not all(math.isfinite(score) for score in scores):
        return RetrieverError("the reranker gave a score that is not finite; check the model")
    order = sorted(range(len(documents)), key=lambda at: (-scores[at], documents[at].id))[:topk]
    return SearchResult(query, tuple(documents[at] for at in order), tuple(float(scores[at]) for at in order))


def passage(document: Document) -> str:
    """Return a document as a model reads it: its title, if it has one, a line break and its text."""
    return f"{document.title}\n{document.text}" if document.title else document.text


def _padded(length: int) -> int:
    """Return the multiple of 16 above `length`: never `length` itself, so that attention always runs with a mask."""
    return (length // _PAD_TO + 1) * _PAD_TO


def _load(model: str, device: str | None) -> CrossEncoder:
    import torch
    from safetensors import SafetensorError
    from sentence_transformers import CrossEncoder

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    try:
        network = CrossEncoder(model, device=device, trust_remote_code=False, model_kwargs={"dtype": dtype})
    # torch asserts that it was built with CUDA
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"reranker {model!r} cannot be loaded on {device} ({reason}); pass --rerank_model with a local folder or a "
            "Hugging Face name that this machine can reach, and a device that is there"
        ) from error
    # A model of another kind would load too, with a head of random weights.
    kinds = getattr(network.config, "architectures", None) or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds) or network.num_labels != 1:
        raise ConfigError(
            f"reranker {model!r} is {', '.join(kinds) or 'of no known kind'} with {network.num_labels} labels; "
            "expected a cross-encoder (...ForSequenceClassification) with one"
        )
    return network.eval()


def _max_length(network: CrossEncoder, wanted: int) -> int:
    """Return the longest pair in tokens whose padded length the model has positions for."""
    positions = network.max_seq_length or wanted + 1
    return min(wanted, positions // _PAD_TO * _PAD_TO - 1)


def _fingerprint(network: CrossEncoder, max_length: int) -> str:
    import torch

    weights = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    tokenizer = network.tokenizer.backend_tokenizer.to_str()
    return digest(weights.hexdigest(), tokenizer, max_length, str(network.activation_fn))
