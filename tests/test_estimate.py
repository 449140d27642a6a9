"""The clock of these tests counts the tokens that enter the model, so that they hold on a busy machine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tiny_models import PROMPTS, QUERIES, SAFETY, build, chat

import analysis_lib.report.cost as room
from analysis_lib.analysis.directions import fit_direction
from analysis_lib.analysis.space import AnchorSpace
from analysis_lib.collect.responses import sample_responses
from analysis_lib.collect.states import hidden_states
from analysis_lib.judge.verdicts import judge_responses
from analysis_lib.model.chat import ChatModel
from analysis_lib.model.errors import ChatModelError
from analysis_lib.model.soft_prompt import SoftPrompt
from analysis_lib.report.cost import estimate
from analysis_lib.store.store import Store
from analysis_lib.store.upkeep import ls
from analysis_lib.train.dro import DROConfig, train_dro
from analysis_lib.train.tuning import PromptTuningConfig, train_prompt_tuning

SAMPLING = {"n_samples": 3, "max_new_tokens": 40}
CONFIG = DROConfig(epochs=5, batch_size=2)
TUNING = PromptTuningConfig(epochs=4, batch_size=3, max_response_tokens=30)


@pytest.fixture
def model(monkeypatch):
    """A model whose every token takes a millisecond."""
    model = build("qwen2")
    model.tokens = 0

    forward = model.forward.body.forward

    def counted(*args, **kwargs):
        model.tokens += (args[0] if args else kwargs["input_ids"]).numel()
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.forward.body, "forward", counted)
    monkeypatch.setattr(room, "time", SimpleNamespace(perf_counter=lambda: model.tokens / 1000))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    chat("qwen2").model.save_pretrained(folder)
    chat("qwen2").tokenizer.save_pretrained(folder)
    return folder


def ran(model, run):
    before = model.tokens
    run()
    return (model.tokens - before) / 1000


def test_estimates_are_what_the_runs_take(model, monkeypatch):
    monkeypatch.setattr(room, "PROBE_TOKENS", 10)  # of 40: most responses go on past the probe
    told = estimate(
        model, QUERIES, PROMPTS, sampling=SAMPLING, config=CONFIG, tuning=TUNING
    ).set_index("step")
    assert (
        list(told["rows"]) == [len(QUERIES) * 3, len(QUERIES) * 9, 5 * 3, 4 * 2]
        and not told["found"].any()
    )
    states = ran(model, lambda: hidden_states(model, QUERIES, PROMPTS, n_check=0))
    responses = ran(model, lambda: sample_responses(model, QUERIES, PROMPTS, **SAMPLING))
    captured = hidden_states(model, QUERIES, PROMPTS)
    space = AnchorSpace.fit(captured.at(-1)[0], k=2)
    Z, y = space.transform(captured.at(-1)[0]), captured.rows["harmful"].astype(float).to_numpy()
    along = fit_direction(Z, y, name="d", groups=captured.rows["query_id"])
    trained = ran(model, lambda: train_dro(model, QUERIES, SAFETY, space, along, along, CONFIG))
    seen = judge_responses(
        sample_responses(model, QUERIES, {"none": "", "default": SAFETY}, **SAMPLING)
    )
    tuned = ran(model, lambda: train_prompt_tuning(model, QUERIES, seen, SAFETY, TUNING))
    assert told["seconds"]["prompt tuning"] == pytest.approx(tuned, rel=0.4)
    assert told["tokens"]["prompt tuning"] == 4 * len(QUERIES) * 2 * 3 * 30
    assert told["seconds"]["states"] == pytest.approx(states, rel=0.4)
    assert told["seconds"]["responses"] == pytest.approx(responses, rel=0.5)
    assert told["seconds"]["DRO"] == pytest.approx(trained, rel=0.4)
    assert told["tokens"]["responses"] == len(QUERIES) * 9 * 40
    assert (told["memory_bytes"] >= model.weight_bytes).all()


def test_what_the_store_has_is_not_counted_and_nothing_is_kept(tmp_path):
    model, store = build("qwen2"), Store(tmp_path)
    options = {"layers": (1, -1), "sampling": SAMPLING, "config": CONFIG, "store": store}
    # The last query reads like the third.
    hidden_states(model, QUERIES.head(4), {"default": SAFETY}, layers=(1, -1), store=store)
    hidden_states(
        model, QUERIES.iloc[[4]], {"default": SAFETY}, layers=(-1,), store=store
    )  # one layer is not enough
    sample_responses(
        model, QUERIES.head(2), {"none": ""}, n_samples=1, max_new_tokens=40, store=store
    )
    kept = ls(Store(tmp_path))["rows"].sum()
    told = estimate(model, QUERIES, PROMPTS, **options).set_index("step")
    assert told["found"]["states"] == 5 and told["found"]["responses"] == 2
    assert ls(Store(tmp_path))["rows"].sum() == kept
    hidden_states(model, QUERIES, PROMPTS, layers=(1, -1), store=store)
    sample_responses(model, QUERIES, PROMPTS, **SAMPLING, store=store)
    told = estimate(model, QUERIES.drop(columns="harmful"), PROMPTS, **options)
    assert list(told["step"]) == ["states", "responses"]
    assert (told["found"] == told["rows"]).all() and not told[
        ["tokens", "seconds"]
    ].to_numpy().any()
    other = estimate(
        model, QUERIES, PROMPTS, **{**options, "sampling": {**SAMPLING, "seed": 1}}, probe=False
    )
    assert list(other["found"]) == [18, 0, 0]


def test_without_a_probe_no_weights_are_loaded(saved):
    model = ChatModel.load(str(saved), device="cpu")
    told = estimate(model, QUERIES, PROMPTS, sampling=SAMPLING, probe=False)
    assert not model.loaded and told["seconds"].isna().all()
    assert told["memory_bytes"].eq(sum(p.nbytes for p in chat("qwen2").model.parameters())).all()
    probed = estimate(model, QUERIES, PROMPTS, sampling=SAMPLING)
    assert probed["seconds"].gt(0).all() and (probed["tokens"] == told["tokens"]).all()


def test_weights_of_fewer_bits_take_less_memory(saved):
    full, whole = (
        ChatModel.load(str(saved), device="cpu", dtype=dtype).weight_bytes
        for dtype in ("float32", "bfloat16")
    )
    packed = {}
    for bits in ("8bit", "4bit"):
        model = ChatModel.load(str(saved), device="cpu")
        model.quantization = bits  # set by hand: bitsandbytes does not run here
        packed[bits] = model.weight_bytes
    linear = sum(
        m.weight.nbytes for name, m in chat("qwen2").model.named_modules() if name.endswith("proj")
    )
    assert (full, packed["8bit"], packed["4bit"]) == (
        2 * whole,
        full - linear * 3 // 4,
        full - linear * 7 // 8,
    )


def test_weights_beyond_the_free_memory_are_refused_before_they_are_loaded(saved, monkeypatch):
    model = ChatModel.load(str(saved), device="cpu")
    monkeypatch.setattr(room, "_free_bytes", lambda device: 1000)
    with pytest.raises(
        ChatModelError,
        match=r"GB in float32.* are free; in Python, ChatModel.load\(.*dtype=, quantization=, device='auto'",
    ):
        estimate(model, QUERIES, PROMPTS)
    assert not model.loaded


def test_the_memory_that_can_be_had_counts_what_the_system_would_give_up(monkeypatch, tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(
        "MemTotal:       32000000 kB\nMemFree:          900000 kB\nMemAvailable:   20000000 kB\n"
    )
    monkeypatch.setattr(room, "MEMINFO", meminfo)
    monkeypatch.setattr(room.torch.cuda, "is_available", lambda: False)
    assert room._free_bytes("cpu") == room._free_bytes("auto") == 20_000_000 * 1024
    meminfo.unlink()  # no Linux: what the system calls free is better than nothing
    assert room._free_bytes("cpu") == pytest.approx(
        room.os.sysconf("SC_AVPHYS_PAGES") * room.os.sysconf("SC_PAGE_SIZE"), rel=0.2
    )


def test_the_free_memory_is_that_of_the_models_device(monkeypatch):
    free = {0: 5, 1: 7, "cuda": 5, "cuda:1": 7}
    monkeypatch.setattr(room.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(room.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(room.torch.cuda, "mem_get_info", lambda device: (free[device], 10))
    assert [room._free_bytes(device) for device in ("auto", "cuda", "cuda:1")] == [12, 5, 7]
    assert room._free_bytes("cpu") > 1000  # not the GPU's


def test_training_is_left_out_where_it_cannot_run(model):
    def steps(queries, prompts):
        return list(
            estimate(
                model,
                queries,
                prompts,
                sampling=SAMPLING,
                config=CONFIG,
                tuning=TUNING,
                probe=False,
            )["step"]
        )

    assert steps(QUERIES, PROMPTS) == ["states", "responses", "DRO", "prompt tuning"]
    assert (
        steps(QUERIES[QUERIES["harmful"]], PROMPTS)
        == steps(QUERIES, {"none": ""})
        == ["states", "responses"]
    )
    soft = SoftPrompt.from_text(model, SAFETY, name="s")
    assert steps(QUERIES, {"s": soft}) == ["states", "responses"]
    model.quantization = "4bit"
    assert steps(QUERIES, PROMPTS) == ["states", "responses"]


@pytest.mark.parametrize("family", ["mamba", "gemma3"])
def test_every_family_and_soft_prompts_can_be_estimated(family):
    model = build(family)
    prompts = {"s": SoftPrompt.from_text(model, SAFETY, name="s"), "default": SAFETY}
    sampling = {"n_samples": 2, "max_new_tokens": 8}
    told = estimate(
        model, QUERIES, prompts, sampling=sampling, config=CONFIG, tuning=TUNING
    ).set_index("step")
    assert told["seconds"].gt(0).all() and ("prompt tuning" in told.index) == (
        family != "mamba"
    )  # which cannot be tuned
    if family == "mamba":  # whole rows
        assert told["tokens"]["states"] == 2 * sum(
            len(row.ids) for row in model.render(QUERIES["text"].tolist(), SAFETY)
        )
