"""Tokenizers of Llama's kind: the ids of transformers 4, of the study and of exports, and soft tokens that stand apart."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file
from tiny_models import (
    FAMILIES,
    QUERIES,
    SAFETY,
    as_in_transformers_4,
    build,
    chat,
    llama_chat,
    llama_tokenizer,
)
from tokenizers import AddedToken

from analysis_lib.analysis.directions import Direction
from analysis_lib.analysis.space import AnchorSpace
from analysis_lib.collect.states import hidden_states
from analysis_lib.model.chat import ChatModel
from analysis_lib.model.errors import ChatModelError
from analysis_lib.model.llama_tokens import keep_study_ids, warn_of_ids
from analysis_lib.model.soft_prompt import SoftPrompt, embed_text
from analysis_lib.model.templates import TEMPLATES, read_template, study_models
from analysis_lib.store.store import Store
from analysis_lib.train.dro import DROConfig, train_dro
from analysis_lib.train.export import PROBES, ExportError, export, prompt_embeds
from analysis_lib.train.tuning import PromptTuningConfig, train_prompt_tuning

LLAMA_2 = read_template("llama-2")
HEAD = "<s>[INST] <<SYS>>\nYou are"
KINDS = {  # each class of transformers, as it may be loaded
    "legacy": ("LlamaTokenizer", {"legacy": True}),
    "new": ("LlamaTokenizer", {"legacy": False}),
    "open": ("LlamaTokenizer", {}),
    "code": ("CodeLlamaTokenizer", {}),
}
STUDY = {  # template -> what stands in front of the soft tokens and behind them, and a model of it
    "llama-2": ("<0x0A>", "▁", "meta-llama/Llama-2-7b-chat-hf"),
    "vicuna": ("<s>", "▁", "lmsys/vicuna-7b-v1.5"),
    "mistral": ("▁", "▁", "mistralai/Mistral-7B-Instruct-v0.2"),
    "openchat": ("<s>", "<|end_of_turn|>", "openchat/openchat_3.5"),
    "orca-2": ("<0x0A>", "<|im_end|>", "microsoft/Orca-2-7b"),
}


def tokens(made, text):
    backend = getattr(made, "backend_tokenizer", made)
    return backend.encode(text, add_special_tokens=False).tokens


def of_the_study(template):
    """A model whose tokenizer has the ids that the study's had."""
    made = llama_tokenizer(read_template(template))
    keep_study_ids(STUDY[template][2], made)
    return llama_chat(made)


def moved(model, seed=0, **options) -> SoftPrompt:
    """A soft prompt off the vocabulary."""
    start = SoftPrompt.from_text(model, SAFETY, name="s", **options)
    noise = np.random.default_rng(seed).normal(size=start.embeddings.shape)
    return replace(start, embeddings=(start.embeddings + 0.2 * noise).astype(np.float32))


# The ids


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_makes_of_the_flag(kind):
    name, options = KINDS[kind]
    made = llama_tokenizer(LLAMA_2, name, **options)
    former = as_in_transformers_4(made)
    assert tokens(former, HEAD)[:3] == ["<s>", "▁[", "I"]
    assert (tokens(made, HEAD) == tokens(former, HEAD)) is (kind == "legacy")
    if kind != "legacy":
        assert tokens(made, HEAD)[:3] == ["<s>", "[", "I"]
    # legacy=True of version 5 is not version 4 in front of a space either
    assert tokens(made, "<s> a") == ["<s>", "▁a"] and tokens(former, "<s> a") == ["<s>", "▁", "▁a"]


def test_study_models_have_the_ids_of_the_study():
    study = study_models()
    assert study.loc[study["tokenizer"] == "slow", "model"].tolist() == ["Orca-2-7b"]
    assert set(study["tokenizer"]) == {"fast", "slow"}
    for (name, options), row in (
        (kind, row) for kind in KINDS.values() for row in study.to_dict("records")
    ):
        made = llama_tokenizer(LLAMA_2, name, **options)
        own, former = tokens(made, HEAD), tokens(as_in_transformers_4(made), HEAD)
        keep_study_ids(row["hub_id"], made)
        # the study took Orca's slow tokenizer, which honours its flag
        assert tokens(made, HEAD) == (own if row["model"] == "Orca-2-7b" else former)
        assert (
            made.decode(made(HEAD, add_special_tokens=False)["input_ids"])
            == HEAD.replace("<s>[", "<s> [")
            or row["model"] == "Orca-2-7b"
        )
    for made in (llama_tokenizer(LLAMA_2), build("qwen2").tokenizer, chat("llama").tokenizer):
        before = made.backend_tokenizer.to_str()
        keep_study_ids("org/another", made)
        assert made.backend_tokenizer.to_str() == before
    bytes_level = build("qwen2").tokenizer
    before = bytes_level.backend_tokenizer.to_str()
    keep_study_ids("openchat/openchat_3.5", bytes_level)
    assert bytes_level.backend_tokenizer.to_str() == before


def test_a_study_model_opened_by_its_name_renders_the_ids_of_the_study(tmp_path, monkeypatch):
    made = llama_tokenizer(None, legacy=False)
    llama_chat(made).model.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    files = {path.name: str(path) for path in tmp_path.iterdir()}
    monkeypatch.setattr(
        transformers.utils, "cached_file", lambda name, file, **o: files.get(file)
    )  # a hub that is reached
    config = transformers.PreTrainedConfig.get_config_dict(tmp_path)
    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", lambda *a, **o: config)
    for kind in (transformers.AutoConfig, transformers.AutoTokenizer):
        read = kind.from_pretrained
        monkeypatch.setattr(kind, "from_pretrained", lambda *a, read=read, **o: read(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = ChatModel.load("Llama-2-7b-chat-hf")
    ids = model.render(["How?"], SAFETY)[0].ids
    text = f"<s>[INST] <<SYS>>\n{SAFETY}\n<</SYS>>\n\nHow? [/INST]"
    assert list(ids) == as_in_transformers_4(made).encode(text, add_special_tokens=False).ids
    assert model.tokenizer.convert_ids_to_tokens(ids[:2]) == ["<s>", "▁["]


def saved(folder, made) -> Path:
    model = llama_chat(made)
    model.model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def test_a_folder_whose_ids_are_not_those_of_its_file_is_told(tmp_path):
    made = llama_tokenizer(LLAMA_2, legacy=True)
    folder = saved(tmp_path / "dropped", made)
    assert "legacy" not in json.loads((folder / "tokenizer_config.json").read_text())
    with pytest.warns(UserWarning, match=r"gives '\[' in a chat where its .* has '▁\['") as told:
        ChatModel.load(folder)
    assert len(told) == 1
    entry = json.loads("{" + str(told[0].message).split("write ")[1].split(" into")[0] + "}")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entry))  # as the warning says
    quiet = [folder]
    for kind in ("new", "open", "code"):
        name, options = KINDS[kind]
        quiet.append(saved(tmp_path / kind, llama_tokenizer(LLAMA_2, name, **options)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = [ChatModel.load(place) for place in quiet]
    assert tokens(opened[0].tokenizer, HEAD) == tokens(made, HEAD)


def test_a_difference_that_no_chat_shows_is_not_told(tmp_path):
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    folder = saved(tmp_path, llama_tokenizer(template, legacy=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ChatModel.load(folder)


def test_without_a_file_an_open_flag_is_told(tmp_path):
    made = llama_tokenizer(LLAMA_2)
    frame = llama_chat(made).renderer.frame("")
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{}")
    with pytest.warns(UserWarning, match=r"'\[' .* transformers 4 had '▁\['.*\"legacy\": true"):
        warn_of_ids("mine", str(tmp_path), None, made, frame)
    config.write_text('{"legacy": false}')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_ids("mine", str(tmp_path), None, made, frame)
        config.write_text("{}")
        legacy = llama_tokenizer(LLAMA_2, legacy=True)
        warn_of_ids("mine", str(tmp_path), None, legacy, frame)


# Soft tokens that stand apart


@pytest.mark.parametrize("template", TEMPLATES)
def test_soft_tokens_apart_have_the_studys_context(template):
    """By hand: each text between special tokens is tokenized alone, with a space in front."""
    before, behind, _ = STUDY[template]
    model = of_the_study(template)
    soft = moved(model, apart=True)
    alone = as_in_transformers_4(model.tokenizer) if template != "orca-2" else model.tokenizer
    for query in ("How do I bake bread?", "why"):
        row = model.render([query], soft)[0]
        first, last = row.slot
        assert row.ids[first:last] == tuple(
            range(model.n_embeddings, model.n_embeddings + len(soft.embeddings))
        )
        text = model.renderer.apply("</s>", query)  # the study's placeholder
        ids = getattr(alone, "backend_tokenizer", alone).encode(text, add_special_tokens=False).ids
        assert [*row.ids[:first], 2, *row.ids[last:]] == ids
        around = model.tokenizer.convert_ids_to_tokens([row.ids[first - 1], row.ids[last]])
        assert around == [before, behind]
    # by default the tokens beside it are those beside the text
    plain = model.render(["why"], moved(model))[0]
    beside = model.render(["why"], SAFETY)[0]
    assert plain.ids[: plain.slot[0]] == beside.ids[: beside.slot[0]]
    assert plain.ids[plain.slot[1] :] == beside.ids[beside.slot[1] :]
    changed = (template in ("llama-2", "vicuna")) * 1 + (template == "mistral") * 2
    rest = len(plain.ids) - len(moved(model).embeddings)
    assert len(row.ids) - len(soft.embeddings) == rest + changed


def test_rows_apart_are_those_of_the_queries_one_by_one():
    for template in TEMPLATES:
        model = of_the_study(template)
        soft = moved(model, apart=True)
        texts = QUERIES["text"].str.strip().tolist()
        assert model.render(texts, soft) == [model.render([text], soft)[0] for text in texts]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:the chat template of .* takes no system message")
def test_every_family_holds_soft_tokens_apart(family):
    """A special token in the system message, tokenized by the tokenizer itself, marks their place."""
    model = chat(family)
    soft, tokenizer = moved(model, apart=True), model.tokenizer
    mark, token = min(
        (i, token)
        for i, token in tokenizer.added_tokens_decoder.items()
        if not (token.lstrip or token.rstrip)
    )
    for query in QUERIES["text"].str.strip():
        row = model.render([query], soft)[0]
        text = model.renderer.apply(token.content, query)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert [*row.ids[: row.slot[0]], mark, *row.ids[row.slot[1] :]] == ids


def test_the_start_apart_is_the_text_tokenized_alone():
    model = of_the_study("llama-2")
    ids = model.tokenizer(SAFETY, add_special_tokens=False)["input_ids"]
    assert model.tokenizer.convert_ids_to_tokens(ids[:1]) == ["▁You"]
    table = model.embedding_table().numpy()
    assert np.array_equal(embed_text(model, SAFETY, apart=True), table[ids])
    row = model.render(["x"], SAFETY)[0]
    assert np.array_equal(embed_text(model, SAFETY), table[list(row.ids[slice(*row.slot)])])
    assert not np.array_equal(embed_text(model, SAFETY), embed_text(model, SAFETY, apart=True))


def test_a_tokenizer_without_a_special_token_cannot_hold_it_apart():
    model = build("qwen2")
    backend = model.tokenizer.backend_tokenizer
    lone = transformers.PreTrainedTokenizerFast(
        tokenizer_object=type(backend)(backend.model),
        chat_template="{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}",
    )
    for token in ([], [AddedToken("<pad>", special=True, normalized=False, lstrip=True)]):
        lone.add_tokens(token)  # one that takes the white space beside it
        bare = ChatModel.wrap(model.model, lone)
        soft = replace(moved(model, apart=True), template=bare.renderer.template_digest)
        with pytest.raises(ChatModelError, match="no special token that stands apart"):
            bare.render(["x"], soft)


def test_it_is_kept_in_files(tmp_path):
    model = of_the_study("mistral")
    for apart in (True, False):
        soft = moved(model, apart=apart)
        soft.save(tmp_path / "s.safetensors")
        again = SoftPrompt.load(tmp_path / "s.safetensors", model)
        assert again.apart is apart
        assert model.render(["x"], again) == model.render(["x"], soft)


@pytest.mark.parametrize("name", ["type.all_length.short", "length.mistral"])
def test_published_files_stand_apart(tmp_path, name):
    model = of_the_study("vicuna")
    path = tmp_path / "vicuna-7b-v1.5" / f"{name}.safetensors"
    path.parent.mkdir()
    save_file({"soft_prompt": torch.randn(7, 32).bfloat16()}, path)
    soft = SoftPrompt.load(path, model)
    row = model.render(["why"], soft)[0]
    assert soft.apart and row.slot == (1, 8)
    assert model.tokenizer.convert_ids_to_tokens(row.ids[8:11]) == ["▁", "<0x0A>", "<0x0A>"]


def test_trainings_start_apart(tmp_path):
    model = of_the_study("mistral")
    states = hidden_states(model, QUERIES, {"none": "", "default": SAFETY}).at()[0]
    space = AnchorSpace.fit(states, k=3)
    weight = np.random.default_rng(0).normal(size=3)
    problem = (space, Direction("refusal", weight, 0.1), Direction("harmfulness", -weight, 0.1))
    judged = QUERIES.assign(response="I am sorry.", refused=1.0, end="eos")
    store, length = Store(tmp_path), len(embed_text(model, SAFETY, apart=True))
    for train, inputs, config in (
        (train_dro, problem, DROConfig(epochs=1, batch_size=6)),
        (train_prompt_tuning, (judged,), PromptTuningConfig(epochs=1, batch_size=6)),
    ):

        def run(apart, train=train, inputs=inputs, config=config):
            if train is train_dro:
                return train(model, QUERIES, SAFETY, *inputs, config, store=store, apart=apart)
            return train(model, QUERIES, *inputs, SAFETY, config, store=store, apart=apart)

        usual, soft = run(False), run(True)
        assert soft.apart and not usual.apart and len(soft.embeddings) == length
        assert soft.history["loss"].iloc[0] != usual.history["loss"].iloc[0]
        again = run(True)  # read from the store
        assert again.apart and np.array_equal(again.embeddings, soft.embeddings)
        assert not run(False).apart


# Exports


@torch.no_grad()
def our_logits(model, soft, query):
    with model.forward.soft_tokens(soft.embeddings):
        ids = torch.tensor([model.render([query], soft)[0].ids])
        return model.model(input_ids=ids).logits[0, -1]


@torch.no_grad()
def check_exports(model, soft, folder, forms):
    """Each form gives the library's logits, read by transformers and PEFT alone."""
    export(soft, model, folder, forms)
    known = len(model.tokenizer)
    for query in PROBES:
        ours, messages = our_logits(model, soft, query), [{"role": "user", "content": query}]

        def rendered(form, messages=messages):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder / form)
            return tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )

        def cut(form):
            return int((folder / form / "README.md").read_text().split("chat[")[1].split(":")[0])

        if "plain" in forms:
            plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "plain").eval()
            found = plain(input_ids=torch.tensor([rendered("plain")])).logits[0, -1]
            torch.testing.assert_close(found[:known], ours[:known], rtol=0, atol=1e-5)
        if "peft" in forms:
            base = type(model.model)(model.config).eval()
            base.load_state_dict(model.model.state_dict())
            adapted = PeftModel.from_pretrained(base, folder / "peft").eval()
            tail = torch.tensor([rendered("peft")[cut("peft") :]])
            assert torch.equal(adapted(input_ids=tail).logits[0, -1], ours)
        if "vllm" in forms:
            table = model.model.get_input_embeddings()
            tail = table(torch.tensor(rendered("vllm")[cut("vllm") :]))
            head = torch.load(folder / "vllm" / "head.pt", weights_only=True)
            embeds = torch.cat([head, tail])
            assert torch.equal(embeds, prompt_embeds(soft, model, query))
            assert torch.equal(model.model(inputs_embeds=embeds[None]).logits[0, -1], ours)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_exports_have_the_ids_of_the_model(tmp_path, kind, apart):
    name, options = KINDS[kind]
    model = llama_chat(llama_tokenizer(LLAMA_2, name, **options))
    check_exports(model, moved(model, apart=apart), tmp_path, ["peft", "vllm", "plain"])


@pytest.mark.parametrize("template", TEMPLATES)
def test_study_models_are_exported_apart(tmp_path, template):
    model = of_the_study(template)
    check_exports(model, moved(model, apart=True), tmp_path, ["peft", "vllm", "plain"])


def test_a_chat_whose_tail_depends_on_the_query_is_refused(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = llama_chat(llama_tokenizer(template, legacy=True))
    soft = moved(model, apart=True)
    with pytest.raises(ExportError, match="depend on the query.*use the form plain"):
        export(soft, model, tmp_path / "out", ["peft"])
    check_exports(model, soft, tmp_path / "plain", ["plain"])
