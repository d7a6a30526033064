"""Qwen2 (Yang et al., 2024) as somebody outside the library would add it: a Llama with a few differences."""

from __future__ import annotations

from dataclasses import replace

from transformer_fast.models import Architecture
from transformer_fast.models.families import FAMILIES
from transformer_fast.models.families.family import Tensors, Values


def read(values: Values, tensors: Tensors) -> Architecture:
    """From a Qwen2 config.json: biases on q, k and v, and a window on the layers that ``layer_types`` names."""
    names = [name.replace("Qwen2", "Llama") for name in values.get("architectures") or ["Qwen2ForCausalLM"]]
    llama = FAMILIES["llama"].read({**values, "architectures": names}, tensors)
    window = values.get("sliding_window") if values.get("use_sliding_window") else None
    number, first = values["num_hidden_layers"], values.get("max_window_layers", 28)
    # Files of before layer_types: the window is on the layers from max_window_layers on.
    kinds = values.get("layer_types") or ["full_attention"] * min(first, number) + ["sliding_attention"] * (
        number - first
    )
    layers = tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")
    assert llama.decoder is not None
    stack = replace(llama.decoder, biases=("q", "k", "v"), sliding_window=window, sliding_layers=layers)
    return replace(llama, decoder=stack, values=values)


QWEN2 = replace(FAMILIES["llama"], model_type="qwen2", read=read)
