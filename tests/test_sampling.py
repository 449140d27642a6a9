from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections import Counter
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest
from tiny_models import (
    FAMILIES,
    OWN_ATTENTION,
    PLAIN,
    PROMPTS,
    QUERIES,
    SAFETY,
    build,
    chat,
    embedded,
)

from analysis_lib.collect import responses as sampling
from analysis_lib.collect import sampling as tree
from analysis_lib.collect.responses import sample_responses
from analysis_lib.data.queries import load_queries
from analysis_lib.data.shipped import ROOT
from analysis_lib.judge.strings import (
    is_refusal,
    normalized_verdict_is_final,
    string_normalized,
    verdict_is_final,
)
from analysis_lib.model import steps
from analysis_lib.model.chat import ChatModel
from analysis_lib.model.errors import ChatModelError
from analysis_lib.model.passes import shares_prefixes
from analysis_lib.model.soft_prompt import SoftPrompt
from analysis_lib.model.steps import CachedStep, steps_from_cache
from analysis_lib.store.store import Store
from analysis_lib.store.upkeep import info, ls

SHORT = {"n_samples": 4, "max_new_tokens": 8}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def soft_prompt(model, length, seed=0):
    scale = float(model.model.get_input_embeddings().weight.std())
    rows = (
        np.random.default_rng(seed).normal(0, scale, (length, model.hidden_size)).astype(np.float32)
    )
    return SoftPrompt("soft", rows, SAFETY, model.fingerprint)


def keyed(table):
    assert not table.duplicated(["query_id", "prompt", "sample"]).any()
    return {(r.query_id, r.prompt, r.sample): (r.response, r.end) for r in table.itertuples()}


# ---------------------------------------------------------------------------- the definition, one sample at a time


def cut(logits, temperature, top_k, top_p):
    """Tokens by falling probability with their probabilities: temperature, then the top_k, then the least set of mass top_p."""
    p = torch.softmax(torch.as_tensor(logits).double() / temperature, dim=0).numpy()
    order = np.argsort(-p)[: top_k or None]
    p = p[order] / p[order].sum()
    kept = int(np.searchsorted(np.cumsum(p), top_p - 1e-12)) + 1
    return order[:kept], p[:kept] / p[:kept].sum()


@torch.no_grad()
def next_logits(model, row, embeddings, ids):
    start = embedded(model, row, embeddings)
    more = model.model.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))
    return model.model(inputs_embeds=torch.cat([start, more], dim=1), use_cache=False).logits[0, -1]


def mix(number):
    """SplitMix64's hash of one number, in Python's own integers."""
    z = (number + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def reference(
    model, query, prompt, sample, *, max_new_tokens, temperature=1.0, top_p=0.9, top_k=50, seed=0
):
    """One response by full recomputation; its noise is drawn as the stored ones' was."""
    row = model.render([query], prompt)[0]
    digest = hashlib.sha256(np.array([seed, *row.ids], dtype=np.int64).tobytes()).digest()
    key = mix(int.from_bytes(digest[:8], "little") ^ mix(sample))
    ids: list[int] = []
    for position in range(max_new_tokens):
        logits = next_logits(
            model, row, None if isinstance(prompt, str) else prompt.embeddings, ids
        )
        tokens, p = cut(logits, temperature, top_k, top_p)
        uniform = [
            ((mix(mix(key ^ mix(position)) ^ mix(int(t))) >> 11) + 0.5) / 2**53 for t in tokens
        ]
        token = int(tokens[np.argmax(np.log(p) - np.log(-np.log(uniform)))])
        if token in model.generation.stop_ids:
            return model.tokenizer.decode(ids, skip_special_tokens=True).strip(), "eos"
        ids.append(token)
    return model.tokenizer.decode(ids, skip_special_tokens=True).strip(), "length"


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen3", "gemma3", "gpt_neox", "mixtral", "mamba", "jamba"]
)
def test_samples_equal_the_definition(family):
    model = chat(family)
    assert shares_prefixes(model.forward) == (family not in ("mamba", "jamba"))
    prompts = {"none": "", "default": SAFETY, "soft": soft_prompt(model, 4)}
    settings = {"max_new_tokens": 7, "temperature": 1.3, "top_p": 0.8, "top_k": 20, "seed": 3}
    got = sample_responses(model, QUERIES[:3], prompts, n_samples=3, **settings)
    assert got.columns.tolist() == ["query_id", "prompt", "sample", "response", "end"]
    expected = [(q, p, s) for p in prompts for q in QUERIES["query_id"][:3] for s in range(3)]
    assert list(zip(got["query_id"], got["prompt"], got["sample"], strict=True)) == expected
    texts = QUERIES.set_index("query_id")["text"]
    for (q, p, s), found in keyed(got).items():
        assert found == reference(model, texts[q], prompts[p], s, **settings), (q, p, s)
    assert got["response"].nunique() > 8


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_long_replies_agree_with_the_definition(family):
    model, settings = chat(family), {"max_new_tokens": 2 * steps.ROOM + 8}
    got = sample_responses(model, QUERIES[:2], {"p": SAFETY}, n_samples=2, **settings)
    texts = QUERIES.set_index("query_id")["text"]
    for (q, _, s), found in keyed(got).items():
        assert found == reference(model, texts[q], SAFETY, s, **settings)
    assert "length" in set(got["end"])


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_architectures_that_attend_in_their_own_way_sample_plainly(family):
    model = chat(family)
    assert shares_prefixes(model.forward) and not steps_from_cache(model.forward)
    got = sample_responses(model, QUERIES[:2], {"p": SAFETY}, n_samples=2, max_new_tokens=5)
    texts = QUERIES.set_index("query_id")["text"]
    for (q, _, s), found in keyed(got).items():
        assert found == reference(model, texts[q], SAFETY, s, max_new_tokens=5)


def test_most_families_step_from_the_cache():
    assert {family for family in FAMILIES if not steps_from_cache(chat(family).forward)} == PLAIN


def test_ends_of_replies_agree_with_the_definition():
    model = build("phi3")
    model.model.generation_config.eos_token_id = list(range(0, model.n_embeddings, 9))  # ends often
    got = sample_responses(model, QUERIES, {"default": SAFETY}, n_samples=10, max_new_tokens=12)
    texts = QUERIES.set_index("query_id")["text"]
    for (q, _, s), found in keyed(got).items():
        assert found == reference(model, texts[q], SAFETY, s, max_new_tokens=12)
    assert set(got["end"]) == {"eos", "length"}


# --------------------------------------------------------------------------------- a sample is fixed by its key


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "mamba"])
def test_batch_order_subset_and_company_change_no_text(family, monkeypatch):
    model = chat(family)
    whole = keyed(sample_responses(model, QUERIES, PROMPTS, **SHORT))
    turned = sample_responses(
        model, QUERIES[::-1], {k: PROMPTS[k] for k in ("long", "none")}, **SHORT
    )
    one = sample_responses(model, QUERIES[3:4], {"default": SAFETY}, **SHORT)
    more = sample_responses(model, QUERIES[:2], {"none": ""}, n_samples=9, max_new_tokens=8)
    renamed = sample_responses(
        model, QUERIES.assign(query_id=[f"z{i}" for i in range(6)]), {"x": SAFETY}, **SHORT
    )
    monkeypatch.setattr(
        sampling, "_batches", lambda model, rows, todo, *_: [{i: todo[i]} for i in todo]
    )
    alone = sample_responses(model, QUERIES, {"default": SAFETY}, **SHORT)
    for table in (turned, one, alone):
        found = keyed(table)
        assert found and all(whole[k] == v for k, v in found.items())
    assert all(keyed(more)[k] == whole[k] for k in whole if k in keyed(more)) and len(more) == 18
    assert all(v == whole[f"q{q[1:]}", "default", s] for (q, _, s), v in keyed(renamed).items())


HALF = pd.DataFrame(
    {
        "query_id": [f"h{i}" for i in range(8)],
        "text": [
            *QUERIES["text"][:4],
            "Why?",
            "How to boil an egg?",
            "Please",
            "Is it a rainy day?",
        ],
    }
)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_in_half_precision_few_texts_depend_on_the_batch(family):
    """Distributions differ from batch to batch there. Tokens may differ about twice as often."""
    size = {"initializer_range": 0.05, "hidden_size": 128, "num_hidden_layers": 6}
    model, options = build(family, dtype=torch.bfloat16, **size), {"n_samples": 20}

    def changed(max_new_tokens):
        limit = options | {"max_new_tokens": max_new_tokens}
        whole = sample_responses(model, HALF, {"p": ""}, **limit)["response"]
        alone = [sample_responses(model, HALF.iloc[[i]], {"p": ""}, **limit) for i in range(8)]
        return (pd.concat(alone, ignore_index=True)["response"] != whole).mean()

    rows = [row.ids for row in model.render(HALF["text"].tolist())]
    with torch.no_grad():
        together = CachedStep(model.forward, rows).first()
        one = torch.cat([CachedStep(model.forward, [row]).first() for row in rows])
    p, q = (torch.softmax(logits.double(), dim=-1) for logits in (together, one))
    apart = float((p - q).abs().sum(dim=-1).mean() / 2)
    assert 0.001 < apart < 0.1, "nothing is rounded here, and the test shows nothing"
    assert changed(1) <= 2 * apart + 0.02
    assert changed(10) < 0.3


def test_equal_noise_couples_two_distributions_nearly_as_well_as_can_be():
    """Choices differ with at most 2 d / (1 + d), d the total variation of two distributions."""
    generator = np.random.default_rng(0)
    keys = tree._mix(np.arange(20_000))
    free = tree.Settings(1, 1.0, 1.0, 0, 0, None)
    for scale in (0.01, 0.1, 0.5):
        first = torch.tensor(generator.normal(0, 2, 40))
        second = first + torch.tensor(generator.normal(0, scale, 40))
        a, b = (
            tree._choose(logits[None], np.zeros(len(keys), dtype=int), keys, free)
            for logits in (first, second)
        )
        p, q = torch.softmax(first, dim=0), torch.softmax(second, dim=0)
        apart = float((p - q).abs().sum() / 2)
        error = 4 * np.sqrt(apart / len(keys))
        assert apart - error < (a != b).mean() < 2 * apart / (1 + apart) + error
        for chosen, exact in ((a, p), (b, q)):
            counts = np.bincount(chosen, minlength=40)
            assert chisquare(counts, exact.numpy() * len(keys)).pvalue > 1e-3


def test_noise_is_gumbels_and_independent_from_token_to_token_and_place_to_place():
    keys = tree._noise_keys(chat("llama").render(["Why?"])[0], range(3000), 0)
    tokens = np.arange(40)
    noise = np.stack(
        [
            tree._gumbel(tree._mix(keys ^ tree._mix(np.array([place]))), np.tile(tokens, (3000, 1)))
            for place in range(8)
        ]
    )
    assert kstest(noise.ravel()[::7], "gumbel_r").pvalue > 1e-3
    flat = noise.transpose(1, 0, 2).reshape(3000, -1)
    assert len(np.unique(flat)) == flat.size
    pairs = np.corrcoef(flat, rowvar=False)[np.triu_indices(flat.shape[1], 1)]
    assert abs(pairs).max() < 6 / np.sqrt(3000)
    assert abs(np.corrcoef(flat[:-1, 0], flat[1:, 0])[0, 1]) < 4 / np.sqrt(3000)


def test_a_longer_limit_goes_on_with_the_same_text():
    model = chat("llama")
    short, long = (
        sample_responses(model, QUERIES, {"p": ""}, n_samples=4, max_new_tokens=n)["response"]
        for n in (4, 9)
    )
    assert all(b.startswith(a.rstrip("\ufffd")) for a, b in zip(short, long))


def test_seed_and_settings_change_the_text():
    model = chat("llama")
    base = sample_responses(model, QUERIES, {"p": ""}, **SHORT)["response"]
    for change in ({"seed": 1}, {"temperature": 3.0}, {"top_k": 3}, {"top_p": 0.2}):
        assert (
            sample_responses(model, QUERIES, {"p": ""}, **SHORT, **change)["response"] != base
        ).mean() > 0.5
    assert base.equals(sample_responses(model, QUERIES, {"p": ""}, **SHORT, seed=0)["response"])
    assert base.nunique() == 20  # 24 samples; q2 and q5 ask the same


def test_store_resumes_extends_and_serves(store, monkeypatch):
    model = chat("qwen2")
    fresh = sample_responses(model, QUERIES, PROMPTS, **SHORT)
    computed = []
    right = sampling._sample_batch

    def counted(model, rows, jobs, settings):
        computed.append(sum(map(len, jobs.values())))
        return right(model, rows, jobs, settings)

    monkeypatch.setattr(sampling, "_sample_batch", counted)

    def run(queries, prompts, n_samples, **changes):
        computed.clear()
        table = sample_responses(
            model, queries, prompts, n_samples=n_samples, max_new_tokens=8, store=store, **changes
        )
        return table, sum(computed)

    assert run(QUERIES[:2], {"none": ""}, 2)[1] == 4
    assert run(QUERIES[:2], {"renamed": ""}, 2)[1] == 0
    assert (
        run(QUERIES[:3], {"none": ""}, 4)[1] == 2 * 2 + 4
    )  # two more samples of the old queries, four of the new one
    table, n = run(QUERIES, PROMPTS, 4)
    assert n == 6 * 4 * 3 - 12 - 4 and table.equals(fresh)  # q5 reads as q2
    table, n = run(QUERIES, PROMPTS, 4)
    assert n == 0 and table.equals(fresh)
    for change in (
        {"seed": 1},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"top_k": 5},
        {"stop_when": verdict_is_final},
    ):
        assert run(QUERIES[:1], {"none": ""}, 2, **change)[1] == 2, change
    for other in (build("qwen2", seed=1), build("qwen2", dtype=torch.bfloat16)):
        computed.clear()
        sample_responses(
            other, QUERIES[:1], {"none": ""}, n_samples=2, max_new_tokens=8, store=store
        )
        assert sum(computed) == 2


def test_one_folder_in_two_dtypes_shares_no_responses(store, tmp_path):
    model = chat("qwen2")
    model.model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    for dtype in ("float32", "bfloat16", "float32"):
        loaded = ChatModel.load(str(tmp_path / "model"), device="cpu", dtype=dtype)
        sample_responses(loaded, QUERIES[:1], {"p": ""}, **SHORT, store=store)
    assert info(store)["responses_rows"] == 8


def test_other_stop_ids_find_no_old_responses(store):
    model, other = build("qwen2"), build("qwen2")
    other.model.generation_config.eos_token_id = list(range(0, 360, 3))
    first = sample_responses(model, QUERIES, {"p": ""}, **SHORT, store=store)
    second = sample_responses(other, QUERIES, {"p": ""}, **SHORT, store=store)
    assert (first["end"] == "length").sum() > (second["end"] == "length").sum()


def test_an_interrupted_run_keeps_finished_batches(store, monkeypatch):
    model = chat("qwen2")
    fresh = sample_responses(model, QUERIES, {"p": SAFETY}, **SHORT)
    monkeypatch.setattr(
        sampling, "_batches", lambda model, rows, todo, *_: [{i: todo[i]} for i in todo]
    )
    right, calls = sampling._sample_batch, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return right(*args)

    monkeypatch.setattr(sampling, "_sample_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample_responses(model, QUERIES, {"p": SAFETY}, **SHORT, store=store)
    assert info(store)["responses_rows"] == 12
    assert sample_responses(model, QUERIES, {"p": SAFETY}, **SHORT, store=store).equals(fresh)
    assert len(calls) == 4 + 2  # q3 and q4; q5 reads as q2


# ------------------------------------------------------------------------------------------------------ distribution


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 5, 1.0), (2.5, 0, 0.3), (0.7, 6, 0.9)]
)
def test_frequencies_agree_with_the_exact_probabilities(temperature, top_k, top_p):
    """Two tokens: every pair's probability by enumeration, against 3,000 samples."""
    model = chat("qwen2")
    row = model.render([QUERIES["text"][0]], SAFETY)[0]
    exact: Counter = Counter()
    first, p_first = cut(next_logits(model, row, None, []), temperature, top_k, top_p)
    for a, p_a in zip(first.tolist(), p_first, strict=True):
        if a in model.generation.stop_ids:
            exact["", "eos"] += p_a
            continue
        second, p_second = cut(next_logits(model, row, None, [a]), temperature, top_k, top_p)
        for b, p_b in zip(second.tolist(), p_second, strict=True):
            end = "eos" if b in model.generation.stop_ids else "length"
            exact[
                model.tokenizer.decode(
                    [a] if end == "eos" else [a, b], skip_special_tokens=True
                ).strip(),
                end,
            ] += p_a * p_b
    assert abs(sum(exact.values()) - 1) < 1e-9 and len(exact) > 5
    got = sample_responses(
        model,
        QUERIES[:1],
        {"p": SAFETY},
        n_samples=3000,
        max_new_tokens=2,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    found = Counter(zip(got["response"], got["end"], strict=True))
    assert found.keys() <= exact.keys()
    often = [k for k in exact if exact[k] * 3000 >= 5]
    observed, expected = [found[k] for k in often], [exact[k] * 3000 for k in often]
    rest = 3000 - sum(observed), 3000 - sum(expected)
    if rest[1] > 1:
        observed, expected = [*observed, rest[0]], [*expected, rest[1]]
    assert chisquare(observed, np.array(expected) * 3000 / sum(expected)).pvalue > 1e-3


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "mamba"])
def test_temperature_zero_is_greedy_generation(family):
    model = chat(family)
    got = sample_responses(
        model, QUERIES, {"p": SAFETY}, n_samples=2, max_new_tokens=10, temperature=0
    )
    for i, row in enumerate(model.render(QUERIES["text"].tolist(), SAFETY)):
        ids = torch.tensor([row.ids])
        out = model.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=10,
            eos_token_id=sorted(model.generation.stop_ids),
        )
        text = model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert got["response"][2 * i : 2 * i + 2].tolist() == [text, text]


def test_nearly_zero_temperature_is_greedy_too():
    model = chat("llama")
    greedy = sample_responses(model, QUERIES, {"p": ""}, **SHORT, temperature=0)
    assert sample_responses(model, QUERIES, {"p": ""}, **SHORT, temperature=1e-4).equals(greedy)
    assert sample_responses(model, QUERIES, {"p": ""}, **SHORT, top_k=1).equals(greedy)
    assert sample_responses(model, QUERIES, {"p": ""}, **SHORT, top_p=1e-9).equals(greedy)


# ----------------------------------------------------------------------------------------------------- early stopping


def two_words(text):
    return text.count(" ") >= 2


def test_the_store_serves_no_stop_function_but_its_own(store):
    """What another function says is in no key: as when a notebook's cell is edited and run again."""
    model = chat("llama")
    options = {"n_samples": 2, "max_new_tokens": 8, "store": store}
    for n in (3, 1):
        with pytest.warns(
            UserWarning, match="a function of your own.*neither read from the store nor kept"
        ):
            got = sample_responses(
                model, QUERIES, {"p": SAFETY}, stop_when=lambda text, n=n: len(text) > n, **options
            )
        fresh = {key: value for key, value in options.items() if key != "store"}
        assert got.equals(
            sample_responses(
                model, QUERIES, {"p": SAFETY}, stop_when=lambda text, n=n: len(text) > n, **fresh
            )
        )
    assert ls(store).empty
    sample_responses(model, QUERIES, {"p": SAFETY}, stop_when=verdict_is_final, **options)
    assert ls(store)["rows"].sum() == 2 * 5  # distinct texts, samples
    for other in (functools.partial(verdict_is_final), Counter().update, str.isupper):
        with pytest.raises(ValueError, match="must be a function"):
            sample_responses(model, QUERIES, {"p": SAFETY}, stop_when=other, **options)


def test_another_tokenizer_finds_no_responses(tmp_path):
    """The ids are the same, the text they stand for is not."""
    store, folder = (
        Store(tmp_path / "store"),
        shutil.copytree(ROOT / "organism", tmp_path / "model"),
    )
    queries = load_queries("anchor").head(2)

    def respond(model=None):
        model = model or ChatModel.load(str(folder), device="cpu")
        return sample_responses(
            model, queries, {"none": ""}, n_samples=2, max_new_tokens=6, store=store
        )["response"].tolist()

    first = respond()
    words = json.loads((folder / "tokenizer.json").read_text())
    upper = {"type": "Replace", "pattern": {"String": "e"}, "content": "E"}
    words["decoder"] = {"type": "Sequence", "decoders": [words["decoder"], upper]}
    (folder / "tokenizer.json").write_text(json.dumps(words))
    assert respond() == [text.replace("e", "E") for text in first] != first
    in_memory = ChatModel.load(str(folder), device="cpu")
    wrapped = [
        ChatModel.wrap(in_memory.model, transformers.AutoTokenizer.from_pretrained(f))
        for f in (ROOT / "organism", folder)
    ]
    assert respond(wrapped[0]) == first and respond(wrapped[1]) != first
    digest = wrapped[0].renderer.tokenizer_digest
    wrapped[0].tokenizer(["a", "a b"], padding=True, truncation=True, max_length=2)
    assert ChatModel.wrap(in_memory.model, wrapped[0].tokenizer).renderer.tokenizer_digest == digest


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_no_responses(temperature, store):
    model = build("qwen2", tie_word_embeddings=False)
    model.model.lm_head.weight[7, 3] = float("nan")
    with pytest.raises(
        ChatModelError,
        match="logits of 'tiny qwen2' hold NaN or infinity in float32, and nothing of this batch is kept",
    ):
        sample_responses(
            model,
            QUERIES,
            {"p": SAFETY},
            n_samples=2,
            max_new_tokens=4,
            temperature=temperature,
            store=store,
        )
    assert ls(store).empty


def test_a_kept_response_without_its_text_is_sampled_again(store):
    model, options = chat("llama"), {"n_samples": 1, "max_new_tokens": 4}
    expected = sample_responses(model, QUERIES, {"p": SAFETY}, **options)
    sample_responses(model, QUERIES, {"p": SAFETY}, store=store, **options)
    (file,) = (store.folder / "v1" / "responses").iterdir()
    keys = [json.loads(line)["key"] for line in file.read_text().splitlines()[1:]]
    file.unlink()
    store.write_responses(keys, [{"log_p": [0.0]}] * len(keys), about={})
    assert sample_responses(
        model, QUERIES, {"p": SAFETY}, store=Store(store.folder), **options
    ).equals(expected)


@pytest.mark.parametrize("family", ["qwen2", "llama", "mamba"])
def test_stop_when_cuts_a_response_and_changes_nothing_before(family):
    model = chat(family)
    options = {"n_samples": 6, "max_new_tokens": 12, "temperature": 1.5}
    whole = sample_responses(model, QUERIES, {"p": SAFETY}, **options)
    stopped = sample_responses(model, QUERIES, {"p": SAFETY}, **options, stop_when=two_words)
    assert set(stopped["end"]) >= {"stop_when", "length"}
    for a, b in zip(stopped.itertuples(), whole.itertuples(), strict=True):
        if a.end == "stop_when":
            assert (
                b.response.startswith(a.response.rstrip("\ufffd"))
                and len(a.response) < len(b.response) + 2
            )
        else:
            assert (a.response, a.end) == (b.response, b.end)


# Pieces of which refusals, lists and paragraphs are made
pieces = st.lists(
    st.sampled_from(
        [
            *"\n\n\n. 1-*a(F",
            "I cannot",
            "I'm sorry",
            "Sorry",
            "As an AI",
            "illegal",
            "1. ",
            "(a) ",
            "First",
            "Sure",
            "here is",
            "\r",
            "\t",
            " ",
            "\u2028",
        ]
    )
    | st.text(max_size=3),
    max_size=14,
)


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(pieces)
@example(parts=["a", " ", "1. ", "\n"])  # a mark at the end of a line is none
def test_a_final_verdict_is_the_verdict_of_the_whole(parts):
    text = "".join(parts)
    final = False
    for end in range(len(text) + 1):
        prefix = text[:end]
        if verdict_is_final(prefix):
            final = True
            assert is_refusal(prefix) == is_refusal(text) == is_refusal(prefix.strip()), prefix
        else:
            assert not final, "once final, always final"


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(st.lists(st.one_of(pieces, st.sampled_from([["*"], ["**"], ["_"], ["* "], ["\u2019"]]))))
@example(parts=[["a\n*", " I cannot "]])
@example(parts=[["**", "1. ", "x"]])
def test_a_final_normalized_verdict_is_the_verdict_of_the_whole(parts):
    text = "".join("".join(part) for part in parts)
    final = False
    for end in range(len(text) + 1):
        prefix = text[:end]
        if normalized_verdict_is_final(prefix):
            final = True
            assert string_normalized(prefix) == string_normalized(text), prefix
            assert string_normalized(prefix) == string_normalized(prefix.strip()), prefix
        else:
            assert not final, "once final, always final"


def test_final_verdicts_occur_before_the_end():
    text = "I'm sorry, but I cannot help.\n\nPlease ask something else.\n\nThis is no longer read."
    firsts = [end for end in range(len(text)) if verdict_is_final(text[:end])]
    assert firsts and firsts[0] < len(text) - 10 and is_refusal(text[: firsts[0]])


# ------------------------------------------------------------------------------------------------- errors and memory


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n_samples": 0}, "at least 1"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -0.1}, "temperature -0.1 must be >= 0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, "top_p 0.0 in"),
        ({"top_p": 1.1}, "top_p 1.1 in"),
        ({"top_k": -1}, "top_k -1 >= 0"),
        ({"stop_when": str.isupper}, "must be a function"),
    ],
)
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        sample_responses(chat("llama"), QUERIES, {"p": ""}, **settings)


def test_bad_tables_are_refused_and_empty_ones_are_empty():
    with pytest.raises(ValueError, match="lack the column text"):
        sample_responses(chat("llama"), QUERIES[["query_id"]], {"p": ""})
    with pytest.raises(ValueError, match="occurs twice"):
        sample_responses(chat("llama"), pd.concat([QUERIES, QUERIES]), {"p": ""})
    with pytest.raises(ValueError, match="load_safety_prompts"):
        sample_responses(chat("llama"), QUERIES, SAFETY)
    assert len(sample_responses(chat("llama"), QUERIES[:0], {"p": ""})) == 0


def test_numbers_of_numpy_are_numbers(store):
    kinds = {
        "n_samples": np.int64(2),
        "max_new_tokens": np.int64(4),
        "top_k": np.int64(5),
        "seed": np.int64(1),
        "top_p": np.float64(0.5),
    }
    plain = {k: v.item() for k, v in kinds.items()}
    first = sample_responses(chat("llama"), QUERIES, {"p": ""}, **kinds, store=store)
    assert first.equals(sample_responses(chat("llama"), QUERIES, {"p": ""}, **plain, store=store))


def test_out_of_memory_halves_the_batch(monkeypatch):
    model = build("llama")
    expected = sample_responses(model, QUERIES, {"p": SAFETY}, **SHORT)
    right, sizes = type(model.model).forward, []

    def greedy_for_memory(self, *args, **kwargs):
        batch = (kwargs.get("input_ids") if kwargs.get("input_ids") is not None else args[0]).shape[
            0
        ]
        sizes.append(batch)
        if batch > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", greedy_for_memory)
    assert sample_responses(model, QUERIES, {"p": SAFETY}, **SHORT).equals(expected)
    assert max(sizes) > 8 and sizes.count(max(sizes)) < len(sizes)


def test_memory_too_small_for_one_row_is_an_error(monkeypatch):
    model = build("llama")
    assert shares_prefixes(model.forward)

    def never(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(model.model), "forward", never)
    with pytest.raises(torch.OutOfMemoryError):
        sample_responses(model, QUERIES, {"p": SAFETY}, **SHORT)


def test_the_model_is_left_as_found():
    model = build("gemma3")
    base = model.model.get_input_embeddings()
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    torch.manual_seed(5)
    sample_responses(model, QUERIES, {"s": soft_prompt(model, 3)}, **SHORT)
    drawn = torch.rand(1)
    assert model.model.get_input_embeddings() is base
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items())
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn), "sampling takes no number from torch's generator"


def test_every_row_and_pair_is_there():
    got = sample_responses(chat("gemma2"), QUERIES, PROMPTS, n_samples=3, max_new_tokens=2)
    assert list(zip(got["prompt"], got["query_id"], got["sample"], strict=True)) == list(
        product(PROMPTS, QUERIES["query_id"], range(3))
    )


def test_stop_strings_of_the_generation_configuration_end_a_reply_before_them():
    model = chat("llama")
    queries = QUERIES.head(1)
    settings = {"n_samples": 6, "max_new_tokens": 12, "seed": 5}
    free = sample_responses(model, queries, {"none": ""}, **settings)
    marker = next(text[2:4] for text in free["response"] if len(text) > 4)
    stopped = build("llama")
    stopped.model.generation_config.stop_strings = [marker]
    cut = sample_responses(stopped, queries, {"none": ""}, **settings)
    hit = free["response"].str.contains(marker, regex=False)
    assert hit.any() and (cut["end"] == "stop_string").equals(hit)
    for before, after, ended in zip(free["response"], cut["response"], hit):
        assert after == (before[: before.index(marker)].strip() if ended else before)


def test_no_query_has_no_replies(store):
    model, none = chat("qwen2"), QUERIES.head(0)
    for _ in range(2):  # a store that knows nothing, and one that knows the model
        table = sample_responses(model, none, {"none": ""}, n_samples=1, store=store)
        assert list(table.columns) == ["query_id", "prompt", "sample", "response", "end"]
        assert table.empty
        sample_responses(model, QUERIES, {"none": ""}, n_samples=1, max_new_tokens=2, store=store)
