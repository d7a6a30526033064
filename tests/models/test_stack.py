"""The stacks: packed against padded, layouts, configurations, and a decoder against a plain one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from dropin.promised import PROMISED
from torch.utils.checkpoint import checkpoint

from transformer_fast.dropin import linears
from transformer_fast.models import Architecture, CausalLM, EncoderModel, ModelConfig, TokenLayout
from transformer_fast.models.layers import MLP, Attention, AttentionOptions
from transformer_fast.tasks import SentenceEncoder
from transformer_fast.testing import judge

MASKS = {
    "right padding": [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]],
    "left padding": [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]],
    "holes": [[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 1, 0]],
    "an empty row": [[1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]],
}


def encoder_of(config: ModelConfig) -> EncoderModel:
    return EncoderModel(Architecture(encoder=config))


def plain_attention(query, key, value, layout, options: AttentionOptions):
    """Softmax written out with a dense mask, for dense layouts without a cache."""
    query, key, value = (layout.heads_first(x) for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    distance = torch.arange(layout.seqlen)[:, None] - torch.arange(layout.seqlen)
    left, right = options.window_size or (layout.seqlen, layout.seqlen)
    visible = (distance <= left) & (-distance <= (0 if options.causal else right))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    out = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value
    return out.transpose(1, 2).flatten(0, 1)


def worst(runs, oracle):
    """For each element, the one of the runs that is farthest from the oracle."""
    runs = torch.stack(runs).double()
    return runs.gather(0, (runs - oracle).abs().argmax(0, keepdim=True)).squeeze(0)


def jittered_attention(*arguments):
    """The plain attention, its last digit rounded at random."""
    out = plain_attention(*arguments)
    return out * (1 + torch.finfo(out.dtype).eps * torch.empty_like(out).uniform_(-1, 1))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_packed_and_padded_agree(mask, encoder_config, randomized):
    encoder = randomized(encoder_of(encoder_config))
    keep = torch.tensor(mask)
    ids, types = torch.randint(50, keep.shape), torch.randint(2, keep.shape)
    packed = encoder(ids, keep, types).last_hidden_state
    padded = encoder(ids, keep, types, packed=False).last_hidden_state
    oracle = encoder.double()(ids, keep, types, packed=False).last_hidden_state
    verdict = judge(packed, oracle, padded, name="packed hidden states")
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_padding_never_reaches_a_result(mask, packed, encoder_config, randomized):
    """Other ids in the padding: not one bit changes, in sentence vectors or gradients."""
    model = SentenceEncoder(randomized(encoder_of(encoder_config)))
    keep = torch.tensor(mask)
    ids = torch.randint(50, keep.shape)
    results = []
    for filler in (0, 49):
        model.zero_grad()
        vectors = model(ids.where(keep.bool(), filler), keep, packed=packed)
        vectors.square().sum().add(vectors[:, 0].sum()).backward()
        gradients = [p.grad.clone() for name, p in model.named_parameters() if "embeddings.tokens" not in name]
        results.append([vectors.detach(), *gradients])
        assert all(t.isfinite().all() for t in results[-1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@torch.no_grad()
def test_a_sentence_is_its_own_first_token(mask, packed, encoder_config, randomized):
    """Behind padding on the left it was the last token of the sentence before."""
    encoder = randomized(encoder_of(encoder_config))
    keep = torch.tensor(mask)
    ids = torch.randint(50, keep.shape)
    states = encoder(ids, keep, packed=packed).last_hidden_state
    vectors = SentenceEncoder(encoder, "cls", normalize=False)(ids, keep, packed=packed)
    for state, vector, row in zip(states, vectors, mask, strict=True):
        assert torch.equal(vector, state[row.index(1)] if any(row) else torch.zeros_like(vector))


def test_decoder_against_plain_attention(decoder):
    """Logits and gradients of rotary positions, grouped queries and alternate windows shorter than the sequence.

    At the end of a whole model, one run's rounding errors say little of how large they may well be: the
    baseline is the worst, element by element, of several plain runs.
    """
    ids = torch.randint(50, (2, 24))

    def logits_and_gradients():
        decoder.zero_grad()
        decoder.loss(ids).backward()
        return decoder(ids).logits.detach(), torch.cat([p.grad.flatten() for p in decoder.parameters()])

    ours = logits_and_gradients()
    decoder.set_attention(jittered_attention)
    plain_runs = [logits_and_gradients() for _ in range(8)]
    decoder.set_attention(plain_attention)
    decoder.double()
    oracle = logits_and_gradients()
    for i, name in enumerate(("logits", "gradients")):
        verdict = judge(ours[i], oracle[i], worst([run[i] for run in plain_runs], oracle[i]), name=name)
        assert verdict.passed, str(verdict)


def test_windows_are_on_the_layers_that_ask_for_them(decoder, encoder_config):
    windows = [module.options.window_size for module in decoder.modules() if isinstance(module, Attention)]
    assert windows == [(4, 0), None, (4, 0)]
    assert replace(encoder_config, sliding_window=3).window_of(1) == (2, 2)


def test_causal_states_do_not_depend_on_later_tokens(decoder):
    ids = torch.randint(50, (1, 20))
    changed = ids.clone()
    changed[0, 12:] = (ids[0, 12:] + 1) % 50
    before, after = decoder(ids).logits, decoder(changed).logits
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])


def test_a_window_forgets_what_lies_behind_it(decoder_config, randomized):
    """Three layers that see 4 tokens back reach 12, and not one more."""
    model = randomized(CausalLM(replace(decoder_config, sliding_layers=None)))
    ids = torch.randint(50, (1, 20))
    near, far = ids.clone(), ids.clone()
    near[0, 19 - 12] = (ids[0, 19 - 12] + 1) % 50
    far[0, 19 - 13] = (ids[0, 19 - 13] + 1) % 50
    assert not torch.equal(model(ids).logits[:, -1], model(near).logits[:, -1])
    assert torch.equal(model(ids).logits[:, -1], model(far).logits[:, -1])


def test_loss_is_the_cross_entropy_of_the_next_token(decoder):
    ids = torch.randint(50, (3, 11))
    logits = decoder(ids[:, :-1]).logits
    torch.testing.assert_close(decoder.loss(ids), F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def test_token_types_default_to_the_first(encoder_config, randomized):
    encoder = randomized(encoder_of(encoder_config))
    ids = torch.randint(50, (2, 7))

    def states(*arguments, **named):
        return encoder(*arguments, **named).last_hidden_state

    assert torch.equal(states(ids), states(ids, token_type_ids=torch.zeros_like(ids)))
    assert not torch.equal(states(ids), states(ids, token_type_ids=torch.ones_like(ids)))


def test_layout_of_a_mask():
    keep = torch.tensor(MASKS["holes"])
    layout = TokenLayout.from_mask(keep)
    assert layout.positions.tolist() == [0, 2, 3, 5, 0, 1, 2, 3, 4, 5, 2, 4]
    assert layout.cu_seqlens is not None and layout.cu_seqlens.dtype == torch.int32
    assert layout.cu_seqlens.tolist() == [0, 4, 10, 12]
    assert layout.lengths.tolist() == [4, 6, 2]
    assert layout.sequence_ids.tolist() == [0] * 4 + [1] * 6 + [2] * 2
    counted = TokenLayout.from_mask(keep, position_ids=keep.cumsum(1) - 1)
    assert counted.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1]
    grid = torch.arange(18.0).view(3, 6, 1)
    rows = layout.take_rows(grid)
    assert torch.equal(layout.to_grid(rows), grid * keep[..., None])
    assert torch.equal(layout.last_rows(rows), torch.tensor([[5.0], [11.0], [16.0]]))
    assert torch.equal(layout.mean(rows), torch.tensor([[2.5], [8.5], [15.0]]))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_heads": 5}, "hidden_size=24 is not a multiple of num_heads=5"),
        ({"num_kv_heads": 2}, "num_kv_heads=2 must divide num_heads=3"),
        ({"norm": "batchnorm"}, "norm='batchnorm' is not one of layernorm, rmsnorm"),
        ({"activation": "relu6"}, "activation='relu6'"),
        ({"positions": "rope", "head_dim": 7}, "even head_dim, not 7"),
        ({"sliding_window": 0}, "sliding_window=0"),
    ],
)
def test_configurations_that_cannot_be_built(changes, complaint, encoder_config):
    with pytest.raises(ValueError, match=complaint):
        replace(encoder_config, **{"num_kv_heads": 0, "head_dim": 0, **changes})


def test_other_complaints(encoder_config):
    with pytest.raises(ValueError, match="unknown model configuration: colour"):
        ModelConfig.from_dict({**encoder_config.to_dict(), "colour": "red"})
    with pytest.raises(ValueError, match="causal=True"):
        CausalLM(encoder_config)
    with pytest.raises(ValueError, match="max_positions=32"):
        encoder_of(encoder_config)(torch.zeros(1, 33, dtype=torch.int64))


@pytest.mark.parametrize("name", ["attention_mask", "token_type_ids"])
@pytest.mark.parametrize("shape", [(2, 5), (1, 6), (2, 7)], ids=str)
def test_a_grid_of_another_shape_is_refused(name: str, shape: tuple[int, int]) -> None:
    """A shorter mask mixed the tokens of two sequences, without a word."""
    config = ModelConfig(
        vocab_size=20, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8, max_positions=9, token_types=2
    )
    encoder = encoder_of(config)
    with pytest.raises(ValueError, match=rf"{name} has shape .*; allowed: \(2, 6\), as input_ids"):
        encoder(torch.zeros(2, 6, dtype=torch.int64), **{name: torch.ones(shape, dtype=torch.int64)})


def small_decoder(**more):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=50,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=48,
        max_positions=20,
        causal=True,
        **more,
    )
    model = CausalLM(config).eval()
    model.initialize()
    return model


class Wrapped(torch.nn.Module):
    """As adapters do: a layer and something added to what it gives."""

    def __init__(self, base):
        super().__init__()
        self.base, self.calls = base, 0

    def forward(self, x, *args, **kwargs):
        self.calls += 1
        return self.base(x, *args, **kwargs) + 0.1


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.usefixtures("every_product_is_packed")
@torch.no_grad()
def test_parts_may_be_replaced_and_wrapped(activation, packs):
    """An adapter around a layer stands before the activation and the residual, with packed layers too."""
    model, ids = small_decoder(activation=activation), torch.randint(50, (2, 7))
    biased = small_decoder(activation=activation, biases=frozenset({"mlp", "out"}))
    biased.load_state_dict(model.state_dict(), strict=False)
    for block in biased.decoder.blocks:
        for layer in (block.mlp.up, block.mlp.down, block.attention.out):
            layer.bias.fill_(0.1)
    if packs:
        linears.pack_linears(model)
        linears.pack_linears(biased)
    expected = biased(ids).logits
    for block in model.decoder.blocks:
        for owner, name in ((block.mlp, "up"), (block.mlp, "down"), (block.attention, "out")):
            setattr(owner, name, Wrapped(getattr(owner, name)))
    assert (model(ids).logits - expected).abs().max() <= PROMISED * expected.abs().max()
    other = torch.nn.Linear(48, 32)  # of no kind that is known here
    other.weight, other.bias = biased.decoder.blocks[0].mlp.down.weight, biased.decoder.blocks[0].mlp.down.bias
    model.decoder.blocks[0].mlp.down = other
    assert (model(ids).logits - expected).abs().max() <= PROMISED * expected.abs().max()


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.usefixtures("every_product_is_packed")
@torch.no_grad()
def test_hooks_hear_what_a_layer_gives(packs):
    """Without the residual: whoever sets a layer's result to 0 takes out that layer, and no more."""
    for place in ("attention", "attention.out", "mlp", "mlp.down"):
        model, without = small_decoder(), small_decoder()
        ids = torch.randint(50, (2, 7))
        block = without.decoder.blocks[0]
        (block.attention.out if "attention" in place else block.mlp.down).weight.zero_()
        expected = without(ids).logits
        if packs:
            linears.pack_linears(model)
        model.decoder.blocks[0].get_submodule(place).register_forward_hook(lambda m, x, out: out * 0)
        assert (model(ids).logits - expected).abs().max() <= PROMISED * expected.abs().max(), place


LAST_ROWS = {
    "sandwich": {"norm_placement": "sandwich"},
    "pre, a window and rotary positions": {"norm_placement": "pre", "sliding_window": 4, "positions": "rope"},
    "post": {"norm_placement": "post"},
    "parallel": {"norm_placement": "parallel", "activation": "swiglu"},
    "a bias of positions": {"positions": "relative"},
}


@pytest.fixture
def rows_of_mlps(monkeypatch):
    """How many rows each block's feed-forward layer had."""
    seen, forward = [], MLP.forward
    monkeypatch.setattr(
        MLP, "forward", lambda self, x, *rest, **how: seen.append(len(x)) or forward(self, x, *rest, **how)
    )
    return seen


@pytest.mark.parametrize("changes", LAST_ROWS.values(), ids=LAST_ROWS)
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.usefixtures("every_product_is_packed")
@torch.no_grad()
def test_the_last_block_computes_the_last_rows_alone(changes, packs, cached, rows_of_mlps):
    """Where these are all that is asked for: the same logits, of dense and of padded prompts, and of what follows."""
    model, ids = small_decoder(**changes), torch.randint(50, (3, 9))
    if packs:
        linears.pack_linears(model)
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [1] * 2 + [0] * 7]).bool()
    for keep in (None, mask):
        cache = model.new_cache(3, 20) if cached else None
        rows_of_mlps.clear()
        found = model.next_token_logits(ids, keep, cache=cache)
        assert rows_of_mlps == [27 if keep is None else 16, 3]
        alone = [row if keep is None else row[keep[i]] for i, row in enumerate(ids)]
        expected = torch.cat([model(row[None]).logits[:, -1] for row in alone])
        assert (found - expected).abs().max() <= PROMISED * expected.abs().max()
        if cache is not None:
            found = model.next_token_logits(ids[:, :2], cache=cache)
            longer = [torch.cat((row, ids[i, :2])) for i, row in enumerate(alone)]
            expected = torch.cat([model(row[None]).logits[:, -1] for row in longer])
            assert (found - expected).abs().max() <= PROMISED * expected.abs().max()


@pytest.mark.parametrize("place", ["blocks.1", "blocks.1.mlp.down", "blocks.1.mlp_norm", "final_norm", "final_dropout"])
@torch.no_grad()
def test_who_listens_to_the_last_block_hears_all_rows(place, rows_of_mlps):
    model, ids, heard = small_decoder(), torch.randint(50, (2, 7)), []
    expected = model.next_token_logits(ids)
    hook = model.decoder.get_submodule(place).register_forward_hook(lambda m, x, out: heard.append(len(out)))
    found = model.next_token_logits(ids)
    assert heard == [14]
    assert (found - expected).abs().max() <= PROMISED * expected.abs().max()
    hook.remove()
    model.decoder.get_submodule(place).register_full_backward_hook(lambda *_: None)
    rows_of_mlps.clear()
    model.next_token_logits(ids)
    assert rows_of_mlps == [14, 14]


@pytest.mark.parametrize("part", ["attention", "mlp"])
@torch.no_grad()
def test_a_part_put_into_the_last_block_gets_all_rows(part, rows_of_mlps):
    """It may look at more than its own row."""
    model, ids = small_decoder(), torch.randint(50, (2, 7))
    setattr(model.decoder.blocks[1], part, Wrapped(getattr(model.decoder.blocks[1], part)))
    expected = model(ids).logits[:, -1]
    rows_of_mlps.clear()
    found = model.next_token_logits(ids)
    assert rows_of_mlps == [14, 14]
    assert (found - expected).abs().max() <= PROMISED * expected.abs().max()


@torch.no_grad()
def test_blocks_that_are_one(rows_of_mlps):
    """As in ALBERT: only its last use leaves rows out."""
    model, ids = small_decoder(), torch.randint(50, (2, 7))
    model.decoder.blocks[0] = model.decoder.blocks[1]
    expected = model(ids).logits[:, -1]
    rows_of_mlps.clear()
    found = model.next_token_logits(ids)
    assert rows_of_mlps == [14, 2]
    assert (found - expected).abs().max() <= PROMISED * expected.abs().max()


class Checkpointed(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *inputs):
        return checkpoint(self.block, *inputs, use_reentrant=False)


def test_a_checkpoint_of_an_earlier_block_computes_all_rows_again():
    model, ids = small_decoder(), torch.randint(50, (2, 7))
    wanted = model.decoder.blocks[0].mlp.down.weight
    (expected,) = torch.autograd.grad(model(ids).logits[:, -1].square().sum(), wanted)
    model.decoder.blocks[0] = Checkpointed(model.decoder.blocks[0])
    (found,) = torch.autograd.grad(model.next_token_logits(ids).square().sum(), wanted)
    assert (found - expected).abs().max() <= PROMISED * expected.abs().max()


class Path(torch.nn.Module):
    def forward(self, x):
        return x * 0


@torch.no_grad()
def test_dropout_by_its_own_switch():
    """Some leave it on to look at the spread, and put other kinds in its place."""
    model, ids = small_decoder(dropout=0.5), torch.randint(50, (2, 7))
    expected = model(ids).logits
    for block in model.decoder.blocks:
        block.dropout.train()
    assert (model(ids).logits - expected).abs().max() > 0.01
    for block in model.decoder.blocks:
        block.dropout = block.attention_dropout = Path()
    model.train()
    model.decoder.dropout.eval()
    for module in model.decoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    hidden = model.decoder.final_norm(model.decoder.embeddings(ids.flatten(), torch.arange(7).repeat(2), None))
    found, expected = model(ids).logits, model.head.logits(hidden).view(2, 7, -1)
    assert (found - expected).abs().max() <= PROMISED * expected.abs().max()


@pytest.mark.parametrize("mask", [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 1]])
@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_one_sequence_whose_prompt_is_padded(packed, mask):
    """Its next token follows its last one, also where the padding was computed: the grid is the longer one."""
    model = small_decoder()
    ids, mask = torch.randint(50, (1, 7)), torch.tensor([mask])
    keep = torch.cat((mask[0].bool(), torch.ones(1, dtype=torch.bool)))
    positions = torch.arange(7)[None]
    expected = model(ids[:, keep], position_ids=positions[:, keep]).logits[:, -1]
    past = model(ids[:, :6], attention_mask=mask, use_cache=True, packed=packed).past_key_values
    for buffer in past.buffers:
        for sequence in buffer.unbind(1):
            sequence[:, :, int(past.seqlens[0]) :] = float("nan")  # slots that hold nothing
    found = model(ids[:, 6:], past_key_values=past).logits[:, -1]
    assert judge(found, expected.double(), expected).passed
