"""What runs inside vLLM's worker processes; vLLM mixes the class into its worker (`worker_extension_cls`)."""

from __future__ import annotations

from safetensors import safe_open


class WeightReload:
    """Adds weight replacement from a file to vLLM's worker."""

    def reload_from_file(self, path: str) -> None:
        """Replace the model's weights by those in the safetensors file at `path` (Hugging Face names).

        vLLM's own `reload_weights` undoes and redoes the repacking that a plain `load_weights` would trip over.
        """
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            self.reload_weights(weights_iterator=((name, file.get_tensor(name)) for name in names))  # type: ignore[attr-defined]
