"""What Hugging Face's models and ours make of a checkpoint: outputs, loss and gradients by name.

The oracle is their model in float64 with eager attention, the baseline the worst of several of their runs in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from models.checkpoints_hf import Case, save
from models.inputs_hf import Inputs, make_inputs
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from transformer_fast.checkpoints import export_state_dict
from transformer_fast.models import from_pretrained

RUNS = 4  # of the baseline
Results = dict[str, Tensor]


class InFloat64(TorchFunctionMode):
    """What a model does in float32 whatever it is given (norms, softmax, rotary positions), in float64.

    But for the buckets of T5's distances, which are a matrix of integers: the logarithm in float32 defines them.
    """

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.Tensor.float and (args[0].is_floating_point() or args[0].dim() != 2):
            return args[0].double()
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return function(*args, **kwargs)


class Jittered(TorchFunctionMode):
    """The last digit of what sums and norms give is rounded at random, and with it that of their gradients.

    At the end of a whole model, one run's rounding errors say little of how large they may well be.

    Args:
        noise: the largest relative change, a unit in the last place by default.
    """

    FUNCTIONS = frozenset(
        (F.linear, F.layer_norm, F.softmax, F.conv1d, F.conv2d, F.embedding, torch.addmm, torch.rsqrt,
         torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
    )  # fmt: skip

    def __init__(self, noise: float = torch.finfo(torch.float32).eps) -> None:
        super().__init__()
        self.noise = noise

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in self.FUNCTIONS and out.dtype == torch.float32:
            return out * (1 + self.noise * torch.empty_like(out).uniform_(-1, 1))
        return out


class Shelf:
    """The checkpoints and what both sides make of them, each computed once."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.seed = root, seed
        self.names_in_file: dict[str, dict[str, str]] = {}  # by case: of each parameter
        for method in ("folder", "inputs", "theirs", "model", "oracle", "baselines", "ours"):
            setattr(self, method, functools.cache(getattr(self, method)))

    def folder(self, case: Case) -> Path:
        folder = self.root / case.id.replace(" ", "_")
        self.names_in_file[case.id] = save(case, folder, self.seed)
        return folder

    def inputs(self, case: Case, kind: str) -> Inputs:
        return make_inputs(case, kind, self.seed)

    def model(self, case: Case) -> nn.Module:
        """Ours."""
        return from_pretrained(self.folder(case), dtype=torch.float32)

    def theirs(self, case: Case, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
        model = load_theirs(case, self.folder(case), dtype)
        if dtype == torch.float64:
            with InFloat64():
                for module in model.modules():
                    if hasattr(module, "rotary_emb"):
                        module.rotary_emb = type(module.rotary_emb)(module.config)
        return model

    def oracle(self, case: Case, kind: str) -> Results:
        with InFloat64():
            return self._their_results(case, kind, torch.float64)

    def baselines(self, case: Case, kind: str) -> list[Results]:
        with Jittered():
            return [self._their_results(case, kind, torch.float32) for _ in range(RUNS)]

    def ours(self, case: Case, kind: str) -> Results:
        model = self.model(case)

        def gradients() -> Mapping[str, Tensor]:
            return export_state_dict(model, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})

        return results(model, self.inputs(case, kind), gradients)

    def _their_results(self, case: Case, kind: str, dtype: torch.dtype) -> Results:
        model, names = self.theirs(case, dtype), self.names_in_file[case.id]

        def gradients() -> Mapping[str, Tensor]:
            return {names[n]: p.grad for n, p in model.named_parameters() if p.grad is not None and n in names}

        return results(model, self.inputs(case, kind), gradients)


def load_theirs(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """Their model from a folder, which must hold what it needs and nothing else."""
    model, report = getattr(transformers, case.model).from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True, **case.arguments
    )
    assert not any(report.values()), report
    return model.eval()


def results(model: nn.Module, inputs: Inputs, gradients: Callable[[], Mapping[str, Tensor]]) -> Results:
    """Every output at the real tokens, the loss, and the gradient of each parameter by its name in the file.

    The loss of a model that has none is a sum of its outputs' squares.
    """
    model.zero_grad()
    outputs = model(**arguments_for(model, inputs.arguments), output_hidden_states=True)
    found = dict(named_outputs(outputs, inputs))
    if "loss" not in found:
        found["loss"] = sum((weights_like(t) * t.square()).sum() for n, t in found.items() if "hidden_states" not in n)
    found["loss"].backward()
    found |= {f"gradient of {key}": gradient for key, gradient in gradients().items()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def arguments_for(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What is real-valued, in the model's dtype."""
    dtype = next(model.parameters()).dtype
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def named_outputs(outputs: Mapping[str, Any], inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    """The tensors among the outputs, of the real tokens only; caches are left out."""
    for name, value in outputs.items():
        keep = inputs.encoder_keep if name.startswith("encoder") else inputs.keep
        values = {f"{name}[{i}]": v for i, v in enumerate(value)} if name.endswith("hidden_states") else {name: value}
        for full_name, tensor in values.items():
            if isinstance(tensor, Tensor):
                yield full_name, tensor[keep] if keep is not None and tensor.shape[:2] == keep.shape else tensor


def weights_like(tensor: Tensor) -> Tensor:
    """Fixed positive numbers: with signs, the sum could be all cancellation."""
    generator = torch.Generator().manual_seed(tensor.numel())
    return torch.rand(tensor.shape, generator=generator).to(tensor.dtype)


def worst(runs: list[Tensor], oracle: Tensor) -> Tensor:
    """For each element, the one of the runs that is farthest from the oracle."""
    stacked = torch.stack(runs).double()
    return stacked.gather(0, (stacked - oracle).abs().argmax(0, keepdim=True)).squeeze(0)
