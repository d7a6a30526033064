"""The searches give the ids of transformers' own `generate`, and the processors its scores, to the last bit.

Each step computes the whole sequence again on both sides: what is compared is the search alone. With 30 tokens, ends
and repetitions are frequent.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from transformer_fast.generation.config import GenerationConfig
from transformer_fast.generation.processors import processor
from transformer_fast.generation.search import beam_search, sample_search

transformers = pytest.importorskip("transformers")
# transformers warns of lengths that contradict each other, and of the default one.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers")

VOCAB = 30
CPU = torch.device("cpu")
GPT2_SIZES = dict(n_positions=64, n_embd=16, n_layer=1, n_head=2)
BART_SIZES = dict(encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, max_position_embeddings=64)
BART_SIZES |= dict(decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, d_model=16)
ENDS = dict(eos_token_id=3, pad_token_id=1)


class Chaos(transformers.PreTrainedModel, transformers.GenerationMixin):
    """Every sequence has its own random logits. Real models with random weights soon say the same for ever."""

    main_input_name = "input_ids"

    def __init__(self, config) -> None:
        super().__init__(config)
        self.table = torch.nn.Parameter(torch.empty(997, VOCAB))

    def forward(self, input_ids, attention_mask=None, position_ids=None, **_):
        key = ((input_ids + 2) * torch.arange(1, input_ids.shape[1] + 1) ** 3).sum(1) % 997
        return transformers.modeling_outputs.CausalLMOutput(logits=self.table[key][:, None])


class Reference:
    """A model of transformers, its `generate`, and the same model as a stepper without a cache."""

    def __init__(self, name: str) -> None:
        kind = transformers.BartConfig if name == "bart" else transformers.GPT2Config
        sizes = BART_SIZES if name == "bart" else GPT2_SIZES
        config = kind(vocab_size=VOCAB, bos_token_id=None, eos_token_id=None, **sizes)
        self.has_encoder = config.is_encoder_decoder
        models = {"bart": transformers.BartForConditionalGeneration, "gpt2": transformers.GPT2LMHeadModel}
        self.model = models.get(name, Chaos)(config).eval()
        # Said by each test, and by nothing else.
        self.model.generation_config = transformers.GenerationConfig()
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.normal_(0.0, 1.5 if name == "chaos" else 0.5)
        self.steps = 0
        self.model.register_forward_hook(self._count_step)

    def _count_step(self, *_) -> None:
        self.steps += 1

    def inputs(self, batch: int, prompt_length: int = 1, padding: int = 0) -> dict[str, torch.Tensor]:
        """Sources and prompts, for `generate`. Row ``i`` of a decoder alone has ``i * padding`` pads on its left."""
        ids = torch.randint(4, VOCAB, (batch, prompt_length))
        if self.has_encoder:
            ids[:, 0] = 2
            source = torch.randint(4, VOCAB, (batch, 6))
            return dict(input_ids=source, attention_mask=torch.ones_like(source), decoder_input_ids=ids)
        mask = torch.arange(prompt_length) >= torch.arange(batch)[:, None] * padding
        return dict(input_ids=ids.where(mask, 1), attention_mask=mask.long())

    def generate(self, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
        if self.has_encoder:
            options["decoder_start_token_id"] = 2
        return self.model.generate(**inputs, **options, use_cache=False)

    def search(self, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
        config = GenerationConfig(**options)
        rows = {name: tensor.repeat_interleave(config.rows_per_prompt, 0) for name, tensor in inputs.items()}
        stepper = Recompute(self, rows)
        return (beam_search if config.num_beams > 1 else sample_search)(stepper, stepper.ids, config)

    def check(self, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
        """The same ids, after as many steps."""
        self.steps = 0
        expected = self.generate(inputs, **options)
        steps, self.steps = self.steps, 0
        made = self.search(inputs, **options)
        assert torch.equal(made, expected), f"{options}\n{made}\n{expected}"
        assert self.steps == steps, options
        return made


class Recompute:
    """Keeps the ids so far, and passes all of them through the model each time."""

    def __init__(self, reference: Reference, rows: dict[str, torch.Tensor]) -> None:
        self.model, self.has_encoder, self.mask = reference.model, reference.has_encoder, rows["attention_mask"]
        self.ids = rows["decoder_input_ids" if self.has_encoder else "input_ids"]
        self.source = self.model.get_encoder()(rows["input_ids"], self.mask) if self.has_encoder else None

    def __call__(self, tokens: torch.Tensor | None) -> torch.Tensor:
        if tokens is not None:
            self.ids = torch.cat((self.ids, tokens[:, None]), 1)
        if self.has_encoder:
            options = dict(encoder_outputs=self.source, attention_mask=self.mask, decoder_input_ids=self.ids)
        else:
            mask = torch.nn.functional.pad(self.mask, (0, self.ids.shape[1] - self.mask.shape[1]), value=1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            options = dict(input_ids=self.ids, attention_mask=mask, position_ids=positions)
        return self.model(**options).logits[:, -1]

    def reorder(self, index: torch.Tensor) -> None:
        self.ids = self.ids[index]


class Scripted:
    """Gives the logits it was made with, one step after the other."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits, self.calls, self.taken = logits, 0, []

    def __call__(self, tokens: torch.Tensor | None) -> torch.Tensor:
        self.calls += 1
        self.taken.append(tokens)
        return self.logits[self.calls - 1]

    def reorder(self, index: torch.Tensor) -> None:
        rows = self.logits.shape[1]
        assert index.shape == (rows,)


@pytest.fixture(params=["chaos", "bart"])
def reference(request) -> Reference:
    return Reference(request.param)


PAIRS = [[first, second] for first in range(2, VOCAB) for second in range(8, VOCAB, 3)]
#: Options by which the best token changes, with the length of the prompt.
CONTENT = {
    "nothing": ({}, 1),
    "several ends": ({"eos_token_id": [3, 7, 11, 20], "pad_token_id": None}, 2),
    "no end": ({"eos_token_id": None, "pad_token_id": None}, 2),
    "padding is 0": ({"pad_token_id": 0}, 1),
    "the default length": ({"max_new_tokens": None}, 3),
    "max_length": ({"max_new_tokens": None, "max_length": 9}, 4),
    "min_length": ({"min_length": 7, "eos_token_id": [3, 4, 5, 6, 7, 8]}, 2),
    "min_new_tokens": ({"min_new_tokens": 5, "min_length": 12, "eos_token_id": [3, 4, 5, 6, 7, 8]}, 3),
    "repetition": ({"repetition_penalty": 1.7}, 4),
    "repetition wanted": ({"repetition_penalty": 0.6}, 4),
    "single tokens": ({"no_repeat_ngram_size": 1}, 5),
    "pairs": ({"no_repeat_ngram_size": 2, "eos_token_id": None}, 3),
    "triples": ({"no_repeat_ngram_size": 3, "eos_token_id": None}, 1),
    "bad words": (
        {"bad_words_ids": [[3], [5], [9], *PAIRS, [6, 7, 8]], "eos_token_id": [3, 5, 6, 7]},
        1,  # the first tokens of a pair: which forbids nothing, see there
    ),
    "forced": ({"forced_bos_token_id": 5, "forced_eos_token_id": 3, "begin_suppress_tokens": [8, 9, 10]}, 1),
    "forced late": ({"forced_bos_token_id": 5, "forced_eos_token_id": [3, 6], "begin_suppress_tokens": [8, 9]}, 3),
    "renormalized": ({"suppress_tokens": list(range(8, 20)), "renormalize_logits": True}, 2),
    "suppressed": ({"suppress_tokens": list(range(8, 20)), "begin_suppress_tokens": [3, 20, 21, 22]}, 3),
}


@pytest.mark.parametrize(("options", "prompt_length"), CONTENT.values(), ids=CONTENT.keys())
@pytest.mark.parametrize("num_beams", [1, 3])
def test_content(options, prompt_length, num_beams, reference):
    options = {"num_beams": num_beams, "max_new_tokens": 10, **ENDS, **options}
    reference.check(reference.inputs(3, prompt_length), **options)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("num_beams", [2, 3, 5])
def test_beams(num_beams, early_stopping):
    """Lengths must differ in the end, or how beams of different lengths are compared would go untested."""
    reference = Reference("chaos")
    inputs = reference.inputs(16, 2)
    options = dict(num_beams=num_beams, num_return_sequences=num_beams - 1, early_stopping=early_stopping)
    options |= dict(eos_token_id=[3, 4], pad_token_id=1, max_new_tokens=9)
    made = [reference.check(inputs, length_penalty=penalty, **options) for penalty in (-1.0, 0.0, 0.5, 2.0)]
    assert all(len(ids) == 16 * (num_beams - 1) for ids in made)
    assert len({length for ids in made for length in (ids != 1).sum(1).tolist()}) > 3
    assert len({str(ids.tolist()) for ids in made}) > 1, "length_penalty changes nothing"


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_beams_stop(early_stopping):
    """Each prompt alone, or the last one to end would hide when the others do."""
    reference = Reference("chaos")
    steps = []
    for length_penalty in (-1.0, -0.3, 0.0, 0.5):
        for _ in range(6):
            options = dict(early_stopping=early_stopping, length_penalty=length_penalty, eos_token_id=[3, 4, 5, 6])
            reference.check(reference.inputs(1, 2), num_beams=2, max_new_tokens=9, **options)
            steps.append(reference.steps)
    assert min(steps) < 9


@pytest.mark.parametrize("num_beams", [1, 4])
def test_prompts_of_unequal_length(num_beams):
    reference = Reference("gpt2")
    reference.check(reference.inputs(3, 7, padding=2), num_beams=num_beams, repetition_penalty=1.3, **ENDS)


def random_options(draw: random.Random) -> dict[str, Any]:
    """Some of all options at once: their order counts."""

    def tokens(most: int) -> list[int]:
        return draw.sample(range(3, VOCAB), draw.randint(1, most))

    options: dict[str, Any] = {
        "max_new_tokens": 7,
        "eos_token_id": tokens(3),
        "repetition_penalty": draw.choice([0.7, 1.4]),
        "no_repeat_ngram_size": draw.randint(1, 3),
        "bad_words_ids": [tokens(2) for _ in range(9)],
        "min_length": draw.randint(0, 6),
        "min_new_tokens": draw.randint(0, 4),
        "forced_bos_token_id": draw.randrange(VOCAB),
        "forced_eos_token_id": tokens(2),
        "begin_suppress_tokens": tokens(9),
        "length_penalty": draw.choice([-0.7, 0.8, 1.5]),
        "early_stopping": draw.choice([False, True, "never"]),
        "renormalize_logits": draw.choice([False, True]),
    }
    kept = {"max_new_tokens", *draw.sample(sorted(options), draw.randint(2, 8))}
    options = {name: value for name, value in options.items() if name in kept}
    if draw.random() < 0.5:
        forced = {options.get("forced_bos_token_id"), *options.get("forced_eos_token_id", [])}
        options["suppress_tokens"] = [token for token in tokens(9) if token not in forced]
    return options


NO_END = {"num_beams": 2, "eos_token_id": None, "pad_token_id": None}
DRAWS = [
    {"top_k": 0},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 4},
    {"top_k": 1},
    {"top_p": 0.7},
    {"top_p": 0.0},
    {"top_p": 0.9, "top_k": 100},
    {"min_p": 0.1},
    {"min_p": 1.0, "top_k": 0},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
]


def test_random_options(reference, seed):
    draw = random.Random(seed)
    for _ in range(12):
        options = {"num_beams": draw.randint(1, 4), **random_options(draw)}
        reference.check(reference.inputs(2, draw.randint(1, 4)), **options)


def test_scores(reference, seed):
    """Each step's scores, from each step's logits; neither the ids nor the logits are written to."""
    draw = random.Random(seed)
    for way in (*DRAWS, None, None, None):
        options = random_options(draw)
        if way is not None:
            options |= {"do_sample": True, **way}
        inputs = reference.inputs(2, draw.randint(1, 4))
        asked = dict(output_logits=True, output_scores=True, return_dict_in_generate=True)
        expected = reference.generate(inputs, **options, **asked)
        length = expected.sequences.shape[1] - len(expected.scores)
        process = processor(GenerationConfig(**options), length, CPU)
        for step, (logits, scores) in enumerate(zip(expected.logits, expected.scores, strict=True)):
            ids = expected.sequences[:, : length + step]
            before = ids.clone(), logits.clone()
            assert torch.equal(process(ids, logits), scores), f"{options}, step {step}"
            assert torch.equal(ids, before[0]) and torch.equal(logits, before[1])


@pytest.mark.parametrize("way", DRAWS, ids=str)
def test_draws(way):
    """The same seed is the same stream of random numbers; with beams, so many tokens are kept as there are ends."""
    reference = Reference("chaos")
    inputs = reference.inputs(2, 2)
    for more in ({"num_return_sequences": 3}, {"num_beams": 3, "eos_token_id": [3, 4]}, NO_END):
        options = {**ENDS, "do_sample": True, "max_new_tokens": 8, **way, **more}
        torch.manual_seed(5)
        expected = reference.generate(inputs, **options)
        state = torch.get_rng_state()
        assert torch.equal(reference.search(inputs, **options, seed=5), expected), options
        assert torch.equal(torch.get_rng_state(), state), "a seed leaves torch's own stream alone"
        torch.manual_seed(5)
        assert torch.equal(reference.search(inputs, **options), expected), "no seed: torch's own stream"


@pytest.mark.parametrize(("way", "kept"), [({"top_k": 1}, 2), ({"top_p": 0.5}, 1), ({"min_p": 1.0}, 2)], ids=str)
def test_tokens_on_the_border(way, kept):
    """Two of equal score."""
    process = processor(GenerationConfig(do_sample=True, **way), 1, CPU)
    scores = process(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[0.0, -200.0, 0.0, -200.0]]))
    assert scores.isfinite().sum() == kept


def test_another_seed_is_another_draw():
    logits = torch.zeros(20, 2, VOCAB)
    prompt = torch.zeros(2, 1, dtype=torch.int64)
    made = [
        sample_search(Scripted(logits), prompt, GenerationConfig(do_sample=True, max_new_tokens=20, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_steps_of_a_search():
    """Each step's tokens are given to the model and to the listener, and the search ends with its last row."""
    logits = torch.randn(9, 3, VOCAB)
    logits[:, :, 3] = -100.0
    for row, step in enumerate((1, 4, 2)):
        logits[step, row, 3] = 100.0
    stepper, streamed = Scripted(logits), []
    prompt = torch.full((3, 2), 8)
    made = sample_search(stepper, prompt, GenerationConfig(max_new_tokens=9, **ENDS), streamed.append)
    assert torch.equal(made[:, :2], prompt)
    assert (made == 3).nonzero().tolist() == [[0, 3], [1, 6], [2, 4]]
    assert made[0, 4:].eq(1).all() and made[2, 5:].eq(1).all()
    assert torch.equal(torch.stack(streamed, 1), made[:, 2:])
    assert stepper.taken[0] is None and torch.equal(torch.stack(stepper.taken[1:], 1), made[:, 2:-1])


def test_scores_are_float32():
    """A penalty of less than bfloat16's step counts."""
    logits = torch.zeros(1, 1, VOCAB).bfloat16()
    logits[:, :, [0, 5]] = 1.0
    config = GenerationConfig(max_new_tokens=1, repetition_penalty=1.0001)
    assert sample_search(Scripted(logits), torch.zeros(1, 1, dtype=torch.int64), config).tolist() == [[0, 5]]


@pytest.mark.parametrize("search", [sample_search, beam_search])
def test_low_precision_logits_and_no_writing(search):
    logits = torch.randn(6, 4, VOCAB).bfloat16()
    before = logits.clone()
    prompt = torch.randint(VOCAB, (4, 3))
    config = GenerationConfig(num_beams=2, max_new_tokens=6, suppress_tokens=[1, 2], repetition_penalty=1.3)
    made = search(Scripted(logits), prompt, config)
    assert torch.equal(made, search(Scripted(before.float()), prompt, config))
    assert torch.equal(logits, before)


def test_config_from_files():
    """As they are on the Hub: other keys, nulls, lists, one end or several."""
    assert GenerationConfig.from_values({"top_k": None, "vocab_size": 3, "transformers_version": "4"}).top_k == 50
    read = GenerationConfig.from_values({"eos_token_id": 2, "bad_words_ids": [[7]], "suppress_tokens": [1, 2]})
    assert (read.eos_token_id, read.bad_words_ids, read.suppress_tokens) == ((2,), ((7,),), (1, 2))
    assert hash(read) == hash(read.replace(eos_token_id=[2]))
    assert read.replace(top_k=None, eos_token_id=None) == read.replace(top_k=0, eos_token_id=[])
    hub = transformers.GenerationConfig()
    hub.update(**transformers.GenerationConfig._get_default_generation_params(), defaults_only=True)
    lengths = ("max_length",)  # 20 new tokens, of which GenerationConfig says nothing until the prompt is there
    for name, value in GenerationConfig().__dict__.items():
        if name not in (*lengths, "seed"):
            assert (getattr(hub, name) or None) == (value or None), name


def test_lengths():
    assert GenerationConfig().length_limit(5) == 25
    assert GenerationConfig().length_limit(5, max_positions=12) == 12
    assert GenerationConfig(max_length=30).length_limit(5, max_positions=12) == 30
    assert GenerationConfig(max_length=30, max_new_tokens=3).length_limit(5) == 8
    assert GenerationConfig(min_length=9).length_floor(5) == 9
    assert GenerationConfig(min_length=9, min_new_tokens=1).length_floor(5) == 6
    with pytest.raises(ValueError, match="the prompt has 5 tokens; allowed: fewer than the greatest length, 5"):
        GenerationConfig(max_length=5).length_limit(5)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"max_length": 0},
        {"min_length": -1},
        {"num_beams": 1.0},
        {"num_beams": True},
        {"temperature": -0.5},
        {"temperature": 0, "do_sample": True},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_p": 1.5},
        {"min_p": float("nan")},
        {"repetition_penalty": 0},
        {"no_repeat_ngram_size": -1},
        {"bad_words_ids": [[]]},
        {"bad_words_ids": [4, 5]},
        {"bad_words_ids": 4},
        {"bad_words_ids": [["a"]]},
        {"length_penalty": None, "early_stopping": 1},
        {"early_stopping": "always"},
        {"do_sample": 1},
        {"eos_token_id": "</s>"},
        {"suppress_tokens": [1.5]},
        {"pad_token_id": 1.5},
        {"num_return_sequences": 2},
        {"num_return_sequences": 3, "num_beams": 2, "do_sample": True},
        {"forced_bos_token_id": 4, "suppress_tokens": [4]},
        {"forced_eos_token_id": [4, 5], "suppress_tokens": [4, 5, 6]},
    ],
    ids=str,
)
def test_wrong_values(options):
    """The message names the option, and what is allowed."""
    names = "|".join(options)
    with pytest.raises(ValueError, match=rf"^({names})=.*allowed: "):
        GenerationConfig(**options)


def test_complaints():
    with pytest.raises(TypeError, match=r"unknown generation option: beams; allowed: .*num_beams"):
        GenerationConfig().replace(beams=3)
    ids = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="ids has 3 rows; allowed: a multiple of num_beams=2"):
        beam_search(Scripted(torch.zeros(1, 3, VOCAB)), ids, GenerationConfig(num_beams=2))
    with pytest.raises(ValueError, match="bad_words_ids has the token 30; allowed: below the vocabulary's size, 30"):
        sample_search(Scripted(torch.zeros(1, 3, VOCAB)), ids, GenerationConfig(bad_words_ids=[[4, 30]]))
    with pytest.raises(ValueError, match="the prompt has 2 tokens"):
        sample_search(Scripted(torch.zeros(1, 3, VOCAB)), ids, GenerationConfig(max_length=2))
