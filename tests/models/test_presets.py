"""Published sizes, counted on the meta device; and the models without public weights, small and real."""

from __future__ import annotations

import pytest
import torch

from transformer_fast import models
from transformer_fast.models import presets
from transformer_fast.models.layers import Context, rotary_tables
from transformer_fast.testing import judge

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 8192}
GEMMA2 = {
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
}

# In millions, as published: the papers' tables and the model cards.
COUNTS = {
    "BERT-large": (335.1, {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 30522, "hidden_size": 1024,
        "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096, "max_position_embeddings": 512,
    }),
    "Mistral 7B": (7241.7, {
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    }),
    "Gemma 2 2B": (2614.3, GEMMA2 | {
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256,
    }),
    "Gemma 2 27B": (27227.1, GEMMA2 | {
        "hidden_size": 4608, "intermediate_size": 36864, "num_hidden_layers": 46, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128,
    }),
    "SmolLM2 135M": (134.5, LLAMA | {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    }),
    "SmolLM2 1.7B": (1711.4, LLAMA | {
        "vocab_size": 49152, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": True,
    }),
    "GPT-3": (174_600, presets.gpt3()),
    "PaLM": (540_356, presets.palm()),  # 540.35 billion in the paper, which cuts the rest off
    # 65 and 213 in the paper, whose English-German tokens are "about 37000".
    "Transformer base": (63.1, presets.transformer_2017()),
}  # fmt: skip


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name: str) -> None:
    millions, config = COUNTS[name]
    model = models.from_config(config, device="meta")
    digits = 0 if name == "PaLM" else -2 if name == "GPT-3" else 1
    assert round(count(model) / 1e6, digits) == millions


SMALL = {
    "Transformer 2017": lambda: presets.transformer_2017(vocab_size=23),
    "GPT-3": lambda: presets.gpt3(num_layers=2, hidden_size=32, num_heads=4),
    "PaLM": lambda: presets.palm(num_layers=2, hidden_size=32, num_heads=2),
}


@pytest.mark.parametrize("name", SMALL)
def test_what_has_no_public_class_is_saved_under_our_names(name: str, tmp_path) -> None:
    torch.manual_seed(0)
    model = models.from_config(SMALL[name]()).eval()
    ids = torch.randint(20, (2, 9))
    inputs = {"input_ids": ids} if model.architecture.encoder is None else {"input_ids": ids, "decoder_input_ids": ids}
    model.save_pretrained(tmp_path)
    again = models.from_pretrained(tmp_path)
    assert again.architecture == model.architecture
    with torch.no_grad():
        before, after = model(**inputs), again(**inputs)
    assert torch.equal(before.logits, after.logits)
    assert before.logits.std() > 0


@torch.no_grad()
def test_parallel_blocks_against_their_formula() -> None:
    """y = x + attention(norm(x)) + mlp(norm(x)), from PaLM's section 2."""
    model = models.from_config(SMALL["PaLM"]())
    layout = models.TokenLayout.dense(1, 5, device=torch.device("cpu"))
    x = torch.randn(5, 32)

    def of(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        block, y = model.to(dtype).decoder.blocks[0], x.to(dtype)
        context = Context(layout, rotary_tables(layout.positions, model.config, dtype))
        seen = torch.nn.functional.layer_norm(y, (32,), block.attention_norm.weight)
        return block(y, context), y + block.attention(seen, context) + block.mlp(seen)

    (ours, baseline), (_, oracle) = of(torch.float32), of(torch.float64)
    verdict = judge(ours, oracle, baseline, name="a parallel block")
    assert verdict.passed, str(verdict)
    assert (oracle - x).std() > 0, "the two layers add something"
