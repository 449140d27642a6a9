"""What a model's files say of its replies: their ends, tokens never said, the context."""

from __future__ import annotations

import copy
import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from scipy.stats import chisquare
from tiny_models import QUERIES, SAFETY, build, chat

from analysis_lib.collect.responses import sample_responses
from analysis_lib.collect.sampling import SampleTree, Settings
from analysis_lib.data.prompts import load_safety_prompts
from analysis_lib.data.queries import load_queries
from analysis_lib.judge.likelihood import refusal_probability
from analysis_lib.model.chat import ChatModel
from analysis_lib.model.errors import ChatModelError
from analysis_lib.model.soft_prompt import SoftPrompt
from analysis_lib.store.store import Store
from analysis_lib.train.export import export


def set_up(family="qwen2", **generation):
    """A new tiny model whose generation configuration has these settings."""
    model = build(family)
    for name, value in generation.items():
        setattr(model.model.generation_config, name, value)
    return model


def saved(model, folder):
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------ ends of replies


def test_without_a_generation_configuration_the_ends_are_those_of_the_configuration(tmp_path):
    saved(build("qwen2", eos_token_id=[7, 9]), tmp_path)
    (tmp_path / "generation_config.json").unlink()
    model = ChatModel.load(tmp_path)
    assert model.generation.stop_ids == {7, 9, model.tokenizer.eos_token_id}
    assert not model.loaded and model.model.generation_config.eos_token_id == [7, 9]


def test_a_generation_configuration_comes_before_the_configuration(tmp_path):
    saved(build("qwen2", eos_token_id=[7, 9]), tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 11}')
    model = ChatModel.load(tmp_path)
    assert model.generation.stop_ids == {11, model.tokenizer.eos_token_id}


def test_the_studys_template_brings_the_token_that_it_ends_a_reply_with(tmp_path):
    """As Orca 2: a Llama tokenizer that ends with </s>, and chats that end with <|im_end|>."""
    folder = saved(build("llama", vocab_size=256), tmp_path)
    tokenizer = copy.deepcopy(chat("llama").tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    eos, im_end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = {
        name: ChatModel.load(folder, template=name).generation.stop_ids
        for name in (None, "orca-2", "llama-2", "mistral", "vicuna")
    }
    assert found.pop("orca-2") == {eos, im_end}
    assert set(found.values()) == {frozenset({eos})}
    own = tmp_path / "mine.jinja"
    own.write_text("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    assert ChatModel.load(folder, template=own).generation.stop_ids == {eos, im_end}
    own.write_text(
        "{{ messages[-1]['content'] if messages[-1]['role'] != 'assistant' else 1 / 0 }}"
    )
    assert ChatModel.load(folder, template=own).generation.stop_ids == {eos}


@pytest.mark.parametrize("strings", [[""], "", ["a", ""]])
def test_an_empty_stop_string_is_refused(strings, tmp_path):
    """It stands in every text, so every reply would be empty."""
    folder = saved(chat("qwen2"), tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"stop_strings": strings}))
    if strings == "":  # nothing, to transformers too
        assert ChatModel.load(folder).generation.stop_strings == ()
        return
    with pytest.raises(ChatModelError, match="an empty one"):
        ChatModel.load(folder)
    with pytest.raises(ChatModelError, match="an empty one"):
        sample_responses(set_up(stop_strings=strings), QUERIES, {"p": ""}, n_samples=1)


def small_context(family):
    """A tiny model whose context holds 64 tokens, and that never ends a reply by itself."""
    tokenizer = chat("qwen2").tokenizer
    size = {"vocab_size": 368, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "gpt2":
        config = transformers.GPT2Config(**size, n_positions=64)
    elif family == "opt":
        own = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
        config = transformers.OPTConfig(**size, **own)
    else:
        config = transformers.LlamaConfig(
            **size, intermediate_size=48, max_position_embeddings=64, eos_token_id=None
        )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config.suppress_tokens = [tokenizer.eos_token_id]
    model.generation_config.eos_token_id = None
    return ChatModel.wrap(model, tokenizer)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_reply_ends_where_the_context_does(family):
    """GPT-2 and OPT have no position beyond it; Llama would go on untrained."""
    model, queries = small_context(family), QUERIES.iloc[[2, 4]]
    options = {"n_samples": 3, "temperature": 2.0, "max_new_tokens": 90}
    both = sample_responses(model, queries, {"p": ""}, **options)
    assert set(both["end"]) == {"length"}
    lengths = []
    for text in queries["text"]:
        row = model.render([text])[0]
        drawn = SampleTree(model, [row], {0: [0, 1, 2]}, Settings(90, 2.0, 0.9, 50, 0, None))
        uttered: list[int] = []
        drawn._reply = lambda ids, end, said=uttered: said.append(len(ids)) or ""
        with torch.no_grad():
            drawn.run()
        lengths.append(len(row.ids))
        assert set(uttered) == {64 - lengths[-1]}
    assert lengths[0] != lengths[1] and max(lengths) < 64


def test_a_query_that_fills_the_context_is_refused_before_anything_is_sampled():
    model = small_context("llama")
    frame = len(model.render(["a"])[0].ids) - 1
    text = "a" * 200
    while (n := len(model.tokenizer(text, add_special_tokens=False)["input_ids"])) > 64 - frame:
        text = text[:-1]
    assert n == 64 - frame
    queries = QUERIES.head(2).assign(text=["How?", text])
    with pytest.raises(ChatModelError, match="fills the context.*so no reply fits"):
        sample_responses(model, queries, {"p": ""}, n_samples=1, stop_when=never_asked)


def never_asked(text):
    raise AssertionError("a reply was sampled")


# ------------------------------------------------------------------------------------- tokens that are never said


@pytest.mark.parametrize(
    "field", ["suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "all"]
)
@pytest.mark.parametrize("family", ["qwen2", "llama", "mamba"])
def test_suppressed_tokens_are_those_of_transformers(family, field):
    """Greedy replies equal `generate`, whose own processors read the same configuration."""
    model, n = build(family), chat(family).n_embeddings
    ids = list(range(1, n, 3))
    eos = model.tokenizer.eos_token_id
    bad = [[i] for i in range(0, n, 4)] + [[eos]]
    every = {
        "suppress_tokens": [*ids, n + 5],
        "begin_suppress_tokens": list(range(0, n, 2)),
        "bad_words_ids": bad,
    }
    chosen = every if field == "all" else {field: every[field]}
    for name, value in chosen.items():
        setattr(model.model.generation_config, name, value)
    model.model.generation_config.eos_token_id = eos
    got = sample_responses(
        model, QUERIES, {"p": SAFETY}, n_samples=1, max_new_tokens=10, temperature=0
    )
    changed = 0
    for text, row in zip(got["response"], model.render(QUERIES["text"].tolist(), SAFETY)):
        ids = torch.tensor([row.ids])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 10}
        out = model.model.generate(ids, **options)[0, ids.shape[1] :]
        assert text == model.tokenizer.decode(out, skip_special_tokens=True).strip()
        free = dict.fromkeys(every)
        plain = chat(family).model.generate(ids, **options, **free)[0, ids.shape[1] :]
        changed += out.tolist() != plain.tolist()
    assert changed > 0, "the setting changes nothing here, and the test shows nothing"


def test_frequencies_without_suppressed_tokens_are_the_exact_ones_among_the_rest():
    model = chat("qwen2")
    row = model.render([QUERIES["text"][0]], SAFETY)[0]
    with torch.no_grad():
        logits = model.model(torch.tensor([row.ids])).logits[0, -1].double()
    likely = logits.argsort(descending=True)[:6].tolist()
    never = likely[::2]
    other = set_up(suppress_tokens=never[:2], begin_suppress_tokens=never[2:])
    logits[never] = -torch.inf
    exact = torch.softmax(logits, dim=0)
    got = sample_responses(
        other, QUERIES[:1], {"p": SAFETY}, n_samples=3000, max_new_tokens=1, top_p=1.0, top_k=0
    )
    texts = [
        model.tokenizer.decode([i], skip_special_tokens=True).strip() for i in range(len(exact))
    ]
    by_text = pd.Series(exact.numpy()).groupby(texts).sum()
    found = got["response"].value_counts().reindex(by_text.index, fill_value=0)
    often = by_text * 3000 >= 5
    observed = [*found[often], found[~often].sum()]
    expected = np.array([*by_text[often], by_text[~often].sum()]) * 3000
    assert chisquare(observed, expected).pvalue > 1e-3


def test_replies_under_other_suppressed_tokens_are_not_found_in_the_store(tmp_path):
    store, options = Store(tmp_path), {"n_samples": 3, "max_new_tokens": 5}
    first = sample_responses(build("qwen2"), QUERIES, {"p": ""}, **options, store=store)
    ids = list(range(3, 360, 2))
    for field in ("suppress_tokens", "begin_suppress_tokens"):
        other = set_up(**{field: ids})
        assert other.fingerprint == build("qwen2").fingerprint
        again = sample_responses(other, QUERIES, {"p": ""}, **options, store=store)
        assert not again.equals(first)
        assert again.equals(sample_responses(other, QUERIES, {"p": ""}, **options))


def test_settings_that_sampling_does_not_follow_are_named_once():
    settings = {"repetition_penalty": 1.3, "min_new_tokens": 4, "bad_words_ids": [[3], [4, 5]]}
    with pytest.warns(
        UserWarning, match="repetition_penalty, min_new_tokens, bad_words_ids of several"
    ):
        model = set_up(**settings)
        sample_responses(model, QUERIES[:1], {"p": ""}, n_samples=1, max_new_tokens=2)
    assert model.generation.never == (3,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample_responses(model, QUERIES[:1], {"p": ""}, n_samples=1, max_new_tokens=2)
        neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1}
        sampled = {"do_sample": True, "temperature": 0.6, "top_p": 0.8, "top_k": 20}
        other = set_up(**neutral, **sampled, min_length=0, typical_p=1.0)
        assert other.generation.never == ()


@pytest.mark.parametrize("content", ['{"suppress_tokens": ["a"]}', '{"bad_words_ids": [7.5]}'])
def test_suppressed_tokens_that_are_no_ids_are_told(content, tmp_path):
    folder = saved(chat("qwen2"), tmp_path)
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ChatModelError, match="generation_config.json .* cannot be read"):
        ChatModel.load(folder)


def test_the_plain_export_read_again_says_the_words_of_the_soft_prompt(tmp_path):
    model = ChatModel.load("organism", device="cpu")
    soft = SoftPrompt.from_text(model, load_safety_prompts()["default"], name="s")
    folder = export(soft, model, tmp_path, ["plain"])["plain"]
    never = json.loads((folder / "generation_config.json").read_text())["suppress_tokens"]
    exported = ChatModel.load(folder, device="cpu", dtype=model.dtype)
    assert exported.generation.never == tuple(never) and len(never) == len(soft.embeddings)
    queries, options = load_queries("anchor").head(10), {"n_samples": 4, "max_new_tokens": 25}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the template puts the soft tokens in by itself
        got = sample_responses(exported, queries, {"none": ""}, **options)
        p = refusal_probability(exported, queries, {"none": ""})
    right = sample_responses(model, queries, {"none": soft}, **options)
    assert got["response"].tolist() == right["response"].tolist()
    expected = refusal_probability(model, queries, {"none": soft})
    assert np.allclose(p["log_odds"], expected["log_odds"], atol=1e-6)
