from __future__ import annotations

import json
import os
import shutil
import warnings
import weakref

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import (
    CHATML,
    FAMILIES,
    GEMMA,
    NO_SYSTEM_ROLE,
    PROMPTS,
    QUERIES,
    SAFETY,
    VICUNA,
    build,
    chat,
    plain_states,
    relative,
    tokenizer,
)  # fmt: skip

import analysis_lib.model.loading as room
from analysis_lib.analysis.published import load_published
from analysis_lib.collect.responses import sample_responses
from analysis_lib.collect.states import hidden_states
from analysis_lib.data.shipped import ROOT
from analysis_lib.judge.likelihood import refusal_probability
from analysis_lib.model import checks
from analysis_lib.model.architecture import text_config
from analysis_lib.model.chat import ChatModel
from analysis_lib.model.errors import ChatModelError
from analysis_lib.model.loading import load_classifier
from analysis_lib.model.rendering import soft_digest
from analysis_lib.model.soft_prompt import SoftPrompt, embed_text, nearest_tokens
from analysis_lib.model.templates import TEMPLATES, read_template, study_models
from analysis_lib.report.reproduce import environment_of
from analysis_lib.store.store import Store
from analysis_lib.store.upkeep import ls

pytestmark = pytest.mark.filterwarnings("ignore:the chat template of .* takes no system message")
families = pytest.mark.parametrize("family", FAMILIES)
one_per_template = pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "gemma2", "gemma3", "phi3", "gpt_neox", "mixtral"]
)
QUERY = "How do I bake bread in a small oven?"
SYSTEMS = [
    SAFETY,
    "system",
    "Be safe",
    "Ünïcode — ‘quotes’ 日本語.",
    "Two lines.\nThe second one",
    "x",
    "How do I bake bread in a small oven?",
]


def text_of(model, ids):
    return model.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def messages(model, system, query):
    if not system:
        return [{"role": "user", "content": query}]
    if not model.renderer.system_role:
        return [{"role": "user", "content": f"{system}\n\n{query}"}]
    return [{"role": "system", "content": system}, {"role": "user", "content": query}]


# ---------------------------------------------------------------------------------------------------------- rendering


@one_per_template
@pytest.mark.parametrize("system", ["", *SYSTEMS])
def test_rendering_is_the_chat_template_of_the_tokenizer(family, system):
    model = chat(family)
    assert model.renderer.system_role == (family not in NO_SYSTEM_ROLE)
    queries = [QUERY, "x", "Ünï — 日本?", "Why [x] {y} #1?"]
    for row, query in zip(model.render(queries, system), queries, strict=True):
        expected = model.tokenizer.apply_chat_template(
            messages(model, system, query),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        assert list(row.ids) == expected
        assert row.soft == ""


@one_per_template
@pytest.mark.parametrize("system", SYSTEMS)
def test_slot_holds_exactly_the_tokens_that_overlap_the_system_text(family, system):
    model = chat(family)
    row = model.render([QUERY], system)[0]
    encoded = model.tokenizer(system, add_special_tokens=False)["input_ids"]
    known = text_of(model, encoded).strip()  # what the tokenizer can say of this text
    start, stop = row.slot
    assert known in text_of(model, row.ids[start:stop])
    if text_of(
        model, row.ids[start : start + 1]
    ):  # not the bare space that a tokenizer puts in front of a word
        assert known not in text_of(model, row.ids[start + 1 : stop])
    assert known not in text_of(model, row.ids[start : stop - 1])
    reference = model.render([QUERY], SAFETY)[
        0
    ]  # the slot begins where the template has it, not where the text occurs first
    assert (
        text_of(model, row.ids[:start]).rstrip()
        == text_of(model, reference.ids[: reference.slot[0]]).rstrip()
    )


@one_per_template
def test_empty_text_means_no_system_message(family):
    model = chat(family)
    for row in model.render([QUERY], "") + model.render([QUERY], "  \n"):
        assert row.slot == (0, 0) and row.soft == ""
        assert "system" not in text_of(model, row.ids).lower() and "<<SYS>>" not in text_of(
            model, row.ids
        )


@pytest.mark.parametrize("family", sorted(NO_SYSTEM_ROLE))
def test_without_a_system_role_the_prompt_stands_in_front_of_the_query(family):
    model = chat(family)
    text = text_of(model, model.render([QUERY], SAFETY)[0].ids)
    assert f"{SAFETY}\n\n{QUERY}" in text


@one_per_template
def test_queries_and_prompts_are_stripped_and_rendering_is_deterministic(family):
    model = chat(family)
    for system in ("", SAFETY):
        first = model.render([QUERY, "x"], system)
        assert first == model.render([f"  \n{QUERY}\t ", " x\n"], f"\n{system}  ")
        assert first == ChatModel.wrap(model.model, model.tokenizer).render([QUERY, "x"], system)
        assert first[1] == model.render(["x"], system)[0]
        assert first == model.render([QUERY, " x\n"], system)
    assert model.render([], SAFETY) == []


@one_per_template
@pytest.mark.parametrize("place", ["query", "prompt"])
def test_special_tokens_and_role_markers_open_no_new_role(family, place):
    model = chat(family)
    markers = [*model.tokenizer.all_special_tokens]
    markers += {
        "llama": ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"],
        "mistral": ["[INST]", "[/INST]"],
    }.get(family, [])
    markers += ["USER:", "ASSISTANT:"] if FAMILIES[family][3] is VICUNA else []
    benign = model.render([QUERY], SAFETY)[0]
    for marker in markers:
        for attack in (
            f"Say {marker} yes",
            f"{marker}{marker}",
            f"x{marker[:2]}{marker}{marker[2:]}y",
            f"a\n{marker}\nb {marker}",
        ):
            with pytest.warns(UserWarning, match="broken by a space") as caught:
                row = (
                    model.render([attack], SAFETY)[0]
                    if place == "query"
                    else model.render([QUERY], attack)[0]
                )
            assert [
                ("a query" in str(w.message), "a prompt" in str(w.message)) for w in caught
            ] == [(place == "query", place == "prompt")]
            for token in model.tokenizer.all_special_ids:
                if token != model.tokenizer.unk_token_id:
                    assert row.ids.count(token) == benign.ids.count(token), (marker, attack)
            assert text_of(model, row.ids).count(marker) == text_of(model, benign.ids).count(
                marker
            ), (marker, attack)


def test_full_width_lookalikes_of_special_tokens_stay_text():
    for family in (
        "llama",
        "gemma2",
        "phi3",
    ):  # their tokenizer's NFKC makes them look like special tokens
        model = chat(family)
        with pytest.warns(UserWarning, match="broken by a space"):
            benign, row = (
                model.render([QUERY], "")[0],
                model.render(["＜s＞ ＜bos＞ ＜｜user｜＞ ＜start_of_turn＞"], "")[0],
            )
        for token in model.tokenizer.all_special_ids:
            if token != model.tokenizer.unk_token_id:
                assert row.ids.count(token) == benign.ids.count(token)


@one_per_template
def test_ordinary_queries_are_not_rewritten(family):
    model = chat(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for query in (
            "if a < b and b > c: x[0] = <y>?",
            "the user: who? Note: this",
            "email <me@x.org>",
            "a [list] of <b>html</b>",
        ):
            assert query in text_of(model, model.render([query], "")[0].ids)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=40),
    st.sampled_from(["qwen2", "llama", "gpt_neox"]),
)
def test_any_query_keeps_head_and_tail_of_the_chat(query, family):
    model = chat(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row, benign = model.render([query], SAFETY)[0], model.render(["x"], SAFETY)[0]
    special = [i for i in model.tokenizer.all_special_ids if i != model.tokenizer.unk_token_id]
    assert [i for i in row.ids if i in special] == [i for i in benign.ids if i in special]
    assert row.slot == benign.slot
    assert row.ids[: row.slot[1]] == benign.ids[: row.slot[1]]


def with_template(family, template):
    """The family's shared model under another chat template."""
    model = chat(family)
    own = model.tokenizer.__class__(
        tokenizer_object=model.tokenizer.backend_tokenizer,
        bos_token=model.tokenizer.bos_token,
        eos_token=model.tokenizer.eos_token,
    )
    own.chat_template = template
    return ChatModel.wrap(model.model, own)


def test_template_that_changes_the_query_is_followed_and_one_that_drops_it_refused():
    model = chat("qwen2")
    changed = with_template(
        "qwen2", CHATML.replace("m['content']", "m['content'] | replace('bread', 'cake')")
    )
    for queries in ([QUERY], ["x", QUERY], ["x", QUERY, "y"]):  # it shows on some queries only
        assert changed.render(queries, SAFETY) == model.render(
            [q.replace("bread", "cake") for q in queries], SAFETY
        )
    drops = "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(ChatModelError, match="drops the user message"):
        with_template("qwen2", drops).render([QUERY], "")
    with pytest.raises(ChatModelError, match="cannot be rendered: .*wanted.*template=FILE"):
        with_template("qwen2", "{{ raise_exception('wanted') }}").render([QUERY], "")


@pytest.mark.parametrize("family", sorted(NO_SYSTEM_ROLE))
def test_a_template_without_system_messages_is_told_once_and_recorded(family):
    model = ChatModel.wrap(chat(family).model, chat(family).tokenizer, name="mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.render([QUERY], "")
    with pytest.warns(
        UserWarning, match="'mine' takes no system message; prompts stand in front of the query"
    ) as caught:
        model.render([QUERY], SAFETY), model.render(["x"], "Be safe")
    assert len(caught) == 1 and caught[0].filename == __file__
    assert model.about()["prompt_goes"] == "in front of the query"
    assert chat("qwen2").about()["prompt_goes"] == "into the system message"


def test_a_template_with_a_system_message_of_its_own_is_told_once_and_recorded():
    default = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Tiny.<|im_end|>\n{% endif %}"
        + CHATML
    )
    model = with_template("qwen2", default)
    assert model.renderer.default_system == model.about()["default_system"] == "You are Tiny."
    with pytest.warns(UserWarning, match="'You are Tiny.'") as caught:
        assert "You are Tiny." in text_of(model, model.render([QUERY], "")[0].ids)
        model.render(["x"], "")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "You are Tiny." not in text_of(model, model.render([QUERY], SAFETY)[0].ids)
    assert [chat(family).renderer.default_system for family in FAMILIES] == [""] * len(FAMILIES)


# As the study rendered a system message and a query: the README of github.com/chujiezheng/chat_templates (llama-2, mistral,
# vicuna), the model card of Orca 2 with the tokenizer's BOS, and the collection's openchat.
STUDY_FORMATS = {
    "llama-2": ("<s>[INST] <<SYS>>\nS!\n<</SYS>>\n\nQ? [/INST]", "<s>[INST] Q? [/INST]"),
    "mistral": ("<s>[INST] S!\n\nQ? [/INST]", "<s>[INST] Q? [/INST]"),
    "vicuna": ("<s>S!\n\nUSER: Q?\nASSISTANT:", "<s>USER: Q?\nASSISTANT:"),
    "orca-2": (
        "<s><|im_start|>system\nS!<|im_end|>\n<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n",
        "<s><|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "openchat": (
        "<s>S!<|end_of_turn|>GPT4 Correct User: Q?<|end_of_turn|>GPT4 Correct Assistant:",
        "<s>GPT4 Correct User: Q?<|end_of_turn|>GPT4 Correct Assistant:",
    ),
}
MORE_TURNS = {
    "llama-2": "<s>[INST] <<SYS>>\nS!\n<</SYS>>\n\nQ? [/INST] A. </s><s>[INST] R? [/INST]",
    "mistral": "<s>[INST] S!\n\nQ? [/INST] A. </s>[INST] R? [/INST]",
    "vicuna": "<s>S!\n\nUSER: Q?\nASSISTANT: A.</s>\nUSER: R?\nASSISTANT:",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_the_study_render_as_documented(name):
    made = tokenizer("sentencepiece", VICUNA)
    model = ChatModel(
        "x", "", None, "cpu", torch.float32, made, chat("mixtral").config, template=name
    )
    made.chat_template, own = read_template(name), made.chat_template
    try:
        for system, expected in zip(["S!", ""], STUDY_FORMATS[name], strict=True):
            assert model.renderer.apply(system, "Q?") == expected
        turns = [("system", "S!"), ("user", "Q?"), ("assistant", "A."), ("user", "R?")]
        chat_of = [{"role": role, "content": text} for role, text in turns]
        rendered = made.apply_chat_template(chat_of, tokenize=False, add_generation_prompt=True)
        assert name not in MORE_TURNS or rendered == MORE_TURNS[name]
        again = ChatModel.wrap(chat("mixtral").model, made)  # the slot is found in each
        assert again.renderer.system_role and again.renderer.default_system == ""
        row = again.render(["x"], SAFETY)[0]
        assert text_of(again, row.ids[slice(*row.slot)]).strip() == SAFETY
    finally:
        made.chat_template = own


def test_models_of_the_study():
    table = study_models()
    assert set(table["model"]) == set(load_published()[0]["model"]) and len(table) == 8
    assert set(table["template"]) == set(TEMPLATES) == set(STUDY_FORMATS)
    assert (
        table["revision"].str.fullmatch(r"[0-9a-f]{40}|refs/pr/\d+|").all()
        and table["hub_id"].is_unique
    )
    assert table["note"].str.len().gt(10).all()


# --------------------------------------------------------------------------------------------------------- soft tokens


@families
def test_soft_prompt_of_a_text_gives_the_states_of_the_text(family):
    model = chat(family)
    soft = SoftPrompt.from_text(model, SAFETY, name="s")
    text_row, soft_row = model.render([QUERY], SAFETY)[0], model.render([QUERY], soft)[0]
    assert soft_row.slot == text_row.slot and len(soft_row.ids) == len(text_row.ids)
    assert soft_row.soft == soft_digest(soft.embeddings) != ""
    assert all(i >= model.n_embeddings for i in soft_row.ids[slice(*soft_row.slot)])
    with torch.no_grad():
        expected = model.forward.body(input_ids=torch.tensor([text_row.ids])).last_hidden_state
        with model.forward.soft_tokens(soft.embeddings):
            got = model.forward.body(input_ids=torch.tensor([soft_row.ids])).last_hidden_state
    assert relative(got, expected) <= 1e-5
    other = soft.embeddings.copy()
    other[-1] = other[-1][::-1]
    with torch.no_grad(), model.forward.soft_tokens(other):
        assert (
            relative(
                model.forward.body(input_ids=torch.tensor([soft_row.ids])).last_hidden_state,
                expected,
            )
            > 1e-3
        )


@families
@pytest.mark.parametrize("length", [1, 3, 40])
def test_soft_prompt_may_have_another_length_than_its_text(family, length):
    model = chat(family)
    table = model.model.get_input_embeddings().weight
    rows = (
        np.random.default_rng(length)
        .normal(0, float(table.std()), (length, model.hidden_size))
        .astype(np.float32)
    )
    soft = SoftPrompt("s", rows, SAFETY, model.fingerprint)
    text_row, row = model.render([QUERY], SAFETY)[0], model.render([QUERY], soft)[0]
    assert (
        row.ids[: row.slot[0]] == text_row.ids[: text_row.slot[0]]
        and row.ids[row.slot[1] :] == text_row.ids[text_row.slot[1] :]
    )
    assert row.slot[1] - row.slot[0] == length
    with torch.no_grad(), model.forward.soft_tokens(rows):
        got = model.forward.body(input_ids=torch.tensor([row.ids])).last_hidden_state[0, -1]
    assert relative(got, plain_states(model, row, (-1,), rows)[0]) <= 1e-5


@families
def test_soft_tokens_leave_the_model_bit_for_bit_as_found(family):
    model = chat(family)
    ids = torch.tensor([model.render([QUERY], SAFETY)[0].ids])
    base, modules = model.model.get_input_embeddings(), dict(model.model.named_modules())
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    with torch.no_grad():
        expected = model.model(input_ids=ids).logits
        with model.forward.soft_tokens(np.ones((2, model.hidden_size), np.float32)):
            assert model.model.get_input_embeddings() is not base
            assert torch.equal(
                model.model(input_ids=ids).logits, expected
            )  # text rows are the same within, too
        with (
            pytest.raises(KeyboardInterrupt),
            model.forward.soft_tokens(np.ones((2, model.hidden_size), np.float32)),
        ):
            raise KeyboardInterrupt
        assert model.model.get_input_embeddings() is base
        now = dict(model.model.named_modules())
        assert now.keys() == modules.keys() and all(now[k] is m for k, m in modules.items())
        after = model.model.state_dict()
        assert after.keys() == before.keys() and all(
            torch.equal(after[k], v) for k, v in before.items()
        )
        assert torch.equal(model.model(input_ids=ids).logits, expected)


@families
def test_gradients_reach_the_soft_rows_and_nothing_else(family):
    model = chat(family)
    soft = torch.nn.Parameter(torch.tensor(embed_text(model, SAFETY)))
    row = model.render(["x"], SoftPrompt("s", soft.detach().numpy(), SAFETY, model.fingerprint))[0]
    with model.forward.soft_tokens(soft):
        model.forward.body(input_ids=torch.tensor([row.ids])).last_hidden_state[0, -1].pow(
            2
        ).sum().backward()
    rows = soft.grad.abs().sum(dim=1)
    assert (rows[-3:] > 0).all()  # a window may hide the first ones
    assert all(p.grad is None and not p.requires_grad for p in model.model.parameters())


@pytest.mark.parametrize("shape", [(3, 31), (3, 33), (32,), (1, 3, 32)])
def test_soft_tokens_of_another_width_are_refused(shape):
    model = chat("qwen2")
    base = model.model.get_input_embeddings()
    with (
        pytest.raises(ChatModelError, match="32 dimensions"),
        model.forward.soft_tokens(np.zeros(shape, np.float32)),
    ):
        pass
    assert model.model.get_input_embeddings() is base


def test_embed_text_and_nearest_tokens():
    for family in ("qwen2", "llama", "gemma3"):
        model = chat(family)
        row = model.render(["x"], SAFETY)[0]
        ids = row.ids[slice(*row.slot)]
        rows = embed_text(model, SAFETY)
        assert rows.shape == (len(ids), model.hidden_size) and rows.dtype == np.float32
        assert np.array_equal(rows, model.model.get_input_embeddings().weight[list(ids)].numpy())
        nearest = nearest_tokens(model, rows * 3, n=2)
        assert [found[0] for found in nearest] == [(model.tokenizer.decode([i]), 1.0) for i in ids]
        assert all(len(found) == 2 and found[1][1] < 1 for found in nearest)
        with pytest.raises(ChatModelError, match="give its text"):
            embed_text(model, "  ")


def test_bfloat16_soft_tokens_take_part_in_bfloat16():
    model = build("gemma3", dtype=torch.bfloat16)
    soft = SoftPrompt.from_text(model, SAFETY, name="s")
    rows = [model.render([QUERY], p)[0] for p in (SAFETY, soft)]
    with torch.no_grad():
        expected = model.forward.body(input_ids=torch.tensor([rows[0].ids])).last_hidden_state
        with model.forward.soft_tokens(soft.embeddings):
            assert torch.equal(
                model.forward.body(input_ids=torch.tensor([rows[1].ids])).last_hidden_state,
                expected,
            )


# --------------------------------------------------------------------------------------------- fingerprint and stop ids


def test_fingerprint_changes_with_weights_and_configuration_only():
    first = build("llama").fingerprint
    assert first == build("llama").fingerprint
    assert (
        len(
            {
                first,
                build("llama", seed=1).fingerprint,
                build("llama", rms_norm_eps=1e-3).fingerprint,
                chat("mistral").fingerprint,
            }
        )
        == 4
    )
    changed = build("llama")
    changed.model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-6
    assert changed.fingerprint != first


def test_fingerprint_follows_weights_changed_after_it_was_taken(saved):
    for model in (build("qwen2"), ChatModel.load(str(saved), device="cpu")):
        first, weight = model.fingerprint, model.model.get_input_embeddings().weight
        model.render([QUERY], SAFETY), model.model(input_ids=torch.tensor([[5, 6]]))
        assert model.fingerprint == first
        with torch.no_grad():
            weight[7, 3] += 1
        changed = model.fingerprint
        up = model.model.model.layers[0].mlp.up_proj
        up.weight = torch.nn.Parameter(up.weight.detach() * 2, requires_grad=False)
        assert len({first, changed, model.fingerprint}) == 3
        with model.forward.soft_tokens(np.ones((2, model.hidden_size), np.float32)):
            inside = model._hashed
            assert (
                model.fingerprint == inside[1] and model._hashed is inside
            )  # nothing is hashed again
    assert ChatModel.load(str(saved), device="cpu").fingerprint not in (changed, model.fingerprint)


def test_stop_ids_are_those_of_tokenizer_and_generation_configuration():
    model = build("qwen2")
    assert model.generation.stop_ids == {model.tokenizer.eos_token_id}
    model = build("qwen2")
    model.model.generation_config.eos_token_id = [7, 9]
    assert model.generation.stop_ids == {model.tokenizer.eos_token_id, 7, 9}


# -------------------------------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = chat("qwen2")
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(
        saved, tmp_path / "401" / "offline-gated-network"
    )  # a path that must not steer the advice


def fails(name, *said, use=False, **options):
    with pytest.raises(ChatModelError) as caught:
        model = ChatModel.load(str(name), **options)
        assert use, "loaded"
        _ = model.model
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for part in said:
        assert part in message, message


def test_a_saved_model_loads_with_the_same_states(saved):
    model, original = ChatModel.load(str(saved), device="cpu"), chat("qwen2")
    assert model.dtype == torch.float32 and model.render([QUERY], SAFETY) == original.render(
        [QUERY], SAFETY
    )
    row = original.render([QUERY], SAFETY)[0]
    assert torch.equal(
        plain_states(model, row, (0, 1, -1)), plain_states(original, row, (0, 1, -1))
    )
    assert not model.model.training and not any(p.requires_grad for p in model.model.parameters())
    assert model.generation.stop_ids == original.generation.stop_ids
    assert ChatModel.load(str(saved), dtype="bfloat16").model.dtype == torch.bfloat16
    assert ChatModel.load(saved).fingerprint == model.fingerprint  # a path as well as its text


def forbid_weights(patch):
    """Loading a model's weights fails from here on."""

    def load(*args, **kwargs):
        raise AssertionError("the weights were loaded")

    patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)


@families
@pytest.mark.parametrize("shards", [1, 3])
def test_embeddings_are_read_without_the_rest_of_the_weights(family, shards, tmp_path, monkeypatch):
    model = chat(family)
    model.model.save_pretrained(tmp_path, max_shard_size=1_000_000 if shards == 1 else 20_000)
    model.tokenizer.save_pretrained(tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (shards == 1)
    with monkeypatch.context() as patch:
        forbid_weights(patch)
        found = ChatModel.load(str(tmp_path), device="cpu")
        assert np.array_equal(embed_text(found, SAFETY), embed_text(model, SAFETY))
        assert nearest_tokens(found, embed_text(model, SAFETY)) == nearest_tokens(
            model, embed_text(model, SAFETY)
        )
        half = ChatModel.load(str(tmp_path), device="cpu", dtype="bfloat16")
        rows = embed_text(half, SAFETY)
    assert np.array_equal(rows, embed_text(ChatModel.wrap(half.model, half.tokenizer), SAFETY))
    assert not np.array_equal(rows, embed_text(model, SAFETY))


@pytest.mark.parametrize("change", ["another name", "another shape"])
def test_embeddings_that_their_file_does_not_hold_as_expected_come_from_the_loaded_model(
    change, tmp_path, monkeypatch
):
    """Loading says what is wrong, where anything is."""
    folder, name = tmp_path / "model", "model.embed_tokens.weight"
    model = chat("qwen2")
    model.model.save_pretrained(folder, max_shard_size=20_000)
    model.tokenizer.save_pretrained(folder)
    index = folder / "model.safetensors.index.json"
    parsed = json.loads(index.read_text())
    shard = folder / parsed["weight_map"][name]
    tensors = load_file(shard)
    table = tensors.pop(name)
    save_file(
        tensors | ({"other": table} if change == "another name" else {name: table[:-1].clone()}),
        shard,
    )
    found = ChatModel.load(str(folder), device="cpu")
    forbid_weights(monkeypatch)
    with pytest.raises((ChatModelError, AssertionError), match="the weights were loaded"):
        embed_text(found, SAFETY)


@pytest.mark.parametrize("use", [ChatModel.load, load_classifier])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "a tensor lacks",
            r"do not hold 1 of the model's tensors \(model.layers.1.mlp.up_proj.weight\)",
        ),
        (
            "all have other names",
            r"do not hold \d\d of the model's tensors \(\S+, \S+, \S+, \.\.\.\)",
        ),
        ("more layers", r"do not hold 12 of the model's tensors \(model.layers.3"),
    ],
)
def test_weights_that_would_be_drawn_at_random_are_refused(folder, use, change, said):
    if change == "more layers":
        config = json.loads((folder / "config.json").read_text())
        n = config["num_hidden_layers"] = config["num_hidden_layers"] + 1
        config["layer_types"] = ["full_attention"] * n
        (folder / "config.json").write_text(json.dumps(config))
    else:
        tensors = load_file(folder / "model.safetensors")
        if change == "a tensor lacks":
            del tensors["model.layers.1.mlp.up_proj.weight"]
        else:
            tensors = {f"other.{name}": tensor for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = (
        r"do not hold \d+ of the model's tensors" if use is load_classifier else said
    )  # and its head
    with pytest.raises(
        ChatModelError,
        match=said + ".*, which would be drawn at random; copy or download the model again",
    ):
        _ = use(str(folder)).model


def sharded(folder):
    """A model in several files: its folder and the index's content."""
    model = chat("qwen2")
    model.model.save_pretrained(folder, max_shard_size=20_000)
    model.tokenizer.save_pretrained(folder)
    return folder, json.loads((folder / "model.safetensors.index.json").read_text())


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "sub/x.safetensors", "pytorch_model.bin", "/dev/zero", 3, ["x"]],
)
def test_an_index_may_name_only_safetensors_of_its_own_folder(name, tmp_path):
    folder, index = sharded(tmp_path / "model")
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fails(
        folder,
        "model.safetensors.index.json",
        repr(str(name))[1:-1],
        "which is no *.safetensors beside it",
    )
    for damaged in ("", "[]", "{}", '{"weight_map": 1}', "[" * 100_000):
        (folder / "model.safetensors.index.json").write_text(damaged)
        fails(folder, "names no files", "copy or download the model again")


def test_the_index_is_part_of_the_fingerprint(tmp_path):
    folder, index = sharded(tmp_path / "model")
    first = ChatModel.load(str(folder)).fingerprint
    name, file = next(iter(index["weight_map"].items()))
    (folder / "another.safetensors").write_bytes((folder / file).read_bytes())
    with_another = ChatModel.load(str(folder)).fingerprint
    index["weight_map"][name] = "another.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert len({first, with_another, ChatModel.load(str(folder)).fingerprint}) == 3


def test_a_model_with_an_adapter_is_refused(folder, monkeypatch):
    (folder / "adapter_config.json").write_text("{}")
    fails(folder, "holds an adapter beside the model", "merge the adapter")
    read = transformers.utils.cached_file  # a hub that has the folder's files
    monkeypatch.setattr(
        transformers.utils,
        "cached_file",
        lambda name, *args, **options: read(str(folder), *args, **options),
    )
    for kind in (transformers.AutoConfig, transformers.AutoTokenizer):
        monkeypatch.setattr(
            kind,
            "from_pretrained",
            lambda *args, own=kind.from_pretrained, **options: own(str(folder)),
        )
    config = transformers.PreTrainedConfig.get_config_dict(str(folder))
    monkeypatch.setattr(
        transformers.PreTrainedConfig, "get_config_dict", lambda *args, **options: config
    )
    fails("org/model", "holds an adapter beside the model")
    (folder / "adapter_config.json").unlink()
    assert ChatModel.load("org/model").name == "org/model"


@pytest.mark.parametrize("use", [ChatModel.load, load_classifier])
def test_a_configuration_that_names_its_own_weights_is_refused(folder, use):
    """They could lie anywhere, and be pickled."""
    config = json.loads((folder / "config.json").read_text()) | {
        "transformers_weights": "other.safetensors"
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ChatModelError, match="names its own file of weights, which is not read; take the entry"
    ):
        use(str(folder))


def test_a_classifiers_index_may_not_lead_out_of_its_folder(tmp_path):
    folder, index = sharded(tmp_path / "model")
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../evil.bin")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ChatModelError, match="'../evil.bin', which is no .*safetensors beside it"):
        load_classifier(str(folder))


@pytest.mark.parametrize(
    "entry", ["_attn_implementation", "attn_implementation", "experts_implementation"]
)
def test_a_configuration_that_asks_for_compiled_code_of_the_hub_is_refused(folder, entry):
    config = json.loads((folder / "config.json").read_text()) | {entry: "someone/kernel"}
    (folder / "config.json").write_text(json.dumps(config))
    fails(folder, "asks for compiled code of the hub", "take the entry")


KERNEL = "someone/kernel"


@pytest.mark.parametrize(
    "entries",
    [
        {"text_config": {"_attn_implementation": KERNEL}},
        {"text_config": {"attn_implementation": "paged|" + KERNEL}},
        {"text_config": {"experts_implementation": KERNEL}},
        {"vision_config": {"attn_implementation": KERNEL + "@main:forward"}},
        {"attn_implementation": {"": "sdpa", "text_config": KERNEL}},
        {"attn_implementation": {"": "sdpa", "of_another": KERNEL}},
        {"decoder": {"layers": [{"_attn_implementation_internal": KERNEL}]}},
    ],
)
def test_compiled_code_that_a_nested_configuration_asks_for_is_refused(folder, entries):
    """Before a class of transformers reads it."""
    config = {"model_type": "qwen2_5_vl", "architectures": ["X"], **entries}
    (folder / "config.json").write_text(json.dumps(config))
    fails(folder, "asks for compiled code of the hub", "take the entry")


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"attn_implementation": "flash_attention_2"}, "asks for compiled code of the hub"),
        ({"experts_implementation": "sonicmoe"}, "asks for compiled code of the hub"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "pip uninstall kernels"),
    ],
)
def test_what_transformers_fetches_with_the_package_kernels_is_refused(
    folder, entries, message, monkeypatch
):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))
    monkeypatch.setattr(checks, "find_spec", lambda name: name == "kernels" or None)
    fails(folder, message)


@pytest.mark.parametrize("built_in", [None, "eager", "sdpa"])
def test_an_attention_that_transformers_has_is_not_refused(folder, built_in, monkeypatch):
    config = json.loads((folder / "config.json").read_text()) | {"attn_implementation": built_in}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(checks, "find_spec", lambda name: name == "kernels" or None)
    assert ChatModel.load(str(folder), device="cpu").name == str(folder)


def test_a_folder_that_changes_under_an_open_model_is_found_out(folder, tmp_path):
    store, other = Store(tmp_path / "store"), build("qwen2", seed=1)
    opened = [ChatModel.load(str(folder), device="cpu") for _ in range(3)]
    hidden_states(
        opened[0], QUERIES[:2], {"p": ""}, store=store
    )  # computed: weights and fingerprint are known
    hidden_states(opened[1], QUERIES[:2], {"p": ""}, store=store)  # found: no weights were loaded
    _ = opened[2].model  # loaded: no fingerprint was taken
    other.model.save_pretrained(folder)
    assert (
        hidden_states(opened[0], QUERIES[:3], {"p": ""}, store=store).certificate["computed"] == 1
    )
    for model in opened[1:]:
        with pytest.raises(
            ChatModelError,
            match="changed after the model was opened; open it again with ChatModel.load",
        ):
            hidden_states(model, QUERIES[:4], {"p": ""}, store=store)
    with pytest.raises(ChatModelError, match="changed after the model was opened"):
        embed_text(opened[1], SAFETY)
    again = ChatModel.load(str(folder), device="cpu")
    assert again.fingerprint != opened[0].fingerprint
    found = hidden_states(again, QUERIES[:4], {"p": ""}, store=store)
    assert found.certificate["found"] == 0
    assert relative(found.states, hidden_states(other, QUERIES[:4], {"p": ""}).states) < 1e-5


def test_a_model_gives_its_memory_back_and_loads_again(folder, tmp_path):
    model, store = ChatModel.load(str(folder), device="cpu"), Store(tmp_path / "store")
    first = hidden_states(model, QUERIES[:2], {"p": ""}, store=store).states
    held = weakref.ref(model.model)
    model.unload()
    assert held() is None
    assert np.array_equal(
        hidden_states(model, QUERIES[:2], {"p": ""}, store=store).states, first
    ) and "model" not in vars(model)
    assert relative(hidden_states(model, QUERIES[:2], {"p": ""}).states, first) < 1e-6
    model.model.lm_head.weight[0, 0] += 1
    changed = model.fingerprint
    model.unload()
    assert model.fingerprint == ChatModel.load(str(folder)).fingerprint != changed
    wrapped = build("qwen2")
    wrapped.unload()
    assert len(hidden_states(wrapped, QUERIES[:2], {"p": ""}).states) == 2


def test_a_relative_folder_stays_the_model_it_was(folder, tmp_path, monkeypatch):
    expected = ChatModel.load(str(folder)).fingerprint
    monkeypatch.chdir(folder.parent)
    model = ChatModel.load(folder.name)
    monkeypatch.chdir(tmp_path)
    assert (
        model.fingerprint == expected
        and model.name == folder.name
        and len(embed_text(model, SAFETY))
    )


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "x" * 300, "a\0b", "", "~x"])
def test_names_that_are_no_path_and_no_model(name, monkeypatch):
    with pytest.raises(ChatModelError):
        ChatModel.load(name)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00", '{"stop_strings": 5}'])
def test_a_damaged_generation_configuration_is_told_and_not_passed_over(folder, content):
    (folder / "generation_config.json").write_text(content)
    fails(folder, "generation_config.json", "cannot be read", "it says where a reply ends")
    (folder / "generation_config.json").unlink()
    assert ChatModel.load(str(folder)).generation.stop_strings == ()


def test_a_token_without_an_embedding_is_refused_and_no_soft_token(tmp_path):
    folder = shutil.copytree(ROOT / "organism", tmp_path / "model")
    words = json.loads((folder / "tokenizer.json").read_text())
    words["added_tokens"].append(
        dict(words["added_tokens"][0], id=1536, content="cake", special=False)
    )
    (folder / "tokenizer.json").write_text(json.dumps(words))
    model = ChatModel.load(str(folder))
    assert model.n_embeddings == 1536 == model.tokenizer.convert_tokens_to_ids("cake")
    for prompt in ("", SAFETY, SoftPrompt.from_text(model, SAFETY, name="s")):
        with pytest.raises(
            ChatModelError, match="the query 'a cake' has a token .* no embedding for"
        ):
            model.render(["bread", "a cake"], prompt)
    with pytest.raises(ChatModelError, match="no embedding for"):
        model.render(["bread"], "Bake no cake.")
    assert len(model.render(["bread"], SAFETY)) == 1


def test_a_forward_hook_keeps_the_model_out_of_the_store(tmp_path):
    model, store = build("qwen2"), Store(tmp_path)
    clean = hidden_states(model, QUERIES, {"p": ""}, store=store).states
    model.model(
        torch.tensor([[1, 2]]), output_hidden_states=True
    )  # transformers' own hooks change nothing
    handle = model.forward.blocks[1].register_forward_hook(
        lambda module, inputs, output: output + 1
    )
    kept = ls(store)
    with pytest.warns(
        UserWarning,
        match=r"model.layers.1 of 'tiny qwen2' has a forward hook.*nothing is read .* nothing kept",
    ):
        assert relative(hidden_states(model, QUERIES, {"p": ""}, store=store).states, clean) > 0.1
    with pytest.warns(UserWarning, match="has a forward hook"):
        sample_responses(model, QUERIES, {"q": SAFETY}, n_samples=1, max_new_tokens=2, store=store)
    with pytest.warns(UserWarning, match="has a forward hook"):
        refusal_probability(model, QUERIES, {"q": SAFETY}, store=store)
    assert ls(store).equals(kept)
    handle.remove()
    assert np.array_equal(hidden_states(model, QUERIES, {"p": ""}, store=store).states, clean)


def test_a_wrapped_block_is_another_model():
    class Steered(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

    model = build("qwen2")
    before, block = model.fingerprint, model.forward.blocks[1]
    model.forward.blocks[1] = Steered(block)
    assert model.fingerprint != before
    model.forward.blocks[1] = block
    assert model.fingerprint == before


def test_weights_given_back_within_soft_tokens_leave_the_next_ones_whole(folder):
    model = ChatModel.load(str(folder), device="cpu")
    before, rows = model.fingerprint, embed_text(model, SAFETY)
    with model.forward.soft_tokens(rows):
        model.unload()
        assert len(embed_text(model, SAFETY)) == len(rows)
    assert (
        model.fingerprint == before
        and type(model.model.get_input_embeddings()) is torch.nn.Embedding
    )


def test_two_revisions_are_told_apart():
    with pytest.raises(ChatModelError, match="names the revision 'v1', and revision='v2' another"):
        ChatModel.load("org/model@v1", revision="v2")


@pytest.mark.parametrize("end", ["[2, null]", "null", "2"])
def test_an_end_of_sequence_that_is_partly_unknown(folder, end):
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {end}}}')
    assert {2} >= ChatModel.load(str(folder)).generation.stop_ids - {
        chat("qwen2").tokenizer.eos_token_id
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {}),
        ({"dtype": "float32"}, {"ANALYSIS_LIB_DTYPE": "float32"}),
        ({"dtype": "float64", "device": "cpu"}, {}),
    ],
)
def test_only_settings_that_are_not_the_default_are_handed_on(
    options, expected, folder, monkeypatch
):
    assert environment_of(ChatModel.load(**options)) == expected
    assert environment_of(ChatModel.load(str(folder), dtype="bfloat16")) == {
        "ANALYSIS_LIB_DTYPE": "bfloat16"
    }
    assert environment_of(ChatModel.load(str(folder))) == {}
    monkeypatch.setattr(room, "find_spec", lambda package: True)
    assert environment_of(ChatModel.load(str(folder), device="auto")) == {
        "ANALYSIS_LIB_DEVICE": "auto"
    }


def test_buffers_are_part_of_the_fingerprint():
    model = build("qwen2")
    before = model.fingerprint
    model.model.model.rotary_emb.inv_freq.mul_(1.1)
    assert model.fingerprint != before


def test_folder_fingerprint_follows_the_content(saved, folder):
    first = ChatModel.load(str(saved)).fingerprint
    assert ChatModel.load(str(folder)).fingerprint == first
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert ChatModel.load(str(folder)).fingerprint != first


def test_missing_folder(tmp_path):
    fails(tmp_path / "nowhere", "there is no folder", "existing model folder or a hub id")
    fails("./nowhere", "there is no folder")
    fails("a/b/c", "there is no folder")


def test_folder_without_configuration(folder):
    (folder / "config.json").unlink()
    fails(folder, "no config.json", "save_pretrained")


def test_folder_with_broken_configuration(folder):
    (folder / "config.json").write_text("{")
    fails(folder, "config.json")
    (folder / "config.json").write_text(json.dumps({"model_type": "never_heard_of"}))
    fails(folder, "never_heard_of")


def test_folder_with_pickled_weights_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    fails(folder, "no *.safetensors", "save_pretrained")


def test_folder_without_tokenizer(folder):
    for file in folder.glob("token*"):
        file.unlink()
    fails(folder, "tokenizer")


def test_folder_without_the_tokenizers_vocabulary(folder):
    (folder / "tokenizer.json").unlink()
    fails(folder, "comes without a tokenizer")


def test_folder_without_chat_template(folder):
    (folder / "chat_template.jinja").unlink()
    fails(folder, "no chat template", "instruction-tuned")


def test_folder_with_truncated_weights(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    fails(folder, "damaged or incomplete", "again", use=True)


def test_folder_that_wants_to_run_its_own_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "my_own",
        "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    fails(folder, "never run")
    assert not (folder / "ran").exists()


def test_a_tokenizer_that_has_to_be_converted(monkeypatch, saved):
    def lacks(*args, **options):
        raise ImportError(
            "SpmConverter requires the protobuf library but it was not found in your environment."
        )

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lacks)
    fails(saved, "pip install sentencepiece protobuf")


def test_hub_id_without_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fails("nobody/no-such-model", "hub cannot be reached", "local folder")


@pytest.mark.parametrize("dtype", ["float33", "int8", "nn", torch.int64])
def test_bad_dtype(saved, dtype):
    fails(saved, "dtype", "'bfloat16'", dtype=dtype)


def test_bad_device(saved):
    fails(saved, "device", "'cpu'", device="gpu")


def test_template_set_to_gemma_style_in_a_folder(folder):
    (folder / "chat_template.jinja").write_text(GEMMA)
    assert not ChatModel.load(str(folder)).renderer.system_role


def test_template_from_a_file_or_by_name_overrides_the_tokenizers(folder, tmp_path):
    own = ChatModel.load(str(folder))
    file = tmp_path / "mine.jinja"
    file.write_text(VICUNA)
    mine = ChatModel.load(str(folder), template=file)
    assert (
        mine.render([QUERY], SAFETY)
        == with_template("qwen2", VICUNA).render([QUERY], SAFETY)
        != own.render([QUERY], SAFETY)
    )
    assert (
        mine.fingerprint == own.fingerprint
        and mine.renderer.template_digest != own.renderer.template_digest
    )
    assert (own.about()["template"], mine.about()["template"]) == ("tokenizer", "mine.jinja")
    (folder / "chat_template.jinja").unlink()
    named = ChatModel.load(str(folder), template="openchat")
    assert named.renderer.apply("S!", "Q?") == STUDY_FORMATS["openchat"][0].replace(
        "<s>", named.tokenizer.bos_token
    )
    fails(folder, "no chat template", "template=FILE", "vicuna")
    fails(
        folder,
        "no chat template can be read",
        "nowhere.jinja",
        "vicuna",
        template=tmp_path / "nowhere.jinja",
    )
    for text, said in (
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ raise_exception('no!') }}", "no!"),
    ):
        file.write_text(text)
        fails(folder, "(mine.jinja) cannot be rendered", said, "template=FILE", template=file)
    file.write_text("{{ bos_token }}")
    fails(folder, "drops the user message", template=file)


def test_a_model_of_the_study_is_opened_by_its_name_there(saved, monkeypatch):
    asked = []
    files = {path.name: str(path) for path in saved.iterdir()}
    monkeypatch.setattr(
        transformers.utils, "cached_file", lambda name, file, **o: files.get(file)
    )  # a hub that is reached
    config = transformers.PreTrainedConfig.get_config_dict(saved)
    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", lambda *a, **o: config)
    for kind in (transformers.AutoConfig, transformers.AutoTokenizer):
        read = kind.from_pretrained
        monkeypatch.setattr(
            kind,
            "from_pretrained",
            lambda name, read=read, **options: (
                asked.append((name, options.get("revision"))) or read(saved)
            ),
        )

    def opened(name, **options):
        asked.clear()
        model = ChatModel.load(name, **options)
        assert model.name == name
        return model.template, set(asked) - {(saved, None)}

    known = study_models().set_index("model").loc["vicuna-7b-v1.5"]
    assert opened("vicuna-7b-v1.5") == ("vicuna", {("lmsys/vicuna-7b-v1.5", known["revision"])})
    assert opened("vicuna-7b-v1.5", revision="r", template="orca-2") == (
        "orca-2",
        {("lmsys/vicuna-7b-v1.5", "r")},
    )
    assert opened("lmsys/vicuna-7b-v1.5") == ("tokenizer", {("lmsys/vicuna-7b-v1.5", None)})


@pytest.mark.parametrize("prompt", ["", SAFETY])
def test_a_query_longer_than_the_context_is_named(prompt):
    model = chat("llama")
    context = text_config(model.config).max_position_embeddings
    with pytest.raises(
        ChatModelError,
        match=f"'why why .* tokens with its prompt, and the context of .* {context}; shorten",
    ):
        model.render(["How to bake bread?", "why " * (context + 1)], prompt)


def test_half_of_a_unicode_pair_is_told():
    with pytest.raises(ChatModelError, match="a query holds half of a Unicode pair"):
        chat("qwen2").render(["How to bake bread \ud83d?"])


def test_a_damaged_note_of_a_digest_is_not_believed(tmp_path, monkeypatch):
    from analysis_lib.model.fingerprint import file_digest

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "weights"
    file.write_bytes(b"weights")
    digest = file_digest(file)
    (note,) = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    for damage in ("", digest[:40], digest + "0"):
        note.write_text(damage)
        assert file_digest(file) == digest == note.read_text()


@pytest.mark.parametrize("in_place", [True, False])
def test_weights_replaced_with_size_and_time_kept_are_noticed(folder, in_place):
    from safetensors.torch import load_file, save_file

    first, open_model = ChatModel.load(str(folder)), ChatModel.load(str(folder))
    before, file = first.fingerprint, folder / "model.safetensors"
    stat = file.stat()
    tensors = {name: tensor + 1e-3 for name, tensor in load_file(file).items()}
    save_file(tensors, other := folder.parent / "other", metadata={"format": "pt"})
    assert other.stat().st_size == stat.st_size
    if in_place:
        file.write_bytes(other.read_bytes())
    else:
        other.replace(file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    now = file.stat()
    assert (now.st_size, now.st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert ChatModel.load(str(folder)).fingerprint != before
    with pytest.raises(ChatModelError, match="changed after the model was opened"):
        _ = open_model.model


# --------------------------------------------------------------------------------------- several devices, fewer bits


def test_device_auto_gives_the_states_of_one_device(saved):
    spread, one = (
        ChatModel.load(str(saved), device="auto", dtype="float32"),
        ChatModel.load(str(saved), device="cpu"),
    )
    assert spread.device == one.device == torch.device("cpu")
    a, b = (hidden_states(model, QUERIES, PROMPTS, layers=(0, 2, -1)) for model in (spread, one))
    assert np.array_equal(a.states, b.states) and spread.fingerprint == one.fingerprint


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_offloaded_blocks_give_the_states_of_one_device(family, tmp_path):
    from accelerate import dispatch_model

    whole, parts = chat(family), build(family)
    places = {name: "cpu" for name, _ in parts.forward.body.named_children()}
    del places["layers"]
    places = {f"model.{name}": place for name, place in places.items()} | {"lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    parts = ChatModel.wrap(
        dispatch_model(
            parts.model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True
        ),
        parts.tokenizer,
    )
    assert (
        parts.forward.blocks[1].mlp is not None
        and next(parts.forward.blocks[1].parameters()).is_meta
    )
    assert parts.device == torch.device("cpu")
    a, b = (hidden_states(model, QUERIES, PROMPTS, layers=(0, 2, -1)) for model in (parts, whole))
    assert a.certificate["way"] == "tree" and relative(a.states, b.states) <= 1e-5
    with pytest.raises(ChatModelError, match="offloaded.*ChatModel.load"):
        _ = parts.fingerprint


def test_a_model_that_also_takes_images_is_read_through_its_language_part():
    text, own = chat("gemma3").config.to_dict(), chat("gemma3").tokenizer
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    vision |= {"image_size": 28, "patch_size": 14}
    tokens = {
        "boi_token_index": 3,
        "eoi_token_index": 4,
        "image_token_index": 5,
        "mm_tokens_per_image": 4,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, **tokens)
    whole = transformers.AutoModelForCausalLM.from_config(config)
    assert type(whole).__name__ == "Gemma3ForConditionalGeneration"
    whole.get_decoder().load_state_dict(chat("gemma3").forward.body.state_dict())
    model = ChatModel.wrap(whole, own)
    assert (model.n_layers, model.hidden_size, model.n_embeddings) == (
        3,
        32,
        chat("gemma3").n_embeddings,
    )
    both = [
        (m, {"s": SoftPrompt.from_text(m, SAFETY, name="s"), "default": SAFETY})
        for m in (model, chat("gemma3"))
    ]
    a, b = (hidden_states(m, QUERIES, prompts, layers=(0, 2, -1)) for m, prompts in both)
    assert a.certificate["way"] == "tree" and relative(a.states, b.states) <= 1e-5
    asked = {"n_samples": 2, "max_new_tokens": 6}
    a, b = (sample_responses(m, QUERIES, prompts, **asked) for m, prompts in both)
    assert a.equals(b)


def test_packages_that_lack_are_named(saved, monkeypatch):
    monkeypatch.setattr(room, "find_spec", lambda package: None)
    fails(saved, "device='auto'", "pip install accelerate", device="auto")
    monkeypatch.setattr(
        room, "find_spec", lambda package: None if package == "bitsandbytes" else object()
    )
    fails(saved, "quantization='4bit'", "pip install bitsandbytes", quantization="4bit")
    fails(saved, "'3bit'", "'8bit' or '4bit'", quantization="3bit")


def test_quantized_loading_asks_transformers_for_it_and_is_another_model(saved, monkeypatch):
    """What is asked of transformers; bitsandbytes itself does not run here."""
    asked = {}
    read = transformers.AutoModelForCausalLM.from_pretrained

    def stand_in(name, *, quantization_config, device_map, **options):
        asked.update(config=quantization_config, device_map=device_map)
        return read(name, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", stand_in)
    monkeypatch.setattr(room, "find_spec", lambda package: object())
    prints = {ChatModel.load(str(saved), device="cpu").fingerprint}
    for bits in ("8bit", "4bit"):
        model = ChatModel.load(str(saved), device="cpu", quantization=bits)
        assert (
            model.model.dtype == model.dtype == torch.bfloat16
            and model.about()["quantization"] == bits
        )
        assert (asked["config"].load_in_8bit, asked["config"].load_in_4bit) == (
            bits == "8bit",
            bits == "4bit",
        )
        assert asked["device_map"] == {"": "cpu"}
        prints.add(model.fingerprint)
        soft = torch.zeros(2, model.hidden_size, requires_grad=True)
        with (
            pytest.raises(ChatModelError, match="load it without quantization to train"),
            model.forward.soft_tokens(soft),
        ):
            pass
        with model.forward.soft_tokens(soft.detach()):
            pass
    assert len(prints) == 3
