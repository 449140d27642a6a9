"""The bench compares like with like.

Its rows are equal on a few queries, a planted fault is told, and its floor counts right.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from analysis_lib import load_safety_prompts
from analysis_lib.collect.responses import sample_responses
from analysis_lib.model.chat import ChatModel
from bench import __main__ as command
from bench import gpu, plain, rows
from bench.measure import RAREST, alternate, distinct_depths, flops, same_distribution
from bench.table import Row, line

BENCH = Path(__file__).parents[1] / "bench"

SIZE = replace(
    rows.QUICK["organism"],
    capture=8,
    batch=6,
    sampling=4,
    sampling_plain=3,
    samples=16,
    tokens=12,
    lengths=(0, 60),
)


@pytest.fixture(scope="module")
def organism():
    chat = ChatModel.load(device="cpu", dtype="float32")
    chat.name = "organism"
    return chat


def changed(function, change):
    return lambda *args, **kwargs: change(function(*args, **kwargs))


def test_capture_equals_the_plain_way_and_a_fault_is_told(organism, monkeypatch):
    checked, unchecked, stored = rows.capture_rows(organism, SIZE)
    assert checked.equal and unchecked.equal and stored.equal
    prompt, texts = load_safety_prompts()["default"], plain.anchor(8)["text"]
    assert (
        stored.plain[0]
        == sum(len(plain.plain_ids(organism, t, prompt)) for t in texts) * 5 * 128 * 4
    )
    assert stored.ours[0] >= 8 * 128 * 4
    work = flops(organism, distinct_depths([plain.plain_ids(organism, t, prompt) for t in texts]))
    assert checked.floor * checked.extra["gflops"] * 1e9 == pytest.approx(work)
    monkeypatch.setattr(
        rows,
        "hidden_states",
        changed(rows.hidden_states, lambda h: replace(h, states=h.states * 1.01)),
    )
    assert [row.equal for row in rows.capture_rows(organism, SIZE)] == [False, False, True]


def test_dro_steps_equal_the_plain_ones_and_a_fault_is_told(organism, monkeypatch):
    (row,) = rows.dro_row(organism, SIZE)
    assert row.equal and row.floor > 0 and len(row.plain) == len(row.ours) == 2
    trained = plain.train_dro
    for part in ("weight_refusal", "weight_harmfulness", "weight_norm"):

        def weaker(*args, part=part, **kw):
            return trained(*args[:-1], replace(args[-1], **{part: 0.5}), **kw)

        monkeypatch.setattr(plain, "train_dro", weaker)
        assert not next(rows.dro_row(organism, SIZE)).equal, part


def test_samples_have_the_plain_distribution_and_a_fault_is_told(organism, monkeypatch):
    (row,) = rows.sampling_row(organism, SIZE)
    assert row.equal and "greedy equal 3/3" in row.difference and "3 queries timed" in row.note
    rendered = organism.render(plain.anchor(4)["text"].tolist(), load_safety_prompts()["default"])
    tree = len(distinct_depths([r.ids for r in rendered]))
    assert tree < row.extra["computed_tokens"] < tree + 4 * 16 * 12
    with monkeypatch.context() as patch:
        narrow = lambda *args, **kw: sample_responses(*args, **kw, top_p=0.3)  # noqa: E731
        patch.setattr(plain, "sample_responses", narrow)
        (row,) = rows.sampling_row(organism, SIZE)
        assert not row.equal and "greedy equal 3/3" in row.difference
    monkeypatch.setattr(plain, "plain_ids", changed(plain.plain_ids, lambda ids: ids[:-1]))
    (row,) = rows.sampling_row(organism, SIZE)
    assert not row.equal and "greedy equal 3/3" not in row.difference


def test_further_queries_under_prompts_of_two_lengths(organism):
    found = list(rows.slope_rows(organism, SIZE))
    assert [row.equal for row in found] == [True, True]
    told = [int(row.detail.split()[-2]) for row in found]
    assert told[0] == 0 and 55 <= told[1] <= 60


def test_distinct_depths_are_those_of_all_different_prefixes():
    drawn = np.random.default_rng(0).integers(0, 3, (40, 6))
    texts = [tuple(r[: 2 + i % 5].tolist()) for i, r in enumerate(drawn)]
    prefixes = {r[: i + 1] for r in texts for i in range(len(r))}
    assert sorted(distinct_depths(texts)) == sorted(len(p) - 1 for p in prefixes)


@pytest.mark.parametrize("training", [False, True])
def test_flops_are_those_a_counter_sees(organism, training):
    """Matrix products exactly; attention by hand, since the counter takes a kernel's whole square and we its lower half."""
    n, d, layers = 12, organism.hidden_size, organism.n_layers
    embedded = torch.zeros(1, n, d, requires_grad=training)
    with FlopCounterMode(display=False) as counter:
        out = organism.forward.body(inputs_embeds=embedded, use_cache=False).last_hidden_state
        if training:
            out.sum().backward()
    seen = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in seen.items() if str(op) in ("aten.mm", "aten.addmm"))
    attention = 4 * layers * d * sum(range(1, n + 1)) * (3 if training else 1)
    assert (
        flops(organism, np.arange(n), backward_from=0 if training else None) == products + attention
    )


def test_same_distribution_tells_equal_from_different():
    rng = np.random.default_rng(1)

    def draw(p):
        return [
            ["".join(rng.choice(["a", "b"], 6, p=[p, 1 - p])) for _ in range(20)] for _ in range(8)
        ]

    assert min(same_distribution(draw(0.5), draw(0.5)) for _ in range(10)) > RAREST
    assert same_distribution(draw(0.5), draw(0.8)) <= RAREST


@pytest.mark.parametrize(
    ("ours", "floor", "met"),
    [(1.0, 0.9, (True, True)), (2.0, 1.9, (False, True)), (1.0, 0.5, (True, False))],
)
def test_a_missed_goal_is_shown(ours, floor, met):
    row = Row("capture", "110M", [10.0, 9.0, 20.0], [ours], floor=floor)
    assert tuple(ok for _, ok in row.goals().values()) == met
    shown = line(row, timed=True)
    assert shown.count(" met") == sum(met) and shown.count("missed") == 2 - sum(met)
    assert "10.0 (9.0-20.0) s" in shown


def test_peak_memory_is_above_what_was_held():
    held = np.ones(5_000_000)
    runs = alternate({"large": lambda: np.ones(8_000_000).sum(), "small": lambda: held.sum()}, 2)
    if runs["large"].peak is None:
        pytest.skip("this system keeps no high-water mark")
    assert 60e6 < runs["large"].peak < 90e6 and runs["small"].peak < 20e6
    assert len(runs["large"].seconds) == 2


def test_gpu_rows_on_a_tiny_shape_and_without_a_gpu(organism, monkeypatch):
    measured = list(gpu.gpu_rows(organism, "tiny", "cpu"))
    assert [row.equal for row in measured] == [True] * 3
    assert all(
        row.extra["tokens_per_s"] > 0
        and row.extra["matrix_share"] * row.of_floor == pytest.approx(1)
        for row in measured
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for row in gpu.gpu_rows(organism, "7b", "cuda"):
        assert row.ours == [] and row.note == "no GPU at hand" and " - " in line(row, timed=True)


def test_results_are_written_only_on_request_and_hold_no_path(tmp_path, monkeypatch, capsys):
    before = set(BENCH.rglob("*.json"))
    assert command.main(["--quick", "--only", "import"]) == 0
    out = tmp_path / "result.json"
    assert command.main(["--quick", "--only", "import", "--out", str(out)]) == 0
    assert set(BENCH.rglob("*.json")) == before
    text = out.read_text(encoding="utf-8")
    found = json.loads(text)
    assert found["rows"][0]["what"] == "import" and found["versions"]["torch"] and found["date"]
    assert str(Path.home()) not in text and str(BENCH.parent) not in text

    monkeypatch.setattr(
        command,
        "cpu_rows",
        lambda *args: [Row("capture", "organism", [1.0], [1.0], equal=False)],
    )
    assert command.main(["--quick"]) == 1
    assert "DIFFERENT" in capsys.readouterr().out
