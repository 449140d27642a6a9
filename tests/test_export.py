"""Soft prompts elsewhere: equal logits and equal text under PEFT, prompt embeddings and plain transformers, without this library."""

from __future__ import annotations

import ast
import base64
import contextlib
import copy
import io
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file
from tiny_models import CHATML, FAMILIES, LLAMA2, NO_SYSTEM_ROLE, SAFETY, build, chat
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, trainers
from tokenizers.models import BPE

from analysis_lib.model.chat import ChatModel
from analysis_lib.model.errors import ChatModelError
from analysis_lib.model.soft_prompt import SoftPrompt, SoftPromptError
from analysis_lib.model.templates import TEMPLATES, study_models
from analysis_lib.train import export as room
from analysis_lib.train.export import (
    FORMS,
    PROBES,
    ExportError,
    completion_body,
    export,
    prompt_embeds,
)
from analysis_lib.train.export import plain as plain_form
from analysis_lib.train.export.page import code_span, python_literal, shell_word

pytestmark = pytest.mark.filterwarnings("ignore:the chat template of .* takes no system message")
QUERY = PROBES[0]  # the one in the READMEs' code


def moved(model, seed=0) -> SoftPrompt:
    """A soft prompt off the vocabulary."""
    start = SoftPrompt.from_text(model, SAFETY, name="s")
    noise = (
        np.random.default_rng(seed).normal(size=start.embeddings.shape)
        * start.embeddings.std()
        * 0.5
    )
    return replace(
        start, embeddings=(start.embeddings + noise).astype(np.float32), config={"method": "DRO"}
    )


@torch.no_grad()
def our_logits(model, soft, query=QUERY):
    with model.forward.soft_tokens(soft.embeddings):
        return model.model(input_ids=torch.tensor([model.render([query], soft)[0].ids])).logits[
            0, -1
        ]


@torch.no_grad()
def our_text(model, soft, query=QUERY, n=50):
    """Greedy, by this library's own soft tokens; special tokens shown."""
    with model.forward.soft_tokens(soft.embeddings):
        ids = torch.tensor([model.render([query], soft)[0].ids])
        out = model.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False
        )
    return model.tokenizer.decode(out[0, ids.shape[1] :])


def code_of(folder: Path) -> str:
    return re.search(
        r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )[1]


def kept(model, folder) -> ChatModel:
    """The same model from a folder, as the READMEs' code opens it."""
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return ChatModel.load(str(folder))


# Without this library


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{name: (model, soft prompt, folder)}: one with BOS, one whose prompt sits in the user turn, and the embedded one."""
    found = {"organism": ChatModel.load()}
    for family in ("llama", "mistral"):
        exact = build(
            family, vocab_size=len(chat(family).tokenizer)
        )  # a random model would utter rows without a token
        found[family] = kept(exact, tmp_path_factory.mktemp(family))
    done = {}
    for name, model in found.items():
        soft, folder = moved(model), tmp_path_factory.mktemp("out")
        assert export(soft, model, folder) == {form: folder / form for form in FORMS}
        done[name] = model, soft, folder
    assert done["llama"][0].render(["x"])[0].ids[0] == done["llama"][0].tokenizer.bos_token_id
    assert not done["mistral"][0].renderer.system_role
    return done


RUN = """
import contextlib, io, json, os, sys
sys.modules["analysis_lib"] = None  # an import of it fails
found = {}
for folder, code in json.load(sys.stdin):
    os.chdir(folder)
    names, out = {}, io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, names)
    found[folder] = names["body"]["prompt_embeds"] if "body" in names else out.getvalue()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def said(exported):
    """What the code in each README says, in one process that cannot import this library."""
    tasks = [
        (str(folder / form), code_of(folder / form))
        for _, _, folder in exported.values()
        for form in FORMS
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(tasks), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("form", ["peft", "plain"])
@pytest.mark.parametrize("name", ["organism", "llama", "mistral"])
def test_the_readme_gives_our_greedy_text(exported, said, name, form):
    model, soft, folder = exported[name]
    text = our_text(model, soft)
    assert said[str(folder / form)].rstrip("\n") == text.rstrip("\n")
    assert text.strip() and not torch.allclose(
        our_logits(model, soft), our_logits(model, moved(model, 1)), atol=0.01
    )


@pytest.mark.parametrize("name", ["organism", "llama", "mistral"])
def test_the_readme_gives_vllm_our_embeddings(exported, said, name):
    model, soft, folder = exported[name]
    assert torch.equal(decoded(said[str(folder / "vllm")]), prompt_embeds(soft, model, QUERY))


def test_readmes_say_what_to_know(exported):
    model, _, folder = exported["organism"]
    pages = {form: (folder / form / "README.md").read_text(encoding="utf-8") for form in FORMS}
    for form, page in pages.items():
        assert "`organism`" in page and model.fingerprint[:12] in page and "float64" in page
        assert (
            len(
                [
                    line
                    for line in code_of(folder / form).splitlines()
                    if line and "import" not in line
                ]
            )
            <= 7
        )
    assert (
        "vllm serve" in pages["vllm"]
        and "--enable-prompt-embeds" in pages["vllm"]
        and "Tried once on the CPU build of vLLM 0.32" in pages["vllm"]
    )
    assert "private-use" not in pages["plain"]  # its soft tokens are special tokens
    assert "suppress_tokens" in pages["plain"] and "0.01 GB" in pages["plain"]
    assert "weights_only=True" in pages["vllm"]


def test_a_model_in_a_relative_folder_is_found_from_the_export(tmp_path, monkeypatch):
    """Its name would be another folder there, or somebody's repository; quotes and spaces in it are no syntax."""
    monkeypatch.chdir(tmp_path)
    name = 'models/it\'s "mine"'
    model = kept(build("llama", vocab_size=len(chat("llama").tokenizer)), Path(name))
    soft, there = moved(model), str(tmp_path.resolve() / name)
    assert (model.name, model.source) == (name, there)
    export(soft, model, "out", ["peft", "vllm"])
    adapter = json.loads(Path("out/peft/adapter_config.json").read_text())
    assert (
        adapter["base_model_name_or_path"]
        == json.loads(Path("out/vllm/request.json").read_text())["model"]
        == there
    )
    assert served("out/vllm")[:3] == ["vllm", "serve", there]
    text, names, said = our_text(model, soft), {}, io.StringIO()
    for form in ("peft", "vllm"):
        monkeypatch.chdir(tmp_path / "out" / form)
        with contextlib.redirect_stdout(said):
            exec(code_of(Path()), names)
    assert said.getvalue().rstrip("\n") == text.rstrip("\n") and names["body"]["model"] == there


def served(folder) -> list[str]:
    """The words of the README's `vllm serve`, as a shell reads them."""
    return shlex.split(
        re.search(r"^    (vllm serve .*)$", (Path(folder) / "README.md").read_text(), re.MULTILINE)[
            1
        ]
    )


HOSTILE = [
    "x`\n```python\nimport os; os.system('touch harm')\n```\n",
    "y` of `z`\n\n    vllm serve evil\n",
    "'; touch harm; echo '$(touch harm)`touch harm`\\",
    'q", trust_remote_code=True); import os; os.system("touch harm"); ("',
    "\u202etxet\u2066 \x1b[31m\x07 \r\n# Head\n",
    "``` ~~~ <script>alert(1)</script> [a](javascript:b)",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_shown_and_write_no_code(name, tmp_path):
    """Those of model, soft prompt, method and revision: the page is the same but for four quoted names."""
    pages = []
    for index, given in enumerate(("tame", name)):
        model = build("llama")
        model.name, model.revision = given, given
        soft = replace(moved(model), name=given, config={"method": given})
        export(soft, model, tmp_path / str(index), ["peft", "vllm"])
        pages.append(
            {
                form: (tmp_path / str(index) / form / "README.md").read_text()
                for form in ("peft", "vllm")
            }
        )
    for form in ("peft", "vllm"):
        tame, page = (found[form] for found in pages)
        for quote in (python_literal, shell_word, code_span):
            page = page.replace(quote(name), quote("tame"))
        assert page == tame
        tree = ast.parse(code_of(tmp_path / "1" / form))
        strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        assert strings.count(name) == (2 if form == "peft" else 3)
    assert "`" not in python_literal(name) and not re.search(r"[\r\n]", code_span(name))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_shell_reads_a_name_as_one_word(name):
    said = subprocess.run(
        ["bash", "-c", f"printf %s {shell_word(name)}"], capture_output=True, check=True
    )
    assert said.stdout.decode() == name and not re.search(r"[\r\n]", shell_word(name))


@pytest.mark.skipif(os.name == "nt", reason="no such modes")
def test_an_export_may_be_served_by_another_user(exported):
    mask = os.umask(0)
    os.umask(mask)
    files = [
        file for _, _, folder in exported.values() for file in folder.rglob("*") if file.is_file()
    ]
    assert len(files) > 10 and {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~mask}


def test_exports_pin_the_revision_and_the_dtype(tmp_path):
    model = build("llama", dtype=torch.bfloat16)
    model.revision = "a" * 40
    export(moved(model), model, tmp_path, ["peft", "vllm"])
    for form in ("peft", "vllm"):
        assert f'from_pretrained("tiny llama", revision="{"a" * 40}", dtype="bfloat16")' in code_of(
            tmp_path / form
        )
    assert (
        json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["revision"] == "a" * 40
    )
    words = [
        "vllm",
        "serve",
        "tiny llama",
        "--revision",
        "a" * 40,
        "--dtype",
        "bfloat16",
        "--enable-prompt-embeds",
    ]
    assert served(tmp_path / "vllm") == words


def test_a_float64_model_is_served_in_a_dtype_that_vllm_has(exported):
    assert served(exported["organism"][2] / "vllm")[3:5] == ["--dtype", "float32"]


# The folders


def test_a_form_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model = chat("llama")
    with monkeypatch.context() as patch:
        patch.setattr(plain_form, "write_readme", full_disk)
        with pytest.raises(OSError, match="No space"):
            export(moved(model), model, tmp_path, ["plain"])
        assert not list(tmp_path.iterdir())
    export(moved(model), model, tmp_path, FORMS)
    (tmp_path / "plain" / "older.safetensors").write_bytes(b"of an older export")
    before = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(plain_form, "write_readme", full_disk)
        with pytest.raises(OSError, match="No space"):
            export(moved(model, 1), model, tmp_path, ["plain"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()} == before
    export(moved(model, 1), model, tmp_path, ["plain"])
    assert {path.name for path in (tmp_path / "plain").iterdir()} == before.keys() - {
        "older.safetensors"
    }
    check_plain(model, moved(model, 1), tmp_path / "plain")
    assert {path.name for path in tmp_path.iterdir()} == set(FORMS)
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and b".part" in path.read_bytes()
    ]


def full_disk(*arguments):
    raise OSError(28, "No space left on device")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "README.md").write_text("My notes.")
    with pytest.raises(
        ExportError,
        match="plain holds something that is no whole export; remove it, or choose another folder",
    ):
        export(moved(chat("llama")), chat("llama"), tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["plain", "README.md"]


# PEFT


@pytest.fixture(scope="module", params=[f for f in FAMILIES if f not in ("mamba", "jamba")])
def family(request, tmp_path_factory):
    """(model, soft prompt, folder) of each family with attention."""
    model, folder = chat(request.param), tmp_path_factory.mktemp(request.param)
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    template, n_tokens, soft = model.tokenizer.chat_template, len(model.tokenizer), moved(model)
    export(soft, model, folder)
    after = model.model.state_dict()
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )
    assert (model.tokenizer.chat_template, len(model.tokenizer)) == (template, n_tokens)
    assert model.config.vocab_size == model.n_embeddings
    return model, soft, folder


@torch.no_grad()
def test_peft_gives_our_logits(family):
    model, soft, folder = family
    adapted = PeftModel.from_pretrained(copy_of(model), folder / "peft").eval()
    assert not adapted.training and adapted.peft_config["default"].num_virtual_tokens > len(
        soft.embeddings
    )
    cut = int(re.search(r"chat\[(\d+):\]", code_of(folder / "peft"))[1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "peft")
    for query in PROBES:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": query}], add_generation_prompt=True, return_dict=False
        )
        ours = our_logits(model, soft, query)
        assert torch.equal(adapted(input_ids=torch.tensor([rendered[cut:]])).logits[0, -1], ours)
        naive = adapted(input_ids=torch.tensor([rendered])).logits[
            0, -1
        ]  # the whole chat behind the virtual tokens
        assert (naive - ours).norm() > 0.02 * ours.norm()


def copy_of(model):
    other = type(model.model)(model.config).eval()
    other.load_state_dict(model.model.state_dict())
    return other


# vLLM


def decoded(prompt_embeds: str) -> torch.Tensor:
    """As vLLM's server reads the field: strict base64, a torch file without code, a dense floating-point matrix."""
    tensor = torch.load(
        io.BytesIO(base64.b64decode(prompt_embeds, validate=True)),
        weights_only=True,
        map_location="cpu",
    )
    assert tensor.dim() == 2 and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return tensor


@torch.no_grad()
def test_prompt_embeddings_give_our_logits(family):
    model, soft, folder = family
    for query in PROBES[:2]:
        embeds = prompt_embeds(soft, model, query)
        assert torch.equal(
            model.model(inputs_embeds=embeds[None]).logits[0, -1], our_logits(model, soft, query)
        )
    request = json.loads((folder / "vllm" / "request.json").read_text())
    assert torch.equal(decoded(request.pop("prompt_embeds")), prompt_embeds(soft, model, QUERY))
    assert request == {"model": model.name, "max_tokens": 50, "temperature": 0}


def test_a_body_holds_its_rows_alone():
    """A view's whole storage would go along."""
    rows = torch.zeros(10_000, 8)
    body = completion_body(rows[:4], "m", n=3)
    assert (
        decoded(body["prompt_embeds"]).shape == (4, 8)
        and len(body["prompt_embeds"]) < 3000
        and body["n"] == 3
    )


def test_prompt_embeddings_of_a_bfloat16_model():
    model = build("gemma3", dtype=torch.bfloat16)
    embeds = prompt_embeds(moved(model), model, QUERY)
    assert embeds.dtype == torch.bfloat16 and torch.equal(
        decoded(completion_body(embeds, "m")["prompt_embeds"]), embeds
    )


# Plain transformers


@torch.no_grad()
def test_plain_gives_our_logits(family):
    model, soft, folder = family
    check_plain(model, soft, folder / "plain")


def check_plain(model, soft, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert plain.dtype == model.dtype
    known = len(model.tokenizer)
    for query in PROBES:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": query}], add_generation_prompt=True, return_tensors="pt"
        )
        torch.testing.assert_close(
            plain(**rendered).logits[0, -1, :known],
            our_logits(model, soft, query)[:known],
            rtol=0,
            atol=1e-5,
        )
    ids = plain.generation_config.suppress_tokens
    assert len(ids) == len(soft.embeddings) and min(ids) >= known
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUERY}]
    if model.renderer.system_role:  # a chat with a system message of its own has no soft prompt
        found = tokenizer.apply_chat_template(own, add_generation_prompt=True, return_dict=False)
        assert list(found) == list(model.render([QUERY], "Be brief.")[0].ids)
    turns = [
        {"role": r, "content": t}
        for r, t in (("user", "a b"), ("assistant", "c d"), ("user", "e f"))
    ]
    rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert sum(i in ids for i in rendered) == len(ids)  # once, in the first turn


def test_plain_of_a_family_without_attention(tmp_path):
    model = chat("mamba")
    export(moved(model), model, tmp_path)
    with torch.no_grad():
        check_plain(model, moved(model), tmp_path / "plain")


def test_tied_weights_stay_tied(tmp_path):
    model = build("qwen2", tie_word_embeddings=True)
    export(moved(model), model, tmp_path, ["plain"])
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    soft_rows = plain.model.embed_tokens.weight[plain.generation_config.suppress_tokens]
    assert torch.equal(soft_rows, torch.tensor(moved(model).embeddings))
    check_plain(model, moved(model), tmp_path / "plain")


def llama_like():
    """A tokenizer in the shape of Llama 2's file: BPE over characters with bytes to fall back on, a space put in front of each
    part between special tokens, and a special token outside the vocabulary, as OpenChat has."""
    made = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    made.train_from_iterator(
        [SAFETY + " How do I bake bread? [INST] <<SYS>>\n <</SYS>>\n\n [/INST]"] * 2, trainer
    )
    made.add_special_tokens([AddedToken("<|end_of_turn|>", special=True)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=LLAMA2,
    )


@torch.no_grad()
def test_plain_with_a_tokenizer_that_puts_a_space_after_special_tokens(tmp_path):
    """Soft tokens beside the text would add a space behind them; they become characters of the vocabulary instead."""
    made = build("llama", vocab_size=512)
    model = ChatModel.wrap(made.model, llama_like(), name="llama like")
    assert model.tokenizer("a</s>b", add_special_tokens=False)["input_ids"].count(
        model.tokenizer.convert_tokens_to_ids("\u2581")
    ) or (model.tokenizer.tokenize("</s>b")[1].startswith("\u2581"))
    export(moved(model), model, tmp_path, ["plain"])
    check_plain(model, moved(model), tmp_path / "plain")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    for token in ("<s>", "</s>", "<|end_of_turn|>"):
        assert tokenizer.convert_tokens_to_ids(token) == model.tokenizer.convert_tokens_to_ids(
            token
        )
    assert tokenizer.convert_ids_to_tokens(len(model.tokenizer)) == "\ue000"
    last = 0xE000 + len(moved(model).embeddings) - 1
    assert (
        f"private-use characters U+E000 to U+{last:04X}"
        in (tmp_path / "plain" / "README.md").read_text()
    )


def test_plain_is_left_out_where_it_is_large(tmp_path, monkeypatch):
    model = chat("llama")
    size = model.weight_bytes
    monkeypatch.setattr(room, "MOST_UNASKED", size)
    assert (
        list(export(moved(model), model, tmp_path)) == ["peft", "vllm"]
        and not (tmp_path / "plain").exists()
    )
    export(moved(model), model, tmp_path, ["plain"])
    written = (tmp_path / "plain" / "model.safetensors").stat().st_size
    assert 0.8 * size < written < 1.2 * size


# What is refused


def test_another_model_is_refused(tmp_path):
    with pytest.raises(
        ChatModelError,
        match="trained on 'tiny llama' .* cannot be used on 'tiny mistral' .*load the model",
    ):
        export(moved(chat("llama")), chat("mistral"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_template_is_refused(tmp_path):
    folder = tmp_path / "model"
    model = kept(build("llama"), folder)
    moved(model).save(tmp_path / "s.safetensors")
    other = ChatModel.load(str(folder), template="vicuna")
    assert other.fingerprint == model.fingerprint
    for refused in (
        lambda: SoftPrompt.load(tmp_path / "s.safetensors", other),
        lambda: export(moved(model), other, tmp_path),
    ):
        with pytest.raises(ChatModelError, match="chat template") as error:
            refused()
        assert model.renderer.template_digest[:12] in str(
            error.value
        ) and other.renderer.template_digest[:12] in str(error.value)
    got = SoftPrompt.load(tmp_path / "s.safetensors", model)
    assert got.template == model.renderer.template_digest and np.array_equal(
        got.embeddings, moved(model).embeddings
    )


def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch):
    model = build("llama")
    with pytest.raises(ExportError, match="unknown form onnx; choose among peft, vllm, plain"):
        export(moved(model), model, tmp_path, ["onnx"])
    plain = build(
        "qwen2"
    )  # the slot's last token reaches beyond it, so that the soft tokens take the place of more
    merging = ChatModel.wrap(plain.model, copy.deepcopy(plain.tokenizer), name=plain.name)
    merging.tokenizer.chat_template = CHATML.replace(
        "m['content']", "m['content'] + ('stant' if m['role'] == 'system' else '')"
    )
    row = merging.render(["x"], "You are an assi")[0]
    assert merging.tokenizer.decode(row.ids[row.slot[1] - 1]) == " assistant"
    with pytest.raises(ExportError, match="splits the text around new tokens .* peft or vllm"):
        export(
            SoftPrompt.from_text(merging, "You are an assi", name="s"), merging, tmp_path, ["plain"]
        )
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(ExportError, match="0.0 GB are free; leave it out, or make room"):
        export(moved(model), model, tmp_path, ["plain"])
    model.quantization = "8bit"
    with pytest.raises(ExportError, match="are quantized; load it without quantization"):
        export(moved(model), model, tmp_path, ["plain"])


# The study's own soft prompts


@pytest.fixture
def published(tmp_path):
    """(model, path): a file as the study's authors published them, for a model of its hidden size."""
    study = tmp_path / "trained_prompts" / "Llama-2-7b-chat-hf"
    study.mkdir(parents=True)
    model = kept(build("llama"), tmp_path / "model")
    rows = torch.tensor(moved(model).embeddings).bfloat16()[
        :-1
    ]  # their slot is tokenized alone: its length may differ
    save_file({"soft_prompt": rows}, study / "type.all_length.short.safetensors")
    return model, study / "type.all_length.short.safetensors"


def test_a_published_soft_prompt_loads_and_is_exported(published, tmp_path):
    model, path = published
    model = ChatModel.load(model.source, template="llama-2")
    soft = SoftPrompt.load(path, model)
    assert (
        soft.name == "dro_short"
        and soft.start_text
        == "You are a helpful, respectful and honest assistant. "
        + ("Always answer as helpfully as possible, while being safe.")
    )
    assert soft.config == {
        "method": "DRO",
        "published": "Llama-2-7b-chat-hf/type.all_length.short.safetensors",
    }
    assert (
        soft.embeddings.dtype == np.float32
        and len(soft.embeddings) == len(moved(model).embeddings) - 1
    )
    soft.check(model)
    row = model.render([QUERY], soft)[0]
    assert row.slot[1] - row.slot[0] == len(soft.embeddings)
    export(soft, model, tmp_path / "out")
    with torch.no_grad():
        check_plain(model, soft, tmp_path / "out" / "plain")
        adapted = PeftModel.from_pretrained(copy_of(model), tmp_path / "out" / "peft").eval()
        cut = int(re.search(r"chat\[(\d+):\]", code_of(tmp_path / "out" / "peft"))[1])
        tail = model.render([QUERY], soft.start_text)[0].ids[cut:]
        assert torch.equal(
            adapted(input_ids=torch.tensor([tail])).logits[0, -1], our_logits(model, soft)
        )
    soft.save(tmp_path / "again.safetensors")
    again = SoftPrompt.load(tmp_path / "again.safetensors", model)
    assert again.name == soft.name and np.array_equal(again.embeddings, soft.embeddings)


def test_a_published_soft_prompt_needs_its_model_and_template(published, tmp_path):
    model, path = published
    with pytest.raises(ChatModelError, match="does not say which model"):
        SoftPrompt.load(path)
    with pytest.raises(
        ChatModelError, match=r"shape \(\d+, 32\), those of 'tiny llama' have 48 dimensions"
    ):
        SoftPrompt.load(path, build("llama", hidden_size=48))
    vicuna = ChatModel.load(model.source, template="vicuna")
    with pytest.raises(
        ChatModelError,
        match="in the chat template 'llama-2' .* in 'vicuna'; open the model with ChatModel.load",
    ):
        SoftPrompt.load(path, vicuna)
    other = ChatModel.load(model.source, template="llama-2")
    other.source = "lmsys/vicuna-7b-v1.5"
    with pytest.raises(ChatModelError, match="trained on 'Llama-2-7b-chat-hf'"):
        SoftPrompt.load(path, other)
    elsewhere = (
        tmp_path / "other" / path.name
    )  # no study model's folder: the hidden size alone is checked
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(path.read_bytes())
    assert SoftPrompt.load(elsewhere, vicuna).template == vicuna.renderer.template_digest
    elsewhere.rename(tmp_path / "length.safetensors")
    with pytest.raises(SoftPromptError, match="no soft prompt of this library"):
        SoftPrompt.load(tmp_path / "length.safetensors", model)


@pytest.mark.parametrize("kind", ["type.all_length", "length"])
@pytest.mark.parametrize("prompt", ["default", "short", "mistral"])
def test_every_published_name_is_known(published, kind, prompt):
    """48 files: 8 models, 3 prompts, DRO and the baseline."""
    model, path = published
    file = path.with_name(f"{kind}.{prompt}.safetensors")
    file.write_bytes(path.read_bytes())
    soft = SoftPrompt.load(file, ChatModel.load(model.source, template="llama-2"))
    assert soft.name == f"{'dro' if 'type' in kind else 'tuned'}_{prompt}"
    assert soft.config["method"] == ("DRO" if "type" in kind else "prompt tuning")
    assert len(study_models()) == 8 and set(study_models()["template"]) <= set(TEMPLATES)


def test_the_families_hold_what_these_tests_say():
    assert {"mistral", "gemma2"} <= NO_SYSTEM_ROLE and {"llama", "mistral"} <= set(FAMILIES)
