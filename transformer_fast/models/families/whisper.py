"""Whisper (Radford et al., 2022): an encoder of audio frames, and a decoder of text."""

from __future__ import annotations

from transformer_fast.models.config import BIASES, Architecture, HeadConfig
from transformer_fast.models.families import family as f
from transformer_fast.models.families.bart import layer_names, stack
from transformer_fast.models.families.family import Family, Tensors, Values


def read(values: Values, tensors: Tensors) -> Architecture:
    """From a Whisper config.json: no bias on keys, and fixed positions of frames that the file holds."""
    kind = f.head_kind(values, "Whisper", "ForConditionalGeneration", "Model")
    values = {"dropout": 0.0, **values}
    biases = tuple(name for name in BIASES if name != "k")
    encoder = stack(
        values,
        "encoder",
        vocab_size=0,
        max_positions=values.get("max_source_positions", 1500),
        biases=biases,
        front_end="audio",
        channels=values["num_mel_bins"],
        positions_trained=False,
    )
    decoder = stack(
        values,
        "decoder",
        vocab_size=values["vocab_size"],
        max_positions=values.get("max_target_positions", 448),
        biases=biases,
    )
    tied = kind == "language" and f.is_tied(
        values, tensors, "decoder.embed_tokens.weight", "proj_out.weight", default=True
    )
    return Architecture(encoder=encoder, decoder=decoder, head=HeadConfig(kind, tied=tied), values=values)


WHISPER = Family(
    model_type="whisper",
    read=read,
    names={
        **layer_names("encoder"),
        **layer_names("decoder"),
        "encoder.embeddings.conv1": "encoder.conv1",
        "encoder.embeddings.conv2": "encoder.conv2",
        "decoder.embeddings.tokens": "decoder.embed_tokens",
        "encoder.final_norm": "encoder.layer_norm",
        "decoder.final_norm": "decoder.layer_norm",
    },
    heads={"language": {"head.weight": "proj_out.weight"}},
    prefix="model.",
    others={"decoder.embeddings.tokens.weight": ("proj_out.weight",)},
)
