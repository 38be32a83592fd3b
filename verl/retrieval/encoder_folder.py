"""Read from a model folder of sentence-transformers how the model is used: pooling, scaling, prompts, length.

Only the small JSON files are read, and only what this project can reproduce is accepted: a transformer, one way of
pooling, and perhaps a normalisation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from verl.errors import ConfigError
from verl.retrieval.encoder_spec import Pooling, Setting
from verl.typed import Decoder

_MODULES = "modules.json"
_POOLING: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "max": "max", "lasttoken": "last"}
_OLD_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_PASSAGE_PROMPTS = ("document", "passage", "corpus")
_NO_LIMIT = 1_000_000
"""Tokenizers without a limit write a number far above this one."""


def read_folder(source: str) -> dict[str, Setting]:
    """Return the fields of `EncoderSpec` that a sentence-transformers model says about itself.

    Args:
        source: a local folder or a Hugging Face name.

    Raises:
        ConfigError: there is no such description, or it asks for something that is not supported.
    """
    modules = _modules(source)
    name = "config_sentence_transformers.json"
    config = _mapping(source, name)
    prompts = _decode(dict[str, str | None], config.get("prompts") or {}, f"{source}: {name}: prompts")
    settings: dict[str, Setting] = {
        "query_prefix": prompts.get("query") or "",
        "passage_prefix": next((prompts[key] for key in _PASSAGE_PROMPTS if prompts.get(key)), ""),
        "pooling": _pooling(source, modules["Pooling"]),
        # The index ranks by inner product: a model that is meant for the cosine is scaled for it.
        "normalize": "Normalize" in modules or config.get("similarity_fn_name") == "cosine",
    }
    length = _max_length(source)
    return settings if length is None else {**settings, "max_length": length}


def _modules(source: str) -> dict[str, str]:
    """Return the folder of every module by the name of its class."""
    listed = _decode(list[dict[str, Any]], _load(source, _MODULES, required=True), f"{source}: {_MODULES}")
    modules = {str(entry.get("type")).rpartition(".")[2]: str(entry.get("path", "")) for entry in listed}
    unknown = set(modules) - {"Transformer", "Pooling", "Normalize", "Dropout"}
    if unknown or len(modules) != len(listed) or not {"Transformer", "Pooling"} <= set(modules):
        raise ConfigError(
            f"{source}: {_MODULES} lists {', '.join(modules) or 'nothing'}; supported are a Transformer, a Pooling and "
            "a Normalize, once each"
        )
    if modules["Transformer"]:
        raise ConfigError(
            f"{source}: {_MODULES} has the transformer in the subfolder {modules['Transformer']!r}; pass that folder "
            "with --retriever_name custom and say the rest with --encoder_spec"
        )
    return modules


def _pooling(source: str, folder: str) -> Pooling:
    name = f"{folder}/config.json"
    config = _mapping(source, name, required=True)
    modes = config.get("pooling_mode", [mode for key, mode in _OLD_POOLING.items() if config.get(key)])
    modes = _decode(list[str], [modes] if isinstance(modes, str) else modes, f"{source}: {name}: pooling_mode")
    if len(modes) != 1 or modes[0] not in _POOLING or config.get("include_prompt") is False:
        raise ConfigError(
            f"{source}: {name} asks for pooling {modes} with include_prompt={config.get('include_prompt', True)}; "
            f"supported is one of {', '.join(_POOLING)}, with the prompt"
        )
    return _POOLING[modes[0]]


def _max_length(source: str) -> int | None:
    """Return the length in tokens that texts are cut at; None where nothing is said about it."""
    transformer = _mapping(source, "sentence_bert_config.json")
    if transformer.get("do_lower_case"):
        raise ConfigError(f"{source}: sentence_bert_config.json asks for do_lower_case, which is not supported")
    length = transformer.get("max_seq_length") or _mapping(source, "tokenizer_config.json").get("model_max_length")
    return length if isinstance(length, int) and 0 < length < _NO_LIMIT else None


def _decode(kind: Any, value: object, path: str) -> Any:
    return Decoder(error=ConfigError).decode(kind, value, path)


def _mapping(source: str, name: str, required: bool = False) -> dict[str, Any]:
    """Read a JSON file that holds an object; an optional one that is not there is empty."""
    return _decode(dict[str, Any], _load(source, name, required) or {}, f"{source}: {name}")


def _load(source: str, name: str, required: bool = False) -> object:
    """Read a JSON file of the model; an optional one that is not there is None."""
    path = Path(source) / name if Path(source).is_dir() else _fetch(source, name)
    if path is None or not path.is_file():
        if not required:
            return None
        raise ConfigError(
            f"{source} has no {name}, so it does not say how it is used; pass a sentence-transformers model, or "
            "--retriever_name custom and --encoder_spec"
        )
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); fetch the model again") from error


def _fetch(source: str, name: str) -> Path | None:
    """Return the file of a Hugging Face model, None where the model has no such file.

    Raises:
        ConfigError: the model cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, name))
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"model {source!r}: {name} is not on this machine and cannot be fetched; pass --retriever_model with a "
            "local folder"
        ) from error
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"model {source!r} cannot be fetched ({reason}); pass --retriever_model with a local folder or a Hugging "
            "Face name that this machine can reach"
        ) from error
