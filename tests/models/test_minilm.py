"""The real pretrained MiniLM sentence encoder against Hugging Face's own computation of it."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

from transformer_fast import backends, tasks
from transformer_fast.demo.text import load_corpus, sentences, spread
from transformer_fast.testing import judge

# What the project promises for this encoder in float32.
PROMISED_COSINE = 0.999999
SENTENCES = 200

# The emulator is for tests of small problems in half precision.
AVAILABLE = [name for name, info in backends().items() if info.available and name != "emulated"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    found = spread(sentences(load_corpus()), SENTENCES)
    assert len(found) == SENTENCES
    return found


@pytest.fixture(scope="module")
def encoder() -> tasks.SentenceEncoder:
    return tasks.load_sentence_encoder(tasks.minilm_folder())


@pytest.fixture(scope="module")
def tokenizer() -> tasks.Tokenizer:
    return tasks.Tokenizer(tasks.minilm_folder(), max_seqlen=256)


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    return transformers.BertModel.from_pretrained(tasks.minilm_folder(), attn_implementation="eager").eval()


@torch.no_grad()
def hidden_states(theirs: torch.nn.Module, batch: tasks.TokenBatch) -> Tensor:
    """Hugging Face's (batch, seqlen, d)."""
    mask = batch.attention_mask.long()
    return theirs(batch.input_ids, attention_mask=mask, token_type_ids=batch.token_type_ids).last_hidden_state


@pytest.fixture(scope="module", params=["left", "right"])
def padded(request, texts, tokenizer, theirs) -> tuple[tasks.TokenBatch, Tensor]:
    """A batch padded on one side, and Hugging Face's sentence vectors of it, by the mean over tokens."""
    batch = tokenizer(texts, padding_side=request.param)
    mask = batch.attention_mask[..., None].float()
    return batch, (hidden_states(theirs, batch) * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize(
    ("backend", "packed"),
    [pytest.param(name, True, id=f"{name}-packed") for name in AVAILABLE] + [pytest.param("auto", False, id="padded")],
)
def test_same_vectors_as_hugging_face(packed, backend, padded, encoder, record_property):
    batch, expected = padded
    lengths = batch.attention_mask.sum(1)
    assert lengths.min() < 12 and lengths.max() > 60, "the sentences should be of mixed length"
    encoder.encoder.set_backend(backend)
    with torch.no_grad():
        ours = encoder(*batch, packed=packed)
    cosine = torch.cosine_similarity(ours.double(), expected.double(), dim=-1)
    record_property("smallest_cosine", float(cosine.min()))
    assert cosine.min() >= PROMISED_COSINE


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_hidden_states_by_the_tolerance_rule(padding_side, texts, encoder, tokenizer, theirs):
    """Every real token's state, not only their mean: our float32 against Hugging Face in float64 and float32."""
    batch = tokenizer(texts[::10], padding_side=padding_side)
    keep = batch.attention_mask
    baseline = hidden_states(theirs, batch)[keep]
    oracle = hidden_states(theirs.double(), batch)[keep]
    theirs.float()
    encoder.encoder.set_backend("auto")
    with torch.no_grad():
        ours = encoder.encoder(*batch).last_hidden_state
    verdict = judge(ours[keep], oracle, baseline, name=f"hidden states, {padding_side} padding")
    assert verdict.passed, str(verdict)
    assert not ours[~keep].any(), "padding comes back as zeros"


def test_a_sentence_does_not_depend_on_its_batch(texts, encoder, tokenizer):
    """Packed next to others or alone: the same vector."""
    encoder.encoder.set_backend("auto")
    with torch.no_grad():
        together = encoder(*tokenizer(texts[:8]))
        alone = torch.cat([encoder(*tokenizer([text])) for text in texts[:8]])
    cosine = torch.cosine_similarity(together.double(), alone.double(), dim=-1)
    assert cosine.min() >= PROMISED_COSINE


def test_tokenizer_pads_no_further_than_the_longest_text(tokenizer, texts):
    """MiniLM's own file asks for 128 tokens always, and cuts there."""
    batch = tokenizer(["short", "a little longer"])
    assert batch.input_ids.shape[1] < 10
    assert bool(batch.attention_mask.any(0).all())
    long = tokenizer([" ".join(texts)])
    assert long.input_ids.shape[1] == 256, "cut where the caller said"
    left = tokenizer(["short", "a little longer"], padding_side="left")
    assert left.attention_mask[0].tolist() == sorted(left.attention_mask[0].tolist())


def test_bfloat16_and_the_folder_found_without_an_import(encoder, tokenizer, texts):
    low = tasks.load_sentence_encoder(tasks.minilm_folder(), dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in low.parameters())
    encoder.encoder.set_backend("auto")
    batch = tokenizer(texts[:16])
    with torch.no_grad():
        close = torch.cosine_similarity(low(*batch).float(), encoder(*batch), dim=-1)
        others = torch.cosine_similarity(low(*batch).float(), encoder(*batch).roll(1, 0), dim=-1)
    # Rounding the weights moves a sentence far less than being another sentence does.
    assert (1 - close).max() < (1 - others).min() / 10
