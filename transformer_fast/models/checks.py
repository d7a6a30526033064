"""What a model's arguments must be. Ids are looked at on the CPU only: a GPU would have to be waited for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

#: Arguments of ``transformers``' models that change nothing with these values, and what serves in place of others.
_OTHERS: dict[str, tuple[tuple[object, ...], str]] = {
    "return_dict": ((None, True), "True: results have names, and are reached by attribute or key"),
    "output_attentions": ((None, False), "False: fused attention has no weights to give out"),
    "encoder_outputs": ((None,), "past_key_values of a call with use_cache=True, which spares the encoder"),
    "inputs_embeds": ((None,), "input_ids"),
    "decoder_inputs_embeds": ((None,), "decoder_input_ids"),
    "head_mask": ((None,), "None: all heads take part"),
    "use_cache": ((None, False), "False: an encoder keeps nothing"),
    "cache_position": ((None,), "None: a cache knows its places"),
    "logits_to_keep": ((None, 0), "0: all logits, or next_token_logits() for the last ones only"),
}


def labels_of(given: Mapping[str, Any], known: tuple[str, ...], owner: str) -> dict[str, Tensor]:
    """The labels among the arguments that a model has no names for; TypeError on one that nobody knows."""
    for name in sorted(set(given) & set(_OTHERS)):
        harmless, allowed = _OTHERS[name]
        value = given[name]
        if isinstance(value, Tensor) or not any(value is one for one in harmless):
            shown = f"a {type(value).__name__}" if isinstance(value, (Tensor, tuple, Mapping)) else repr(value)
            raise TypeError(f"{name}={shown} is not supported; allowed: {allowed}")
    unknown = sorted(set(given) - set(known) - set(_OTHERS))
    if unknown:
        raise TypeError(f"{owner} got {', '.join(unknown)}; labels that its head takes: {', '.join(known) or 'none'}")
    return {name: given[name] for name in known if given.get(name) is not None}


def check_inputs(wanted: str, value: object, owner: str, **others: object) -> None:
    """TypeError unless ``wanted`` is given, and none of ``others``, which the model would not read."""
    if strangers := [name for name, other in others.items() if other is not None]:
        raise TypeError(f"{', '.join(strangers)} given to a model of {owner}, which reads {wanted}")
    if value is None:
        raise TypeError(f"{wanted} is None; allowed: {owner}")


def check_ids(name: str, ids: Tensor, **grids: Tensor | None) -> None:
    """Ids are ``(batch, seqlen)``, and what goes with them has their shape: else rows would mix between sequences."""
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} is {kind}; allowed: a tensor of whole numbers (batch, seqlen)")
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(ids.shape)}; allowed: (batch, seqlen) with at least one token")
    for other, grid in grids.items():
        if grid is not None and grid.shape != ids.shape:
            raise ValueError(f"{other} has shape {tuple(grid.shape)}; allowed: {tuple(ids.shape)}, as {name}")


def check_range(name: str, ids: Tensor, size: int) -> None:
    """Ids that are looked up are rows of their table, which has ``size``."""
    if ids.device.type != "cpu" or ids.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(end) for end in ids.aminmax())
    if low < 0 or high >= size:
        raise ValueError(f"{name} has {low if low < 0 else high}; allowed: 0 to {size - 1}")
