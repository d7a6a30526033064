"""Padding that is not computed: the layers of a transformers model run on the tokens of a padded batch alone.

A layer treats each token by itself but in attention, which takes sequences one after the other as well as padded
(:func:`transformer_fast.attention_varlen`). So each layer is given the tokens packed, (1, tokens, d), and what it
returns is put back in place, (batch, seqlen, d), with 0 where padding is. Model code sees nothing of it.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from ..masks import cu_seqlens_from_mask, repad, unpad
from ..ops import is_watched
from ..spec import UnsupportedError
from .huggingface import attention_forward, register_with_transformers, weights_wanted
from .huggingface_masks import IntervalMask
from .swap import Swapped, is_swapped, own_class, swapped

_Module = TypeVar("_Module", bound=nn.Module)

#: Families of transformers whose layers treat tokens by themselves but in attention through the interface: encoders,
#: encoder-decoders (of which the encoders), and decoders.
FAMILIES = (
    "bert", "bert_generation", "camembert", "electra", "ernie", "distilbert", "eurobert", "jina_embeddings_v3",
    "modernbert", "nomic_bert", "roberta", "roberta_prelayernorm", "xlm_roberta", "xlm_roberta_xl",
    "bart", "blenderbot", "marian", "mbart", "pegasus", "plbart",
    "biogpt", "cohere", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3", "glm", "gpt2", "gpt_bigcode",
    "gpt_neox", "granite", "helium", "llama", "mistral", "olmo", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3",
    "smollm3", "starcoder2",
)  # fmt: skip
#: Arguments of a layer that have a row for each token, (batch or 1, seqlen, ...), or are a tuple of such.
_ROWS = ("hidden_states", "position_embeddings", "position_ids")
#: Tensors that models hand on to layers, which have no use for them.
_UNUSED = ("cache_position", "num_items_in_batch", "token_type_ids")
_CACHES = ("past_key_values", "layer_past")


class Packing(NamedTuple):
    """Where the tokens of a padded batch are, and the mask for them one after the other."""

    places: Tensor  # int64 (tokens,), of the batch * seqlen
    shape: tuple[int, int]  # (batch, seqlen)
    mask: IntervalMask

    def packed(self, rows: Any) -> Any:
        """(batch or 1, seqlen, ...) to (1, tokens, ...)."""
        if isinstance(rows, tuple):
            return tuple(self.packed(part) for part in rows)
        return unpad(rows.expand(*self.shape, *rows.shape[2:]), self.places)[None]

    def padded(self, rows: Tensor) -> Tensor:
        """(1, tokens, ...) to (batch, seqlen, ...), 0 at padding."""
        return repad(rows[0], self.places, *self.shape)


def packing_of(mask: IntervalMask) -> Packing | None:
    """The packing of a mask's batch, made once; None where it has no padding, or is not of a sequence and itself."""
    if mask.packing is None and mask.key_padding_mask is not None and mask.cu_seqlens is None:
        mask.packing = _new_packing(mask, mask.key_padding_mask)
    return mask.packing


def _new_packing(mask: IntervalMask, keep: Tensor) -> Packing | None:
    from transformers import masking_utils as theirs

    batch, seqlen = keep.shape
    if mask.seqlens_k is not None or mask.lengths != (seqlen, seqlen) or keep.is_meta:
        return None
    if max(mask.window) > 0 and bool((keep[:, 1:] & ~keep[:, :-1]).sum(1).add(keep[:, 0]).gt(1).any()):
        return None  # padding between tokens: packed, they would be nearer to each other
    places, cu_seqlens, max_seqlen = cu_seqlens_from_mask(keep)
    tokens = len(places)
    if tokens == 0:
        return None
    same_sequence = theirs.packed_sequence_mask_function((places // seqlen)[None])
    mask_function = theirs.and_masks(same_sequence, mask.arguments["mask_function"])
    arguments = mask.arguments | dict(
        batch_size=1, q_length=tokens, kv_length=tokens, q_offset=0, kv_offset=0, attention_mask=None,
        mask_function=mask_function,
    )  # fmt: skip
    packed = IntervalMask(mask.window, None, None, cu_seqlens, max_seqlen, arguments)
    return Packing(places, (batch, seqlen), packed)


class _SkipsPadding(Swapped):
    """A layer that is given tokens without padding, wherever it can be. Mixed into the class of a layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own."""
        masks = {id(value): value for value in (*args, *kwargs.values()) if isinstance(value, IntervalMask)}
        packing = packing_of(*masks.values()) if len(masks) == 1 and not is_watched() else None
        if packing is None:
            return super().forward(*args, **kwargs)
        call = _signature(own_class(self)).bind(*args, **kwargs)
        extra: dict[str, Any] = call.arguments.pop("kwargs", {})
        named = call.arguments | extra
        obstacles = [name for name, value in named.items() if not _fits(packing, name, value)]
        if getattr(self, "chunk_size_feed_forward", 0):  # of which the number of tokens is no multiple
            obstacles.append("chunk_size_feed_forward")
        if obstacles or weights_wanted(named):
            what = " and ".join(obstacles) or "attention weights"
            has_cache = any(name in _CACHES for name in obstacles)
            hint = "; pass use_cache=False where no tokens are generated" if has_cache else ""
            warnings.warn(f"{type(self).__name__} computes padding, because of {what}{hint}", stacklevel=2)
            return super().forward(*args, **kwargs)
        result = super().forward(**{name: _packed(packing, name, value) for name, value in named.items()})
        if isinstance(result, tuple):
            return packing.padded(result[0]), *result[1:]
        return packing.padded(result)


@functools.cache
def _signature(layer: Any) -> inspect.Signature:
    """Of the layer's ``forward``, without self."""
    signature = inspect.signature(layer.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _fits(packing: Packing, name: str, value: Any) -> bool:
    """Whether an argument has a row for each token where it should, or has nothing to do with tokens."""
    if name in _UNUSED:
        return True
    if name not in _ROWS:
        return value is None or isinstance(value, (bool, int, float, str, IntervalMask))
    batch, seqlen = packing.shape
    parts = value if isinstance(value, tuple) else (value,)
    return value is None or all(
        isinstance(part, Tensor) and part.dim() >= 2 and part.shape[0] in (1, batch) and part.shape[1] == seqlen
        for part in parts
    )


def _packed(packing: Packing, name: str, value: Any) -> Any:
    if isinstance(value, IntervalMask):
        return packing.mask
    return packing.packed(value) if name in _ROWS and value is not None else value


def skip_padding(model: _Module, attn_implementation: str = "transformer_fast") -> _Module:
    """Let a transformers model compute no padding: its layers run on the tokens that the attention mask keeps.

    For padded batches without a cache: encoders, and decoders in training or with ``use_cache=False``. Outputs and
    gradients at tokens are those of the model as it was. Hidden states at padding, which mean nothing, are 0 after each
    layer; so what reads them says something else: a loss with labels at padding, a classifier that takes the first
    token of texts padded on the left, or the last of texts whose ids do not tell it.

    A call that cannot be packed runs as before: with a warning where attention weights, a cache or another argument of
    the layers stand in the way; without one for cross-attention, a window over padding between tokens,
    ``torch.compile``, ``torch.func``, tracers and dispatch modes. On a GPU each forward pass waits a few times for what
    the mask holds. :func:`restore_padding` undoes it.

    Args:
        model: a model of transformers, or any module that holds some; changed in place. The layers stay the same
            objects, with the same parameters.
        attn_implementation: what :func:`transformer_fast.register_with_transformers` has registered; it is registered
            under the name that is the default if it is not, and is set where the model has another one.

    Returns:
        the model.

    Raises:
        UnsupportedError: no layer in it is of a family that is known to treat tokens by themselves (the message names
            them); it answers questions, by probabilities over positions among which is padding; or something, as
            accelerate does, has given a layer another ``forward``.
        ValueError: there is no model of transformers in it, or ``attn_implementation`` is not registered.
    """
    from transformers import AttentionInterface, PreTrainedModel

    if attn_implementation == "transformer_fast" and attn_implementation not in AttentionInterface():
        register_with_transformers(attn_implementation)
    implementation = AttentionInterface().get(attn_implementation)
    if not isinstance(implementation, functools.partial) or implementation.func is not attention_forward:
        raise ValueError(
            f"attn_implementation={attn_implementation!r}; allowed: a name that register_with_transformers() was given"
        )
    found: list[Any] = [module for module in model.modules() if _is_layer(module)]
    if not found:
        raise UnsupportedError(f"{type(model).__name__} has no layer of transformers' {', '.join(FAMILIES)}")
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not models:
        raise ValueError(f"model is of type {type(model).__name__}; allowed: one of transformers, or what holds some")
    for module in models:
        if "QuestionAnswering" in type(module).__name__:
            raise UnsupportedError(f"{type(module).__name__}, whose probabilities are over padding too")
    for layer in found:
        if "forward" in vars(layer):
            raise UnsupportedError(f"a {type(layer).__name__} whose forward something else has replaced")
    for module in models:
        if module.config._attn_implementation != attn_implementation:
            module.set_attn_implementation(attn_implementation)
    for layer in found:
        if not isinstance(layer, _SkipsPadding):
            own: Any = type(layer)
            layer.__class__ = swapped(_SkipsPadding, own)
    return model


def restore_padding(model: _Module) -> _Module:
    """Give back what :func:`skip_padding` took; the attention implementation stays.

    Args:
        model: any module; changed in place.

    Returns:
        the model, with layers that compute padding.

    Raises:
        UnsupportedError: something else has changed the class of a layer since (a parametrization, say).
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, _SkipsPadding)]
    for layer in layers:
        if not is_swapped(layer):
            raise UnsupportedError(f"a layer that has become a {type(layer).__name__} since skip_padding()")
    for layer in layers:
        layer.__class__ = own_class(layer)
    return model


def _is_layer(module: nn.Module) -> bool:
    """Is it a layer of one of the families, as transformers has it?"""
    from transformers.modeling_layers import GradientCheckpointingLayer

    _, _, family = type(module).__module__.partition("transformers.models.")
    return isinstance(module, GradientCheckpointingLayer) and family.split(".")[0] in FAMILIES
