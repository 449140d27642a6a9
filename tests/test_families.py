"""Every family's numbers are those of plain passes, past windows and switches and in half precision, or are refused."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from tiny_models import CHATML, QUERIES, SAFETY, build, plain_states, relative, tokenizer

from analysis_lib.collect.certificates import ParityError
from analysis_lib.collect.responses import sample_responses
from analysis_lib.collect.states import hidden_states
from analysis_lib.judge import likelihood
from analysis_lib.judge.likelihood import next_token_loss
from analysis_lib.model import passes, steps
from analysis_lib.model.architecture import turns
from analysis_lib.model.chat import ChatModel
from analysis_lib.model.errors import ChatModelError
from analysis_lib.model.passes import last_states, log_probabilities, shares_prefixes, tree_tokens
from analysis_lib.model.precision import in_float32
from analysis_lib.model.soft_prompt import SoftPrompt
from analysis_lib.model.tree import LONG
from analysis_lib.store.store import Store
from analysis_lib.store.upkeep import info
from analysis_lib.train.export import export
from analysis_lib.train.tuning import PromptTuningConfig, train_prompt_tuning
from tools.families import SHORT_FORM, look_at, words

LONG_QUERY = pd.DataFrame({"query_id": ["long"], "text": ["How do I bake bread in an oven? " * 14]})
MIXED_LENGTHS = pd.concat([QUERIES[["query_id", "text"]], LONG_QUERY], ignore_index=True)
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}


def made(config_class, *, dtype=torch.float32, **settings):
    """A random model of a family that tests/tiny_models.py does not have, with its chat tokenizer."""
    chosen = tokenizer("bytes", CHATML)
    common = {
        "vocab_size": 368,
        "hidden_size": 32,
        "initializer_range": 0.3,
        "bos_token_id": chosen.bos_token_id,
        "eos_token_id": chosen.eos_token_id,
        "pad_token_id": chosen.pad_token_id,
    }
    config = getattr(transformers, config_class)(**{**common, **settings})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(0, 0.3)
    return ChatModel.wrap(model, chosen, name=config_class)


def longrope(switch):
    rope = {"rope_type": "longrope", "original_max_position_embeddings": switch, **FACTORS}
    changes = {"max_position_embeddings": 2048, "original_max_position_embeddings": switch}
    return build("phi3", sliding_window=None, rope_parameters=rope, **changes)


PER_LAYER = {
    "vocab_size_per_layer_input": 368,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "max_position_embeddings": 512,
}


def gemma3n():
    streams = {"intermediate_size": [48] * 4, "altup_num_inputs": 2, "laurel_rank": 4}
    return made("Gemma3nTextConfig", activation_sparsity_pattern=[0.0] * 4, **streams, **PER_LAYER)


def gemma4():
    return made("Gemma4TextConfig", intermediate_size=48, global_head_dim=8, **PER_LAYER)


def assert_plain(model, queries, got, limit=1e-4):
    for text, state in zip(queries["text"], got.states, strict=True):
        row = model.render([text], SAFETY)[0]
        assert relative(state, plain_states(model, row, (-1,))) <= limit


# ---------------------------------------------------------------------------------------- the sweep's short form


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", SHORT_FORM)
def test_a_familys_row_of_the_sweep(family, dtype):
    row = look_at(family, dtype, words())
    assert not row.note.startswith(("failed", "refused", "not built")), row.note
    limit = 1e-4 if dtype == torch.float32 else 2 * row.rounding
    assert row.states <= limit and (row.soft == "refused" or row.soft <= limit)
    assert ("tree" in row.way) == (family not in ("mpt", "mamba", "gpt_neo"))
    if dtype == torch.float32:
        assert row.greedy == "4 of 4" and row.log_p < 1e-4


# -------------------------------------------------------------------------------------------- windows and switches


def test_rows_on_both_sides_of_a_switch_are_as_alone():
    model = longrope(128)
    got = hidden_states(model, MIXED_LENGTHS, {"p": SAFETY})
    assert got.certificate["way"] == "tree, plain"
    assert_plain(model, MIXED_LENGTHS, got)
    answers = MIXED_LENGTHS[["query_id"]].assign(response="Take flour.")
    losses = next_token_loss(model, MIXED_LENGTHS, answers, {"p": SAFETY})["loss"]
    reply = model.tokenizer("Take flour.", add_special_tokens=False)["input_ids"]
    for text, loss in zip(MIXED_LENGTHS["text"], losses, strict=True):
        ids = [*model.render([text], SAFETY)[0].ids, *reply[:-1]]
        logits = model.model(torch.tensor([ids]), use_cache=False).logits[0, -len(reply) :]
        log_p = torch.log_softmax(logits, dim=-1)[range(len(reply)), reply]
        assert abs(loss + float(log_p.mean())) < 1e-4


def test_a_reply_across_a_switch_is_as_of_generate():
    rows = longrope(512).render(QUERIES["text"].tolist(), SAFETY)
    model = longrope(max(len(row.ids) for row in rows) + 3)
    got = sample_responses(
        model, QUERIES, {"p": SAFETY}, n_samples=1, max_new_tokens=10, temperature=0
    )
    for row, reply in zip(rows, got["response"], strict=True):
        ids = torch.tensor([row.ids])
        out = model.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=10,
            eos_token_id=sorted(model.generation.stop_ids),
        )
        text = model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert reply == text


def test_a_window_by_place_in_the_line_is_found_out():
    """GPT-Neo's local attention counts places, not positions: short rows in a long line lose their beginning."""
    local = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    model = made("GPTNeoConfig", window_size=64, max_position_embeddings=512, **local)
    assert turns(model.model.config) == [64] and shares_prefixes(model.forward)
    rows = [(*range(5, 25), *(j * k % 150 for j in range(1, 20))) for k in range(7, 30)]
    states, way = last_states(model.forward, rows)
    assert way == "tree" and tree_tokens(model.forward, 100) == 64
    plain = [model.model.transformer(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
    assert relative(states[:, 0], torch.stack(plain)) <= 1e-4


def test_a_pass_does_not_depend_on_the_passes_before_it():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = build("llama", max_position_embeddings=24, rope_parameters=rope)
    rows = [tuple(j * 7 % 150 for j in range(1, n)) for n in (20, 60, 40, 90, 24, 26)]
    states = last_states(model.forward, rows)[0]
    for row, state in zip(rows, states, strict=True):
        alone = copy.deepcopy(model.model).model(torch.tensor([row])).last_hidden_state[0, -1]
        assert relative(state[0], alone) <= 1e-4


def test_turns_are_found_wherever_a_configuration_keeps_them():
    config = transformers.LlamaConfig(
        rope_parameters={"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 99}
    )
    config.attn_config = {"local_window": 7, "deep": [{"chunk_size": 33}]}
    config.num_local_experts = 5
    assert turns(config) == [7, 33, 99]


# ------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("spread", [0.02, 0.3])
def test_half_precision_refuses_what_float32_refuses(spread):
    for family in ("llama", "qwen2", "gemma3", "mistral"):
        model = build(family, dtype=torch.bfloat16, initializer_range=spread)
        assert shares_prefixes(model.forward), family
        got = hidden_states(model, QUERIES, {"p": SAFETY})
        assert got.certificate["way"] == "tree"
    for family in ("mamba", "jamba"):
        assert not shares_prefixes(build(family, dtype=torch.bfloat16).forward), family
    for dtype in (torch.float32, torch.bfloat16):
        mpt = made("MptConfig", n_heads=4, n_layers=2, dtype=dtype, initializer_range=spread)
        bloom = made("BloomConfig", n_head=4, n_layer=2, dtype=dtype, initializer_range=spread)
        assert not shares_prefixes(mpt.forward) and not shares_prefixes(bloom.forward)


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "deepseek_v2"])
def test_asking_in_float32_changes_no_bit(family):
    model = build(family, dtype=torch.bfloat16)
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    wide = copy.deepcopy(model.model).float()
    row = torch.tensor([[5, 9, 2, 77, 31]])
    with torch.no_grad(), in_float32(model.forward):
        logits = model.model(row).logits
    assert logits.dtype == torch.float32 and relative(logits, wide(row).logits) <= 1e-2
    after = model.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert {v.dtype for v in after.values()} == {v.dtype for v in before.values()}


# --------------------------------------------------------------------------------------------------- certificates


def test_the_longest_row_is_always_certified(monkeypatch):
    model, right = build("llama"), passes.last_states
    longest = max(len(r.ids) for r in model.render(MIXED_LENGTHS["text"].tolist(), SAFETY))

    def wrong(forward, rows, layers):
        states, way = right(forward, rows, layers)
        return torch.stack([s * (1 + (len(r) == longest)) for r, s in zip(rows, states)]), way

    monkeypatch.setattr("analysis_lib.collect.states.last_states", wrong)
    with pytest.raises(ParityError, match="states of 'tiny llama' differ"):
        hidden_states(model, MIXED_LENGTHS, {"p": SAFETY}, n_check=1)


def test_wrong_logits_of_a_reply_are_refused_and_not_stored(monkeypatch, tmp_path):
    model, store, right = build("llama"), Store(tmp_path), steps.CachedStep.next
    assert steps.steps_from_cache(model.forward)
    n = model.n_embeddings

    def wrong(self, parents, tokens):
        return right(self, parents, tokens) + 0.01 * torch.arange(n)

    monkeypatch.setattr(steps.CachedStep, "next", wrong)
    with pytest.raises(ParityError, match="logits of 'tiny llama' differ"):
        sample_responses(model, QUERIES, {"p": ""}, n_samples=2, max_new_tokens=5, store=store)
    assert info(store)["responses_rows"] == 0


def test_wrong_log_probabilities_are_refused_and_not_stored(monkeypatch, tmp_path):
    model, store = build("llama"), Store(tmp_path)

    def wrong(forward, heads, replies):
        found = log_probabilities(forward, heads, replies)
        return found if forward.plainly else [one * 1.01 for one in found]

    monkeypatch.setattr(likelihood, "log_probabilities", wrong)
    answers = QUERIES[["query_id"]].assign(response="Take flour.")
    with pytest.raises(ParityError, match="log probabilities of 'tiny llama' differ"):
        next_token_loss(model, QUERIES, answers, {"p": ""}, store=store)
    assert info(store)["responses_rows"] == 0


def test_wrong_gradients_are_refused_before_the_first_step(monkeypatch):
    model, right = build("llama"), passes.attention_mask
    assert shares_prefixes(model.forward)
    monkeypatch.setattr(
        passes,
        "attention_mask",
        lambda config, see, *rest: right(config, torch.ones_like(see), *rest),
    )
    judged = QUERIES[["query_id"]].assign(response="Take flour and water.", refused=1.0)
    steps_taken = []
    with pytest.raises(ParityError, match="gradients of 'tiny llama' differ"):
        train_prompt_tuning(
            model,
            QUERIES,
            judged,
            SAFETY,
            PromptTuningConfig(epochs=1),
            on_step=lambda *step: steps_taken.append(step),
        )
    assert not steps_taken


# ----------------------------------------------------------------------------- token ids that blocks look up again


@pytest.mark.parametrize("family", [gemma3n, gemma4])
def test_per_layer_embeddings_take_no_soft_prompt(family, tmp_path):
    model = family()
    assert hidden_states(model, QUERIES, {"p": SAFETY}).certificate["max_rel"] < 1e-4
    sample_responses(model, QUERIES[:2], {"p": SAFETY}, n_samples=1, max_new_tokens=2)
    soft = SoftPrompt.from_text(model, SAFETY, name="s")
    judged = QUERIES[["query_id"]].assign(response="Take flour.", refused=1.0)
    asked = [
        lambda: hidden_states(model, QUERIES, {"p": soft}),
        lambda: train_prompt_tuning(model, QUERIES, judged, SAFETY),
        lambda: export(soft, model, tmp_path, ["peft"]),
        lambda: export(soft, model, tmp_path, ["plain"]),
    ]
    for ask in asked:
        with pytest.raises(ChatModelError, match="has per-layer embeddings"):
            ask()
    assert not list(tmp_path.iterdir())


def test_blocks_of_several_streams_are_named():
    with pytest.raises(ChatModelError, match=r"several streams .* read layers=\(-1,\)"):
        hidden_states(gemma3n(), QUERIES, {"p": ""}, layers=(1,))


def test_a_model_whose_blocks_use_the_ids_otherwise_takes_no_soft_prompt(monkeypatch):
    model = build("llama")
    soft = SoftPrompt.from_text(model, SAFETY, name="s")
    block, right = model.forward.blocks[1], model.forward.blocks[1].forward
    seen = []
    model.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    n = model.n_embeddings
    table = torch.randn(n, 32, generator=torch.Generator().manual_seed(0))
    block.forward = lambda x, **kwargs: right(x + table[seen[-1].clamp(max=n - 1)], **kwargs)
    with pytest.raises(ChatModelError, match="token ids beside their embeddings"):
        hidden_states(model, QUERIES, {"p": soft}, n_check=0)


def test_rows_of_the_table_past_the_vocabulary_are_no_soft_tokens():
    model = build("llama", tie_word_embeddings=False)
    table = model.model.get_input_embeddings()
    wide = torch.nn.Embedding(len(table.weight) + 64, 32)
    with torch.no_grad():
        wide.weight[: len(table.weight)] = table.weight
    soft = SoftPrompt.from_text(model, SAFETY, name="s")
    text = hidden_states(model, QUERIES, {"p": SAFETY}).states
    model.model.set_input_embeddings(wide.requires_grad_(False))
    moved = dataclasses.replace(soft, embeddings=soft.embeddings)
    assert relative(hidden_states(model, QUERIES, {"p": moved}).states, text) <= 1e-4


# ------------------------------------------------------------------------------------------------------- long rows


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_long_rows_need_no_mask_of_their_square(family, monkeypatch):
    model = build(family, max_position_embeddings=8192)
    n = 2 * LONG
    shared = [j * 7 % 150 for j in range(1, n)]
    rows = [
        (*range(5, 9), *shared),
        (*range(5, 8), 1, *shared),
        (5, 6, 7, 3, 2),
        (5, 6, 7, 3, 4, 9),
    ]
    deep = [(*shared, 3, 2), (*shared, 3, 4, 9), (*shared, 8)]
    right, sizes = passes.attention_mask, []
    monkeypatch.setattr(
        passes, "attention_mask", lambda c, see, *a: sizes.append(see.numel()) or right(c, see, *a)
    )
    for part in (rows, deep):
        states, way = last_states(model.forward, part)
        assert way == "tree"
        for row, state in zip(part, states, strict=True):
            plain = model.forward.body(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
            assert relative(state[0], plain) <= 1e-4
    assert max(sizes) < 20 * n
    replies = [(3, 4), (9,), (8, 7), (5,)]
    for row, reply, found in zip(rows, replies, log_probabilities(model.forward, rows, replies)):
        ids = torch.tensor([[*row, *reply[:-1]]])
        logits = model.model(ids, use_cache=False).logits[0, -len(reply) :]
        log_p = torch.log_softmax(logits, dim=-1)[range(len(reply)), list(reply)]
        assert np.abs(found - log_p.numpy()).max() < 1e-4
    first = steps.CachedStep(model.forward, rows)
    logits, plainly = first.first(), steps.PlainStep(model.forward, rows).first()
    assert relative(logits, plainly) <= 1e-4
