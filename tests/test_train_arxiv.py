"""train_arxiv.py: the data it draws, the numbers it reports against other ways to find them, and its runs."""

import contextlib
import csv
import itertools
import json
import math
import re
import runpy
import shutil
import signal
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import h5py
import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from commands import Job, brought_in_by, colours, ended, meanwhile, refusal, two_ranks, wait_for
from comparison import apart, unequal

import prepare_data
import sweep
import train_arxiv
from common import checkpoint
from common.errors import DataError
from common.runtime import Runtime
from configurator import configure
from measure import curves as curves_room
from measure import speed
from measure.curves import Curves, describe_fit, fit_power_law, gains, is_fit, measure, probe, summarize, verdict
from measure.report import study_sections
from measure.sequences import sequence_xe
from sources import chunks as chunks_source
from sources.chunk_checks import digest_of, layout, seal
from sources.chunks import chunk_arrays
from sources.processes import make_process
from sources.study_arxiv import plan, plan_study, run_name, typed
from train_arxiv import ALIASES, Batches, Chunks, Config

ROOT = Path(__file__).resolve().parents[1]
PARTS = [{"name": "a", "process": "coin", "p": 0.9, "vocab_map": [0, 1]},
         {"name": "b", "process": "mess3", "vocab_map": [0, 1, 2]},
         {"name": "c", "process": "no_consecutive_ones", "vocab_map": [1, 3]}]
TINY = ("--n_layers=1", "--d_model=16", "--n_heads=2", "--d_mlp=32", "--batch_size=8", "--epochs=2", "--lr=1e-2",
        "--warmup_steps=4", "--bootstrap=40", "--log_interval=5", "--device=cpu", "--precision=fp32", "--out_dir=run")
RUN = (*TINY, "--categories=a,b", "--eval_interval=7", "--save_interval=5", "--dropout=0.1", "--keep_last=-1")
FIVE = ["cs.DS", "math.ST", "math.GR", "cs.IT", "cs.PL"]


@pytest.fixture(autouse=True)
def without_pictures(in_a_folder_of_its_own, monkeypatch):
    """Unless it asks, a test draws no pictures."""
    monkeypatch.setattr(train_arxiv, "draw_run", lambda *args: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Twenty training documents of two chunks of 12 tokens, of each of three components; six to validate."""
    folder = tmp_path_factory.mktemp("data") / "ergodic"
    prepare_data.main(["ergodic", f"--components={json.dumps(PARTS)}", "--train_documents=20", f"--out_dir={folder}",
                       "--validation_documents=6", "--chunk_size=12"])
    return folder


@pytest.fixture(scope="module", autouse=True)
def at_work(request, data, tmp_path_factory):
    """What whole waits for."""
    yield from meanwhile(request, "whole", ROOT / "train_arxiv.py", *RUN, f"--data={data}",
                         folder=tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole(at_work) -> Path:
    """The RUN by the real script, which nothing disturbed. Tests leave the folder as it is."""
    process, folder = at_work
    done = ended(process)
    notes = [line for line in done.stderr.splitlines() if " ..." not in line]  # how far it is, on a busy machine
    assert done.returncode == 0 and not notes, done.stderr
    return folder / "run"


def run(data: Path, *settings: str) -> dict:
    return train_arxiv.main([*TINY, f"--data={data}", *settings])


def quick(argv: list[str]) -> None:
    """main in another process, without pictures."""
    train_arxiv.draw_run, speed.RATE_SECONDS = lambda *args: None, 0
    train_arxiv.main(argv)


def refused(capsys, *argv: str, code: int = 2) -> str:
    return refusal(capsys, train_arxiv.main, *argv, code=code)


def runtime(rank: int = 0, world_size: int = 1) -> Runtime:
    """A runtime that believes to be one of several ranks."""
    rt = Runtime(SimpleNamespace(seed=7, device="cpu", precision="fp32", compile="false"))
    rt.rank, rt.world_size = rank, world_size
    return rt


def chunks_of(path: Path | str) -> Chunks:
    return Chunks(**chunk_arrays(Path(path)))


def corpus(documents: dict[str, list], vocab_size: int, chunk_size: int) -> Chunks:
    """An open file of these documents, a list of token sequences a category."""
    spool = chunks_source.ChunkSpool(Path(), "corpus", chunk_size, vocab_size)
    for name, ids in itertools.chain.from_iterable(zip(itertools.repeat(k), v, strict=False)
                                                   for k, v in documents.items()):
        spool.add(name, ids)
    spool.write(Path("corpus.h5"))
    spool.close()
    return chunks_of("corpus.h5")


def some_corpus(sizes: tuple = (40, 30, 33), chunk_size: int = 5, each: int = 2, vocab_size: int = 60_000) -> Chunks:
    """Categories a, b, c of so many chunks, documents of `each` chunks, every token another."""
    tokens = iter(np.random.default_rng(0).permutation(vocab_size))
    documents = {name: [[next(tokens) for _ in range(chunk_size * each)] for _ in range(size // each)]
                 + [[next(tokens) for _ in range(chunk_size)]] * (size % each)
                 for name, size in zip("abc", sizes, strict=True)}
    return corpus(documents, vocab_size, chunk_size)


def read(path: Path | str):
    return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=pytest.fail)


def evals(folder: Path | str) -> list[dict]:
    records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "time_s"} for r in records if r["split"] == "eval"]


def assert_as_if_uninterrupted(folder: Path, whole: Path) -> None:
    found, expected = checkpoint.load(folder), checkpoint.load(whole)
    keys = ("step", "best", "model", "optimizer", "ranks", "extra")
    assert unequal({k: found[k] for k in keys}, {k: expected[k] for k in keys}) == []
    assert evals(folder) == evals(whole) and len(evals(whole)) > 1
    results, wanted = read(folder / "results.json"), read(whole / "results.json")
    assert results == wanted


# -------------------------------------------------------------------------------------------------------------- model


def a_model(vocab_size: int = 11, n_ctx: int = 9, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    cfg = Config(**{"n_layers": 2, "d_model": 16, "n_heads": 2, "d_mlp": 32, **changes})
    model = train_arxiv.build_model(cfg, vocab_size, n_ctx)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)  # an untrained model hardly looks back
    return model.eval()


def test_no_later_token_moves_an_earlier_logit():
    model, tokens = a_model(), torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(tokens)[0]
        for t in range(9):
            other = tokens.clone()
            other[:, t] = (other[:, t] + 1) % 11
            moved = (model(other)[0] - logits).abs().amax((0, 2))
            assert moved[:t].sum() < 1e-5 and (moved[t:] > 1e-4).all()
        assert torch.allclose(model(tokens[:, :4])[0], logits[:, :4], atol=1e-5)


def test_no_gradient_of_an_earlier_logit_reaches_a_later_token():
    model, seen = a_model(), []
    model.embed.register_forward_hook(lambda module, args, out: seen.append(out))
    logits = model(torch.arange(9)[None])[0]
    for t in range(9):
        reached = torch.autograd.grad(logits[0, t].square().sum(), seen[0], retain_graph=True)[0][0].abs().sum(-1)
        assert (reached[t + 1 :] == 0).all() and (reached[: t + 1] > 0).all()


def test_dropout_is_of_training_alone_and_of_attention_too(monkeypatch):
    """Attention of every block, and what is written to the stream: by the embedding and twice by a block."""
    rates = {"attention": [], "dropout": []}
    for name, found in rates.items():
        function = getattr(train_arxiv, name)
        monkeypatch.setattr(train_arxiv, name, lambda *args, f=function, r=found: (r.append(args[-1]), f(*args))[1])
    model = train_arxiv.build_model(Config(n_layers=2, dropout=0.3), 5, 9)
    tokens = torch.zeros(2, 9, dtype=torch.long)
    model(tokens)
    assert rates == {"attention": [0.3] * 2, "dropout": [0.3] * 5}
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])
    assert rates == {"attention": [0.3] * 2 + [0.0] * 4, "dropout": [0.3] * 5}


@pytest.mark.parametrize("path, vocab_size, nats", [  # the default is small: what its random logits cost shows
    (None, 4, 0.03), ("arxiv.py", 8_192, 0.01 * math.log(8_192)), ("arxiv_small.py", 2_048, 0.01 * math.log(2_048))])
def test_an_untrained_model_knows_nothing(path, vocab_size, nats):
    cfg = configure(Config, [str(ROOT / "config" / path)] if path else [], ALIASES)
    torch.manual_seed(3)
    model = train_arxiv.build_model(cfg, vocab_size, 100)
    tokens = torch.randint(vocab_size, (100 if vocab_size < 10 else 4, 100))
    with torch.no_grad():
        xe = train_arxiv.token_xe(model.eval()(tokens[:, :-1])[0], tokens[:, 1:]).mean()
    assert float(xe) == pytest.approx(math.log(vocab_size), abs=nats)


def test_the_streamed_cross_entropy_has_the_values_and_gradients_of_the_plain_one():
    model, tokens = a_model(), torch.randint(11, (30, 10), generator=torch.Generator().manual_seed(1))
    plain = train_arxiv.token_xe(model(tokens[:, :-1])[0], tokens[:, 1:])
    expected = torch.autograd.grad(3 * plain.mean(), list(model.parameters()))
    mean = model(tokens[:, :-1], tokens[:, 1:])[0]
    found = torch.autograd.grad(3 * mean, list(model.parameters()))
    assert torch.allclose(mean, plain.mean()) and min(g.abs().max() for g in expected) > 0
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(found, expected, strict=True))
    with torch.no_grad():
        assert torch.allclose(model(tokens[:, :-1], tokens[:, 1:])[0], plain, atol=1e-5)


def test_every_position_of_the_table_is_trained_and_none_is_missing(data):
    chunks, cfg = chunks_of(data / "train.h5"), Config(n_layers=1, d_model=16, n_heads=2, d_mlp=32)
    model = train_arxiv.build_model(cfg, chunks.vocab_size, chunks.n_ctx)
    train_arxiv.train_step(model, torch.from_numpy(chunks.tokens[:20].astype(np.int64)), runtime(), cfg)
    assert chunks.n_ctx == chunks.size - 1 == len(model.position) == 11
    assert (model.position.grad.abs().sum(1) > 0).all()


def test_the_full_context_predicts_as_well_as_one_token_less():
    """A word said again and again, which can be told by where one is in it, and read by sample.py in moving windows."""
    word = np.array([0, 0, 0, 1, 1, 0, 2, 0, 1, 2, 2])
    documents = [word[np.arange(i, i + 26) % 11] for i in range(11)]
    for split in ("train", "validation"):
        corpus({"x": documents * 4}, 3, 13)
        Path("corpus.h5").rename(f"{split}.h5")
    train_arxiv.main([*TINY, "--data=.", "--epochs=60", "--eval_interval=1000", "--probe=false"])
    _, model, _, extra = train_arxiv.load_run(Path("run"), "cpu")
    xe = sequence_xe(model.eval(), torch.tensor(np.array(documents)), extra["n_ctx"]).mean(0)
    assert extra["n_ctx"] == 12 and xe[10] < 0.05 and xe[11:].max() < 0.05  # a row never trained: 2 nats and more


def as_older(path: Path) -> None:
    """The checkpoint as it was written with a position more than there are predictions, and a row never trained."""
    state = torch.load(path, weights_only=True)
    extra, model, moments = state["extra"], state["model"], state["optimizer"]["state"][0]
    T = len(model["position"])
    assert T == extra["n_ctx"] and moments["exp_avg"].shape == model["position"].shape
    extra["n_ctx"] = extra.pop("chunk_size")
    del extra["data"], state["meter"], state["digest"]
    state["format_version"] = 1
    model["position"] = torch.cat([model["position"], torch.full_like(model["position"][:1], 9.0)])
    for name in ("exp_avg", "exp_avg_sq"):
        moments[name] = torch.cat([moments[name], torch.zeros_like(moments[name][:1])])
    torch.save(state, path)


def test_an_older_run_with_a_position_more_goes_on_to_the_same_bits(data, whole):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "stopping", lambda self, now: now == 8)
        run(data, *RUN)
    for name in ("last.pt", "best.pt"):
        as_older(Path("run", name))
    assert run(data, *RUN)["steps"] == 10
    assert_as_if_uninterrupted(Path("run"), whole)


def test_an_older_finished_run_is_measured_and_sampled_without_that_position(data, whole):
    shutil.copytree(whole, "run")
    for path in Path("run").glob("*.pt"):
        as_older(path)
    _, model, _, extra = train_arxiv.load_run(Path("run"), "cpu")
    assert (len(model.position), extra["n_ctx"]) == (11, 11) and model.position.abs().max() < 9
    assert train_arxiv.main(["--analyze=run", "--device=cpu"])["val_xe"] == pytest.approx(
        read(whole / "summary.json")["val_xe"], rel=1e-5)


def test_moments_of_another_order_of_matrices_are_refused(data, whole, capsys):
    shutil.copytree(whole, "run")
    as_older(Path("run/step_7.pt"))
    state = torch.load("run/step_7.pt", weights_only=True)
    moments = state["optimizer"]["state"]
    moments[0], moments[1] = moments[1], moments[0]
    torch.save(state, "run/step_7.pt")
    told = refused(capsys, *RUN, f"--data={data}", "--load_checkpoint_step=7")
    assert "older train_arxiv.py" in told and "resume=never" in told


def test_matrices_decay_and_norms_and_biases_do_not():
    model = a_model()
    decays, stays = train_arxiv.parameter_groups(model, Config(weight_decay=0.3))
    assert (decays["weight_decay"], stays["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in stays["params"]} == {n for n in names.values() if "norm" in n or "bias" in n}
    assert sorted(names[id(p)] for g in (decays, stays) for p in g["params"]) == sorted(names.values())


def test_the_learning_rate_ends_at_a_tenth_unless_it_is_told_where():
    assert Config(lr=2.0).min_lr == 0.2 and Config(lr=2.0, min_lr=0.0).min_lr == 0.0
    old = configure(Config, ["--min_lr_ratio=0.3", "--lr=1e-3", "--adam_beta1=0.5"], ALIASES)
    assert (old.min_lr, old.beta1) == (3e-4, 0.5)


# --------------------------------------------------------------------------------------------------------------- data


def shares(chunks: Chunks, active: list[str], **changes) -> list[int]:
    rows = train_arxiv.training_rows(chunks, active, Config(**changes))
    assert len(np.unique(rows)) == len(rows) and (np.diff(rows) > 0).all()
    return [int(np.isin(rows, chunks.rows(name)).sum()) for name in active]


def test_every_k_trains_on_the_same_number_of_chunks_to_within_k():
    chunks = some_corpus()
    for K in (1, 2, 3):
        for active in map(list, itertools.permutations("abc", K)):
            assert shares(chunks, active) == [30 // K] * K
            assert shares(chunks, active, budget="tokens", budget_tokens=103) == [20 // K] * K
    assert shares(chunks, ["a", "b", "c"], budget="proportional") == [30 * n // 103 for n in (40, 30, 33)]
    assert shares(chunks, ["a", "c"], budget="proportional") == [30 * 40 // 73, 30 * 33 // 73]


def test_the_first_chunks_or_a_seeded_choice_make_the_share():
    chunks = some_corpus()
    first = train_arxiv.training_rows(chunks, ["c", "a"], Config(choice="first"))
    assert first.tolist() == [*range(15), *range(70, 85)]
    one, two, again = (train_arxiv.training_rows(chunks, ["a", "c"], Config(seed=s)).tolist() for s in (1, 2, 1))
    assert one == again != two and set(one) <= {*range(40), *range(70, 103)} and one != sorted(first.tolist())


def test_a_category_that_is_short_is_refused_unless_allowed():
    chunks, wanted = some_corpus(), {"budget": "tokens", "budget_tokens": 5 * 70}
    with pytest.raises(DataError, match="b has 30 chunks, less than its share of 35.*allow_short"):
        shares(chunks, ["a", "b"], **wanted)
    assert shares(chunks, ["a", "b"], **wanted, allow_short=True) == [35, 30]
    with pytest.raises(DataError, match="budget of 2 chunks is less than one for each of 3"):
        shares(chunks, ["a", "b", "c"], budget="tokens", budget_tokens=14)


def batches(chunks: Chunks, rows, rank: int = 0, world_size: int = 1, **changes) -> Batches:
    return Batches(runtime(rank, world_size), chunks, np.asarray(rows), Config(**{"batch_size": 8, **changes}))


def test_each_chunk_comes_once_an_epoch_though_batches_cross_its_end():
    rows = np.arange(3, 33)  # 30 rows: no multiple of 8
    drawn = batches(some_corpus(), rows)
    order = np.concatenate([drawn.rows(step) for step in range(15)]).reshape(4, 30)
    assert (np.sort(order, 1) == rows).all() and len(np.unique(order, axis=0)) == 4
    assert order.ravel().tolist() != np.concatenate([batches(drawn.chunks, rows, seed=2).rows(s) for s in range(15)]
                                                    ).tolist()


@pytest.mark.parametrize("windows", [False, True])
def test_a_batch_is_a_pure_function_of_seed_and_step_and_ranks_share_it(windows):
    chunks, rows = some_corpus(), np.arange(30)
    forward = [batches(chunks, rows, random_windows=windows)(step) for step in range(10)]
    drawn = batches(chunks, rows, random_windows=windows)
    for step in (9, 3, 4, 3, 0):
        assert torch.equal(drawn(step), forward[step])
        parts = [batches(chunks, rows, rank, 2, random_windows=windows)(step) for rank in (0, 1)]
        assert torch.equal(torch.stack(parts, 1).flatten(0, 1), forward[step]) and parts[0].shape == (4, 5)
        assert windows or np.array_equal(forward[step], chunks.tokens[drawn.rows(step)])


def test_random_windows_are_slices_of_one_document():
    chunks = some_corpus((40, 30, 33), each=3)
    drawn, offsets = batches(chunks, np.arange(103), random_windows=True), []
    place = {int(token): i for i, token in enumerate(chunks.tokens.ravel())}
    for step in range(60):
        for row, tokens in zip(drawn.rows(step), drawn(step).tolist(), strict=True):
            begin = place[tokens[0]]
            assert chunks.tokens.ravel()[begin : begin + 5].tolist() == tokens and 0 <= begin - 5 * row < 5
            assert chunks.documents[begin // 5] == chunks.documents[(begin + 4) // 5] == chunks.documents[row]
            offsets.append(begin - 5 * row)
    assert set(offsets) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("choice", ["random", "first"])
def test_random_windows_are_as_many_whatever_k(choice):
    """Of documents of four chunks, three in four go on. Chunks chosen one by one would go on in 1 / K of the cases."""
    chunks = some_corpus((120, 120, 120), each=4)
    for K in (1, 2, 3):
        cfg = Config(random_windows=True, choice=choice)
        rows = train_arxiv.training_rows(chunks, list("abc")[:K], cfg)
        assert len(rows) == 120 and len(np.unique(rows)) == 120
        following = np.isin(rows + 1, rows) & (chunks.documents[np.minimum(rows + 1, 359)] == chunks.documents[rows])
        assert following.mean() == 0.75
    first, second = (train_arxiv.training_rows(chunks, ["a", "b"], Config(random_windows=True, seed=s)) for s in (1, 2))
    assert first.tolist() != second.tolist()


# ------------------------------------------------------------------------------------------- losses, statistics, probe


class Table(torch.nn.Module):
    """The logits of the next token by the last one alone; the stream is what `show` makes of the tokens."""

    def __init__(self, V: int, show=None):
        super().__init__()
        self.table, self.show = torch.randn(V, V, generator=torch.Generator().manual_seed(2)), show

    def forward(self, tokens, targets=None):
        found, stream = self.table[tokens], [self.show(tokens)] if self.show else []
        return found if targets is None else train_arxiv.token_xe(found, targets), stream


def test_evaluate_predicts_the_next_token_and_agrees_with_a_loop_over_tokens():
    draw = np.random.default_rng(3)
    chunks = corpus({k: [draw.integers(0, 7, 6 * n) for n in (1, 3, 2)] for k in "xy"}, 7, 6)
    model, rows = Table(7), np.array([0, 2, 3, 7, 8, 11])
    curves = train_arxiv.evaluate(model, chunks, rows, runtime(), batch=4)
    expected, counts = np.zeros((6, 5)), np.zeros(6)
    log_q = F.log_softmax(model.table.double(), -1)
    for row in rows:
        counts[chunks.documents[row]] += 1
        for t in range(5):
            expected[chunks.documents[row], t] -= log_q[int(chunks.tokens[row, t]), int(chunks.tokens[row, t + 1])]
    used = counts > 0
    assert np.abs(curves.sums - expected[used]).max() < 1e-5 and curves.counts.tolist() == counts[used].tolist()
    assert curves.codes.tolist() == [0, 0, 1, 1] and np.allclose(curves.mean(1), expected[3:].sum(0) / counts[3:].sum())


def some_curves(documents: int = 400, spread: float = 1.0) -> Curves:
    draw = np.random.default_rng(4)
    xe = 2 + np.arange(6, 0, -1) + spread * draw.standard_normal((documents, 6))
    return Curves(3 * xe, np.full(documents, 3), np.arange(documents) % 2)


def test_intervals_cover_the_mean_at_the_width_of_the_standard_error():
    curves = some_curves()
    found = measure(curves, ["x", "y", "z"], ["x"], None, 2_000, 1)
    assert found.keys() == {"x", "y", "seen", "unseen"}
    for code, name in enumerate("xy"):
        xe = curves.sums[curves.codes == code] / 3
        assert found[name]["xe_by_position"] == pytest.approx(xe.mean(0))
        assert found[name]["xe"] == pytest.approx(xe.mean())
        low, high = np.array(found[name]["low"]), np.array(found[name]["high"])
        assert (low < xe.mean(0)).all() and (xe.mean(0) < high).all()
        assert (high - low) / (2 * 1.96 * xe.std(0) / math.sqrt(200)) == pytest.approx(np.ones(6), abs=0.12)
        assert found[name]["icl_gain"] == pytest.approx((xe[:, 0] - xe[:, -1]).mean())
        assert found[name]["total_gain"] == pytest.approx((xe - xe[:, -1:]).sum(1).mean())
        assert found[name]["perplexity"] == pytest.approx(math.exp(xe.mean()))
    assert found["seen"] == found["x"] and found["unseen"] == found["y"]
    together = measure(curves, ["x", "y"], ["x", "y"], None, 2_000, 1)["seen"]
    assert together["xe_by_position"] == pytest.approx((found["x"]["xe_by_position"] + np.array(
        found["y"]["xe_by_position"])) / 2)
    same = measure(some_curves(spread=0), ["x", "y"], ["x"], None, 2_000, 1)["x"]
    assert np.ptp([same["low"], same["high"], same["xe_by_position"]], 0).max() < 1e-12


def test_documents_not_chunks_are_drawn_in_the_bootstrap():
    """A document of many equal chunks is one observation: its chunks do not narrow the interval."""
    curves = some_curves()
    more = Curves(10 * curves.sums, 10 * curves.counts, curves.codes)
    one, ten = (c.resampled(0, 300, 1) for c in (curves, more))
    assert np.allclose(one, ten) and not np.allclose(one, curves.resampled(0, 300, 2))


def test_a_power_law_is_recovered_whatever_the_shape_of_the_stack():
    t = np.arange(1, 100)
    wanted = np.array(list(itertools.product((0.5, 3.0), (0.2, 2.0, -0.4), (0.1, 0.5, 1.3, 3.0))))
    xe = wanted[:, :1] + wanted[:, 1:2] * t ** -wanted[:, 2:]
    assert fit_power_law(xe) == pytest.approx(wanted, rel=1e-3, abs=1e-3)
    assert fit_power_law(xe.reshape(2, 12, -1)) == pytest.approx(wanted.reshape(2, 12, 3), rel=1e-3, abs=1e-3)
    assert fit_power_law(xe[5]) == pytest.approx(wanted[5], rel=1e-3) and fit_power_law(xe[5]).shape == (3,)


def test_a_power_law_fits_as_well_as_scipy_does_from_the_true_start():
    draw, t = np.random.default_rng(7), np.arange(1, 100)
    wanted = np.array([(0.8, 0.3, 0.9), (2.0, 1.5, 0.4), (0.5, 0.2, 2.0)])
    noisy = wanted[:, :1] + wanted[:, 1:2] * t ** -wanted[:, 2:] + 0.01 * draw.standard_normal((3, 99))
    for xe, ours, start in zip(noisy, fit_power_law(noisy), wanted, strict=True):
        theirs, _ = scipy.optimize.curve_fit(lambda t, infinity, c, alpha: infinity + c * t**-alpha, t, xe, start)
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-3)


def noisy(curve: np.ndarray, sd: float, resamples: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """(a curve, resamples of it): both with noise of this size at each position."""
    draw = np.random.default_rng(3)
    mean = curve + sd * draw.standard_normal(len(curve))
    return mean, mean + sd * draw.standard_normal((resamples, len(curve)))


POSITIONS = np.arange(1, 51)


@pytest.mark.parametrize("curve, sd", [
    (np.full(50, 1.3), 0.01),  # nothing but noise
    (np.full(50, 1.3), 0.0),
    (1 - 0.5 / POSITIONS, 0.001),  # rises
    (1 + np.exp(-10.0 * (POSITIONS - 1)), 0.0),  # all is known after one token: the exponent ends at its bound
    (1 - 0.1 * np.log(POSITIONS), 0.0),  # the exponent ends at its other bound
    (0.2 + 2 * POSITIONS**-0.1 - 1.0, 0.0),  # would fall below 0
    (np.array([3.0, 2.0, 1.5]), 0.0),  # as many numbers as parameters
    (np.full(50, np.nan), 0.0),
])
def test_what_no_power_law_fits_has_no_fit(curve, sd):
    assert describe_fit(*noisy(curve, sd)) is None


def test_a_fall_beyond_the_noise_has_a_fit_with_its_interval():
    fit = describe_fit(*noisy(1 + 0.8 / POSITIONS, 0.005))
    for name, true in (("xe_inf", 1.0), ("c", 0.8), ("alpha", 1.0)):
        low, high = fit[name]["interval"]
        assert fit[name]["value"] == pytest.approx(true, abs=0.1) and low < fit[name]["value"] < high


def test_a_fall_within_the_noise_has_no_fit_though_the_curve_itself_has_one():
    curve = 2 + 0.02 / POSITIONS
    samples = noisy(curve, 0.01)[1]
    assert is_fit(fit_power_law(curve), len(curve)) and describe_fit(curve, samples) is None
    assert describe_fit(curve, curve + 0.001 * (samples - samples.mean(0)))


def test_a_curve_without_a_fit_is_said_to_have_none():
    groups = measure(some_curves(), ["x", "y"], ["x", "y"], None, 50, 1)
    for group in groups.values():
        group["fit"] = None
    summary = summarize(groups)
    told = verdict(summary, 2)
    assert summary["fit"] is None and "no fit of a power law" in told and "t^" not in told
    falling = summary | {"fit": {"xe_inf": 1.0, "c": 0.5, "alpha": 0.7}}
    assert "1.0000 + 0.5000 t^-0.700" in verdict(falling, 2)


def test_the_verdict_the_summary_and_the_picture_say_what_icl_gain_is(monkeypatch):
    summary = summarize(measure(some_curves(), ["x", "y"], ["x", "y"], None, 50, 1))
    definition = "XE after 1 token less XE after 6, in nats"
    assert summary["icl_gain_definition"] == definition
    assert f"icl_gain {summary['icl_gain']:.4f} ({definition})" in verdict(summary, 2)
    titles = []

    @contextlib.contextmanager
    def kept(*args, **options):
        axes = matplotlib.figure.Figure().subplots()
        yield axes
        titles.append(axes.get_title())

    monkeypatch.setattr(curves_room, "figure", kept)
    curves_room.draw_curves(Path(), "", measure(some_curves(), ["x", "y"], ["x"], None, 50, 1), ["x"])
    assert definition in titles[0]


def test_help_lists_the_studies(capsys):
    with pytest.raises(SystemExit):
        train_arxiv.main(["--help"])
    told = capsys.readouterr().out
    named = re.findall(r"^  --study=(\S+)", told, re.MULTILINE)
    assert named == ["all", "k=1,2", "nested:1,2,4", "NAME,NAME"]
    for study in (*named[:3], "K2_a_b"):
        assert plan_study(study, ["a", "b", "c", "d"])


def test_each_optimum_is_dashed_in_the_colour_of_its_curve(monkeypatch):
    drawn = []

    @contextlib.contextmanager
    def kept(*args, **options):
        drawn.append(matplotlib.figure.Figure().subplots())
        yield drawn[-1]

    monkeypatch.setattr(curves_room, "figure", kept)
    curves = some_curves()
    curves_room.draw_curves(Path(), "", measure(curves, ["x", "y"], ["x", "y"], (curves, curves), 50, 1), ["x", "y"])
    axes, = drawn
    by_style = {style: [line.get_color() for line in axes.lines if line.get_linestyle() == style and
                        len(line.get_xdata())] for style in ("-", "--")}
    assert by_style["-"] == by_style["--"] and len(set(by_style["-"])) == 2
    assert axes.get_legend_handles_labels()[1].count("exact optimum") == 1
    assert axes.get_legend().texts[-1].get_text() == "exact optimum"


def test_of_one_document_there_is_no_interval():
    """The bootstrap would draw the same document each time: a width of 0 is no certainty."""
    one = Curves(np.array([[3.0, 2.5, 2.4, 2.3, 2.2]]), np.array([1]), np.array([0]))
    found = measure(one, ["x"], ["x"], None, 50, 1)["x"]
    assert found["xe"] == pytest.approx(2.48) and found["fit"] is None
    for name in ("low", "high", "xe_interval", "icl_gain_interval", "total_gain_interval"):
        assert np.isnan(found[name]).all(), name


def test_an_optimum_of_zero_is_held_against_in_nats():
    xe = np.array([[0.03, 0.02, 0.01, 0.01]] * 2)
    model, still = (Curves(c, np.array([1, 1]), np.array([0, 0])) for c in (xe, np.zeros((2, 4))))
    groups = measure(model, ["x"], ["x"], (still, still), 50, 1)
    summary = summarize(groups)
    assert summary["largest_relative_excess"] is None and summary["largest_excess"] == pytest.approx(0.03)
    assert "at most 0.0300 nats from the optimum" in verdict(summary, 1)
    assert "%" not in verdict(summary, 1)
    half = Curves(xe / 2, np.array([1, 1]), np.array([0, 0]))
    summary = summarize(measure(model, ["x"], ["x"], (half, half), 50, 1))
    assert "at most 100.00% from the optimum" in verdict(summary, 1)


def test_gains_are_first_less_last_and_the_sum_over_the_last():
    gain, total = gains(np.array([[5.0, 3.0, 2.0], [1.0, 1.0, 4.0]]))
    assert gain.tolist() == [3.0, -3.0] and total.tolist() == [4.0, -6.0]


@pytest.mark.parametrize("active", [["a", "b", "c"], ["c", "a"], ["b"]])
def test_oracle_curves_are_those_of_the_nonergodic_process_of_the_active_components(data, active):
    chunks = chunks_of(data / "validation.h5")
    rows = np.flatnonzero(np.isin(chunks.codes, [chunks.code(name) for name in active]))[1:]
    parts = {part["name"]: {k: v for k, v in part.items() if k != "name"} for part in PARTS}
    mixture, known = train_arxiv.exact_curves(chunks, rows, active)
    exact = make_process("nonergodic", components=[parts[name] for name in active])
    for name in active:
        mine = rows[chunks.codes[rows] == chunks.code(name)]
        words, alone = torch.from_numpy(chunks.tokens[mine].astype(np.int64)), make_process(
            "nonergodic", components=[parts[name]])
        assert np.abs(mixture.mean(chunks.code(name)) + exact.log_prob(words)[:, 1:].mean(0).numpy()).max() < 1e-5
        assert np.abs(known.mean(chunks.code(name)) + alone.log_prob(words)[:, 1:].mean(0).numpy()).max() < 1e-5
    assert len(mixture.counts) == len(np.unique(chunks.documents[rows])) and mixture.counts.sum() == len(rows)


def test_the_probe_reads_a_category_that_is_there_and_none_that_is_not():
    draw = np.random.default_rng(6)
    chunks = corpus({k: [4 * draw.integers(0, 4, 8) + i for _ in range(150)] for i, k in enumerate("wxyz")}, 16, 8)
    noise = torch.Generator().manual_seed(1)
    told = Table(16, lambda tokens: F.one_hot(tokens % 4, 5).float() + 0.1 * torch.randn(1, generator=noise))
    blind = Table(16, lambda tokens: torch.randn(*tokens.shape, 5, generator=noise))
    sure, lost = (probe(m, chunks, np.arange(600), torch.device("cpu"), 1) for m in (told, blind))
    assert sure["positions"] == [1, 2, 3, 5, 7] and sure["log_K"] == math.log(4)
    assert sure["accuracy"] == [[1.0] * 5] and max(sure["cross_entropy"][0]) < 0.2
    assert np.array(lost["accuracy"]) == pytest.approx(np.full((1, 5), 0.25), abs=0.1)
    assert np.array(lost["cross_entropy"]) == pytest.approx(np.full((1, 5), math.log(4)), abs=0.1)


@pytest.mark.parametrize("train_top, validation_top", [(9, 5), (5, 9), (7, 7)])
def test_files_of_the_source_that_do_not_say_their_vocabulary_share_the_larger(train_top, validation_top):
    for name, top in (("train", train_top), ("validation", validation_top)):
        with h5py.File(f"{name}.h5", "w") as file:
            file["token_chunks"] = np.array([[0, 1, 2, top], [top, 2, 1, 0]])
            file["category_for_chunk"] = ["x", "y"]
            file["doc_idx_for_chunk"] = [3, 3]  # numbers begin anew in every category
    train, validation = train_arxiv.open_data(Config(data="."))
    assert train.vocab_size == validation.vocab_size == max(train_top, validation_top) + 1
    assert (train.names, train.documents.tolist(), train.budget, train.oracle) == (["x", "y"], [0, 1], 1, None)


# --------------------------------------------------------------------------------------------------------------- runs


def assert_drawn(folder: Path, *names: str) -> None:
    assert {path.stem for path in (folder / "plots").iterdir()} == set(names)
    for path in (folder / "plots").iterdir():
        image = matplotlib.image.imread(path)
        assert min(image.shape[:2]) >= 400 and colours(image) > 50, path


def test_a_run_leaves_the_promised_files_numbers_and_pictures(whole, data):
    assert {path.name for path in whole.iterdir()} == {
        "config.json", "metrics.jsonl", "train.log", "summary.json", "results.json", "documents.npz", "plots",
        "xe_by_position.csv", "report.html",
        "train_arxiv.py", "last.pt", "best.pt", "step_5.pt", "step_7.pt", "step_10.pt"}
    assert_drawn(whole, "xe_by_position", "excess_by_position", "component_probe", "loss")
    summary, results = read(whole / "summary.json"), read(whole / "results.json")
    seen, groups = results["groups"]["seen"], results["groups"]
    assert groups.keys() == {"a", "b", "c", "seen", "unseen"} and groups["unseen"] == groups["c"]
    assert summary["test_xe"] == pytest.approx(np.mean(summary["xe_by_position"])) and summary["K"] == 2
    assert len(summary["xe_by_position"]) == len(summary["oracle_xe_by_position"]) == 11
    assert summary["icl_gain"] == pytest.approx(summary["xe_by_position"][0] - summary["xe_by_position"][-1])
    assert {"config_hash", "seconds", "tokens_per_second", "torch", "device", "fit", "total_gain"} <= summary.keys()
    assert (summary["categories"], summary["steps"], summary["train_chunks"]) == (["a", "b"], 10, 40)
    assert seen["excess_by_position"] == pytest.approx(np.subtract(seen["xe_by_position"],
                                                                   seen["oracle_xe_by_position"]))
    with open(whole / "xe_by_position.csv") as file:
        table = list(csv.DictReader(file))
    assert [float(row["xe"]) for row in table if row["group"] == "seen"] == summary["xe_by_position"]
    assert len(table) == 5 * 11 and {row["oracle_xe"] for row in table if row["group"] == "c"} == {""}
    assert len(results["probe"]["accuracy"]) == 2 and "done: test XE" in (whole / "train.log").read_text()


def test_documents_npz_holds_the_sums_that_the_curves_are_made_of(whole, data):
    """Against each document of the test evaluated by itself."""
    test = chunks_of(data / "test.h5")
    _, model, _, _ = train_arxiv.load_run(whole, "cpu")
    groups = read(whole / "results.json")["groups"]
    with np.load(whole / "documents.npz", allow_pickle=False) as file:
        found = dict(file)
    assert found["names"].tolist() == ["a", "b", "c"] and found["counts"].tolist() == [2] * 18
    assert found["positions"].tolist() == [1, 2, 5, 10, 11] and found["codes"].tolist() == sorted(found["codes"])
    for number, code, sums, total in zip(*(found[key] for key in ("documents", "codes", "sums", "total")), strict=True):
        rows = np.flatnonzero(test.documents == number)
        assert len(rows) == 2 and (test.codes[rows] == code).all()
        alone = train_arxiv.evaluate(model, test, rows, runtime()).sums[0]
        assert sums == pytest.approx(alone[found["positions"] - 1], rel=1e-4) and total == pytest.approx(alone.mean())
    for code, name in enumerate("abc"):
        of = found["codes"] == code
        assert found["total"][of].sum() / found["counts"][of].sum() == pytest.approx(groups[name]["xe"], rel=1e-5)


def test_final_numbers_are_of_the_test_and_those_of_before_of_validation(data, whole):
    """Which split is measured changes nothing of the training, nor by what the weights are chosen."""
    earlier = run(data, *RUN, "--final_split=validation")
    now, results = read(whole / "summary.json"), read(whole / "results.json")
    assert checkpoint.load(Path("run/best.pt"))["best"] == checkpoint.load(whole / "best.pt")["best"]
    assert earlier["val_xe"] == pytest.approx(now["val_xe"], rel=1e-5) and "test_xe" not in earlier
    assert (earlier["final_split"], now["final_split"], results["final_split"]) == ("validation", "test", "test")
    assert earlier["verdict"].startswith(f"validation XE {earlier['val_xe']:.4f} nats over K = 2, the cross entropy")
    assert now["verdict"].startswith(f"test XE {now['test_xe']:.4f} nats over K = 2 (validation {now['val_xe']:.4f})")
    _, model, _, _ = train_arxiv.load_run(Path("run"), "cpu")
    for split, summary in (("validation", earlier), ("test", now)):
        chunks = chunks_of(data / f"{split}.h5")
        curves = train_arxiv.evaluate(model, chunks, np.arange(len(chunks.codes)), runtime())
        assert summary["xe_by_position"] == pytest.approx(curves.mean_of([0, 1]), rel=1e-4)
    # An older run is looked at as it was measured then, if that is asked for.
    again = train_arxiv.main([f"--analyze={whole}", "--device=cpu", "--final_split=validation"])
    shutil.rmtree(whole / "analysis")
    assert again["xe_by_position"] == pytest.approx(earlier["xe_by_position"], rel=1e-5)


@pytest.mark.parametrize("damage, words", [("missing", "note: there is no data/test.h5: the final numbers are of vali"),
                                           ("lacks", "note: data/test.h5 has no chunk of 'c': the final numbers are"),
                                           ("other", "error: data/test.h5 differs from the training chunks")])
def test_without_a_test_the_final_numbers_are_of_validation_and_a_line_says_so(damage, words, data, capsys):
    shutil.copytree(data, "data")
    test = Path("data/test.h5")
    test.unlink()
    if damage != "missing":
        size = 12 if damage == "lacks" else 8
        corpus({"a": [[0] * size], "b": [[1] * size]}, 4, size)
        Path("corpus.h5").rename(test)
    settings = (*TINY, "--data=data", "--categories=a", "--max_steps=2", "--probe=false")
    if damage == "other":
        assert words in "error: " + refused(capsys, *settings) and not Path("run").exists()
        with pytest.raises(DataError, match="differs from the training chunks"):  # once, not by every run of a study
            planned(Path("data"), "k=1,2")
        settings = (*settings, "--final_split=validation")
    summary = train_arxiv.main([*settings])
    assert summary["final_split"] == "validation" and "test_xe" not in summary
    assert summary["val_xe"] == pytest.approx(np.mean(summary["xe_by_position"]))
    assert damage == "other" or words in capsys.readouterr().err


def test_the_in_context_score_is_late_less_early_with_its_interval():
    curves = some_curves()
    groups = measure(curves, ["x", "y"], ["x", "y"], None, 2_000, 1, early=2, late=5)
    for code, name in enumerate("xy"):
        xe = curves.sums[curves.codes == code] / 3
        difference = xe[:, 4] - xe[:, 1]
        said = groups[name]["icl_score"]
        assert said["value"] == pytest.approx(difference.mean()) and (said["early"], said["late"]) == (2, 5)
        error = difference.std() / math.sqrt(200)  # of paired positions, not of two independent means
        assert np.ptp(said["interval"]) == pytest.approx(2 * 1.96 * error, rel=0.12)
        assert said["interval"][0] < said["value"] < said["interval"][1]
    assert groups["seen"]["icl_score"]["value"] == pytest.approx(
        (groups["x"]["icl_score"]["value"] + groups["y"]["icl_score"]["value"]) / 2)
    one = Curves(np.ones((4, 1)), np.ones(4, dtype=int), np.zeros(4, dtype=int))
    assert measure(one, ["x"], ["x"], None, 9, 1)["x"]["icl_score"] is None


@pytest.mark.parametrize("given, T, positions", [
    ((None, None), 99, (10, 99)), ((None, None), 11, (10, 11)), ((None, None), 10, (5, 10)), ((None, None), 2, (1, 2)),
    ((None, None), 1, None), ((3, None), 9, (3, 9)), ((None, 30), 99, (10, 30)), ((None, 6), 99, (3, 6))])
def test_the_positions_of_the_score_follow_the_context(given, T, positions):
    assert curves_room.score_positions(*given, T) == positions


@pytest.mark.parametrize("words", ["--icl_late=12", "--icl_early=11", "--icl_early=9 --icl_late=9", "--icl_late=1"])
def test_positions_of_the_score_that_the_context_has_not_are_refused(words, data, capsys):
    told = refused(capsys, *TINY, f"--data={data}", *words.split())
    assert "of the 11 that predict" in told and not Path("run").exists()


@pytest.mark.parametrize("active", ["abc", "ca", "b"])
def test_information_is_what_the_exact_curves_lose_on_the_way(active, data, monkeypatch):
    """The sum over predictions of (mixture - known), and with the first token's log p at most log K."""
    test = chunks_of(data / "test.h5")
    codes = [test.code(name) for name in active]
    rows = np.flatnonzero(np.isin(test.codes, codes))
    found = curves_room.information(test.oracle[rows], test.codes[rows], codes)
    mixture, known = train_arxiv.exact_curves(test, rows, list(active))
    lost = (mixture.mean_of(codes) - known.mean_of(codes)).sum()
    assert found["predictions"] == pytest.approx(lost, abs=1e-6) and found["log_K"] == math.log(len(active))
    first = np.exp(test.oracle[rows][:, codes, 0].astype(float))  # p_j(first token), [R, K]
    own = np.array([first[row, active.index(test.names[code])] for row, code in enumerate(test.codes[rows])])
    told = np.log(own / first.mean(1))  # as many chunks of each component
    assert found["document"] == pytest.approx(lost + told.mean(), abs=1e-6)
    assert -1e-9 <= found["document"] <= found["log_K"] + 1e-9


def test_results_hold_the_information_and_what_a_run_is_a_control_of(data, whole):
    found = read(whole / "results.json")
    assert found["information"]["log_K"] == math.log(2) and found["control_of"] is None
    run(data, "--categories=b", "--control_of=2", "--budget=tokens", "--budget_tokens=240", "--max_steps=2")
    assert read("run/results.json")["control_of"] == 2


def test_chunks_of_a_control_are_those_of_its_share(data):
    """The first B / K of the same permutation, whatever others there are."""
    chunks = some_corpus((60, 60, 60), each=3)
    for choice, windows in itertools.product(("random", "first"), (False, True)):
        settings = {"choice": choice, "random_windows": windows, "seed": 5}
        together = train_arxiv.training_rows(chunks, ["a", "c"], Config(**settings))
        for name in "ac":
            alone = train_arxiv.training_rows(
                chunks, [name], Config(**settings, control_of=2, budget="tokens", budget_tokens=30 * 5))
            assert alone.tolist() == together[chunks.codes[together] == chunks.code(name)].tolist()


def test_test_documents_are_others_and_move_none_of_training_and_validation(data):
    settings = ["ergodic", f"--components={json.dumps(PARTS)}", "--train_documents=20", "--validation_documents=6",
                "--chunk_size=12"]
    prepare_data.main([*settings, "--test_documents=0", "--out_dir=without"])
    assert not Path("without/test.h5").exists()
    for split in ("train", "validation"):
        assert Path(f"without/{split}.h5").read_bytes() == (data / f"{split}.h5").read_bytes()
    test, validation = (chunks_of(data / f"{split}.h5") for split in ("test", "validation"))
    assert len(test.tokens) == len(validation.tokens) and (test.tokens != validation.tokens).any()
    assert test.oracle.shape == validation.oracle.shape


def test_results_say_what_the_run_was_trained_on_and_how_much(whole, data):
    results, summary = read(whole / "results.json"), read(whole / "summary.json")
    assert results["data"]["path"] == str(data) and results["data"]["fingerprint"] == "".join(
        chunks_of(data / f"{split}.h5").fingerprint for split in ("train", "validation"))
    assert results["budget"] == {"kind": "constant", "tokens": 40 * 12} and results["seed"] == 1337
    assert (results["steps"], results["tokens"]) == (summary["steps"], 10 * 8 * 11)
    assert results["settings"]["dropout"] == 0.1 and not {"out_dir", "seed", "categories"} & results["settings"].keys()


@pytest.mark.parametrize("active", ["still", "still,fair"])
def test_a_component_that_never_surprises_is_measured_and_drawn(active, monkeypatch):
    """Its optimum is 0, or falls to it: no division by it, and no axis that ends there."""
    parts = json.dumps([{"name": "still", "process": "coin", "p": 1.0}, {"name": "fair", "process": "coin"}])
    prepare_data.main(["ergodic", f"--components={parts}", "--train_documents=12", "--validation_documents=6",
                       "--chunk_size=12", "--out_dir=coins"])
    monkeypatch.setattr(train_arxiv, "draw_run", curves_room.draw_run)
    summary = train_arxiv.main([*TINY, "--data=coins", f"--categories={active}", "--max_steps=4"])
    groups = read("run/results.json")["groups"]  # valid JSON
    assert (summary["largest_relative_excess"] is None) == (active == "still")
    assert all(math.isfinite(x) for x in groups["seen"]["excess_by_position"])
    assert {path.stem for path in Path("run/plots").iterdir()} >= {"xe_by_position", "excess_by_position"}


def test_what_too_few_documents_leave_undefined_is_null_and_an_empty_cell(capsys):
    """One document a category: no interval, no probe, and no traceback after training."""
    prepare_data.main(["ergodic", f"--components={json.dumps(PARTS)}", "--train_documents=12",
                       "--validation_documents=1", "--chunk_size=12", "--out_dir=few"])
    train_arxiv.main([*TINY, "--data=few", "--max_steps=4"])
    results = read("run/results.json")
    assert results["probe"] is None and results["groups"]["a"]["fit"] is None
    assert set(results["groups"]["seen"]["low"]) == {None}
    with open("run/xe_by_position.csv") as file:
        assert {(row["low"], row["high"]) for row in csv.DictReader(file)} == {("", "")}
    assert "nan" not in capsys.readouterr().out
    sections, _ = study_sections([Path("run")], Path("report"))
    assert sections and "nan" not in Path("report/xe_by_k.csv").read_text()


@pytest.mark.parametrize("weights, words", [((2, 1), "leave weight out"), ((None, 3), "leave weight out"), ((2, 2), ""),
                                            ((1, None), ""), ((-1, -1), "must be positive"), (([1], [1]), "weight")])
def test_a_component_of_another_weight_is_refused(weights, words, capsys):
    """The exact optimum and the training documents are those of equally frequent components."""
    parts = [{"process": "coin", "p": p} | ({"weight": w} if w else {})
             for p, w in zip((0.9, 0.2), weights, strict=True)]
    command = ["ergodic", f"--components={json.dumps(parts)}", "--train_documents=2", "--validation_documents=2",
               "--chunk_size=12", "--out_dir=weighted"]
    if words:
        assert words in refusal(capsys, prepare_data.main, *command)
    else:
        prepare_data.main(command)
    assert Path("weighted").exists() == (not words)


def test_the_final_numbers_are_those_of_the_best_weights(data):
    result = run(data, "--lr=0.03", "--schedule=constant", "--warmup_steps=0", "--eval_interval=2", "--max_steps=12")
    history = [record["val_xe"] for record in evals("run")]
    assert result["val_xe"] == pytest.approx(min(history), rel=1e-5) and min(history) < history[-1]
    best = checkpoint.load(Path("run/best.pt"))
    assert best["step"] == 2 + 2 * int(np.argmin(history)) and best["best"] == min(history)
    cfg, model, step, extra = train_arxiv.load_run(Path("run"), "cpu")
    chunks = chunks_of(data / "validation.h5")
    curves = train_arxiv.evaluate(model, chunks, np.arange(len(chunks.codes)), runtime())
    assert np.mean([curves.mean(k) for k in range(3)]) == pytest.approx(result["val_xe"], rel=1e-5)


def test_a_checkpoint_with_the_older_names_of_settings_loads_and_goes_on(data, whole):
    shutil.copytree(whole, "run")
    for path in (Path("run/last.pt"), Path("run/best.pt")):
        state = torch.load(path, weights_only=True)
        config = state["config"]
        state |= {"experiment": "arxiv", "format_version": 1}
        del state["digest"]
        config |= {"adam_beta1": config.pop("beta1"), "adam_beta2": config.pop("beta2"), "min_lr_ratio": 0.1}
        del config["min_lr"], config["schedule"]
        torch.save(state, path)
    cfg, model, step, extra = train_arxiv.load_run(Path("run"), "cpu")
    assert (cfg.beta2, cfg.min_lr, cfg.schedule, extra["categories"]) == (0.95, 1e-3, "cosine", ["a", "b"])
    again = run(data, *RUN)  # no setting counts as changed, or it would be refused
    assert again["val_xe"] == pytest.approx(read(whole / "summary.json")["val_xe"], rel=1e-5)


def test_early_stopping_stops_and_stays_stopped(data):
    settings = ("--eval_interval=1", "--patience=3", "--min_delta=5", "--epochs=9")
    assert run(data, *settings)["steps"] == 4  # the first evaluation is better than none, three are not
    assert run(data, *settings)["steps"] == 4 and len(evals("run")) == 4
    assert run(data, *settings, "--patience=0", "--max_steps=9", "--out_dir=on")["steps"] == 9


@pytest.mark.parametrize("step", [3, 7, 9])
def test_a_run_stopped_mid_epoch_and_started_again_ends_with_the_same_bits(step, data, whole):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "stopping", lambda self, now: now == step)
        assert run(data, *RUN) == {"stopped_at": step}
    assert not Path("run/summary.json").exists() and checkpoint.load(Path("run"))["step"] == step
    assert run(data, *RUN)["steps"] == 10
    assert_as_if_uninterrupted(Path("run"), whole)


def test_a_killed_run_started_again_ends_with_the_same_bits(data):
    settings = [*RUN, f"--data={data}", "--epochs=20", "--log_interval=1", "--patience=0", "--keep_last=0"]
    train_arxiv.main([*settings, "--out_dir=alone"])
    job, metrics = Job("train_arxiv", *settings), Path("run/metrics.jsonl")
    wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 20, job, "line 20 of metrics.jsonl")
    job.kill()
    assert job.wait() == -signal.SIGKILL and 0 < checkpoint.load(Path("run"))["step"] < 100
    assert train_arxiv.main(settings)["steps"] == 100
    assert_as_if_uninterrupted(Path("run"), Path("alone"))


def test_two_ranks_train_like_one(data):
    settings = [*TINY, f"--data={data}", "--grad_accum=2", "--out_dir=two"]
    assert two_ranks("test_train_arxiv", *settings, function="quick").count("done: test XE") == 1
    alone, two = run(data), read("two/summary.json")
    assert two["xe_by_position"] == pytest.approx(alone["xe_by_position"], rel=1e-3)
    assert two["steps"] == alone["steps"] and [r["step"] for r in evals("two")] == [r["step"] for r in evals("run")]
    told = two_ranks("test_train_arxiv", "--analyze=two", "--device=cpu", function="quick")
    assert told.count("test XE") == 1


def test_a_finished_run_with_another_setting_is_refused_with_the_choices(data, whole, capsys):
    shutil.copytree(whole, "run")
    told = refused(capsys, *RUN, f"--data={data}", "--lr=2e-2")
    assert "finished run with other settings" in told and "resume=never" in told
    assert read("run/summary.json") == read(whole / "summary.json")


def test_analyze_repeats_the_numbers(whole, monkeypatch):
    shutil.copytree(whole, "run")
    expected, table = read("run/results.json"), numbers_in("run/xe_by_position.csv")
    result = train_arxiv.main(["--analyze=run", "--device=cpu"])
    found = read("run/analysis/results.json")
    assert apart(found, expected) == [] and apart(numbers_in("run/analysis/xe_by_position.csv"), table) == []
    assert result["val_xe"] == pytest.approx(read("run/summary.json")["val_xe"], rel=1e-5)


def numbers_in(path: str) -> list[list]:
    with open(path) as file:
        return [[float(x) if re.fullmatch(r"-?[\d.]+(e-?\d+)?", x) else x for x in row] for row in csv.reader(file)]


# -------------------------------------------------------------------------------------------------- studies, reports


def planned(data: Path, study: str, *settings: str, orders: int | None = None, controls: bool = False) -> list:
    """The runs of a study on these data."""
    cfg = configure(Config, [*TINY, f"--data={data}", *settings], ALIASES)
    return plan(train_arxiv, cfg, SimpleNamespace(study=study, orders=orders, controls=controls))


def test_a_study_is_planned_as_it_is_called():
    subsets = plan_study("all31", FIVE)
    assert len(subsets) == 31 == len({tuple(s) for s in subsets}) and subsets[-1] == FIVE
    assert [len(s) for s in plan_study("k=1,4", FIVE)] == [1] * 5 + [4] * 5 and len(plan_study("all", FIVE[:3])) == 7
    assert run_name(["cs.PL", "cs.DS", "cs.IT"]) == "K3_cs.DS_cs.IT_cs.PL"
    assert run_name(["cs.PL"], 7) == "K1_cs.PL_seed7"
    assert plan_study("k=4,1,4", FIVE) == plan_study("k=4,1", FIVE)
    for study in ("K3_cs.DS_cs.IT_cs.PL,K1_math.ST,K1_mathST", "K3_csDS_csIT_csPL,K1_mathST",  # by the older names too
                  "K3_cs.PL_cs.DS_cs.IT,K1_math.ST"):
        assert plan_study(study, FIVE) == [["cs.DS", "cs.IT", "cs.PL"], ["math.ST"]]


@pytest.mark.parametrize("N, sizes", [(4, "1,2,4"), (5, "1,2,3,4,5"), (5, "2,3"), (6, "4")])
def test_nested_sets_of_all_orders_have_every_name_equally_often(N, sizes, capsys):
    """Else K = 2 would be another composition than K = 4, and that would pass for an effect of K."""
    names = [f"c{i}" for i in range(N)]
    sets = plan_study(f"nested:{sizes}", names)
    for K in map(int, sizes.split(",")):
        of_size = [s for s in sets if len(s) == K]
        assert len(of_size) == (N if K < N else 1) == len({tuple(s) for s in of_size})
        assert {sum(name in s for s in of_size) for name in names} == {K if K < N else 1}
        assert names[:K] in of_size and all(s == sorted(s) for s in of_size)
    for small, large in itertools.pairwise(map(int, sizes.split(","))):  # nested: each is in a larger one
        for s in (s for s in sets if len(s) == small):
            assert any(set(s) < set(other) for other in sets if len(other) == large)
    assert capsys.readouterr().err == ""


def test_fewer_orders_are_evenly_spaced_and_what_that_costs_is_said(capsys):
    names = list("abcd")
    assert plan_study("nested:1,2,4", names, 2) == [["a"], ["c"], ["a", "b"], ["c", "d"], names]
    assert "orders = 2 of 4: the sets of K = 1 do not hold every category equally often" in capsys.readouterr().err
    assert plan_study("nested:2,4", names, 2) == [["a", "b"], ["c", "d"], names] and capsys.readouterr().err == ""
    assert plan_study("nested:1,2,5", FIVE, 1) == [FIVE[:1], FIVE[:2], FIVE]
    assert "the sets of K = 1, 2 do not" in capsys.readouterr().err
    assert plan_study("nested:1,2", FIVE, 5) == plan_study("nested:1,2", FIVE)
    many = [f"c{i}" for i in range(60)]  # whose subsets nobody can list
    assert plan_study("nested:1,60", many, 1) == [many[:1], many]


@pytest.mark.parametrize("study, words", [("k=6", "6 is not between 1 and the 5"), ("nested:0", "0 is not between"),
                                          ("K3_csDS_csIT_csPM", "did you mean 'K3_csDS_csIT_csPL'"), ("al", "all31"),
                                          ("K3_cs.DS_cs.IT_cs.PM", "'K3_cs.DS.cs.IT.cs.PL'")])
def test_a_study_that_cannot_be_is_refused(study, words):
    with pytest.raises(DataError, match=words):
        plan_study(study, FIVE)
    with pytest.raises(DataError, match="five categories, but there are 4"):
        plan_study("all31", FIVE[:4])
    with pytest.raises(DataError, match="orders = 6: 5 categories have 5 orders"):
        plan_study("nested:1", FIVE, 6)
    with pytest.raises(DataError, match="orders = 2 is of nested sets"):
        plan_study("k=1,2", FIVE, 2)


def test_controls_are_each_category_alone_at_its_share_of_every_k(data, capsys):
    runs = planned(data, "nested:1,2,3", controls=True)
    assert [run.name for run in runs] == [
        "K1_a", "K1_b", "K1_c", "K2_a_b", "K2_b_c", "K2_a_c", "K3_a_b_c",
        "control2_a", "control2_b", "control2_c", "control3_a", "control3_b", "control3_c"]  # fmt: skip
    assert len({tuple(run.values) for run in runs}) == 1  # columns of a table
    assert runs[3][:3] == ("K2_a_b", {"categories": "a,b"}, {"K": "2", "categories": "a, b", "control_of": ""})
    assert all(list(run.data) == [str(data)] and len(run.data[str(data)]) == 32 for run in runs)  # train, validation
    # 40 chunks of 12 tokens: of 3 categories 13 each.
    assert runs[-1].settings == {
        "categories": "c", "budget": "tokens", "budget_tokens": str(13 * 12), "control_of": "3"}
    assert runs[-1].values == {"K": "1", "categories": "c", "control_of": "3"}
    half = planned(data, "K2_a_c", "--budget=tokens", "--budget_tokens=250", controls=True)  # 20 chunks
    assert [(run.name, run.settings.get("budget_tokens")) for run in half] == [
        ("K2_a_c", None), ("control2_a", "120"), ("control2_c", "120")]
    assert [run.name for run in planned(data, "all")] == [run_name(s) for s in plan_study("all", list("abc"))]
    capsys.readouterr()
    planned(data, "k=2,3", controls=True)  # of 13 chunks, twice in batches of 8
    assert "a control of K = 3 has 4 steps, the first 4 of which warm up" in capsys.readouterr().err
    planned(data, "k=2,3", "--warmup_steps=2", controls=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("study, settings, words", [
    ("k=2", "--budget=proportional", "budget=proportional has not"), ("k=2", "--max_steps=9", "max_steps = 9"),
    ("k=1", "", "this study has none"), ("k=2", "--budget=tokens --budget_tokens=9000", "less than its share")])
def test_controls_that_would_not_be_comparable_are_refused_before_the_first_run(study, settings, words, data):
    with pytest.raises(DataError, match=words):
        planned(data, study, *settings.split(), controls=True)


def test_names_of_any_spelling_come_through_a_command_line():
    for names in (["a", "b"], ["none"], ["a,b", "c"], ["it's", 'so "so"'], ["1"], ["x y"], ["K[1]"], ["null", "a"]):
        assert configure(Config, [f"--categories={typed(names)}"]).categories == names
    assert typed(["cs.DS", "math.ST"]) == "cs.DS,math.ST"


def test_a_run_and_its_controls_train_on_the_same_chunks_and_say_what_they_are(data):
    """The runs of a plan, each by its own command line; a control reads each chunk as often as its share of K does."""
    tokens = {}
    for run_of in planned(data, "K2_a_b", controls=True):
        words = [f"--{name}={value}" for name, value in run_of.settings.items()]
        run(data, *words, "--probe=false", f"--out_dir=study/{run_of.name}")
        results = read(f"study/{run_of.name}/results.json")
        tokens[run_of.name] = results["tokens"]
        assert str(results["control_of"] or "") == run_of.values["control_of"]
        assert results["categories"] == run_of.settings["categories"].split(",")
        assert results["K"] == int(run_of.values["K"])
    assert tokens == {"K2_a_b": 10 * 8 * 11, "control2_a": 5 * 8 * 11, "control2_b": 5 * 8 * 11}


def test_the_words_of_a_study_are_planned_by_sweep(data, capsys):
    words = [*TINY, f"--data={data}", "--study=K2_a_c", "--controls", "--seed=0,1", "--print_config"]
    sweep.main(["train_arxiv.py", *words])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (1 + 2) and all("--patience=0" in line for line in lines)
    assert lines[0].endswith("--categories=a,c --out_dir=run/K2_a_c_seed0") and "control2_c_seed1" in lines[-1]


# --------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("arxiv*.py")), ids=lambda path: path.stem)
def test_a_published_config_is_accepted(path):
    chosen = {key: value for key, value in runpy.run_path(str(path)).items() if not key.startswith("_")}
    cfg = configure(Config, [str(path)], ALIASES)
    assert len(chosen) > 10 and {key: getattr(cfg, key) for key in chosen} == chosen and cfg.categories == FIVE


VALUES = {"categories": "a,b", "out_dir": "x", "n_heads": "8", "lr": "0.5", "beta1": "0.5", "beta2": "0.5",
          "grad_clip": "2", "d_model": "128", "grad_accum": "2", "schedule": "constant", "dropout": "0.5",
          "eval_epochs": "2", "log_level": "DEBUG"}


FIELDS = [field.name for field in fields(Config)]


@pytest.mark.parametrize("theirs", [name for name in ALIASES if ALIASES[name] in FIELDS])
def test_a_name_of_the_source_means_ours(theirs):
    name = ALIASES[theirs]
    ours = configure(Config, [f"--{name}={VALUES.get(name, 1)}"], ALIASES)
    assert configure(Config, [f"--{theirs}={VALUES.get(name, 1)}"], ALIASES) == ours != Config()


def spoil(folder: Path, name: str) -> None:
    path = folder / "train.h5"
    if name == "torn":
        path.write_bytes(path.read_bytes()[:-1_500])
    elif name == "missing":
        path.unlink()
    elif name:
        with h5py.File(path, "a") as file:
            tokens = file["token_chunks"][:].astype(np.int64)
            tokens[3, 3] = {"beyond": 4, "negative": -1}.get(name, 0)
            del file["token_chunks"]
            file["token_chunks"] = tokens if name != "other_size" else tokens[:, :8]
            names, codes = layout(file)
            file.attrs["sha256"] = digest_of(file["token_chunks"], codes, names)
            del file.attrs["checksums"]
            seal(file, codes, names)


@pytest.mark.parametrize("damage, line, words", [
    ("", "--categories=a,bb", "'bb', did you mean 'b'"), ("", "--data=nowhere", "no such file; make it with"),
    ("", "--data=dota", "did you mean data? Or make it with"),
    ("", "--data=a.csv", "a.csv holds documents, and data is a folder of chunks made of them: python prepare_data.py "
     "arxiv --input=a.csv"),
    ("torn", "", "train.h5"), ("missing", "", "no such file"), ("beyond", "", "token 4, but vocab_size = 4"),
    ("negative", "", "-1"), ("other_size", "", "differ in chunk size"), ("", "--categories=a,a", "each once"),
    ("", "--batch_size=9 --grad_accum=2", "multiple of grad_accum"), ("", "--n_heads=3", "no multiple of n_heads = 3"),
    ("", "--bootstrap=100_001", "take at most 100,000"),
    ("", "--budget_tokens=100", "budget_tokens go together"), ("", "--budget=tokens", "go together"),
    ("", "--budget=tokens --budget_tokens=9000", "less than its share"), ("", "--categories=", "categories"),
    ("", "--control_of=2", "one category"), ("", "--final_split=train", "final_split"),
    ("", "--max_steps=0", "max_steps"),
    ("", "--learning_rat=1", "learning_rate"), ("", "--analyze=nowhere", "nowhere"),
    ("", "--dropout=1", "dropout: expected float in [0, 1)"), ("", "--resume=gone.pt", "gone.pt")])
def test_bad_input_is_one_line_and_nothing_is_written(damage, line, words, data, capsys):
    shutil.copytree(data, "data")
    Path("a.csv").write_text("text,label\na,b\n")
    spoil(Path("data"), damage)
    before = sorted(Path.cwd().rglob("*"))
    assert words in refused(capsys, *TINY, "--data=data", *line.split())
    assert sorted(Path.cwd().rglob("*")) == before


@pytest.mark.parametrize("name", ["seen", "unseen"])
def test_a_category_with_the_name_of_a_group_of_results_is_refused(name, capsys):
    parts = [{"process": "coin", "name": name}, {"process": "coin", "p": 0.9, "name": "b"}]
    prepare_data.main(["ergodic", f"--components={json.dumps(parts)}", "--train_documents=8", "--chunk_size=6",
                       "--validation_documents=4", "--out_dir=data"])
    assert f"a category is called '{name}'" in refused(capsys, *TINY, "--data=data", "--categories=b")


def test_importing_the_script_starts_nothing_and_brings_no_other_experiment():
    brought = brought_in_by("train_arxiv")
    assert "train_arxiv" in brought and not {"train_ghmm", "matplotlib"} & brought
