"""The tensors of a shape, how ours is called on them, and what takes part in a timing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import transformer_fast

from .shapes import PAGE_SIZE, Shape

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
#: A call to time: results by the names "out", "dq", "dk", "dv", in the contestant's own layout.
Step = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Layout:
    """How a contestant wants tensors, and the way back to the layout of the work."""

    to: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


AS_IT_IS = Layout(lambda t: t, lambda t: t)


@dataclass(frozen=True)
class Contestant:
    """Somebody who computes the attention of a work. ``note``: it computes something else, and what."""

    name: str
    forward: Forward
    layout: Layout = AS_IT_IS
    note: str = ""


@dataclass
class Work:
    """Query, key, value and dout ``(batch, heads, seqlen, head_dim)``, packed ``(total, heads, head_dim)``."""

    shape: Shape
    device: torch.device
    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor
    lengths: Tensor | None = None  # int32 (batch,): of padded, masked and paged works that have any
    cu_seqlens: Tensor | None = None  # int32 (batch + 1,): of packed works
    block_table: Tensor | None = None  # int32 (batch, pages): of paged works
    pages: tuple[Tensor, Tensor] | None = field(default=None, repr=False)  # K and V as the paged call takes them

    @property
    def dtype(self) -> torch.dtype:
        """Of query, key and value."""
        return self.query.dtype

    def keep(self) -> Tensor:
        """bool ``(batch, seqlen_k)``: which keys are not padding."""
        assert self.lengths is not None
        return torch.arange(self.shape.seqlen_k, device=self.device)[None, :] < self.lengths[:, None]

    def sequence(self, tensor: Tensor, entry: int) -> Tensor:
        """One batch entry or packed sequence of a tensor, as ``(1, heads, seqlen, head_dim)``."""
        if not self.shape.is_packed:
            return tensor[entry : entry + 1]
        first, end = self.shape.starts[entry : entry + 2]
        return tensor[first:end].transpose(0, 1)[None]


def make_work(shape: Shape, device: torch.device) -> Work:
    """Draws the tensors of a shape on the device."""
    generator = torch.Generator(device).manual_seed(1)
    dtype = getattr(torch, shape.dtype)

    def draw(heads: int, seqlen: int) -> Tensor:
        sizes = (shape.starts[-1], heads) if shape.is_packed else (shape.batch, heads, seqlen)
        return torch.randn(*sizes, shape.head_dim, generator=generator, device=device).to(dtype)

    query, dout = draw(shape.num_heads, shape.seqlen_q), draw(shape.num_heads, shape.seqlen_q)
    key, value = draw(shape.num_kv_heads, shape.seqlen_k), draw(shape.num_kv_heads, shape.seqlen_k)
    work = Work(shape, device, query, key, value, dout)
    if shape.is_packed:
        work.cu_seqlens = torch.tensor(shape.starts, dtype=torch.int32, device=device)
    elif shape.lengths is not None or shape.form == "paged":
        keys = [keys for _, keys in shape.sequences]
        work.lengths = torch.tensor(keys, dtype=torch.int32, device=device)
    if shape.form == "paged":
        _into_pages(work, generator)
    return work


def _into_pages(work: Work, generator: torch.Generator) -> None:
    """K and V in pages of a pool, in an order that nothing could guess: (pages, num_kv_heads, PAGE_SIZE, head_dim)."""
    batch, _, seqlen, _ = work.key.shape
    a_sequence = -(-seqlen // PAGE_SIZE)
    places = torch.randperm(batch * a_sequence, generator=generator, device=work.device)
    work.block_table = places.view(batch, a_sequence).to(torch.int32)

    def pool(tensor: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(tensor, (0, 0, 0, a_sequence * PAGE_SIZE - seqlen))
        pages = padded.unflatten(2, (a_sequence, PAGE_SIZE)).transpose(1, 2).flatten(0, 1)
        pooled = torch.empty_like(pages, memory_format=torch.contiguous_format)
        pooled[places] = pages
        return pooled

    work.pages = (pool(work.key), pool(work.value))


# ------------------------------------------------------------------------------------------------------------ ours


def ours(work: Work, backend: str) -> Contestant:
    """The library as a user would call it."""
    shape = work.shape
    dense: Any = transformer_fast.attention
    packed: Any = transformer_fast.attention_varlen
    options: dict[str, Any] = {"causal": shape.causal, "backend": backend}
    if shape.window_left is not None:
        options["window_size"] = (shape.window_left, 0)
    if shape.is_packed:
        how = (work.cu_seqlens, work.cu_seqlens, shape.seqlen_q, shape.seqlen_k)
        return Contestant(backend, lambda q, k, v: packed(q, k, v, *how, **options))
    if shape.form == "paged":
        assert work.pages is not None
        paged: Any = transformer_fast.attention_paged
        cache = (*work.pages, work.block_table, work.lengths)
        return Contestant(backend, lambda q, k, v: paged(q, *cache, **options))
    if shape.form == "masked":
        options["key_padding_mask"] = work.keep()
    elif work.lengths is not None:
        options["seqlens_k"] = work.lengths
    return Contestant(backend, lambda q, k, v: dense(q, k, v, **options))


def ours_unpadded(work: Work, backend: str) -> Contestant | None:
    """Ours without the lengths, as a batch without padding would be: what skipping the padding is worth."""
    if work.lengths is None or work.shape.is_decode:
        return None
    plain = replace(work, shape=replace(work.shape, form="padded"), lengths=None)
    return replace(
        ours(plain, backend), name=f"{backend}_unpadded", note="computes the padding too, as if it were tokens"
    )


# ----------------------------------------------------------------------------------------------------------- steps


def make_step(work: Work, contestant: Contestant) -> Step:
    """The call that is timed. A backward step is backward alone, over a graph that is kept."""
    tensors = [contestant.layout.to(t) for t in (work.query, work.key, work.value, work.dout)]
    if work.shape.phase == "forward":

        @torch.no_grad()
        def forward_step() -> dict[str, Tensor]:
            return {"out": contestant.forward(*tensors[:3])}

        return forward_step
    leaves, dout = [t.detach().requires_grad_() for t in tensors[:3]], tensors[3]
    out = contestant.forward(*leaves)
    if out.dtype != dout.dtype or out.shape != dout.shape:
        raise RuntimeError(f"out is {tuple(out.shape)} {out.dtype}, dout {tuple(dout.shape)} {dout.dtype}")

    def backward_step() -> dict[str, Tensor]:
        grads = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}

    return backward_step
