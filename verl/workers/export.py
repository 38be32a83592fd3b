"""Turn sharded parameters into full ones: for the rollout engine and for Hugging Face folders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from verl.errors import ConfigError
from verl.workers.heads import HEAD_FILE, HEAD_NAME, LogProbModel, ValueModel
from verl.workers.model import gathered, to_shards


def full_weights(model: LogProbModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of a sharded model in full under the name it has in checkpoints; tied ones once.

    All ranks iterate in step.

    Raises:
        ConfigError: transformers merges this model's weights when it loads them (mixtures of experts), so they are
            not what a checkpoint or a rollout engine calls them.
    """
    if any(isinstance(rule, WeightConverter) for rule in get_model_conversion_mapping(model.causal_lm)):
        kind = model.causal_lm.config.model_type
        raise ConfigError(
            f"{kind} keeps its weights in another layout than its checkpoints; exporting it and sending it to a "
            "rollout engine are not supported: use a dense model"
        )
    for name, value in gathered(model, dtype):
        yield _hf_name(name), value


def weight_shapes(model: LogProbModel, dtype: torch.dtype) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Return what `full_weights` will yield, without gathering anything."""
    to_shards(model)
    return [(_hf_name(name), dtype, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


def export_causal_lm(
    model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]], folder: Path, tokenizer_path: str, writes: bool
) -> None:
    """Write a causal language model with config, safetensors and tokenizer.

    Args:
        weights: as of `full_weights`; the rank that writes holds all of them on the CPU at once.
        writes: whether this rank writes; the others only take part in gathering.
    """
    state = _collect(weights, writes)
    if writes:
        _save(AutoModelForCausalLM, model, state, folder, tokenizer_path)


def export_value_model(
    model: ValueModel, weights: Iterable[tuple[str, Tensor]], folder: Path, tokenizer_path: str, writes: bool
) -> None:
    """Write a critic: its body as `export_causal_lm` would, its head in a file of its own."""
    state = _collect(weights, writes)
    if not writes:
        return
    head = state.pop(HEAD_NAME)
    body = {name.removeprefix("body."): value for name, value in state.items()}
    _save(AutoModel, model.body, body, folder, tokenizer_path)
    save_file({HEAD_NAME: head.float()}, folder / HEAD_FILE)


def _hf_name(name: str) -> str:
    return name.removeprefix("causal_lm.")


def _collect(weights: Iterable[tuple[str, Tensor]], keeps: bool) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, value in weights:
        if keeps:
            state[name] = value.cpu().contiguous()
    return state


def _save(
    auto: type[AutoModel] | type[AutoModelForCausalLM],
    model: PreTrainedModel,
    state: dict[str, Tensor],
    folder: Path,
    tokenizer_path: str,
) -> None:
    # FSDP has replaced the model's class, and its config would state float32: a skeleton of the plain class without
    # weights writes the files.
    dtype = next(iter(state.values())).dtype
    with torch.device("meta"):
        skeleton = auto.from_config(model.config, dtype=dtype)
    skeleton.config.use_cache = True
    if getattr(model, "generation_config", None) is not None and skeleton.can_generate():
        skeleton.generation_config = model.generation_config
    skeleton.save_pretrained(folder, state_dict=state)
    AutoTokenizer.from_pretrained(tokenizer_path).save_pretrained(folder)
