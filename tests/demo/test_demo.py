"""The demo in a few seconds: everything it promises is there, and nothing on the page is made up."""

from __future__ import annotations

import base64
import io
import json

import pytest
import torch
from rich.console import Console

from transformer_fast import demo, models
from transformer_fast.demo import plot, report, training
from transformer_fast.demo.encoding import Difference, Neighbours
from transformer_fast.demo.peers import dense_mask, eager_attention, sdpa_attention
from transformer_fast.demo.results import DecoderResults, DemoResults, EncoderResults
from transformer_fast.demo.speed import Speed, VariantSpeed, compare
from transformer_fast.demo.text import load_corpus
from transformer_fast.models.layers import AttentionOptions, fused_attention
from transformer_fast.testing import judge
from transformer_fast.testing.environment import environment

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_a_quick_run_from_start_to_end(tmp_path):
    printed = io.StringIO()
    results = demo.run(tmp_path / "new" / "folder", quick=True, console=Console(file=printed, width=110))
    folder = tmp_path / "new" / "folder"
    assert (folder / "demo.png").read_bytes().startswith(PNG)
    page = (folder / "demo.html").read_text()
    assert base64.b64encode((folder / "demo.png").read_bytes()).decode() in page, "the picture is inside"
    assert "http" not in page.replace("http-equiv", ""), "needs nothing beside itself"
    stored = json.loads((folder / "demo.json").read_text())
    assert stored["decoder"]["training"]["losses"] == results["decoder"]["training"]["losses"]
    text = printed.getvalue()
    for path in results["paths"].values():
        assert path in text.replace("\n", "")
    for neighbours in results["encoder"]["neighbours"]:
        assert len(neighbours["found"]) == 3 and neighbours["query"] in page
    ours = next(row for row in results["encoder"]["differences"] if "eager PyTorch" in row["compared"])
    assert 0 < ours["largest"] < 1 and ours["smallest_cosine"] > 0.999999
    assert [row["ratio"] for row in results["encoder"]["speeds"] if "SDPA" in row["name"]] == [1.0]
    assert results["variants"] and all(row["ratio"] > 0 for row in results["variants"])
    again = models.from_pretrained(folder / "decoder")
    assert isinstance(again, models.DecoderModel)


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "jinja2" else object())
    with pytest.raises(ImportError, match=r'needs jinja2: pip install "transformer-fast\[demo\]"'):
        demo.run(tmp_path)


def test_the_loss_falls_below_the_bigram_model():
    """The demo's own decoder on the demo's own text, for a fixed number of steps."""
    torch.manual_seed(0)
    corpus = load_corpus()
    learned, unseen = training.to_bytes(corpus.training), training.to_bytes(corpus.validation)[:4097]
    model = models.from_config(training.DECODER)
    plan = training.TrainingPlan(seconds=1e9, steps=120, evaluations=2)
    calls = []
    result = training.train(model, learned, unseen, plan, lambda progress, _: calls.append(progress))
    assert len(result.losses) == 120 and calls == sorted(calls) and calls[-1] == 1.0
    steps, losses = zip(*result.validation, strict=True)
    assert steps[0] == 0 and steps[-1] == 120
    assert losses[-1] < training.ngram_loss(learned, unseen, order=2) < losses[0]


def test_validation_loss_is_the_mean_over_all_chunks():
    """Every whole chunk counts, in a batch that is not full too; what is left over does not."""
    model = models.from_config({**training.DECODER, "num_hidden_layers": 1})
    data = torch.randint(256, (7 * 16 + 5,), dtype=torch.uint8)
    chunks = [data[i * 16 : i * 16 + 17].long()[None] for i in range(7)]
    expected = torch.stack([model.loss(chunk) for chunk in chunks]).mean()
    torch.testing.assert_close(training.validation_loss(model, data, 16, batch=3), expected.item())


def test_a_slow_machine_trains_for_at_least_so_many_steps():
    """Time is up at once here."""
    model = models.from_config({**training.DECODER, "num_hidden_layers": 1})
    data = torch.randint(256, (200,), dtype=torch.uint8)
    plan = training.TrainingPlan(seconds=1e-9, at_least=5, batch=1, context=16, evaluations=1)
    progress = []
    training.train(model, data, data, plan, lambda done, _: progress.append(done))
    assert progress == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_threads_come_back_as_they_were():
    usual = torch.get_num_threads()
    tried = []
    with training.quickest_threads(lambda: tried.append(torch.get_num_threads())) as threads:
        assert torch.get_num_threads() == threads
    assert set(tried) == {1, usual} and threads in tried
    assert torch.get_num_threads() == usual


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("causal", "window_size"), [(False, None), (True, None), (True, (3, 0)), (False, (2, 4))])
def test_peers_do_the_same_work(causal, window_size, padded):
    """A ratio to a peer that computes something else would mean nothing."""
    options = AttentionOptions(causal, window_size)
    query, key, value = torch.randn(3 * 11, 4, 8), torch.randn(3 * 11, 2, 8), torch.randn(3 * 11, 2, 8)
    layout = models.TokenLayout.dense(3, 11, device=query.device)
    keep = torch.ones(3, 11, dtype=torch.bool)
    if padded:
        keep = torch.arange(11) < torch.tensor([11, 4, 7])[:, None]
        layout = models.TokenLayout.from_mask(keep, packed=False)
    rows = keep.flatten()
    oracle = eager_attention(query.double(), key.double(), value.double(), layout, options)[rows]
    baseline = eager_attention(query, key, value, layout, options)[rows]
    for attend in (fused_attention, sdpa_attention):
        verdict = judge(attend(query, key, value, layout, options)[rows], oracle, baseline, name=attend.__name__)
        assert verdict.passed, str(verdict)


def test_peers_refuse_what_they_would_get_wrong():
    packed = models.TokenLayout.from_mask(torch.ones(2, 3))
    with pytest.raises(ValueError, match="padded batches"):
        dense_mask(packed, AttentionOptions(True, None))


def test_comparing_takes_fewer_samples_where_they_take_long():
    calls = {"fast": 0, "base": 0}

    def way(name):
        def run():
            calls[name] += 1

        return run

    rows = compare({name: way(name) for name in calls}, "base", repeats=2, seconds=0.0)
    assert [row.name for row in rows] == ["fast", "base"]
    assert rows[1].ratio == 1.0
    assert min(calls.values()) > 2


def made_up_results(ratios) -> DemoResults:
    """Results with awkward contents, to look at the picture and the page."""
    encoder = EncoderResults(
        sentences=2,
        tokens=9,
        seconds=0.1,
        neighbours=[Neighbours("Is 1 < 2 & so?", [(0.5, "<script>alert('x')</script>")])],
        differences=[Difference("ours, and plain eager PyTorch", 1e-6, 1.0)],
        speeds=[Speed("ours, packed", 10.0, 2.0), Speed("PyTorch SDPA, padded", 20.0, 1.0)],
        speed_batch=2,
        speed_seqlen=5,
        padding_share=0.1,
    )
    trained = training.TrainingResult([5.0, 3.0, 2.0], [(0, 5.5), (3, 2.1)], seconds=1.0, wall_seconds=1.5, tokens=30)
    decoder = DecoderResults(
        1000, "one layer", trained, 900, 100, 2.4, "The ", "<b>\ufffd", 30.0, {"forward": encoder.speeds}, 64
    )
    variants = [
        VariantSpeed(f"variant {i}", "batch 1", dtype, 1.0, ratio, ratio)
        for i, ratio in enumerate(ratios)
        for dtype in ("float32", "bfloat16")
    ]
    return DemoResults(encoder, decoder, variants, environment(), True, 12.0)


@pytest.mark.parametrize("ratios", [[0.4, 1.0, 31.0], [1.5], []], ids=["slower too", "one", "none"])
def test_picture_and_page_of_any_results(ratios):
    results = made_up_results(ratios)
    picture = plot.draw(results)
    assert picture.startswith(PNG)
    page = report.render(results, picture)
    assert "<script" not in page and "&lt;script&gt;" in page, "text from outside is escaped"
    assert "&lt;b&gt;" in page
    assert results.environment["processor"] in page and results.environment["torch"] in page


def test_running_mean():
    assert plot.running_mean([2.0, 4.0, 6.0, 8.0], 2) == [2.0, 3.0, 5.0, 7.0]
    assert plot.running_mean([], 3) == []
