"""T5 and T5 1.1, Flan-T5 (Raffel et al., 2020): relative positions, no biases, scores that are not scaled."""

from __future__ import annotations

from transformer_fast.models.config import Architecture, HeadConfig, ModelConfig
from transformer_fast.models.families import family as f
from transformer_fast.models.families.family import Family, Names, Tensors, Values


def read(values: Values, tensors: Tensors) -> Architecture:
    """From a T5 config.json.

    Version 1.0 ties its head to the tokens and scales what it reads; 1.1 does neither. Config files say so by
    ``tie_word_embeddings``, or of late by ``scale_decoder_outputs``.
    """
    kind = f.head_kind(values, "T5", "ForConditionalGeneration", "WithLMHeadModel", "Model", "EncoderModel")
    size, projection = values["d_model"], values.get("feed_forward_proj", "relu")
    gated = projection.startswith("gated-")
    name = "gelu_new" if projection == "gated-gelu" else projection.removeprefix("gated-")
    shared = {
        "vocab_size": values["vocab_size"],
        "hidden_size": size,
        "num_heads": values["num_heads"],
        "head_dim": values["d_kv"],
        "intermediate_size": values["d_ff"],
        "max_positions": 1,  # relative: there is no longest sequence
        "norm": "rmsnorm",
        "norm_eps": values.get("layer_norm_epsilon", 1e-6),
        "activation": f.activation(name, gated=gated),
        "biases": (),
        "positions": "relative",
        "relative_buckets": values.get("relative_attention_num_buckets", 32),
        "relative_max_distance": values.get("relative_attention_max_distance", 128),
        "softmax_scale": 1.0,
        "dropout": values.get("dropout_rate", 0.1),
        **{f"{place}_dropout": values.get("dropout_rate", 0.1) for place in ("attention", "activation", "final")},
    }
    encoder = ModelConfig(num_layers=values["num_layers"], **shared)
    if values.get("architectures") == ["T5EncoderModel"]:
        return Architecture(encoder=encoder, values=values)
    layers = values.get("num_decoder_layers") or values["num_layers"]
    decoder = ModelConfig(num_layers=layers, causal=True, cross_attention=True, **shared)
    scaled = values.get("scale_decoder_outputs", values.get("tie_word_embeddings", True))
    tied = f.is_tied(values, tensors, "shared.weight", "lm_head.weight", default=True)
    head = HeadConfig(kind, tied=tied and kind == "language", scale=size**-0.5 if scaled else 1.0)
    return Architecture(encoder=encoder, decoder=decoder, head=head, values=values)


def _names(stack: str) -> Names:
    ours, theirs = f"{stack}.blocks.{{i}}.", f"{stack}.block.{{i}}.layer."
    cross, last = f"{theirs}1.", f"{theirs}{2 if stack == 'decoder' else 1}."
    more: Names = {
        ours + "cross.q": cross + "EncDecAttention.q",
        ours + "cross.kv": tuple(f"{cross}EncDecAttention.{part}" for part in "kv"),
        ours + "cross.out": cross + "EncDecAttention.o",
        ours + "cross_norm": cross + "layer_norm",
    }
    gate, value = f"{last}DenseReluDense.wi_0", f"{last}DenseReluDense.wi_1"
    return {
        f"{stack}.embeddings.tokens": "shared",
        f"{stack}.relative.table": f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias",
        f"{stack}.final_norm": f"{stack}.final_layer_norm",
        ours + "attention.qkv": tuple(f"{theirs}0.SelfAttention.{part}" for part in "qkv"),
        ours + "attention.out": theirs + "0.SelfAttention.o",
        ours + "attention_norm": theirs + "0.layer_norm",
        **(more if stack == "decoder" else {}),
        ours + "mlp.up/1": last + "DenseReluDense.wi",
        ours + "mlp.up/2": (gate, value),
        ours + "mlp.down": last + "DenseReluDense.wo",
        ours + "mlp_norm": last + "layer_norm",
    }


_TABLES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")

T5 = Family(
    model_type="t5",
    read=read,
    names={**_names("encoder"), **_names("decoder")},
    heads={"language": {"head.weight": "lm_head.weight"}},
    # A bias of cross-attention that the first files hold and no code reads.
    stray=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    others={f"{stack}.embeddings.tokens.weight": _TABLES for stack in ("encoder", "decoder")},
)
