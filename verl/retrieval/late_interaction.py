"""Order documents anew by late interaction: one vector per token, and for every query token its best match (MaxSim).

Models are those of sentence-transformers' `MultiVectorEncoder`: its own, PyLate's and the published ColBERT checkpoints
(an encoder with a linear projection), from a local folder. Scoring is exact over an engine's candidates;
nothing is approximated, and no index of token vectors is kept. Method: Khattab and Zaharia 2020, "ColBERT: Efficient
and Effective Passage Search via Contextualized Late Interaction over BERT".
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from verl.errors import ConfigError
from verl.retrieval.engine import digest
from verl.retrieval.rerank import Pair, passage

if TYPE_CHECKING:
    import torch
    from sentence_transformers import MultiVectorEncoder

_MARKS = ("modules.json", "artifact.metadata")
"""Files that a saved late-interaction model has, the published ColBERT checkpoints the second. To a folder with neither
the library would add a projection of random weights."""
_BATCH = 32


class LateInteractionReranker:
    """A `Reranker` whose scores are sums of best matches. May be called from several threads.

    Every text is encoded once a call, alone in its batch's padding mask, so a score depends on the other pairs up to
    rounding at most.
    """

    def __init__(self, model: str, device: str | None = None) -> None:
        """Load a model.

        Args:
            model: local folder of a late-interaction model.
            device: a torch device; the library's choice when None.

        Raises:
            ConfigError: the model cannot be loaded.
        """
        self.model = model
        self._network = _load(model, device)
        self._fingerprint = _fingerprint(self._network)
        self._lock = threading.Lock()

    @property
    def fingerprint(self) -> str:
        """Of weights, tokenizer and prompts; not of the machine."""
        return self._fingerprint

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """Return one score per pair, higher is better."""
        if not pairs:
            return []
        queries = list(dict.fromkeys(query for query, _ in pairs))
        texts = list(dict.fromkeys(passage(document) for _, document in pairs))
        with self._lock:
            asked = dict(zip(queries, self._network.encode_query(queries, batch_size=_BATCH), strict=True))
            read = dict(zip(texts, self._network.encode_document(texts, batch_size=_BATCH), strict=True))
        return [maxsim(asked[query], read[passage(document)]) for query, document in pairs]


def maxsim(query: torch.Tensor, document: torch.Tensor) -> float:
    """Sum over the query's tokens of the best inner product with any of the document's.

    Args:
        query: (Q, D) float
        document: (T, D) float, at least one token
    """
    return float((query.float() @ document.float().T).max(dim=1).values.sum())


def _load(model: str, device: str | None) -> MultiVectorEncoder:
    from safetensors import SafetensorError
    from sentence_transformers import MultiVectorEncoder

    if not any((Path(model) / mark).is_file() for mark in _MARKS):
        raise ConfigError(
            f"late-interaction model {model!r} has neither {' nor '.join(_MARKS)}; pass --rerank_model with the local "
            "folder of a ColBERT-style model"
        )
    try:
        return MultiVectorEncoder(model, device=device, trust_remote_code=False).eval()
    # torch asserts that it was built with CUDA
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"late-interaction model {model!r} cannot be loaded ({reason}); pass --rerank_model with the local folder "
            "of a ColBERT-style model, and a device that is there"
        ) from error


def _fingerprint(network: MultiVectorEncoder) -> str:
    import torch

    weights = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest(weights.hexdigest(), network.tokenizer.backend_tokenizer.to_str(), network.prompts)
