from __future__ import annotations

import re
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tiny_models import (
    FAMILIES,
    PLAIN,
    PROMPTS,
    QUERIES,
    SAFETY,
    WINDOWED,
    build,
    chat,
    plain_states,
    relative,
)

from analysis_lib.collect import states as capture
from analysis_lib.collect.certificates import ParityError
from analysis_lib.collect.responses import sample_responses
from analysis_lib.collect.states import HiddenStates, hidden_states
from analysis_lib.model import forward, passes
from analysis_lib.model.architecture import text_config
from analysis_lib.model.chat import ChatModel
from analysis_lib.model.passes import last_states, shares_prefixes
from analysis_lib.model.soft_prompt import SoftPrompt
from analysis_lib.model.tree import plan_rows
from analysis_lib.store.batches import row_key
from analysis_lib.store.store import Store
from analysis_lib.store.upkeep import compact, info, ls

families = pytest.mark.parametrize("family", FAMILIES)
LAYERS = (0, 1, 2, 3, -1)
CLOSE = 1e-5  # of the states' root mean square, in float32


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def soft_prompt(model, length, seed=0, name="soft"):
    scale = float(model.model.get_input_embeddings().weight.std())
    rows = (
        np.random.default_rng(seed).normal(0, scale, (length, model.hidden_size)).astype(np.float32)
    )
    return SoftPrompt(name, rows, SAFETY, model.fingerprint)


def assert_plain(model, queries, prompts, got, layers=LAYERS, limit=CLOSE):
    """Every state equals that of a forward pass of its row alone."""
    assert got.states.shape == (len(prompts) * len(queries), len(layers), model.hidden_size)
    assert got.states.dtype == np.float32
    expected_rows = [(q, p) for p in prompts for q in queries["query_id"]]
    assert list(zip(got.rows["query_id"], got.rows["prompt"], strict=True)) == expected_rows
    at = iter(range(len(got.states)))
    for prompt in prompts.values():
        for row in model.render(queries["text"].tolist(), prompt):
            expected = plain_states(
                model, row, layers, None if isinstance(prompt, str) else prompt.embeddings
            )
            for mine, plain in zip(got.states[next(at)], expected, strict=True):
                difference = relative(mine, plain.float())
                assert difference <= limit, difference


# ------------------------------------------------------------------------------------------- states and their meaning


@families
def test_states_equal_a_plain_forward_pass_of_each_row(family):
    model = chat(family)
    got = hidden_states(model, QUERIES, PROMPTS, layers=LAYERS)
    assert_plain(model, QUERIES, PROMPTS, got)
    certificate = got.certificate
    assert certificate["way"] == ("plain" if family in PLAIN else "tree")
    assert (certificate["computed"], certificate["found"], certificate["checked"]) == (18, 0, 3)
    assert certificate["dtype"] == "float32" and certificate["seconds"] > 0
    assert 0 <= certificate["max_rel"] <= CLOSE and 0 <= certificate["max_abs"] < 1e-3


@families
def test_mixed_text_and_soft_prompts_of_several_lengths(family):
    model = chat(family)
    prompts = {
        "a": soft_prompt(model, 2),
        "none": "",
        "b": soft_prompt(model, 30, 1),
        "default": SAFETY,
    }
    assert_plain(
        model, QUERIES[:3], prompts, hidden_states(model, QUERIES[:3], prompts, layers=LAYERS)
    )


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "mixtral", "mamba"])
def test_order_subset_and_layers_change_no_state(family):
    model = chat(family)
    whole = hidden_states(model, QUERIES, PROMPTS, layers=LAYERS)
    shuffled = QUERIES.iloc[[3, 0, 5, 1]]
    turned = {name: PROMPTS[name] for name in ("long", "none")}
    got = hidden_states(model, shuffled, turned, layers=(-1, 2))
    assert_plain(model, shuffled, turned, got, (-1, 2))
    for layer in (2, -1):
        for i, row in got.rows.iterrows():
            same = whole.at(layer, query_id=row["query_id"], prompt=row["prompt"])[0]
            assert same.shape == (1, model.hidden_size)
            assert relative(got.at(layer)[0][i], same[0]) <= CLOSE
    assert_plain(
        model,
        QUERIES[2:3],
        {"p": SAFETY},
        hidden_states(model, QUERIES[2:3], {"p": SAFETY}, layers=LAYERS),
    )


def test_equal_texts_under_different_ids_have_equal_states():
    queries = pd.DataFrame(
        {
            "query_id": ["a", "b", "c"],
            "text": ["How do I bake", "How do I bake", "How do I bake bread"],
        }
    )
    model = chat("qwen2")
    got = hidden_states(model, queries, {"p": SAFETY}, layers=LAYERS)
    assert np.array_equal(got.states[0], got.states[1]) and not np.allclose(
        got.states[0], got.states[2]
    )
    assert_plain(model, queries, {"p": SAFETY}, got)


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma2", "gpt_neox"])
def test_many_small_packs_give_the_same_states(family, monkeypatch):
    monkeypatch.setattr(forward, "PACK_TOKENS", {"cpu": 40, "cuda": 40})
    model = chat(family)
    assert_plain(model, QUERIES, PROMPTS, hidden_states(model, QUERIES, PROMPTS, layers=LAYERS))


@pytest.mark.parametrize("family", sorted(WINDOWED))
def test_windows_are_shorter_than_the_rows_and_matter(family):
    model, wide = chat(family), build(family, sliding_window=512)
    assert (
        min(len(r.ids) for r in model.render(QUERIES["text"].tolist(), SAFETY))
        > 2 * text_config(model.config).sliding_window
    )
    got = [hidden_states(m, QUERIES, {"p": SAFETY}).states for m in (model, wide)]
    assert relative(*got) > 0.01


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_half_precision_is_within_its_tolerance(family, dtype, limit):
    model = build(family, dtype=dtype)
    got = hidden_states(model, QUERIES, PROMPTS, layers=LAYERS, n_check=18)
    assert (
        got.certificate["dtype"] == str(dtype).removeprefix("torch.")
        and got.certificate["checked"] == 18
    )
    assert_plain(model, QUERIES, PROMPTS, got, limit=limit)


def test_last_states_is_differentiable_like_the_plain_pass():
    model = build("gemma3", dtype=torch.float64)
    soft = soft_prompt(model, 5)
    rows = model.render(QUERIES["text"].tolist(), soft)
    gradients = []
    for plain in (False, True):
        rows_of = torch.nn.Parameter(torch.tensor(soft.embeddings, dtype=torch.float64))
        with model.forward.soft_tokens(rows_of):
            if plain:
                states = torch.stack(
                    [
                        model.forward.body(input_ids=torch.tensor([r.ids])).last_hidden_state[0, -1]
                        for r in rows
                    ]
                )
            else:
                states, way = last_states(model.forward, [r.ids for r in rows])
                assert way == "tree"
            states.flatten().sin().sum().backward()
        gradients.append(rows_of.grad)
    assert gradients[0].abs().max() > 0 and relative(*gradients) <= 1e-6


# --------------------------------------------------------------------------------------------------------- the result


def test_at_selects_rows_by_column():
    got = hidden_states(chat("llama"), QUERIES, PROMPTS, layers=(1, -1))
    states, rows = got.at(prompt="default", harmful=True)
    assert rows["query_id"].tolist() == ["q0", "q2", "q4"] and set(rows["prompt"]) == {"default"}
    assert np.array_equal(states, got.states[[6, 8, 10], 1])
    assert len(got.at(1, prompt=["none", "long"])[0]) == 12
    assert got.rows.columns.tolist() == ["query_id", "prompt", "text", "harmful", "query_set"]
    with pytest.raises(KeyError, match=r"pass layers=\(2,\)"):
        got.at(2)
    with pytest.raises(KeyError, match="no column 'colour'; the rows have query_id"):
        got.at(colour="red")


def test_unlabelled_rows_match_no_label():
    queries = QUERIES.assign(
        harmful=pd.array([True, None, False, None, True, False], dtype="boolean")
    )
    got = hidden_states(chat("qwen2"), queries, {"p": ""})
    assert [len(got.at(harmful=label)[0]) for label in (True, False)] == [2, 2]


def test_bad_requests_are_refused():
    model = chat("llama")
    for layers in ((4,), (-2,), (), (1, 1)):
        with pytest.raises(ValueError, match="give distinct numbers from 0 to 3, or -1"):
            hidden_states(model, QUERIES, PROMPTS, layers=layers)
    with pytest.raises(ValueError, match="lack the column text; load them with load_queries"):
        hidden_states(model, QUERIES[["query_id"]], PROMPTS)
    with pytest.raises(ValueError, match="query_id 'q0' occurs twice"):
        hidden_states(model, pd.concat([QUERIES, QUERIES[:1]]), PROMPTS)
    for prompts in ({}, SAFETY, {"a": None}):
        with pytest.raises(ValueError, match="prompts = .*load_safety_prompts"):
            hidden_states(model, QUERIES, prompts)


def test_no_queries_give_no_states():
    got = hidden_states(chat("llama"), QUERIES[:0], PROMPTS)
    assert got.states.shape == (0, 1, 32) and len(got.rows) == 0


# ------------------------------------------------------------------------------------------------ parity and the store


def test_wrong_states_raise_and_nothing_is_stored(store, monkeypatch):
    model, right = build("qwen2"), capture.last_states

    def wrong(*args):
        states, way = right(*args)
        return states * 1.01, way

    monkeypatch.setattr(capture, "last_states", wrong)
    with pytest.raises(
        ParityError, match=r"differ from the plain forward pass by 0\.0.*nothing was stored"
    ):
        hidden_states(model, QUERIES, PROMPTS, store=store)
    assert info(store)["states_rows"] == 0
    monkeypatch.undo()
    assert hidden_states(model, QUERIES, PROMPTS, store=store).certificate["computed"] == 18


def test_a_tree_without_its_mask_is_found_out(monkeypatch):
    """Every token of a pack sees every other: a model asked afterwards runs plainly, one asked before raises."""
    asked, fresh = build("llama"), build("llama")
    assert shares_prefixes(asked.forward)
    right = passes.attention_mask
    monkeypatch.setattr(
        passes,
        "attention_mask",
        lambda config, see, *rest: right(config, torch.ones_like(see), *rest),
    )
    with pytest.raises(ParityError):
        hidden_states(asked, QUERIES, {"p": SAFETY})
    got = hidden_states(fresh, QUERIES, {"p": SAFETY}, layers=LAYERS)
    assert got.certificate["way"] == "plain"
    assert_plain(fresh, QUERIES, {"p": SAFETY}, got)


def test_nan_weights_are_named(store):
    model = build("llama")
    model.model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ParityError, match="NaN or infinity"):
        hidden_states(model, QUERIES, {"p": SAFETY}, store=store)
    assert info(store)["states_rows"] == 0


@pytest.mark.parametrize("family", ["llama", "gemma3", "mamba"])
def test_stored_states_come_back_bit_for_bit(family, store):
    model = chat(family)
    prompts = {**PROMPTS, "soft": soft_prompt(model, 4)}
    first = hidden_states(model, QUERIES, prompts, layers=LAYERS, store=store)
    again = hidden_states(model, QUERIES, prompts, layers=LAYERS, store=Store(store.folder))
    assert np.array_equal(first.states, again.states) and first.rows.equals(again.rows)
    assert (
        again.certificate["computed"],
        again.certificate["found"],
        again.certificate["checked"],
    ) == (0, 24, 0)
    some = hidden_states(
        model, QUERIES[::-2], {"soft": prompts["soft"]}, layers=(-1, 1), store=store
    )
    assert np.array_equal(
        some.states, np.stack([first.at(i, prompt="soft")[0][::-2] for i in (-1, 1)], axis=1)
    )


def test_only_what_is_new_is_computed(store):
    model = chat("qwen2")
    counts = []

    def run(queries, prompts, layers=(-1,), model=model):
        certificate = hidden_states(model, queries, prompts, layers=layers, store=store).certificate
        counts.append((certificate["computed"], certificate["found"]))

    run(QUERIES[:3], {"a": SAFETY})
    run(QUERIES[:5], {"a": SAFETY})  # two more queries
    run(QUERIES[:5], {"renamed": SAFETY})
    run(QUERIES[:5].assign(query_id=list("vwxyz")), {"a": f" {SAFETY} "})
    run(QUERIES[:5], {"a": SAFETY, "b": ""})  # one more prompt
    run(QUERIES[:5], {"a": SAFETY}, layers=(-1, 1))  # one more layer
    assert counts == [(3, 0), (2, 3), (0, 5), (0, 5), (5, 5), (5, 0)]


def test_queries_of_equal_text_are_found_for_each_other(store):
    got = hidden_states(chat("qwen2"), QUERIES, {"p": ""}, store=store)  # q2 and q5 render alike
    assert np.array_equal(got.states[2], got.states[5])
    again = hidden_states(chat("qwen2"), QUERIES, {"p": ""}, store=store)
    assert again.certificate["found"] == 6 and np.array_equal(again.states, got.states)


def test_other_weights_dtype_template_or_soft_prompt_find_nothing(store):
    model = build("qwen2")
    hidden_states(model, QUERIES, {"p": SAFETY, "s": soft_prompt(model, 3)}, store=store)
    tokenizer = build("qwen2").tokenizer.__class__(
        tokenizer_object=model.tokenizer.backend_tokenizer, eos_token="<|im_end|>"
    )
    tokenizer.chat_template = model.tokenizer.chat_template.replace("'\n'", "' '", 1)
    others = [
        build("qwen2", seed=1),
        build("qwen2", dtype=torch.bfloat16),
        ChatModel.wrap(model.model, tokenizer),
    ]
    for other in others:
        assert hidden_states(other, QUERIES, {"p": SAFETY}, store=store).certificate["found"] == 0
    for soft in (
        soft_prompt(model, 3, seed=1),
        soft_prompt(model, 2),
        SoftPrompt.from_text(model, SAFETY, name="t"),
    ):
        assert hidden_states(model, QUERIES, {"s": soft}, store=store).certificate["found"] == 0
    assert (
        hidden_states(model, QUERIES, {"s": soft_prompt(model, 3)}, store=store).certificate[
            "found"
        ]
        == 6
    )


def test_one_folder_in_two_dtypes_shares_no_states(store, tmp_path):
    model = chat("qwen2")
    model.model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    loaded = [
        ChatModel.load(str(tmp_path / "model"), device="cpu", dtype=dtype)
        for dtype in ("float32", "bfloat16", "float32")
    ]
    assert loaded[0].fingerprint == loaded[1].fingerprint
    assert [
        hidden_states(m, QUERIES, {"p": ""}, store=store).certificate["computed"] for m in loaded
    ] == [6, 6, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_round_trip(dtype, store):
    model = build("llama", dtype=dtype)
    first = hidden_states(model, QUERIES, PROMPTS, layers=LAYERS, store=store)
    again = hidden_states(model, QUERIES, PROMPTS, layers=LAYERS, store=store)
    assert again.certificate["computed"] == 0 and np.array_equal(first.states, again.states)
    assert np.array_equal(torch.tensor(first.states).to(dtype).float().numpy(), first.states)
    assert ls(store)["dtype"].tolist() == [str(dtype).removeprefix("torch.")]


def test_the_store_knows_what_was_checked(store):
    model = chat("gpt_neox")
    got = hidden_states(
        model, QUERIES, {"a": SAFETY, "b": ""}, layers=(0, -1), n_check=4, store=store
    )
    assert got.certificate["checked"] == 4
    table = ls(store)
    assert (
        table["prompts"].item() == "a, b"
        and table["layers"].item() == "0, -1"
        and table["rows"].item() == 20
    )  # two queries are alike
    certificates = [c["certificate"] for c in info(store)["certificates"]]
    assert sum(c["checked"] for c in certificates) == 4 and {c["way"] for c in certificates} == {
        "tree"
    }


def test_every_prompt_that_is_stored_was_checked(store):
    prompts = {f"p{i}": f"Prompt number {i}" for i in range(5)}
    got = hidden_states(chat("qwen2"), QUERIES, prompts, store=store)
    assert all(c["certificate"]["checked"] >= 1 for c in info(store)["certificates"])
    assert got.certificate["checked"] >= 5


def test_found_states_come_with_the_certificates_they_were_kept_with(store, tmp_path):
    model, about = chat("qwen2"), ("way", "max_abs", "max_rel", "unchecked")
    first = hidden_states(
        model, QUERIES, PROMPTS, layers=LAYERS, n_check=6, store=store
    ).certificate
    again = hidden_states(model, QUERIES, PROMPTS, layers=LAYERS, store=store).certificate
    assert (
        [again[key] for key in about]
        == [first[key] for key in about]
        == ["tree", first["max_abs"], first["max_rel"], 0]
    )
    assert first["max_rel"] > 0 and (again["checked"], again["computed"]) == (0, 0)
    compact(store, spare=0)
    compacted = hidden_states(
        model, QUERIES, PROMPTS, layers=LAYERS, store=Store(store.folder)
    ).certificate
    assert [compacted[key] for key in about] == [first[key] for key in about]
    hidden_states(model, QUERIES[:2], {"more": "x"}, n_check=0, store=store)
    part = hidden_states(model, QUERIES, {"more": "x"}, store=store).certificate
    assert (part["found"], part["computed"], part["unchecked"]) == (2, 4, 2) and part[
        "way"
    ] == "tree"
    hidden_states(model, QUERIES, {"one": "y"}, store=store)
    compact(
        store, spare=0
    )  # checked and unchecked rows in one file: which are which is no longer known
    mixed = hidden_states(model, QUERIES, {"more": "x"}, store=store).certificate
    assert (mixed["found"], mixed["unchecked"]) == (6, 6)
    keys = [row_key(other=i) for i in range(2)]
    other = {"model": "m", "certificate": {"max_difference": 1}}
    store.write_states(keys, np.zeros((2, 4), np.float32), dtype="float32", about=other)
    store.read_states(keys)
    assert store.certificates(keys) == {key: [] for key in keys}


def test_one_more_layer_keeps_no_row_twice(store):
    hidden_states(chat("qwen2"), QUERIES[:4], {"p": ""}, layers=(-1,), store=store)
    both = hidden_states(chat("qwen2"), QUERIES[:5], {"p": ""}, layers=(-1, 1), store=store)
    assert both.certificate["computed"] == 5
    files = list((store.folder / "v1" / "states").iterdir())
    assert sum(len(load_file(file)["states"]) for file in files) == 10 == ls(store)["rows"].sum()


def test_a_kept_row_of_another_width_is_computed_again(store):
    model = chat("qwen2")
    expected = hidden_states(model, QUERIES[:2], {"p": ""}).states
    keys = [
        key
        for row in capture._keys(model, model.render(QUERIES["text"][:2].tolist()), (-1,))
        for key in row
    ]
    store.write_states(keys, np.zeros((2, 7), np.float32), dtype="float32", about={})
    found = hidden_states(model, QUERIES[:2], {"p": ""}, store=store)
    assert found.certificate["computed"] == 2 and relative(found.states, expected) < 1e-6


def test_states_that_are_not_finite_are_named(monkeypatch):
    model = build("qwen2")
    ids = model.render([QUERIES["text"][3]])[0].ids
    own = next(
        i
        for i in ids
        if all(i not in r.ids for r in model.render(QUERIES["text"].drop(3).tolist()))
    )
    model.model.get_input_embeddings().weight[own] = float("nan")
    with pytest.raises(
        ParityError,
        match=rf"1 of {len(QUERIES)} states .* NaN .*\({re.escape(repr(QUERIES['text'][3][:40]))}\)",
    ):
        hidden_states(model, QUERIES, {"p": ""})


class Bar:
    """What tqdm is told."""

    bars: list = []

    def __init__(self, total, desc, leave, smoothing):
        assert smoothing == 0  # else tqdm's moving average takes what was found for computed
        self.total, self.desc, self.n, self.initial, self.said, self.closed = (
            total,
            desc,
            0,
            0,
            [],
            False,
        )
        self.bars.append(self)

    def set_postfix(self, counts, refresh):
        self.said.append((*counts.values(), self.initial))

    def update(self, n):
        self.n += n

    def close(self):
        self.closed = True


@pytest.mark.parametrize("shown", [True, None, False])
def test_progress_says_found_and_computed_where_somebody_watches(shown, store, monkeypatch):
    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    monkeypatch.setattr(capture, "CHUNK_ROWS", 2)
    monkeypatch.setattr(Bar, "bars", [])
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    model = chat("qwen2")
    hidden_states(model, QUERIES[:1], {"p": ""}, store=store, progress=shown)
    if shown is False:
        assert Bar.bars == []
        return
    Bar.bars.clear()
    hidden_states(model, QUERIES[:1], {"p": ""}, store=store, progress=shown)
    assert Bar.bars == []  # all was found: nothing to wait for
    hidden_states(model, QUERIES[:5], {"p": "", "q": SAFETY}, store=store, progress=shown)
    (bar,) = Bar.bars
    assert (bar.total, bar.desc, bar.n, bar.closed) == (10, "states", 10, True)
    assert bar.said == [(1, 0, 1), (1, 2, 1), (1, 4, 1), (1, 4, 1), (1, 6, 1), (1, 8, 1), (1, 9, 1)]
    sample_responses(
        model, QUERIES[:2], {"p": ""}, n_samples=2, max_new_tokens=2, store=store, progress=shown
    )
    assert (Bar.bars[-1].desc, Bar.bars[-1].n, Bar.bars[-1].total, Bar.bars[-1].closed) == (
        "responses",
        4,
        4,
        True,
    )


def test_a_whole_request_found_in_the_store_loads_no_weights(store, tmp_path, monkeypatch):
    model = chat("qwen2")
    model.model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    first = hidden_states(
        ChatModel.load(str(tmp_path / "model"), dtype="float32"), QUERIES, PROMPTS, store=store
    )
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    for device in (
        "cpu",
        "auto",
    ):  # spread over devices, where the weights lie is known only once they are loaded
        monkeypatch.setattr("analysis_lib.model.loading.find_spec", lambda package: True)
        again = hidden_states(
            ChatModel.load(str(tmp_path / "model"), dtype="float32", device=device),
            QUERIES,
            PROMPTS,
            store=store,
        )
        assert np.array_equal(again.states, first.states) and again.certificate["found"] == 18
        assert again.certificate["peak_bytes"] == 0


# ------------------------------------------------------------------------------------------------------- the prefix tree

token_rows = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=9), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(token_rows, st.integers(1, 30), st.none() | st.integers(1, 12))
def test_plan_lays_out_every_row_once_over(rows, pack_tokens, line_tokens):
    plan = plan_rows(rows, pack_tokens, line_tokens=line_tokens)
    assert sorted(i for pack in plan.packs for i in pack.rows) == list(range(len(rows)))
    distinct = 0
    for pack in plan.packs:
        b, t = pack.tokens.shape
        assert pack.depths.shape == (b, t) and pack.sees.shape == (b, t, t)
        assert b == 1 or (line_tokens is not None and b * t <= pack_tokens)
        lines = {j: [] for j in range(b)}
        seen = {}
        for i, path in zip(pack.rows, pack.paths, strict=True):
            assert path, "the last token of a row is never in the shared prefix"
            line = path[0] // t
            lines[line].append(i)
            assert {place // t for place in path} == {line}
            assert [*plan.prefix, *pack.tokens.ravel()[path]] == rows[i]
            assert pack.depths.ravel()[path].tolist() == list(range(len(plan.prefix), len(rows[i])))
            for j, node in enumerate(path):
                seen[node] = {place - line * t for place in path[: j + 1]}
        for node, sees in enumerate(pack.sees.reshape(b * t, t)):
            assert set(np.flatnonzero(sees)) == seen.get(node, set()), "padding sees nothing"
        for line, members in lines.items():
            used = {node % t for node in seen if node // t == line}
            heads = {
                tuple(rows[i][: j + 1])
                for i in members
                for j in range(len(plan.prefix), len(rows[i]))
            }
            assert used == set(range(len(heads)))
            assert len(used) <= min(pack_tokens, line_tokens or pack_tokens) or len(members) == 1
        distinct += len(seen)
    assert plan.n_tokens == len(plan.prefix) + distinct
    assert plan.n_row_tokens == sum(map(len, rows))


def test_plan_needs_rows():
    for rows in ([], [[], [1, 2]]):
        with pytest.raises(ValueError, match="at least 1 token"):
            plan_rows(rows, 10)


def test_hidden_states_are_frozen():
    got = hidden_states(chat("llama"), QUERIES[:1], {"p": ""})
    assert isinstance(got, HiddenStates)
    with pytest.raises(AttributeError):
        got.layers = (1,)


def test_out_of_memory_halves_the_packs_and_changes_no_state(monkeypatch):
    model = build("llama")
    whole = hidden_states(model, QUERIES, PROMPTS)
    run, failures = passes.run_plan, [0]

    def narrow(model, plan, *arguments, **options):
        if model.pack_tokens > 100:
            failures[0] += 1
            raise torch.OutOfMemoryError("planted")
        yield from run(model, plan, *arguments, **options)

    monkeypatch.setattr(passes, "run_plan", narrow)
    again = hidden_states(model, QUERIES, PROMPTS)
    assert (
        failures[0] == 4
        and again.certificate["way"] == "tree"
        and again.certificate["peak_bytes"] > 0
    )
    np.testing.assert_allclose(again.states, whole.states, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "mixtral"])
def test_the_last_feed_forward_runs_on_last_tokens_alone(family):
    model = build(family)
    widths: list[list[int]] = [[], []]
    for seen, block in zip(widths, (model.forward.blocks[0], model.forward.blocks[-1])):
        block.mlp.forward = lambda x, seen=seen, run=block.mlp.forward: (
            seen.append(x.shape[:-1].numel()) or run(x)
        )
    rows = [(5, 6, 7, *tail) for tail in ((8,), (8, 9), (4, 9, 3), (4, 9, 3))]
    states = last_states(model.forward, rows)[0]
    assert (
        shares_prefixes(model.forward) and widths[0][-2:] == [3, 5] and widths[1][-2:] == [1, 3]
    )  # prefix, then pack: 3 distinct ends
    assert (
        not model.forward.blocks[0].mlp._forward_hooks
        and not model.forward.blocks[-1].mlp._forward_hooks
    )
    plain = torch.cat(
        [
            model.forward.body(input_ids=torch.tensor([row])).last_hidden_state[:, -1:]
            for row in rows
        ]
    )
    assert relative(states, plain) <= 1e-4


def test_states_of_another_dtype_than_the_model_are_kept_as_they_are(tmp_path):
    model = build("mamba", dtype=torch.bfloat16)  # its final norm gives float32
    first = hidden_states(model, QUERIES, {"none": ""}, store=Store(tmp_path), n_check=0)
    again = hidden_states(model, QUERIES, {"none": ""}, store=Store(tmp_path))
    assert again.certificate["computed"] == 0 and np.array_equal(again.states, first.states)


def test_two_threads_take_turns_on_a_model():
    model = build("llama")
    wanted = hidden_states(model, QUERIES, PROMPTS).states
    soft, errors = soft_prompt(model, 4), []

    def disturb():
        try:
            for _ in range(15):
                hidden_states(model, QUERIES[:2], {"soft": soft}, n_check=0)
        except Exception as error:
            errors.append(error)

    others = [threading.Thread(target=disturb) for _ in range(2)]
    for thread in others:
        thread.start()
    got = [hidden_states(model, QUERIES, PROMPTS, n_check=0).states for _ in range(15)]
    for thread in others:
        thread.join()
    assert not errors and all(np.allclose(states, wanted, atol=1e-5) for states in got)


def test_rows_are_kept_chunk_by_chunk(monkeypatch, tmp_path):
    model, store = build("llama"), Store(tmp_path)
    queries = QUERIES.drop_duplicates("text").head(5)
    monkeypatch.setattr(capture, "CHUNK_ROWS", 2)
    real, calls = capture.last_states, [0]

    def killed(*arguments):
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(capture, "last_states", killed)
    with pytest.raises(KeyboardInterrupt):
        hidden_states(model, queries, {"none": ""}, store=store)
    monkeypatch.setattr(capture, "last_states", real)
    resumed = hidden_states(model, queries, {"none": ""}, store=store)
    assert resumed.certificate["found"] == 4 and resumed.certificate["computed"] == 1
