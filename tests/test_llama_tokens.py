"""Tokenizers of Llama's kind: the ids of transformers 4, of the study and of exports."""

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
from tiny_models import (
    SAFETY,
    as_in_transformers_4,
    build,
    chat,
    llama_chat,
    llama_tokenizer,
)

from analysis_lib.model.chat import ChatModel
from analysis_lib.model.llama_tokens import keep_study_ids, warn_of_ids
from analysis_lib.model.soft_prompt import SoftPrompt
from analysis_lib.model.templates import read_template, study_models
from analysis_lib.train.export import PROBES, export, prompt_embeds

LLAMA_2 = read_template("llama-2")
HEAD = "<s>[INST] <<SYS>>\nYou are"
KINDS = {  # each class of transformers, as it may be loaded
    "legacy": ("LlamaTokenizer", {"legacy": True}),
    "new": ("LlamaTokenizer", {"legacy": False}),
    "open": ("LlamaTokenizer", {}),
    "code": ("CodeLlamaTokenizer", {}),
}


def tokens(made, text):
    backend = getattr(made, "backend_tokenizer", made)
    return backend.encode(text, add_special_tokens=False).tokens


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


@pytest.mark.parametrize("kind", KINDS)
def test_exports_have_the_ids_of_the_model(tmp_path, kind):
    name, options = KINDS[kind]
    model = llama_chat(llama_tokenizer(LLAMA_2, name, **options))
    check_exports(model, moved(model), tmp_path, ["peft", "vllm", "plain"])


def test_a_study_model_is_exported(tmp_path):
    made = llama_tokenizer(LLAMA_2)
    keep_study_ids("meta-llama/Llama-2-7b-chat-hf", made)
    model = llama_chat(made)
    check_exports(model, moved(model), tmp_path, ["peft", "vllm", "plain"])
