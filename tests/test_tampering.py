"""A model that computes something else than its key says is neither read from the store nor kept."""

from __future__ import annotations

import contextlib
import functools
import types
import warnings

import numpy as np
import pytest
import torch
import transformers
from tiny_models import FAMILIES, OWN_ATTENTION, PROMPTS, QUERIES, SAFETY, build, chat, relative

from analysis_lib import (
    ChatModel,
    SoftPrompt,
    Store,
    hidden_states,
    next_token_loss,
    refusal_probability,
    sample_responses,
)
from analysis_lib.collect.recheck import WITNESS_NUMBERS
from analysis_lib.model.errors import ChatModelError
from analysis_lib.model.tampering import altered
from analysis_lib.store.upkeep import compact, ls

SHORT = {"n_samples": 2, "max_new_tokens": 4}


def lora(**options):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, init_lora_weights=False, **options
    )


class Adds(torch.nn.Module):
    """A block of the user's own."""

    def __init__(self, block):
        super().__init__()
        self.block, self.vector = block, None

    def forward(self, *args, **options):
        out = self.block(*args, **options)
        return out if self.vector is None else out + self.vector


# ----------------------------------------------------------------- ways to steer without a hook


@contextlib.contextmanager
def replaced_forward(model):
    mlp = model.forward.blocks[1].mlp
    old = mlp.forward
    mlp.forward = lambda x: old(x) + 1.0
    yield
    del mlp.forward


@contextlib.contextmanager
def replaced_forward_that_looks_like_the_old(model):
    mlp = model.forward.blocks[1].mlp
    old = mlp.forward

    @functools.wraps(old)
    def forward(self, x):
        return old(x) + 1.0

    mlp.forward = types.MethodType(torch.no_grad()(forward), mlp)
    yield
    del mlp.forward


@contextlib.contextmanager
def replaced_forward_of_the_class(model):
    kind = type(model.forward.blocks[1].mlp)
    old, kind.forward = kind.forward, lambda self, x: old(self, x) + 1.0
    yield
    kind.forward = old


@contextlib.contextmanager
def replaced_call_of_the_class(model):
    kind = type(model.forward.blocks[1].mlp)
    kind.__call__ = lambda self, x: torch.nn.Module.__call__(self, x) + 1.0
    yield
    del kind.__call__


@contextlib.contextmanager
def replaced_function(model):
    from transformers.models.qwen2 import modeling_qwen2

    old = modeling_qwen2.apply_rotary_pos_emb
    modeling_qwen2.apply_rotary_pos_emb = lambda q, k, *more, **options: (q, k)
    yield
    modeling_qwen2.apply_rotary_pos_emb = old


@contextlib.contextmanager
def attention_of_the_users_own(model):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(module, query, *more, **options):
        return sdpa_attention_forward(module, query * 4, *more, **options)

    before = model.config._attn_implementation
    transformers.AttentionInterface.register("own", attend)
    model.config._attn_implementation = "own"
    yield
    model.config._attn_implementation = before
    del transformers.AttentionInterface._global_mapping["own"]


@contextlib.contextmanager
def global_hook(model):
    mlp = model.forward.blocks[1].mlp
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out + 1.0 if module is mlp else None
    )
    yield
    handle.remove()


@contextlib.contextmanager
def wrapped_block(model):
    block = model.forward.blocks[1]
    model.forward.blocks[1] = wrapper = Adds(block)
    wrapper.vector = torch.full((32,), 3.0)
    yield
    model.forward.blocks[1] = block


@contextlib.contextmanager
def scaled_attention(model):
    attention = model.forward.blocks[1].self_attn
    attention.scaling *= 4
    yield
    attention.scaling /= 4


@contextlib.contextmanager
def another_epsilon(model):
    norm = model.model.model.norm
    before, norm.variance_epsilon = norm.variance_epsilon, 50.0
    yield
    norm.variance_epsilon = before


@contextlib.contextmanager
def swapped_activation(model):
    mlp = model.forward.blocks[1].mlp
    before, mlp.act_fn = mlp.act_fn, torch.nn.Tanh()
    yield
    mlp.act_fn = before


@contextlib.contextmanager
def swapped_blocks(model):
    blocks = model.forward.blocks
    first, second = blocks[0].mlp, blocks[1].mlp
    blocks[0].mlp, blocks[1].mlp = second, first
    yield
    blocks[0].mlp, blocks[1].mlp = first, second


@contextlib.contextmanager
def data_edit(model, by=0.3):
    weight = model.forward.blocks[1].mlp.down_proj.weight
    before = weight.data.clone()
    weight.data += by
    yield
    weight.data.copy_(before)


@contextlib.contextmanager
def edited_angles(model):
    """The rotary angles are read from a buffer's own storage."""
    rope = model.model.model.rotary_emb
    before = rope.inv_freq.data.clone()
    rope.inv_freq.data *= 0.2
    yield
    rope.inv_freq.data.copy_(before)


BYPASSED = [
    replaced_forward,
    replaced_forward_that_looks_like_the_old,
    replaced_forward_of_the_class,
    replaced_call_of_the_class,
    replaced_function,
    attention_of_the_users_own,
    global_hook,
    wrapped_block,
]
OTHER_KEY = [scaled_attention, another_epsilon, swapped_activation, swapped_blocks]
FOUND_OUT = [data_edit, edited_angles]


def everything(model, store):
    """States, replies, refusal probabilities and losses."""
    answers = QUERIES[["query_id"]].assign(response="Sure, here is bread.")
    prompts = {"none": "", "default": SAFETY}
    return (
        hidden_states(model, QUERIES, prompts, layers=(1, -1), store=store).states,
        sample_responses(model, QUERIES, prompts, store=store, **SHORT)["response"].tolist(),
        refusal_probability(model, QUERIES, prompts, openings=["I am sorry", "Sure"], store=store)[
            "log_odds"
        ].to_numpy(),
        next_token_loss(model, QUERIES, answers, prompts, store=store)["loss"].to_numpy(),
    )


def same(a, b) -> bool:
    numbers = all(
        np.abs(x - y).max() <= 1e-4 * np.abs(y).max()
        for x, y in zip(a, b)
        if x is not a[1] and y is not b[1]
    )
    return numbers and a[1] == b[1]


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("way", BYPASSED + OTHER_KEY + FOUND_OUT, ids=lambda way: way.__name__)
def test_a_steered_model_is_computed_and_a_clean_one_finds_its_own_rows(way, tmp_path, quiet):
    model, store = build("qwen2"), Store(tmp_path)
    clean = everything(model, store)
    with way(model):
        truth = everything(model, None)
        assert not same(truth, clean)
        assert same(everything(model, store), truth)
    again = everything(model, store)
    assert same(again, clean)
    assert hidden_states(model, QUERIES, PROMPTS, store=store).certificate["found"] == 12


@pytest.mark.parametrize("way", BYPASSED + OTHER_KEY + FOUND_OUT, ids=lambda way: way.__name__)
def test_rows_of_a_steered_model_never_reach_the_clean_one(way, tmp_path, quiet):
    clean, model, store = everything(build("qwen2"), None), build("qwen2"), Store(tmp_path)
    _ = model.fingerprint
    with way(model):
        everything(model, store)
    assert same(everything(model, store), clean)
    assert same(everything(build("qwen2"), Store(tmp_path)), clean)


@pytest.mark.parametrize("way", FOUND_OUT, ids=lambda way: way.__name__)
@pytest.mark.parametrize("compacted", [False, True])
def test_what_no_key_sees_is_kept_out_of_a_store_that_knows_the_model(way, compacted, tmp_path):
    """No row of the second call is found: a witness of the first one tells."""
    model, store = build("qwen2"), Store(tmp_path)
    everything(model, store)
    if compacted:
        compact(store, spare=0)
    kept = ls(store)[["kind", "rows"]]
    with way(model):
        for prompt in ("Be kind.", SoftPrompt.from_text(model, "Be brief.", name="s")):
            for call in (hidden_states, refusal_probability):
                with pytest.warns(UserWarning, match="does not compute what the store keeps of it"):
                    call(model, QUERIES, {"new": prompt}, store=store)
            with pytest.warns(UserWarning, match="does not compute what the store keeps of it"):
                sample_responses(model, QUERIES, {"new": prompt}, store=store, **SHORT)
    assert ls(store)[["kind", "rows"]].equals(kept)


def test_autocast_computes_something_else(tmp_path):
    model, store = build("qwen2"), Store(tmp_path)
    clean = hidden_states(model, QUERIES, {"p": ""}, store=store).states
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match="runs under autocast on cpu, which no key .* knows"):
            cast = hidden_states(model, QUERIES, PROMPTS, store=store, n_check=0)
    assert (
        cast.certificate["found"] == 0
        and relative(cast.at(-1, prompt="none")[0], clean[:, 0]) > 1e-3
    )
    assert hidden_states(model, QUERIES, PROMPTS, store=store).certificate["found"] == 6


def test_the_cause_is_named_as_far_as_it_is_known(tmp_path):
    model, store = build("qwen2"), Store(tmp_path)
    hidden_states(model, QUERIES, {"p": ""}, store=store)
    with data_edit(model), pytest.warns(UserWarning, match=r"weights were changed through \.data"):
        hidden_states(model, QUERIES, {"p": ""}, store=store)
    model.model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    loaded = ChatModel.load(tmp_path / "model", device="cpu")
    hidden_states(loaded, QUERIES, {"p": ""}, store=store)
    with data_edit(loaded), pytest.warns(UserWarning, match="cause is not known.*cache prune"):
        found = hidden_states(loaded, QUERIES, {"p": ""}, store=store)
    assert found.certificate["found"] == 0


def test_the_recheck_can_be_switched_off_and_needs_no_weights(tmp_path, monkeypatch):
    model, store = build("qwen2"), Store(tmp_path / "store")
    clean = hidden_states(model, QUERIES, {"p": ""}, store=store).states
    with data_edit(model):
        blind = hidden_states(model, QUERIES, {"p": ""}, store=Store(store.folder, recheck=False))
    assert np.array_equal(blind.states, clean)
    model.model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    first = everything(ChatModel.load(tmp_path / "model", device="cpu"), store)
    unloaded = ChatModel.load(tmp_path / "model", device="cpu")
    assert same(everything(unloaded, store), first) and not unloaded.loaded


def test_a_model_that_has_to_load_is_looked_at_before_its_rows_are_kept(tmp_path):
    made, store = build("qwen2"), Store(tmp_path / "store")
    made.model.save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    model = ChatModel.load(tmp_path / "model", device="cpu")
    with replaced_forward_of_the_class(made), pytest.warns(UserWarning, match="whose forward"):
        hidden_states(model, QUERIES, {"p": ""}, store=store)
    model.unload()
    with replaced_forward_of_the_class(made), pytest.warns(UserWarning, match="whose forward"):
        sample_responses(model, QUERIES, {"p": ""}, store=store, **SHORT)
    assert ls(store).empty


# ------------------------------------------------------------------------------------ adapters


def test_an_adapter_may_be_switched_so_the_store_is_not_asked(tmp_path):
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(build("qwen2").model, lora())
    tuned.add_adapter("second", lora())
    model, store = ChatModel.wrap(tuned, build("qwen2").tokenizer, name="tuned"), Store(tmp_path)
    seen = []
    for change in (
        contextlib.nullcontext,
        tuned.disable_adapter,
        lambda: contextlib.nullcontext(tuned.set_adapter("second")),
    ):
        with change():
            with pytest.warns(UserWarning, match="adapter layer of PEFT.*undo it") as told:
                states = hidden_states(model, QUERIES, {"p": ""}, store=store).states
            assert len([w for w in told if "PEFT" in str(w.message)]) == 1
            assert np.array_equal(states, hidden_states(model, QUERIES, {"p": ""}).states)
            seen.append(states)
    assert min(relative(a, b) for a in seen for b in seen if a is not b) > 0.1
    assert ls(store).empty
    merged = ChatModel.wrap(tuned.merge_and_unload(), model.tokenizer, name="merged")
    hidden_states(merged, QUERIES, {"p": ""}, store=store)
    assert hidden_states(merged, QUERIES, {"p": ""}, store=store).certificate["found"] == 6


@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning", "PromptEncoder"])
def test_learned_tokens_before_the_chat_are_refused(kind):
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind + "Config")(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(build("llama").model, config)
    with pytest.raises(ChatModelError, match=r"wrap its base model, model.get_base_model\(\)"):
        ChatModel.wrap(tuned, chat("llama").tokenizer)
    assert ChatModel.wrap(tuned.get_base_model(), chat("llama").tokenizer).n_layers == 3


# ------------------------------------------------------------------------------- clean models


@pytest.mark.parametrize("family", [*FAMILIES, *OWN_ATTENTION])
def test_a_clean_model_is_never_bypassed(family, tmp_path):
    model, store = build(family), Store(tmp_path)
    before = model.fingerprint
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "the chat template|.*white space at the ends")
        prompts = {"none": "", "soft": SoftPrompt.from_text(model, SAFETY, name="soft")}
        for found in (0, 12):
            states = hidden_states(model, QUERIES, prompts, store=store)
            assert states.certificate["found"] == found
            sample_responses(model, QUERIES, prompts, store=store, **SHORT)
            refusal_probability(model, QUERIES, prompts, openings=["Sure"], store=store)
        with model.forward.soft_tokens(prompts["soft"].embeddings):
            assert altered(model.model, family) == ""
        model.model(torch.arange(200)[None] % 128)
    assert model.fingerprint == before


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "mamba"])
def test_saving_a_model_leaves_its_fingerprint(family, tmp_path):
    """transformers writes the dtype and the class into the configuration then."""
    made = build(family)
    before = made.fingerprint
    made.model.save_pretrained(tmp_path / "made")
    made.tokenizer.save_pretrained(tmp_path / "made")
    assert made.fingerprint == ChatModel.wrap(made.model, made.tokenizer).fingerprint == before
    opened = ChatModel.load(tmp_path / "made")
    unloaded = opened.fingerprint
    opened.model.save_pretrained(tmp_path / "again")
    assert opened.fingerprint == unloaded


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 32,
        },
    ],
)
def test_frequencies_that_follow_the_length_leave_the_fingerprint(rope):
    model = build("llama", max_position_embeddings=64, rope_parameters=rope)
    before, length = model.fingerprint, model.model.model.rotary_emb.inv_freq.clone()
    model.model(torch.arange(100)[None])
    assert not torch.equal(model.model.model.rotary_emb.inv_freq, length)
    assert (
        model.fingerprint
        == before
        == build("llama", max_position_embeddings=64, rope_parameters=rope).fingerprint
    )


def test_accelerates_replaced_forward_and_compiled_modules_are_clean(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = build("qwen2")
    accelerate.cpu_offload(model.model, execution_device=torch.device("cpu"))
    assert "forward" in vars(model.forward.blocks[0].mlp.up_proj)
    assert altered(model.model, "m") == ""
    compiled = build("qwen2")
    for block in compiled.forward.blocks:
        block.compile()
    compiled.forward.blocks[0].mlp.forward = torch.compile(compiled.forward.blocks[0].mlp.forward)
    assert altered(compiled.model, "m") == ""


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_a_clean_model_of_another_dtype_finds_its_rows(dtype, tmp_path):
    model, store = build("qwen2", dtype=getattr(torch, dtype)), Store(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*white space at the ends")
        first = everything(model, store)
        again = everything(model, store)
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    # In half precision a difference has to stand out of the model's own rounding.
    with data_edit(model, by=3.0), pytest.warns(UserWarning, match="does not compute"):
        refusal_probability(model, QUERIES, {"none": ""}, openings=["Sure"], store=store)


def test_a_witness_is_small_and_of_the_longest_row(tmp_path):
    model, store = build("qwen2"), Store(tmp_path)
    sample_responses(model, QUERIES, {"p": SAFETY}, store=store, **SHORT)
    (seen,) = store.witnesses([], model.fingerprint)
    rows = model.render(QUERIES["text"].tolist(), SAFETY)
    assert len(seen["ids"]) == max(len(row.ids) for row in rows)
    state = hidden_states(model, QUERIES, {"p": SAFETY}).states[3, 0]
    assert len(seen["state"]) == min(WITNESS_NUMBERS, model.hidden_size)
    assert relative(seen["state"], state) < 1e-5


@pytest.mark.parametrize(
    "wrong", [{"ids": [10**6]}, {"width": 7}, {"state": [1.0]}, {"layer": 99}, {"ids": "x"}, None]
)
def test_a_witness_that_cannot_be_of_the_model_is_passed_over(wrong, tmp_path):
    model, store = build("qwen2"), Store(tmp_path)
    sample_responses(model, QUERIES, {"p": SAFETY}, store=store, **SHORT)
    (seen,) = store.witnesses([], model.fingerprint)
    other = Store(tmp_path / "other")
    about = {"model": model.fingerprint, "witness": wrong and {**seen, **wrong}}
    other.write_responses(["0" * 64], [{"response": "", "end": "eos"}], about=about)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        hidden_states(model, QUERIES, {"p": ""}, store=other)
    assert len(ls(other)) == 2
