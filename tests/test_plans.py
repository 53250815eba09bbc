"""Plans one by one: what is written by each and how likely it is, their lines in a terminal, and the belief drawn."""


import numpy as np
import pytest
import torch

import train_apelr
from measure import plan_pictures, plans
from measure.forced import LONGEST, drawable, plan_legend, plan_table, written_nll
from measure.plan_pictures import COLUMNS, apart, draw_plans, heights, lay_out, letters_of, that_fit
from measure.transcript import columns_of
from measure.writing import advance, predict, prefill
from sources.corpus import Corpus

V1, V2 = "v1_filtered_mixture", "v2_planner_required"
WORDS = [" the", "ing", "\n", "\u4e2d\u6587", "e\u0301", "$x$", "\x00", "*" * 60, "", "a"]


def planner(version: str, K: int = 3, **settings) -> torch.nn.Module:
    torch.manual_seed(0)
    cfg = train_apelr.Config(version=version, num_plan_states=K, chunk_size=4, seq_len=30, d_model=8, token_dim=8,
                             n_layers=1, vocab_size=12, preview_tokens=5, device="cpu", **settings)
    return train_apelr.build_model(cfg)


@pytest.fixture
def corpus() -> Corpus:
    rng = np.random.default_rng(0)
    corpus = Corpus(rng.integers(11, size=310), rng.integers(11, size=310), 12)
    # As if planted: ten documents of 31 tokens in chunks of 4.
    corpus.document_length, corpus.chunk_size, corpus.version = 31, 4, V2
    corpus.oracle_nll, corpus.plans = np.ones((10, 30)), rng.integers(3, size=(10, 8))
    return corpus


@pytest.mark.parametrize("version", [V1, V2, "baseline"])
def test_what_is_written_is_as_likely_as_it_was_token_by_token(version):
    model = planner(version).eval()
    tokens = torch.randint(12, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        state, told = prefill(model, tokens[:, :3]), []
        for t in range(3, 11):
            log_p, logs = predict(model, state)
            told.append(-log_p.gather(1, tokens[:, t : t + 1])[:, 0])
            state = advance(model, state, tokens[:, t], logs)
    torch.testing.assert_close(written_nll(model, tokens, 3), torch.stack(told).mean(0), rtol=1e-4, atol=1e-5)
    assert written_nll(model, tokens[:, :3], 3).isnan().all()


def test_each_plan_writes_by_itself_and_the_table_has_all_of_it(corpus):
    model = planner(V2)
    with torch.no_grad():  # plan k writes token k and no other
        model.experts.weight.zero_()
        model.experts.bias.copy_(40 * torch.eye(3, 12))
    written = plans.forced_texts(model, corpus)
    assert [entry["plan"] for entry in written] == [None, 0, 1, 2]
    assert [entry["text"] for entry in written[1:]] == ["0 0 0 0 0", "1 1 1 1 1", "2 2 2 2 2"]
    # At first the belief has a third for each plan, and is sure of it after a token, but for the boundary.
    assert all(np.log(3) / 5 <= entry["nll"] < np.log(3) for entry in written[1:])
    model.cfg.preview_tokens = 0
    assert plans.forced_texts(model, corpus) == []


def test_a_table_of_texts_keeps_every_word_within_its_width():
    long = " ".join(f"word{i}" for i in range(60))
    texts = ("belief", long + "\n\nend", 1.234), ("plan 10", "", None), ("plan 2", "x" * 250, float("nan"))
    table = plan_table(texts)
    lines = table.splitlines()
    assert max(map(len, lines)) <= 100 and lines[0].split() == ["plan", "nats", "text"]
    assert lines[1].startswith(" belief   1.23  word0 word1") and "plan 10" in lines
    assert [word for word in table.split() if word.startswith("word")] == long.split()
    assert table.split().count("\u21b5") == 2 and table.count("x") == 250 + 1
    wide = plan_table([("0", "\u4e2d" * 200 + "\x1b[2J", 1.0)])  # two columns a letter, and what a console would obey
    assert max(map(columns_of, wide.splitlines())) in (99, 100) and wide.count("\u4e2d") == 200
    assert "\x1b" not in wide and "\u00b7[2J" in wide


def test_a_legend_names_every_plan_and_cuts_at_whole_tokens():
    typical = {str(k): [{"token": f" token{i}\n"} for i in range(20)] for k in range(12)}
    lines = plan_legend([0.5, 0.004] + [0.0496] * 10, typical, [f"true plan {k}" for k in range(12)], width=60)
    assert [line.split()[1] for line in lines] == [str(k) for k in range(12)] and max(map(len, lines)) <= 60
    assert lines[0] == "plan 0     50%  true plan 0  typical: token0\u21b5 token1\u21b5"
    assert plan_legend([1.0, 0.0]) == ["plan 0   100%", "plan 1   0.0%"]
    wide = plan_legend([1.0], {"0": [{"token": "\u4e2d" * 40}] * 3}, width=70)[0]
    assert columns_of(wide) <= 70 and wide.count("\u2026") == 1  # a token is cut, and the second has no room


def test_every_token_has_its_place_and_rows_hold_no_more_than_they_can():
    labels = WORDS * 20
    places = lay_out(labels)
    assert [place.text for place in places][:3] == [" the", "ing", "\u21b5"] and places[8].text == drawable("")
    assert [place.width for place in places[:10]] == [4, 3, 1, 4, 1, 3, 1, LONGEST, 1, 1]
    for before, after in zip(places, places[1:], strict=False):
        end = before.column + before.width
        assert end <= COLUMNS
        assert (after.row, after.column) in {(before.row, end), (before.row + 1, 0)}
    spaced = lay_out(["12", "3"], are_words=True)
    assert [(place.column, place.width) for place in spaced] == [(0, 3), (3, 2)]
    block = heights(4, False)[2]
    shown = that_fit(places, block)
    assert 0 < shown < len(places) and places[shown].row == places[shown - 1].row + 1
    assert letters_of("\u4e2de\u0301x") == 4 and letters_of("\u0301x") == 2 and letters_of("\U0001f1e9") == 2


def test_names_of_shares_stand_apart_and_inside():
    heights = apart([0.0, 0.0, 0.01, 0.5, 1.0, 1.0], 0.1)
    assert all(b - a >= 0.1 - 1e-9 for a, b in zip(heights, heights[1:], strict=False))
    assert heights[0] >= 0 and heights[-1] <= 1 and heights[3] == 0.5


@pytest.mark.parametrize("K", [1, 2, 4, 16])
def test_the_passage_drawn_is_that_of_most_plans_with_all_plans_named(K, corpus, tmp_path, monkeypatch):
    model, told = planner(V2, K), []
    monkeypatch.setattr(plan_pictures, "draw_beliefs", lambda *args, are_words: told.append((*args, are_words)))
    for name in ("draw_usage", "draw_transition"):
        monkeypatch.setattr(plan_pictures, name, lambda *args: None)
    starts = corpus.spread(10, 30, V2)
    draw_plans(tmp_path, model, corpus, starts, [1 / K] * K)
    ((_, name, beliefs, labels, begins, title, true, names, are_words),) = told
    assert name == "belief" and beliefs.shape == (30, K) and begins == [3, 7, 11, 15, 19, 23, 27] and are_words
    np.testing.assert_allclose(beliefs.sum(1), 1, rtol=1e-4)
    assert len(names) == K and all(f"plan {k}" in name for k, name in enumerate(names))
    passage = [str(token) for token in corpus.val]
    at = next(i for i in range(0, 310, 31) if passage[i + 1 : i + 31] == labels)
    np.testing.assert_array_equal(true, corpus.plans[at // 31])
    # No other passage has more plans at the ends of its chunks.
    tokens = corpus.windows("val", starts, 30)
    model.eval()
    with torch.no_grad():
        h, _ = model.read(tokens[:, :-1])
        evidence = model.look_up(h, tokens[:, 1:, None])[..., 0]
        ends = model.filter(evidence, model.contexts(h)).end.argmax(2)
    variety = [len(row.unique()) for row in ends]
    assert variety[at // 31] == max(variety)
    assert ("plan " if K == 1 else f"{K} plans ") in title


@pytest.mark.parametrize("K", [1, 16])
def test_a_picture_grows_with_its_text_until_a_page_is_full(K, tmp_path):
    from matplotlib.image import imread

    sizes = []
    for count in (10, 400):
        labels = [WORDS[i % 10] for i in range(count)]
        beliefs = np.full((count, K), 1 / K)
        names = [f"plan {k}" for k in range(K)]
        plan_pictures.draw_beliefs(tmp_path, f"strip{count}", beliefs, labels, [4, 8], "title " * 40, [0, 0, 0], names)
        sizes.append(imread(tmp_path / "plots" / f"strip{count}.png").shape[0] / 150)
    assert sizes[0] + heights(K, True)[2] <= sizes[1] < plan_pictures.TALLEST + 5
