"""Load any Hugging Face causal language model, as a policy or as the body of a critic, and shard it with FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from verl.errors import CheckpointError, ConfigError
from verl.workers.heads import HEAD_FILE, HEAD_NAME, LogProbModel, ValueModel
from verl.workers.ranks import Ranks

# Logits of these models are changed after the output layer, which the chunked log-probabilities would miss.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@dataclass(frozen=True)
class ModelConfig:
    """A model and how it is computed.

    Attributes:
        path: folder (or hub name) of a Hugging Face causal language model; for a critic also one of its exports.
        dtype: what forward and backward compute in. Master weights, reductions, log-probabilities and values are
            float32 either way.
        attention: implementation of the attention.
        gradient_checkpointing: recompute each layer in the backward pass instead of keeping its activations.
        param_offload: keep parameters, gradients and optimizer state on the CPU and stream each layer to the GPU.
        optimizer_offload: keep the optimizer state on the CPU except while it steps.
        logits_chunk: tokens whose logits exist at one time.
    """

    path: str
    dtype: Literal["bf16", "fp32"] = "bf16"
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    gradient_checkpointing: bool = False
    param_offload: bool = False
    optimizer_offload: bool = False
    logits_chunk: int = 1024

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty; give the folder of a Hugging Face causal language model")
        if self.logits_chunk < 1:
            raise ValueError(f"logits_chunk={self.logits_chunk}; expected at least 1 token")
        if self.attention == "flash_attention_2" and self.dtype != "bf16":
            raise ValueError(f"attention=flash_attention_2 computes in bf16 only, not in {self.dtype}; use sdpa")

    @property
    def compute_dtype(self) -> torch.dtype:
        """The torch name of `dtype`."""
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32


def load_causal_lm(config: ModelConfig) -> LogProbModel:
    """Load the model with float32 weights on the CPU.

    Every rank of a node does so before it keeps its shard, which takes 4 bytes per parameter and rank of host memory.

    Raises:
        ConfigError: there is no such model, or its logits are post-processed in a way that is not supported.
    """
    model = _load(AutoModelForCausalLM, config)
    changed = [name for name in _LOGIT_CHANGES if getattr(model.config, name, None) not in (None, 1.0)]
    if changed:
        raise ConfigError(
            f"{config.path}: {model.config.model_type} changes its logits ({', '.join(changed)}), which the chunked "
            "log-probabilities do not do; use a model of the Qwen2, Qwen3, Llama or Mistral kind"
        )
    return LogProbModel(model, config.logits_chunk)


def load_value_model(config: ModelConfig) -> ValueModel:
    """Load the body of a causal language model with a value head, both float32 on the CPU.

    The head is zero, so that the first values are 0 whatever the body says, unless `config.path` is the export of a
    critic, which has one.

    Raises:
        ConfigError: there is no such model.
        CheckpointError: the critic's head does not fit the body.
    """
    model = ValueModel(_load(AutoModel, config))
    head_file = Path(config.path) / HEAD_FILE
    if not head_file.is_file():
        return model
    head = load_file(head_file).get(HEAD_NAME)
    if head is None or head.shape != model.head.weight.shape:
        found = None if head is None else tuple(head.shape)
        raise CheckpointError(f"{head_file}: {HEAD_NAME} is {found}; expected {tuple(model.head.weight.shape)}")
    with torch.no_grad():
        model.head.weight.copy_(head)
    return model


def shard(model: LogProbModel | ValueModel, config: ModelConfig, ranks: Ranks) -> FSDPModule:
    """Shard `model` in place over the ranks with FSDP2: each decoder layer, then the rest, as one group each.

    Parameters stay float32; with bf16 each group is cast when it is gathered, and gradients are reduced in float32.

    Raises:
        ConfigError: the model does not say which of its modules are its layers.
    """
    if config.gradient_checkpointing:
        model.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    offload = CPUOffloadPolicy() if config.param_offload and ranks.device.type == "cuda" else OffloadPolicy()
    precise = MixedPrecisionPolicy(reduce_dtype=torch.float32, output_dtype=torch.float32)
    mixed = MixedPrecisionPolicy(param_dtype=config.compute_dtype, reduce_dtype=torch.float32)
    for layer in _decoder_layers(model.backbone):
        fully_shard(layer, mesh=ranks.mesh, mp_policy=mixed, offload_policy=offload)
    if isinstance(model, ValueModel):
        fully_shard(model.head, mesh=ranks.mesh, mp_policy=precise, offload_policy=offload)
    fully_shard(model, mesh=ranks.mesh, mp_policy=mixed, offload_policy=offload)
    # FSDP moves parameters; buffers (the rotary frequencies) are ours to move.
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(
                name, buffer.to(ranks.device), persistent=name not in module._non_persistent_buffers_set
            )
    return cast(FSDPModule, model)


def gathered(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter in full, one at a time, on the rank's device; all ranks must iterate in step.

    Tied parameters come once.
    """
    to_shards(model)
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if isinstance(value, DTensor):
            # Shards that rest on the CPU are gathered on the device too: over gloo it would take far longer, and a
            # rollout engine receives from GPU memory. Cast first, so that no more than needed travels.
            value = value.to(device=value.device_mesh.device_type, dtype=dtype).full_tensor()
        yield name, value.to(dtype)


def to_shards(model: nn.Module) -> None:
    """Free the full parameters that a forward pass without a backward pass left in the root group."""
    if isinstance(model, FSDPModule):
        model.reshard()


class Residence:
    """Where the shards of a model are: on the device, or on the CPU while another program needs the device."""

    def __init__(self, model: nn.Module, config: ModelConfig, ranks: Ranks) -> None:
        """Take note of a sharded `model`, which is where it computes."""
        self._model = model
        self._device = ranks.device
        # Parameters that FSDP streams from the CPU are at rest there already.
        self._moves = ranks.device.type != "cpu" and not config.param_offload
        self._asleep = False

    def sleep(self) -> None:
        """Send the shards to the CPU and give the device's memory back."""
        if self._moves and not self._asleep:
            to_shards(self._model)
            self._model.to("cpu")
            torch.cuda.empty_cache()
            self._asleep = True

    def wake(self) -> None:
        """Bring the shards back."""
        if self._asleep:
            self._model.to(self._device)
            self._asleep = False


def _load(auto: type[AutoModel] | type[AutoModelForCausalLM], config: ModelConfig) -> PreTrainedModel:
    try:
        settings = AutoConfig.from_pretrained(config.path)
        model = auto.from_pretrained(
            config.path, config=settings, dtype=torch.float32, attn_implementation=config.attention
        )
    except (OSError, ValueError, ImportError) as cause:
        raise ConfigError(f"model {config.path!r} does not load: {cause}") from cause
    model.config.use_cache = False
    return model


def _decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    kinds = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} names no layer class in _no_split_modules (found {sorted(kinds)}); "
            "FSDP cannot tell its layers; use another model"
        )
    return layers
