"""What a model returns: named results, as attributes and by key."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.utils._pytree import register_pytree_node

#: The names that Hugging Face's output classes have; one that was not asked for is None.
FIELDS = [
    "loss",
    "logits",
    "last_hidden_state",
    "pooler_output",
    "hidden_states",
    "past_key_values",
    "encoder_last_hidden_state",
    "encoder_hidden_states",
    "decoder_hidden_states",
    "start_logits",
    "end_logits",
    "prediction_logits",
    "seq_relationship_logits",
]


class ModelOutput(dict[str, Any]):
    """Results by name: ``output.logits`` is ``output["logits"]``. What is not there is None, or no key."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name in FIELDS:
            return None
        raise AttributeError(f"a model's output has no {name!r}; it has {', '.join(self)}")


def _flatten(output: ModelOutput) -> tuple[list[Any], list[str]]:
    return list(output.values()), list(output)


def _unflatten(values: Iterable[Any], names: list[str]) -> ModelOutput:
    return ModelOutput(zip(names, values, strict=True))


# So that torch.compile and torch.export see the tensors within.
register_pytree_node(
    ModelOutput, _flatten, _unflatten, serialized_type_name=f"{ModelOutput.__module__}.{ModelOutput.__name__}"
)
