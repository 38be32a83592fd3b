"""Text to vectors with a transformers encoder, as `verl.retrieval.encoder_spec` says each family wants it."""

from __future__ import annotations

import importlib.util
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedModel

from verl.errors import ConfigError, RetrieverError
from verl.retrieval.encoder_folder import read_folder
from verl.retrieval.encoder_network import Head, Network, TransformersNetwork, load_model, positions
from verl.retrieval.encoder_packed import PackedNetwork, can_pack
from verl.retrieval.encoder_spec import ENCODERS, EncoderConfig, EncoderSpec, PassageFormat, Setting, check_overrides
from verl.typed import Decoder
from verl.types import Document

logger = logging.getLogger(__name__)

_BATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}
_CHUNK = {"cpu": 512, "cuda": 8192}


@dataclass(frozen=True, slots=True)
class Tokens:
    """Texts as token ids, cut to the encoder's length; `truncated` counts those that were longer."""

    ids: tuple[Sequence[int], ...]
    truncated: int


@dataclass(frozen=True, slots=True)
class TextSide:
    """What serves one kind of text: a tokenizer that cuts at the encoder's length, and the network on every device."""

    tokenizer: Tokenizer
    networks: tuple[Network, ...]


class Encoder:
    """A loaded encoder.

    On a CPU a text's vector does not depend on the texts around it, measured not even in the last bit, nor on the
    number of threads where `PackedNetwork` serves; on a GPU it agrees up to the rounding of the model's dtype.

    Attributes:
        spec: what it computes, with everything that the model folder said and the user asked for.
        width: numbers of a vector, D.
        precision: in which numbers the model computes, for example `float32`.
        chunk_documents: how many passages a caller with many should hand over at once.
        truncated: how many texts were cut at `spec.max_length` so far.
    """

    def __init__(
        self, queries: TextSide, passages: TextSide, spec: EncoderSpec, config: EncoderConfig, device: torch.device
    ) -> None:
        self._queries = queries
        self._passages = passages
        self._max_texts = config.batch_size
        self._max_tokens = config.batch_tokens or _BATCH_TOKENS.get(device.type, _BATCH_TOKENS["cuda"])
        self.spec = spec
        self.width = queries.networks[0].width
        self.precision = _precision(config, device)
        self.chunk_documents = _CHUNK.get(device.type, _CHUNK["cuda"]) * len(passages.networks)
        self.truncated = 0

    def encode_queries(self, queries: Sequence[str]) -> np.ndarray:
        """Return the vectors of `queries`, (queries, D) float32.

        Raises:
            RetrieverError: a text is no valid Unicode, or its vector is not finite.
        """
        tokens = _tokenize(self._queries.tokenizer, [self.spec.query_prefix + query for query in queries])
        return self._encode(self._queries, tokens, "query")

    def encode_passages(self, passages: Sequence[str]) -> np.ndarray:
        """Return the vectors of `passages` (each as `Document.contents`), (passages, D) float32.

        Raises:
            RetrieverError: a text is no valid Unicode, or its vector is not finite.
        """
        return self.encode_tokens(self.tokenize_passages(passages))

    def tokenize_passages(self, passages: Sequence[str]) -> Tokens:
        """Do the part of `encode_passages` that needs no network; may run in another thread meanwhile."""
        prefix, form = self.spec.passage_prefix, self.spec.passage_format
        return _tokenize(self._passages.tokenizer, [_passage_input(prefix, text, form) for text in passages])

    def encode_tokens(self, tokens: Tokens) -> np.ndarray:
        """Return the vectors of tokenized passages, (passages, D) float32."""
        return self._encode(self._passages, tokens, "passage")

    def _encode(self, side: TextSide, tokens: Tokens, kind: str) -> np.ndarray:
        if tokens.truncated and not self.truncated:
            logger.warning("a %s is longer than %d tokens; read up to there and counted", kind, self.spec.max_length)
        self.truncated += tokens.truncated
        vectors = np.empty((len(tokens.ids), self.width), dtype=np.float32)
        lengths = [len(text) for text in tokens.ids]
        waiting = deque(batches(lengths, self._max_texts, self._max_tokens, side.networks[0].equal_lengths))

        def work(network: Network) -> None:
            while waiting:
                try:
                    rows = waiting.popleft()
                except IndexError:  # another device took the last one
                    return
                vectors[rows] = network([tokens.ids[row] for row in rows])

        try:
            if len(side.networks) == 1 or len(waiting) < 2:
                work(side.networks[0])
            else:
                with ThreadPoolExecutor(len(side.networks)) as pool:
                    list(pool.map(work, side.networks))
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"the device has no memory for {self._max_tokens} tokens of a batch ({error}); lower --batch_tokens"
            ) from error
        self._refuse_infinite(vectors, kind)
        return vectors

    def _refuse_infinite(self, vectors: np.ndarray, kind: str) -> None:
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise RetrieverError(
                f"{len(bad)} of {len(vectors)} vectors are not finite (the first is of {kind} {bad[0]}), computed in "
                f"{self.precision}; use dtype bfloat16 or float32, or another model"
            )


def batches(lengths: Sequence[int], max_texts: int, max_tokens: int, equal: bool) -> Iterator[list[int]]:
    """Yield rows in groups of like length, the longest first, so that memory peaks at once.

    Args:
        lengths: tokens of each row's text.
        max_tokens: bounds texts times the longest text of a group; a longer text is a group by itself.
        equal: put only texts of one length together.
    """
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        longest = lengths[group[0]] if group else 0
        full = len(group) == max_texts or (len(group) + 1) * longest > max_tokens
        if group and (full or (equal and lengths[row] != longest)):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def load_encoder(
    name: str,
    model: str | None = None,
    config: EncoderConfig | None = None,
    overrides: Mapping[str, Setting] | None = None,
) -> Encoder:
    """Load an encoder.

    Args:
        name: a key of `verl.retrieval.encoder_spec.ENCODERS`; says how the model is used.
        model: path or Hugging Face name; the spec's own model when None. Where queries and passages have a model each,
            both, with a comma between them.
        overrides: fields of `EncoderSpec` that replace the named encoder's, and what a model folder says of itself.

    Raises:
        ConfigError: unknown name or field, a device that is not there, or a model that cannot be loaded.
    """
    config = config or EncoderConfig()
    spec, sources = _resolve(name, model, overrides or {})
    devices = _devices(config)
    dtype = getattr(torch, _precision(config, devices[0]))
    try:
        bodies = {
            source: [load_model(source, dtype).to(device) for device in devices] for source in dict.fromkeys(sources)
        }
        limits = [positions(found[0]) or spec.max_length for found in bodies.values()]
        spec = replace(spec, max_length=min(spec.max_length, *limits))
        sides = {
            source: TextSide(_load_tokenizer(source, spec), tuple(_network(body, spec) for body in found))
            for source, found in bodies.items()
        }
    except ConfigError as error:
        raise ConfigError(f"encoder {name}: {error}") from error
    queries, passages = (sides[source] for source in sources)
    if queries.networks[0].width != passages.networks[0].width:
        raise ConfigError(
            f"encoder {name}: queries become {queries.networks[0].width} numbers and passages "
            f"{passages.networks[0].width}; pass two models that belong together"
        )
    return Encoder(queries, passages, spec, config, devices[0])


def default_model(spec: EncoderSpec) -> str:
    """Return the folder of the spec's model inside its package where that is installed, else its Hugging Face name."""
    found = importlib.util.find_spec(spec.package) if spec.package else None
    for location in (found.submodule_search_locations or []) if found else []:
        folder = Path(location) / "model"
        if (folder / "config.json").is_file():
            return str(folder)
    return spec.model


def _resolve(name: str, model: str | None, overrides: Mapping[str, Setting]) -> tuple[EncoderSpec, tuple[str, str]]:
    """Return the spec with everything decided, and the models of queries and passages."""
    if name not in ENCODERS:
        raise ConfigError(f"encoder {name!r} is unknown; expected one of {', '.join(ENCODERS)}")
    check_overrides(overrides)
    if "model" in overrides and "package" not in overrides:
        overrides = {**overrides, "package": ""}  # which carries another model
    spec = Decoder(error=ConfigError).decode(EncoderSpec, overrides, "encoder", ENCODERS[name])
    if model:
        spec = _with_model(name, spec, model)
    source = default_model(spec)
    if not source:
        raise ConfigError(f"encoder {name} has no model of its own; pass one with --retriever_model")
    if spec.describes_itself:
        described = replace(spec, **read_folder(source), describes_itself=False)
        said = {key: value for key, value in overrides.items() if key != "describes_itself"}
        spec = Decoder(error=ConfigError).decode(EncoderSpec, said, "encoder", described)
    return spec, (source, spec.passage_model or source)


def _with_model(name: str, spec: EncoderSpec, model: str) -> EncoderSpec:
    if not spec.passage_model:
        return replace(spec, model=model, package="")
    models = model.split(",")
    if len(models) != 2 or not all(models):
        raise ConfigError(
            f"encoder {name} has one model for queries and one for passages, --retriever_model {model!r} was given; "
            "expected both, with a comma between them"
        )
    return replace(spec, model=models[0], passage_model=models[1], package="")


def _network(model: PreTrainedModel, spec: EncoderSpec) -> Network:
    """Return the fastest network that computes what `model` does."""
    return PackedNetwork(model, Head.of(spec)) if can_pack(model) else TransformersNetwork(model, Head.of(spec))


def _load_tokenizer(source: str, spec: EncoderSpec) -> Tokenizer:
    try:
        loaded = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"the tokenizer of model {source!r} cannot be loaded ({reason}); pass --retriever_model with a complete "
            "model"
        ) from error
    tokenizer = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(tokenizer, Tokenizer):
        raise ConfigError(f"the tokenizer of model {source!r} is a {type(loaded).__name__}; expected a fast tokenizer")
    special = tokenizer.num_special_tokens_to_add(spec.passage_format == "pair")
    if not 1 <= special < spec.max_length:
        raise ConfigError(
            f"the tokenizer of model {source!r} adds {special} tokens to a text of at most {spec.max_length}; expected "
            "at least one, so that an empty text has a vector, and room for the text"
        )
    tokenizer.no_padding()
    tokenizer.enable_truncation(spec.max_length, strategy="longest_first", direction=loaded.truncation_side)
    return tokenizer


def _tokenize(tokenizer: Tokenizer, texts: Sequence[str | tuple[str, str]]) -> Tokens:
    try:
        encodings = tokenizer.encode_batch_fast(list(texts))
    except TypeError as error:  # what the tokenizer says to half of a surrogate pair
        raise RetrieverError(f"one of {len(texts)} texts is no valid Unicode ({error}); expected text") from error
    return Tokens(tuple(encoding.ids for encoding in encodings), sum(bool(item.overflowing) for item in encodings))


def _passage_input(prefix: str, contents: str, form: PassageFormat) -> str | tuple[str, str]:
    if form == "contents":
        return prefix + contents
    document = Document.from_contents("", contents)
    parts = [part for part in (document.title, document.text) if part]
    if form == "pair" and len(parts) == 2:
        return prefix + parts[0], parts[1]
    return prefix + " ".join(parts)


def _devices(config: EncoderConfig) -> tuple[torch.device, ...]:
    """Return the configured devices, once it is certain that something can be put there."""
    if config.device is None:
        return (torch.device("cuda:0" if torch.cuda.is_available() else "cpu"),)
    try:
        names = config.device.split(",")
        if config.device == "cuda:all":
            names = [f"cuda:{number}" for number in range(max(torch.cuda.device_count(), 1))]
        devices = tuple(torch.empty(1, device=name.strip()).device for name in names)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"encoder device={config.device!r} is not there ({reason}); pass cpu, cuda:N, several with commas between "
            "them, or cuda:all"
        ) from error
    if len({device.type for device in devices}) > 1:
        raise ConfigError(f"encoder device={config.device!r} mixes kinds of devices; expected one kind")
    return devices


def _precision(config: EncoderConfig, device: torch.device) -> str:
    if config.dtype != "auto":
        return config.dtype
    return "float32" if device.type == "cpu" else "float16"
