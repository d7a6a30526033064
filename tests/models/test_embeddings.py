"""word2vec against its formulas, on a corpus of known structure and through its files; and additive attention."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from transformer_fast.models.additive import AdditiveAttention, ScaledDotProduct, masked_softmax
from transformer_fast.models.embeddings import Vocabulary, Word2Vec, cbow_windows, skipgram_pairs
from transformer_fast.testing import judge

WORDS = ("the", "cat", "sat", "mat", "dog")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_model(words=WORDS, dim: int = 4) -> Word2Vec:
    model = Word2Vec(Vocabulary(tuple(words), torch.arange(len(words), 0, -1)), dim)
    with torch.no_grad():
        model.in_vectors.normal_()
        model.out_vectors.normal_()
    return model


# ----------------------------------------------------------------------------------------------------------- vocabulary


def test_vocabulary_counts_and_chances():
    sentences = [["a"] * 16, ["b"] * 4 + ["c"], ["d", "a", "d"], ["c"]]
    vocabulary = Vocabulary.build(sentences, min_count=2)
    assert vocabulary.words == ("a", "b", "c", "d") and vocabulary.counts.tolist() == [17, 4, 2, 2]
    assert Vocabulary.build(sentences, min_count=3).words == ("a", "b")
    assert vocabulary.encode(["d", "unknown", "a", "a"]).tolist() == [3, 0, 0]
    assert vocabulary.encode([]).dtype == torch.int64
    frequency = torch.tensor([17, 4, 2, 2]) / 25
    assert torch.equal(vocabulary.keep_probability(0.1), (0.1 / frequency).sqrt().clamp(max=1))


def test_noise_and_subsampling_follow_their_chances():
    """Empty slots of the table are never drawn; counts lie within six standard deviations of a binomial (1 in 5e8)."""
    vocabulary = Vocabulary(("a", "b", "never", "c"), torch.tensor([10_000, 81, 0, 16]))
    n = 200_000

    def near(hits: int, chance: float) -> bool:
        return abs(hits - n * chance) <= 6 * math.sqrt(n * chance * (1 - chance))

    drawn = Counter(vocabulary.draw_noise((n // 4, 4), generator()).flatten().tolist())
    shares = [1000.0, 27.0, 0.0, 8.0]
    assert all(near(drawn[i], share / sum(shares)) for i, share in enumerate(shares))
    left = vocabulary.subsample(torch.zeros(n, dtype=torch.int64), 0.04, generator())
    assert near(len(left), math.sqrt(0.04 * 10_097 / 10_000))


# -------------------------------------------------------------------------------------------------------------- windows


def test_windows_are_drawn_for_each_word():
    """Every pair is within its word's reach, symmetric, and a distance d has the chance (window - d + 1) / window."""
    text, window, texts = torch.arange(100, 140), 4, 300
    at_distance: Counter[int] = Counter()
    for inputs, targets in skipgram_pairs([text] * texts, window, generator()):
        for word in text.tolist():
            around = targets[inputs == word].tolist()
            reach = max(abs(other - word) for other in around)
            assert around == [o for o in range(word - reach, word + reach + 1) if o != word and 100 <= o < 140]
            at_distance[reach] += 1
    trials = texts * len(text)
    for reach in range(1, window + 1):
        spread = math.sqrt(trials * (1 / window) * (1 - 1 / window))
        assert abs(at_distance[reach] - trials / window) <= 6 * spread


def test_cbow_windows_are_the_pairs_by_target():
    text = torch.tensor([5, 6, 7, 8, 9])
    ((inputs, targets),) = skipgram_pairs([text], 3, generator(3))
    ((around, centers, keep),) = cbow_windows([text], 3, generator(3))
    assert around.shape == keep.shape == (5, 6) and centers.tolist() == text.tolist()
    for center, row, kept in zip(centers, around, keep, strict=True):
        assert row[kept].tolist() == targets[inputs == center].tolist()
    lone = list(cbow_windows([text[:1], text[:0]], 3, generator()))
    assert [tuple(map(len, window)) for window in lone] == [(0, 0, 0)] * 2, "nothing to predict from"
    assert [tuple(map(len, pairs)) for pairs in skipgram_pairs([text[:1], text[:0]], 3, generator())] == [(0, 0)] * 2


# ------------------------------------------------------------------------------------------------------------- training


def explicit(model: Word2Vec, inputs: Tensor, targets: Tensor, negatives: Tensor, keep: Tensor | None, dtype):
    """Loss and gradients by the formulas of the paper, one example and one candidate at a time."""
    vectors, outs = model.in_vectors.detach().to(dtype), model.out_vectors.detach().to(dtype)
    loss, dvectors, douts = torch.zeros((), dtype=dtype), torch.zeros_like(vectors), torch.zeros_like(outs)
    n = len(targets)
    for i in range(n):
        sources = inputs[i].reshape(-1)
        sources = sources if keep is None else sources[keep[i]]
        hidden = sum((vectors[j] for j in sources), torch.zeros_like(vectors[0])) / max(1, len(sources))
        for number, word in enumerate([targets[i], *negatives[i]]):
            if number and word == targets[i]:
                continue
            label = 1.0 if number == 0 else 0.0
            probability = torch.sigmoid(outs[word] @ hidden)
            loss -= torch.log(probability if label else 1 - probability) / n
            douts[word] += (probability - label) * hidden / n
            for j in sources:
                dvectors[j] += (probability - label) * outs[word] / len(sources) / n
    return loss, dvectors, douts


@pytest.mark.parametrize("kind", ["skipgram", "cbow", "cbow with a mask"])
def test_loss_and_gradients_are_the_formulas(kind):
    model = random_model()
    shape = (20,) if kind == "skipgram" else (20, 6)
    inputs, targets, negatives = torch.randint(5, shape), torch.randint(5, (20,)), torch.randint(5, (20, 3))
    assert (negatives == targets[:, None]).any(), "a negative that is the target occurs"
    keep = torch.rand(shape) < 0.5 if kind == "cbow with a mask" else None
    if keep is not None:
        keep[4] = False
    loss = model(inputs, targets, negatives, keep)
    loss.backward()
    ours = (loss, model.in_vectors.grad, model.out_vectors.grad)
    oracle, baseline = (explicit(model, inputs, targets, negatives, keep, t) for t in (torch.float64, torch.float32))
    for name, *three in zip(("loss", "in", "out"), ours, oracle, baseline, strict=True):
        verdict = judge(*three, name=name)
        assert verdict.passed, str(verdict)


def topics(count: int = 5, words: int = 4, sentences: int = 60) -> list[list[str]]:
    """Sentences that each speak of one topic, with a word that occurs in all of them."""
    return [
        [f"{sentence % count}{i}" for i in torch.randint(words, (8,)).tolist()] + ["the"]
        for sentence in range(sentences)
    ]


@pytest.mark.parametrize("kind", ["skipgram", "cbow"])
def test_words_of_a_topic_become_neighbours(kind):
    corpus = topics()
    vocabulary, draw = Vocabulary.build(corpus, min_count=1), generator()
    model = Word2Vec(vocabulary, 16)
    texts = [vocabulary.encode(sentence) for sentence in corpus]
    squares, losses = [torch.zeros_like(p) for p in model.parameters()], []
    for _ in range(40):
        if kind == "skipgram":
            examples = [torch.cat(parts) for parts in zip(*skipgram_pairs(texts, 4, draw), strict=True)]
            keep = None
        else:
            *examples, keep = (torch.cat(parts) for parts in zip(*cbow_windows(texts, 4, draw), strict=True))
        loss = model(*examples, vocabulary.draw_noise((len(examples[1]), 5), draw), keep)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter, square in zip(model.parameters(), squares, strict=True):  # Adagrad
                square += parameter.grad.square()
                parameter -= 0.2 * parameter.grad / (square.sqrt() + 1e-10)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for word in vocabulary.words:
        if word != "the":
            mates = [other for other in vocabulary.words if other[0] == word[0] and other != word]
            assert {other for other, _ in model.nearest(word, len(mates))} == set(mates)


# -------------------------------------------------------------------------------------------------------------- queries


def test_nearest_and_analogy():
    """Royal or not, and male or female, are two directions; lengths do not matter."""
    words = ("king", "queen", "man", "woman", "stone")
    model = random_model(words, 3)
    model.in_vectors.data = torch.tensor(
        [[1.0, 1.0, 0.3], [1.0, -1.0, 0.3], [0.0, 5.0, 1.0], [0.0, -1.0, 0.2], [-1.0, 0.0, 9.0]]
    )
    ((found, cosine),) = model.analogy("man", "king", "woman")
    assert found == "queen" and 0.5 < cosine <= 1.0
    nearest = model.nearest("king")
    assert [word for word, _ in nearest] == ["man", "stone", "queen", "woman"], "all others, by cosine"
    cosines = torch.cosine_similarity(model.in_vectors[0], model.in_vectors[[2, 4, 1, 3]]).detach()
    verdict = judge(torch.tensor([value for _, value in nearest]), cosines.double(), cosines)
    assert verdict.passed, str(verdict)
    assert len(model.nearest("man", 2)) == 2
    with pytest.raises(ValueError, match="word='prince'; allowed: one of the 5 in the vocabulary"):
        model.analogy("man", "king", "prince")


# ---------------------------------------------------------------------------------------------------------------- files


def test_text_round_trip_is_exact(tmp_path):
    """Numbers of all magnitudes, and words of any script, come back bit by bit."""
    words = ("naïve", "日本語", "a.b,c", "'", "no\u00a0break", "1", "\u2028")
    model = random_model(words, 300)
    exponents = torch.randint(-44, 38, (len(words), 300))
    with torch.no_grad():
        model.in_vectors.mul_(torch.pow(10.0, exponents.double()).float())
        special = (0.0, -0.0, 0.1, 1e-45, 3.4028235e38, 16777216.0, math.inf, 1 / 3)
        model.in_vectors[0, : len(special)] = torch.tensor(special)
    model.save_text(tmp_path / "vectors.txt")
    back = Word2Vec.load_text(tmp_path / "vectors.txt")
    assert back.vocabulary.words == words and back.vocabulary.counts.tolist() == [1] * len(words)
    assert torch.equal(back.in_vectors.view(torch.int32), model.in_vectors.view(torch.int32))
    assert back.in_vectors.requires_grad and not back.out_vectors.any()
    lines = (tmp_path / "vectors.txt").read_bytes().split(b"\n")
    assert lines[0] == b"7 300" and len(lines) == 9 and lines[-1] == b""
    assert lines[1].startswith("naïve 0 -0 0.1 1.4013e-45 3.4028235e+38 16777216 inf 0.33333334 ".encode())


def test_files_of_other_writers(tmp_path):
    """word2vec.c leaves a space at the end of a line; others end it as Windows does."""
    path = tmp_path / "vectors.txt"
    path.write_bytes(b"2 2\r\na 1.000000 -2.5 \r\nb 3e-2 4\n")
    model = Word2Vec.load_text(path)
    assert model.vocabulary.words == ("a", "b")
    assert torch.equal(model.in_vectors, torch.tensor([[1.0, -2.5], [0.03, 4.0]]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: ''; allowed: 'count dim'"),
        ("2\na 1\n", "line 1: '2'; allowed: 'count dim'"),
        ("1 -2\na 1 2\n", "line 1: '1 -2'; allowed: 'count dim'"),
        ("2 2\na 1 2\nb 1\n", "line 3: 'b' with 1 numbers; allowed: a new word with 2"),
        ("2 2\na 1 2 3\nb 1 2\n", "line 2: 'a' with 3 numbers; allowed: a new word with 2"),
        ("2 2\na 1 2\na 3 4\n", "line 3: 'a' with 2 numbers; allowed: a new word with 2"),
        ("2 2\na 1 2\nb 1 x\n", "line 3: could not convert string to float: 'x'"),
        ("3 2\na 1 2\nb 3 4\n", "line 1: count 3; allowed: 2, as many as lines follow"),
    ],
)
def test_malformed_files(text, message, tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        Word2Vec.load_text(path)
    assert str(error.value) == f"{path}, {message}"


@pytest.mark.parametrize("word", ["", "two words", "new\nline", "tab\t"])
def test_words_that_the_format_cannot_hold(word, tmp_path):
    with pytest.raises(ValueError, match="allowed in the text format: not empty, and no white space"):
        random_model(["fine", word]).save_text(tmp_path / "vectors.txt")
    assert not (tmp_path / "vectors.txt").exists()


# --------------------------------------------------------------------------------------------------- additive attention

QUERIES, KEYS, HIDDEN = 5, 7, 6


def additive_problem() -> dict[str, Tensor]:
    return {"query": torch.randn(3, QUERIES, 4), "key": torch.randn(3, KEYS, 3), "value": torch.randn(3, KEYS, 2)}


def loops(module: AdditiveAttention, given: dict[str, Tensor], keep: Tensor) -> tuple[Tensor, Tensor]:
    """Out and weights, score by score."""
    query, key, value = given.values()
    weights = query.new_zeros(keep.shape)
    for b, i in ((b, i) for b in range(3) for i in range(QUERIES)):
        seen = keep[b, i].nonzero().flatten().tolist()
        if seen:
            q, ks = module.query.weight @ query[b, i], [module.key.weight @ key[b, j] for j in seen]
            additive = not isinstance(module, ScaledDotProduct)
            scores = [module.score.weight[0] @ torch.tanh(q + k) if additive else q @ k / HIDDEN**0.5 for k in ks]
            weights[b, i, seen] = torch.stack(scores).softmax(0)
    return weights @ value, weights


def masks(causal: bool, padded: bool) -> tuple[Tensor, Tensor | None]:
    """Which pairs are seen, with a batch entry all of padding; and the padding mask."""
    padding = None
    keep = torch.ones(3, QUERIES, KEYS, dtype=torch.bool)
    if causal:
        keep &= torch.tensor([[j <= i + KEYS - QUERIES for j in range(KEYS)] for i in range(QUERIES)])
    if padded:
        padding = torch.rand(3, KEYS) < 0.6
        padding[0], padding[1, :3] = False, False  # entry 1's first causal row sees nothing
        padding[1, 5] = True
        keep &= padding[:, None]
    return keep, padding


def run(module: AdditiveAttention, given: dict[str, Tensor], function: Callable, *arguments, **options) -> list[Tensor]:
    """Out, weights, and the gradients of all inputs and parameters."""
    module.zero_grad()
    leaves = {name: t.detach().clone().requires_grad_() for name, t in given.items()}
    results = function(leaves, *arguments, **options)
    sum(t.square().sum() for t in results).backward()
    return [*map(Tensor.detach, results), *(t.grad.clone() for t in (*leaves.values(), *module.parameters()))]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", [AdditiveAttention, ScaledDotProduct])
def test_attention_is_the_formula(kind, causal, padded):
    module, given = kind(4, 3, HIDDEN), additive_problem()
    keep, padding = masks(causal, padded)
    ours = run(module, given, lambda x: module(**x, key_padding_mask=padding, causal=causal))
    baseline = run(module, given, lambda x: loops(module, x, keep))
    module.double()
    oracle = run(module, {n: t.double() for n, t in given.items()}, lambda x: loops(module, x, keep))
    # In the gradient of a softmax numbers as large as the values' own gradients cancel.
    unit = torch.stack([t.abs().max() for t in oracle]).max() * torch.finfo(torch.float32).eps
    for result, due, plain in zip(ours, oracle, baseline, strict=True):
        verdict = judge(result, due, plain, unit=unit.expand_as(due))
        assert verdict.passed, str(verdict)
    unseen = ~keep.any(-1)
    assert unseen.any() == padded and not ours[0][unseen].any() and not ours[1][unseen].any()


@pytest.mark.parametrize("kind", [AdditiveAttention, ScaledDotProduct])
def test_what_is_not_seen_reaches_nothing(kind):
    """NaN in padding, and in the future of the rows that are looked at: outputs and gradients, bit by bit."""
    module, given = kind(4, 3, HIDDEN), additive_problem()
    _, padding = masks(causal=True, padded=True)
    padding[2, -1] = True
    results = []
    for filler in (0.0, math.nan):
        for name in ("key", "value"):
            given[name][~padding] = filler
        results.append(run(module, given, lambda x: module(**x, key_padding_mask=padding, causal=True)))
    assert all(t.isfinite().all() for t in results[1])
    assert all(map(torch.equal, *results))
    future = {name: t.clone() for name, t in given.items()}
    future["key"][2, -1] = future["value"][2, -1] = math.nan  # seen by the last query only

    def all_but_the_last(x):
        return [t[:, :-1] for t in module(**x, key_padding_mask=padding, causal=True)]

    results = [run(module, x, all_but_the_last) for x in (given, future)]
    assert all(map(torch.equal, results[0][:2], results[1][:2]))
    assert torch.equal(results[0][2][:, :-1], results[1][2][:, :-1]), "the gradients of those queries"


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_masked_softmax():
    scores = torch.randn(4, 6, requires_grad=True)
    keep = torch.rand(4, 6) < 0.5
    keep[0], keep[1], keep[2, 3] = False, True, True
    with torch.no_grad():
        scores[~keep] = math.nan
    with torch.autograd.detect_anomaly(check_nan=True):  # no NaN on the way either
        weights = masked_softmax(scores, keep)
        weights.square().sum().backward()
    assert not weights[~keep].any() and scores.grad.isfinite().all() and not scores.grad[~keep].any()
    runs = [torch.zeros(4, 6, dtype=dtype) for dtype in (torch.float64, torch.float32)]
    for run, row in ((run, row) for run in runs for row in range(1, 4)):
        run[row, keep[row]] = scores.detach()[row, keep[row]].to(run.dtype).softmax(0)
    verdict = judge(weights, *runs)
    assert verdict.passed, str(verdict)
