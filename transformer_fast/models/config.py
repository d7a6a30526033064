"""What a model is made of: frozen records, read by every layer. One :class:`ModelConfig` describes one stack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args

Norm = Literal["layernorm", "rmsnorm"]
NormPlacement = Literal["pre", "post", "sandwich", "parallel"]
Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "reglu", "geglu", "geglu_tanh", "swiglu"]
Positions = Literal["none", "learned", "sinusoidal", "rope", "relative"]
FrontEnd = Literal["tokens", "patches", "audio"]
HeadKind = Literal["none", "language", "masked", "pretraining", "sequence", "token", "question"]
Pick = Literal["first", "last", "eos"]

#: The linear layers that may have a bias each.
BIASES = ("q", "k", "v", "out", "mlp")

_CHOICES: dict[str, tuple[str, ...]] = {
    "norm": get_args(Norm),
    "norm_placement": get_args(NormPlacement),
    "activation": get_args(Activation),
    "positions": get_args(Positions),
    "front_end": get_args(FrontEnd),
    "kind": get_args(HeadKind),
    "pick": get_args(Pick),
}

Record = TypeVar("Record", bound="_Record")


class _Record:
    """What the configurations share: checked choices, and plain values in and out."""

    def _check_choices(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name, allowed[0])
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a JSON file."""
        return asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls: type[Record], values: Mapping[str, Any]) -> Record:
        """The inverse of :meth:`to_dict`; a name it does not know is an error."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})  # type: ignore[arg-type]
        if unknown:
            raise ValueError(f"unknown model configuration: {', '.join(unknown)}")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def check_dropout(name: str, value: float | None) -> None:
    """Refuse what is no share of the values to drop."""
    if value is not None and not 0 <= value < 1:
        raise ValueError(f"{name}={value}; allowed: from 0, and below 1")


@dataclass(frozen=True)
class ModelConfig(_Record):
    """The facets of one Transformer stack.

    ``num_kv_heads`` defaults to ``num_heads`` and ``head_dim`` to ``hidden_size // num_heads``.

    ``sliding_window`` counts tokens *including* the query's own, as model configurations do;
    :meth:`window_of` is the one place where it becomes the ``(left, right)`` of ``attention``.
    ``sliding_layers`` are the layers that have it; None is all of them.

    Attributes:
        biases: the linear layers that have one, of ``BIASES`` (Whisper has none on k).
        norm_placement: "pre", "post" (after the sum), "sandwich" (before and after the layer, Gemma 2), or
            "parallel" (attention and feed-forward read one norm and are added together, PaLM).
        norm_plus_one: the gain of a norm is ``1 + weight`` (Gemma).
        final_norm: a norm after the last block; None: wherever ``norm_placement`` is not "post".
        position_offset: row of the position table that the first position takes (BART: 2).
        positions_from_pad: positions are counted over the ids that are not this one (RoBERTa), None: by column.
        positions_trained: whether gradients flow into a learned position table.
        rope_scaling: of "linear" or "llama3", with the names that config.json has.
        relative_buckets, relative_max_distance: of a bias shared by all layers (T5).
        padding_id: the id whose row no lookup gives a gradient, as in PyTorch's ``padding_idx``.
        token_types: rows of a table of token types. ``types_are_tokens``: the token table serves (GPT).
        embedding_scale: token vectors are multiplied by it; ``rounded_scale``: by its value in their dtype (Gemma).
        softmax_scale: of the scores; None is ``head_dim ** -0.5``. ``scale_by_layer``: divided by layer number (GPT-2).
        dropout: of what each layer adds, and of the first hidden states. Of these ``embedding_dropout``, and of what
            attention adds ``attention_output_dropout``, where they are not None.
        attention_dropout, activation_dropout: of the attention's weights, and within the feed-forward layer.
        final_dropout: after the final norm (T5).
        front_end: what turns inputs into the first hidden states: tokens, image patches (ViT), audio frames (Whisper).
        channels, patch_size, image_size: of the front end; ``channels`` are mel bins for audio.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    num_kv_heads: int = 0
    head_dim: int = 0
    causal: bool = False
    cross_attention: bool = False
    norm: Norm = "layernorm"
    norm_placement: NormPlacement = "pre"
    norm_eps: float = 1e-5
    norm_bias: bool = True
    norm_plus_one: bool = False
    final_norm: bool | None = None
    activation: Activation = "gelu"
    biases: tuple[str, ...] = BIASES
    positions: Positions = "learned"
    position_offset: int = 0
    positions_from_pad: int | None = None
    positions_trained: bool = True
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = field(default=None, hash=False)
    relative_buckets: int = 32
    relative_max_distance: int = 128
    padding_id: int | None = None
    token_types: int = 0
    types_are_tokens: bool = False
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    rounded_scale: bool = False
    softmax_scale: float | None = None
    scale_by_layer: bool = False
    softcap: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] | None = None
    dropout: float = 0.0
    embedding_dropout: float | None = None
    attention_dropout: float = 0.0
    attention_output_dropout: float | None = None
    activation_dropout: float = 0.0
    final_dropout: float = 0.0
    initializer_range: float = 0.02
    front_end: FrontEnd = "tokens"
    channels: int = 0
    patch_size: tuple[int, int] = (0, 0)
    image_size: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        """Fill in what follows from other fields, and refuse what cannot be built."""
        sizes = ["hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions"]
        for name in [*sizes, "vocab_size"] if self.front_end == "tokens" else sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        self._check_choices()
        unknown = sorted(set(self.biases) - set(BIASES))
        if unknown:
            raise ValueError(f"biases={self.biases!r} names {', '.join(unknown)}; allowed: {', '.join(BIASES)}")
        if self.num_kv_heads == 0:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim == 0:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}: give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        if self.head_dim < 1:
            raise ValueError(f"head_dim={self.head_dim} must be at least 1")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.head_dim}")
        if self.final_norm is None:
            object.__setattr__(self, "final_norm", self.norm_placement != "post")
        self._check_places()
        for name, value in vars(self).items():
            if name.endswith("dropout"):
                check_dropout(name, value)

    def _check_places(self) -> None:
        """Refuse windows and positions that are none."""
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window} must be at least 1 (it counts the token itself)")
        strangers = set(self.sliding_layers or ()) - set(range(self.num_layers))
        if strangers:
            raise ValueError(f"sliding_layers={self.sliding_layers}; allowed: from 0 to {self.num_layers - 1}")
        if self.position_offset < 0 or self.token_types < 0:
            raise ValueError(
                f"position_offset={self.position_offset}, token_types={self.token_types}; allowed: at least 0"
            )
        # A direction needs an exact bucket and a far one, and the far ones begin where the exact ones end.
        exact = self.relative_buckets // (2 if self.causal else 4)
        if self.positions == "relative" and not 1 <= exact < self.relative_max_distance:
            least = 2 if self.causal else 4
            raise ValueError(
                f"relative_buckets={self.relative_buckets}, relative_max_distance={self.relative_max_distance}; "
                f"allowed: at least {least} buckets, and a distance above {exact}, up to which each has its own"
            )

    def window_of(self, layer: int) -> tuple[int, int] | None:
        """The ``window_size`` that layer ``layer`` passes to ``attention``, or None for no window."""
        if self.sliding_window is None or (self.sliding_layers is not None and layer not in self.sliding_layers):
            return None
        left = self.sliding_window - 1
        return (left, 0 if self.causal else left)

    def scale_of(self, layer: int) -> float:
        """What layer ``layer`` multiplies its scores by."""
        scale = self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale
        return scale / (layer + 1) if self.scale_by_layer else scale


@dataclass(frozen=True)
class HeadConfig(_Record):
    """What stands on the stack.

    Attributes:
        kind: "none" (hidden states), "language" (next token), "masked" (the token itself), "pretraining" (masked and
            next sentence), "sequence" (one label a sequence), "token" (one a token), "question" (start and end).
        pooler: a tanh layer on the first token, whose output is given out (BERT).
        tied: the output projection is the token table; ``scale`` multiplies its input (T5: d ** -0.5).
        transform: activation of a dense layer and a norm before the output projection (BERT's MLM), or None.
        bias: the output projection has one; ``bias_trained``: and it is a parameter, not a buffer (BART: a buffer).
        softcap: of the logits.
        num_labels, problem_type: of a classifier; the type is found from the labels when None.
        pick: which token stands for the sequence: the first, the last that is no padding, the last end of sequence.
        dense: activation of a dense layer between that token and the classifier, or None.
        dropout: before the classifier, and where ``dropout_first`` before that dense layer too.
    """

    kind: HeadKind = "none"
    pooler: bool = False
    tied: bool = True
    scale: float = 1.0
    transform: str | None = None
    bias: bool = False
    bias_trained: bool = True
    softcap: float | None = None
    num_labels: int = 2
    problem_type: str | None = None
    pick: Pick = "first"
    dense: Literal["tanh", "relu"] | None = None
    dropout: float = 0.0
    dropout_first: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        self._check_choices()
        if self.num_labels < 1:
            raise ValueError(f"num_labels={self.num_labels} must be at least 1")
        check_dropout("dropout", self.dropout)


@dataclass(frozen=True)
class Architecture:
    """A whole model: an encoder, a decoder, or both, and a head.

    ``values`` are those of its config.json, which is written back as it was; special tokens are read from there.
    ``final_state_unnormed``: the last of ``hidden_states`` is that before the final norm (ViT).
    """

    encoder: ModelConfig | None = None
    decoder: ModelConfig | None = None
    head: HeadConfig = HeadConfig()
    shared_tokens: bool = True
    final_state_unnormed: bool = False
    values: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        if self.encoder is None and self.decoder is None:
            raise ValueError("an architecture needs an encoder, a decoder or both")
        if self.decoder is not None and self.decoder.cross_attention != (self.encoder is not None):
            raise ValueError(
                f"cross_attention={self.decoder.cross_attention} of the decoder must be "
                f"{self.encoder is not None}: there is {'an' if self.encoder else 'no'} encoder"
            )

    @property
    def stack(self) -> ModelConfig:
        """The stack that the head stands on."""
        found = self.decoder or self.encoder
        assert found is not None
        return found

    def token(self, name: str) -> int | None:
        """A special token by its name in config.json (``"pad_token_id"``); the first where there are several."""
        value = self.values.get(name)
        return value[0] if isinstance(value, (list, tuple)) else value
