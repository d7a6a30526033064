"""What a family of checkpoints has to say: how to read its configuration, and what its tensors are called."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from transformer_fast.checkpoints import KeyMap, Source, stored_tensors
from transformer_fast.models.base import Model
from transformer_fast.models.config import Activation, Architecture, HeadKind
from transformer_fast.models.layers import FusedLinear

Values = Mapping[str, Any]
#: What of a file's tensors ``read`` may look at: empty where there is no file.
Tensors = Mapping[str, Tensor]
Names = Mapping[str, "str | tuple[str, ...]"]


@dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Names are of modules, or of single tensors; ``{i}`` stands for the number of a layer, and several names for one
    of ours are projections that are fused here. ``/2`` after one of our names: where the fused layer has two parts.

    Attributes:
        model_type: the ``model_type`` in config.json that names it.
        read: from config.json, and the file's tensors where there is one, to our architecture; ValueError on what
            it cannot do.
        names: ours to theirs, of the base model.
        heads: ours to theirs by kind of head, with the prefix where theirs is within the base model.
        prefix: of the base model's names in files of models with a head.
        transposed: pattern of our modules whose weights are stored as (in, out).
        stray: patterns of names that such files hold and the model has no use for.
        others: further names, by ours, under which the same tensor may stand (tied weights).
        own_names: files have our names.
        rows: our vectors that are stored as a matrix of one row.
        optional: our tensors that are zeros where a file lacks them.
    """

    model_type: str
    read: Callable[[Values, Tensors], Architecture]
    names: Names = field(default_factory=dict)
    heads: Mapping[HeadKind, Names] = field(default_factory=dict)
    prefix: str = ""
    transposed: str = r"(?!)"
    stray: tuple[str, ...] = ()
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    own_names: bool = False
    rows: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def key_map(self, model: Model) -> KeyMap:
        """From the model's names to the file's."""
        if self.own_names:
            return {name: Source((name,)) for name in stored_tensors(model)}
        found = {name: self._source(model, name) for name in stored_tensors(model)}
        # A head that is not tied has its name for itself.
        taken = {name.removeprefix(self.prefix) for source in found.values() for name in source.names}
        return {n: replace(s, others=tuple(o for o in s.others if o not in taken)) for n, s in found.items()}

    def heads_stray(self) -> tuple[str, ...]:
        """Patterns of the names that its heads have: stray to a model of another head."""
        tables = (*self.heads.values(), self.others)
        theirs = [name for table in tables for names in table.values() for name in _several(names)]
        return tuple(rf"{re.escape(name.removeprefix(self.prefix))}(\..+)?" for name in theirs)

    def _source(self, model: Model, name: str) -> Source:
        """Where parameter ``name`` comes from."""
        number = re.search(r"\.(\d+)\.", name)
        layer = number[1] if number else ""
        general = name.replace(f".{layer}.", ".{i}.", 1)
        module, _, leaf = general.rpartition(".")
        owner = model.get_submodule(name.rpartition(".")[0])
        parts = owner.parts if isinstance(owner, FusedLinear) else ()
        theirs, ending = self._theirs(model.architecture.head.kind, general, f"{module}/{len(parts)}", module)
        full = [n.replace("{i}", layer) + (f".{leaf}" if ending else "") for n in theirs]
        sizes = [0] * len(full)
        if len(full) > 1:
            used = [i for i, (_, has_bias) in enumerate(parts) if has_bias or leaf == "weight"]
            full, sizes = [full[i] for i in used], [parts[i][0] for i in used]
        turned = leaf == "weight" and re.fullmatch(self.transposed, module) is not None
        others = self.others.get(general, ())
        return Source(
            tuple(full), tuple(sizes), turned, general in self.rows, others, optional=general in self.optional
        )

    def _theirs(self, kind: HeadKind, tensor: str, variant: str, module: str) -> tuple[tuple[str, ...], bool]:
        """Their names of a tensor, or of its module (then True: what kind of tensor is to be added)."""
        prefix = self.prefix if kind != "none" else ""
        for table, where in ((self.names, prefix), (self.heads.get(kind, {}), "")):
            for ours in (tensor, variant, module):
                if ours in table:
                    return tuple(where + name for name in _several(table[ours])), ours != tensor
        raise KeyError(f"the family {self.model_type} has no name for {tensor}")


def _several(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


_ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
_GATED: dict[str, Activation] = {"relu": "reglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "silu": "swiglu"}


def activation(name: str, *, gated: bool = False) -> Activation:
    """Our name of an activation in a config.json."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not supported; allowed: {', '.join(_ACTIVATIONS)}")
    return _GATED[_ACTIVATIONS[name]] if gated else _ACTIVATIONS[name]


def require(values: Values, **supported: object) -> None:
    """Refuse settings that are neither absent, None, nor what is supported."""
    for name, value in supported.items():
        if values.get(name) not in (None, value):
            kind = values.get("model_type")
            raise ValueError(f"{kind} checkpoints with {name}={values[name]!r} are not supported; only {value!r}")


#: What the public classes are called after their family's prefix.
_KINDS: dict[str, HeadKind] = {
    "Model": "none",
    "EncoderModel": "none",
    "ForMaskedLM": "masked",
    "ForPreTraining": "pretraining",
    "ForCausalLM": "language",
    "LMHeadModel": "language",
    "WithLMHeadModel": "language",  # what T5's was called at first
    "MTModel": "language",
    "ForConditionalGeneration": "language",
    "ForSequenceClassification": "sequence",
    "ForImageClassification": "sequence",
    "ForTokenClassification": "token",
    "ForQuestionAnswering": "question",
}

#: Those that all encoders of text have.
ENCODERS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def head_kind(values: Values, prefix: str, *known: str) -> HeadKind:
    """The head that ``architectures`` names, of the ``known`` classes; the first where config.json does not say."""
    allowed = {prefix + name: _KINDS[name] for name in known}
    names = values.get("architectures") or list(allowed)[:1]
    if names[0] not in allowed:
        raise ValueError(f"architectures={names!r} is not supported; allowed: {', '.join(allowed)}")
    return allowed[names[0]]


def may_hold(tensors: Tensors, name: str) -> bool:
    """Whether a part that files have or have not is to be built: a new model, of no file, has it."""
    return not tensors or name in tensors


def classes(values: Values) -> dict[str, Any]:
    """How many labels a classifier has, and of what kind."""
    number = values.get("num_labels") or len(values.get("id2label") or ()) or 2
    return {"num_labels": number, "problem_type": values.get("problem_type")}


_ORIGINAL = "original_max_position_embeddings"


def rotary(values: Values) -> dict[str, Any]:
    """Rotary positions in both spellings: ``rope_theta`` beside ``rope_scaling``, or all in ``rope_parameters``."""
    given = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    theta = given.pop("rope_theta", values.get("rope_theta") or 10000.0)
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"rope_type={kind!r} is not supported; allowed: default, linear, llama3")
    if kind == "llama3":
        given.setdefault(_ORIGINAL, values.get(_ORIGINAL) or values["max_position_embeddings"])
    needed = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}[kind]
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"the rotary scaling {kind!r} has no {', '.join(missing)}")
    return {
        "positions": "rope",
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"rope_type": kind, **given},
    }


def is_tied(values: Values, tensors: Tensors, table: str, head: str, *, default: bool) -> bool:
    """Whether the output projection is the token table: as config.json says, unless the file holds two that differ."""
    if not values.get("tie_word_embeddings", default):
        return False
    return not (table in tensors and head in tensors and not torch.equal(tensors[table], tensors[head]))
