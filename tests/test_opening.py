"""What `ChatModel.load` opens, and what it refuses with a way out instead of leaving it to later steps."""

from __future__ import annotations

import copy
import json
import time
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import CHATML, QUERIES, SAFETY, build, relative, tokenizer

from analysis_lib.__main__ import main
from analysis_lib.collect.responses import sample_responses
from analysis_lib.collect.states import hidden_states
from analysis_lib.model.chat import ChatModel
from analysis_lib.model.errors import ChatModelError
from analysis_lib.model.templates import takes_text

TEXT = {
    "vocab_size": 368,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
M_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_EYE = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 14,
}
IMAGES_AND_TEXT = {
    "mistral3": (
        "Mistral3Config",
        {
            "text_config": TEXT | {"model_type": "mistral", "head_dim": 8},
            "vision_config": PIXTRAL,
            "image_token_index": 5,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        {
            "text_config": TEXT | {"rope_parameters": M_ROPE},
            "vision_config": QWEN_EYE | {"out_hidden_size": 32},
        },
    ),
    "qwen3_vl": (
        "Qwen3VLConfig",
        {
            "text_config": TEXT
            | {"head_dim": 8, "rope_parameters": M_ROPE | {"mrope_interleaved": True}},
            "vision_config": QWEN_EYE | {"out_hidden_size": 32, "deepstack_visual_indexes": [0]},
        },
    ),
    "qwen2_audio": (
        "Qwen2AudioConfig",
        {
            "text_config": TEXT | {"model_type": "qwen2"},
            "audio_config": {
                "model_type": "qwen2_audio_encoder",
                "d_model": 16,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 16,
            },
            "audio_token_index": 5,
        },
    ),
}
IN_PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{{ c['text'] if c['type'] == 'text' else '' }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save(model, folder):
    model.save_pretrained(folder)
    tokenizer("bytes", CHATML).save_pretrained(folder)
    return folder


def made(kind):
    torch.manual_seed(0)
    name, settings = IMAGES_AND_TEXT[kind]
    config = getattr(transformers, name)(**settings)
    mapping = (
        transformers.AutoModelForMultimodalLM
        if kind == "qwen2_audio"
        else transformers.AutoModelForImageTextToText
    )
    return mapping.from_config(config).eval()


@pytest.fixture
def folder(tmp_path):
    return save(build("qwen2").model, tmp_path / "model")


def refused(name, *said):
    with pytest.raises(ChatModelError) as caught:
        ChatModel.load(str(name))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for part in said:
        assert part in message, message


@pytest.mark.parametrize("kind", IMAGES_AND_TEXT)
def test_the_language_part_of_a_model_that_takes_more_than_text(kind, tmp_path):
    model = made(kind)
    opened = ChatModel.load(str(save(model, tmp_path / kind)), dtype="float32", device="cpu")
    assert opened.weight_bytes == sum(p.nbytes for p in model.parameters())
    got = hidden_states(opened, QUERIES, {"p": SAFETY}).states[:, 0]
    for state, row in zip(got, opened.render(QUERIES["text"].tolist(), SAFETY), strict=True):
        with torch.no_grad():
            plain = model(input_ids=torch.tensor([row.ids]), output_hidden_states=True)
        assert relative(state, plain.hidden_states[-1][0, -1]) < 2e-6
    (reply,) = sample_responses(
        opened, QUERIES.head(1), {"p": SAFETY}, n_samples=1, max_new_tokens=4, top_k=1
    )["response"]
    ids = torch.tensor([row.ids for row in opened.render([QUERIES["text"][0]], SAFETY)])
    for _ in range(4):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    words = opened.tokenizer.decode(ids[0, -4:], skip_special_tokens=True)
    assert words.strip().startswith(reply.strip())


def test_what_is_no_decoder_is_refused_when_it_is_opened(tmp_path, capsys):
    small = {"vocab_size": 400, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**small, num_heads=4))
    refused(save(t5, tmp_path / "t5"), "'t5' is an encoder-decoder", "choose a decoder")
    with pytest.raises(ChatModelError, match="'t5' is an encoder-decoder"):
        ChatModel.wrap(t5, tokenizer("bytes", CHATML))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertLMHeadModel(
        transformers.BertConfig(vocab_size=400, intermediate_size=16, **sizes)
    )
    refused(save(bert, tmp_path / "bert"), "'bert' is an encoder")
    vit = transformers.ViTForImageClassification(
        transformers.ViTConfig(intermediate_size=16, image_size=32, **sizes)
    )
    refused(save(vit, tmp_path / "vit"), "'vit' is no decoder")
    blip = transformers.BlipForConditionalGeneration(
        transformers.BlipConfig(
            text_config=sizes | {"vocab_size": 400, "intermediate_size": 16},
            vision_config=sizes | {"intermediate_size": 16, "image_size": 32},
        )
    )
    refused(save(blip, tmp_path / "blip"), "takes more than text ('blip')")
    prompt = tmp_path / "p.txt"
    prompt.write_text("You are careful.")
    given = ["--model", str(tmp_path / "t5"), "--prompt", str(prompt), "--out", str(tmp_path / "o")]
    capsys.readouterr()
    for more in ([], ["--dry-run"]):
        assert main(["reproduce", *given, *more]) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("ChatModelError: a model of the kind 't5'") and "\n" not in said


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("LORA", ["holds an adapter alone (LORA)", "'org/base'", "merge_and_unload()"]),
        ("PROMPT_TUNING", ["adds soft tokens, which cannot be merged", "open 'org/base'"]),
    ],
)
def test_a_folder_with_an_adapter_alone(kind, said, folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    about = {"peft_type": kind, "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    refused(folder, *said)
    (folder / "config.json").unlink()
    refused(folder, *said)
    (folder / "adapter_config.json").write_text("[")
    refused(folder, "adapter alone (PEFT)", "'the base model'")


def test_files_for_llama_cpp(folder):
    file = folder / "model-Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    assert ChatModel.load(str(folder)).n_layers == 3  # the same model in both forms
    (folder / "model.safetensors").unlink()
    for name in (folder, file):
        refused(name, "GGUF files (model-Q4_K_M.gguf)", "safetensors form")


def test_other_folders_that_people_have(folder, tmp_path):
    refused(folder / "config.json", "is a file", "give the folder that holds it")
    whole = tmp_path / "run"
    whole.mkdir()
    folder.rename(whole / "checkpoint-500")
    refused(whole, "folders in it do (checkpoint-500)")
    folder = whole / "checkpoint-500"
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    refused(folder, "holds consolidated.safetensors and neither model.safetensors nor")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_text(pointer)
    refused(folder, "model.safetensors in the folder", "pointer of Git LFS", "git lfs pull")
    (folder / "config.json").unlink()
    refused(folder, "no config.json, so it is no model")
    (folder / "params.json").write_text("{}")
    refused(folder, "in its maker's own form")
    (folder / "model_index.json").write_text("{}")
    refused(folder, "pipeline of diffusers")


def test_shards_that_lack_or_are_damaged_are_told_when_the_model_is_opened(tmp_path):
    model = build("qwen2").model
    model.save_pretrained(tmp_path, max_shard_size=20_000)
    tokenizer("bytes", CHATML).save_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    kept = index.read_text()
    shard = tmp_path / sorted(json.loads(kept)["weight_map"].values())[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:100])
    refused(tmp_path, "damaged or incomplete")
    shard.unlink()
    refused(tmp_path, "lacks 1 of the files that its index names (model-00001-of-")
    shard.write_bytes(content)
    index.unlink()
    refused(tmp_path, "neither model.safetensors nor model.safetensors.index.json")
    index.write_text(kept)
    assert ChatModel.load(str(tmp_path)).model is not None


def with_tensor(folder, name, *shape):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.zeros(*shape)}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "base_model.model.model.layers.0.mlp.up_proj.weight",
        "lm_head.modules_to_save.default.weight",
    ],
)
def test_tensors_of_an_adapter_that_was_not_merged(name, folder):
    with_tensor(folder, name, 4, 32)
    refused(folder, "an adapter that was not merged", name, "merge_and_unload()")


def test_tensors_that_the_model_has_no_place_for(folder):
    config = json.loads((folder / "config.json").read_text())
    fewer = {"num_hidden_layers": 2, "layer_types": config["layer_types"][:2]}
    (folder / "config.json").write_text(json.dumps(config | fewer))
    model = ChatModel.load(str(folder))
    with pytest.raises(ChatModelError, match=r"no place for \(model.layers.2.input_layernorm"):
        _ = model.model
    ahead = {"num_nextn_predict_layers": 1}  # what DeepSeek and others keep behind the last layer
    (folder / "config.json").write_text(json.dumps(config | fewer | ahead))
    with pytest.warns(UserWarning, match="does not take and that are left out: model.layers.2"):
        assert len(ChatModel.load(str(folder)).forward.blocks) == 2
    (folder / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_tensor(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", 4)
        _ = ChatModel.load(str(folder)).model
    with_tensor(folder, "v_head.summary.weight", 1, 32)
    with pytest.warns(UserWarning, match="left out: v_head.summary.weight"):
        _ = ChatModel.load(str(folder)).model
    with_tensor(folder, "model.layers.1.self_attn.o_proj.bias", 32)
    with pytest.raises(
        ChatModelError, match=r"no place for \(model.layers.1.self_attn.o_proj.bias"
    ):
        _ = ChatModel.load(str(folder)).model


@pytest.mark.parametrize("file", ["chat_template.json", "processor_config.json"])
def test_a_template_that_lies_in_a_processors_file(file, folder):
    expected = ChatModel.load(str(folder)).render([QUERIES["text"][0]], SAFETY)
    (folder / "chat_template.jinja").unlink()
    (folder / file).write_text("[]")
    refused(folder, "no chat template")
    (folder / file).write_text(json.dumps({"chat_template": CHATML}))
    assert ChatModel.load(str(folder)).render([QUERIES["text"][0]], SAFETY) == expected


@pytest.mark.parametrize(
    "template", [IN_PARTS, IN_PARTS.replace("m['content']", "(m.content | selectattr('type'))")]
)
def test_a_template_that_takes_content_in_parts(template, folder):
    expected = ChatModel.load(str(folder)).render(QUERIES["text"].tolist(), SAFETY)
    (folder / "chat_template.jinja").write_text(template)
    opened = ChatModel.load(str(folder))
    assert (
        opened.renderer.system_role and opened.render(QUERIES["text"].tolist(), SAFETY) == expected
    )
    words = copy.copy(tokenizer("bytes", CHATML))
    words.chat_template = template
    chat = [
        {"role": "system", "content": [{"type": "text", "text": SAFETY}]},
        {"role": "user", "content": [{"type": "text", "text": QUERIES["text"][0]}]},
    ]
    for one in (words, opened.tokenizer):  # what takes text still takes parts
        text = one.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = one(text, add_special_tokens=False)["input_ids"]
        assert tuple(ids) == expected[0].ids
    wrapped = ChatModel.wrap(build("qwen2").model, words)
    assert wrapped.render(QUERIES["text"].tolist(), SAFETY) == expected
    assert words.chat_template == template  # the user's own tokenizer stays
    plain = tokenizer("bytes", CHATML)
    assert takes_text(plain) is plain


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("organisim", "organism"),
        ("mistral-7b-instuct", "Mistral-7B-Instruct-v0.2, Mistral-7B-Instruct-v0.1"),
        ("vicuna-7b@main", "vicuna-7b-v1.5"),
        ("gpt2", ""),
        ("", ""),
    ],
)
def test_a_mistyped_name_is_told_before_the_network_is_asked(name, near, monkeypatch):
    def asked(*args, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(transformers.utils, "cached_file", asked)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", asked)
    start = time.perf_counter()
    refused(name, "is no folder and no model of the study", "'org/model'")
    refused(name, f"; models with a similar name: {near}" if near else "or give 'organism'")
    assert time.perf_counter() - start < 2


def test_a_mistyped_path_is_told_with_the_folders_beside_it(folder, monkeypatch):
    refused(str(folder) + "s", "there is no folder", f"similar name: {folder}")
    monkeypatch.chdir(folder.parent)
    refused("modle", "similar name: model")
    refused("C:\\models\\mine", "there is no folder")
