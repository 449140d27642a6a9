"""A soft prompt for use elsewhere: a PEFT adapter, vLLM prompt embeddings, or a model folder for plain transformers.

PEFT puts its virtual tokens before everything, and vLLM takes the embeddings of the whole prompt. So both forms hold the
head of the rendered chat (BOS, template, soft prompt) as one block of embeddings, and the user sends what follows it: the
token ids of the chat rendered under the start text, without the first `cut`. The plain form gives the soft tokens ids of
their own. Each form is checked against `ChatModel.render` when it is written.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..model.architecture import text_config
from ..model.chat import ChatModel
from ..model.soft_prompt import SoftPrompt

FORMS = ("peft", "vllm", "plain")

MOST_UNASKED = (
    1_000_000_000  # bytes of weights that the plain form copies without being asked for it
)

PROBES = (
    "How do I bake bread?",
    "why",
    "1 + 1 = ?",
    "(a) or [b]?",
    "\u201cquoted\u201d",
    "\u65e5\u672c\u8a9e",
)


class ExportError(ValueError):
    """A form cannot be written as asked; the message says why and what to do."""


def export(
    soft: SoftPrompt, model: ChatModel, folder: str | Path, forms: Sequence[str] | None = None
) -> dict[str, Path]:
    """Writes `folder`/peft, /vllm and /plain, each with a README of working code; returns {form: its folder}.

    forms: default peft and vllm, and plain where the weights it copies are below 1 GB (`model.weight_bytes`).
    A form's folder appears when it is whole, and replaces an older export.
    Raises ChatModelError for a soft prompt of another model or template, ExportError for a form that cannot be exact and
    for a folder that holds something else.
    """
    soft.check(model)
    forms = forms or [
        form for form in FORMS if form != "plain" or model.weight_bytes < MOST_UNASKED
    ]
    if unknown := set(forms) - set(FORMS):
        raise ExportError(
            f"unknown form {', '.join(sorted(unknown))}; choose among {', '.join(FORMS)}"
        )
    written = {form: Path(folder) / form for form in forms}
    for place in written.values():
        if place.exists() and not _replaceable(place):
            raise ExportError(
                f"{place} holds something that is no whole export; remove it, or choose another folder"
            )
    for form, place in written.items():
        part = place.with_name(f".{form}.part")
        shutil.rmtree(part, ignore_errors=True)  # a killed run's
        part.mkdir(parents=True)
        try:
            {"peft": _peft, "vllm": _vllm, "plain": _plain}[form](soft, model, part)
            for file in filter(
                Path.is_file, part.iterdir()
            ):  # safetensors writes for the owner alone; who serves it may be another
                file.chmod((part / "README.md").stat().st_mode)
            if place.exists():
                shutil.rmtree(place)
            part.rename(place)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return written


def _replaceable(place: Path) -> bool:
    """Whether a folder is empty or an export; its README is written last."""
    if place.is_symlink() or not place.is_dir():
        return False
    readme = place / "README.md"
    return not any(place.iterdir()) or (
        readme.is_file() and _ABOUT in readme.read_text(encoding="utf-8", errors="replace")
    )


def prompt_embeds(soft: SoftPrompt, model: ChatModel, query: str) -> torch.Tensor:
    """Input embeddings (length, d) of the fully rendered prompt, as vLLM takes them: scaled, where a family scales."""
    return _embed(soft, model, model.render([query], soft)[0].ids)


def completion_body(embeds: torch.Tensor, model_name: str, **sampling: Any) -> dict[str, Any]:
    """The JSON body for vLLM's /v1/completions: the tensor by torch.save, in base64."""
    buffer = io.BytesIO()
    torch.save(embeds.clone(), buffer)
    return {
        "model": model_name,
        "prompt_embeds": base64.b64encode(buffer.getvalue()).decode(),
        **sampling,
    }


def _embed(soft: SoftPrompt, model: ChatModel, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad(), model.forward.soft_tokens(soft.embeddings):
        rows = model.model.get_input_embeddings()(torch.tensor(ids, device=model.device)).cpu()
    return (
        rows.float() if rows.dtype == torch.float64 else rows
    )  # neither PEFT nor vLLM keeps float64


def _base(model: ChatModel) -> str:
    """The base model's name, for code that runs in another folder."""
    if model.source and Path(model.source).is_dir():
        return str(Path(model.source).resolve())
    return model.source or model.name


def _quoted(name: str) -> str:
    """A name as a literal of Python."""
    return json.dumps(name, ensure_ascii=False)


def _loading(model: ChatModel) -> str:
    """How the README's code opens the base model: as this one was."""
    revision = f", revision={_quoted(model.revision)}" if model.revision else ""
    return f'AutoModelForCausalLM.from_pretrained({_quoted(_base(model))}{revision}, dtype="{model.dtype_name}")'


# The head as embeddings: PEFT and vLLM -------------------------------------------------------------------------------------


def _head(soft: SoftPrompt, model: ChatModel, folder: Path) -> tuple[torch.Tensor, int]:
    """Embeddings (n, d) up to the soft prompt's end, and how many ids of the chat under the start text they replace.

    Writes the tokenizer, whose chat template puts the start text into the slot.
    """
    row = model.render(["x"], soft)[0]
    chats = model.render(PROBES, soft.start_text)
    if _save_tokenizer(copy.deepcopy(model.tokenizer), soft.start_text.strip(), model, folder) != [
        list(c.ids) for c in chats
    ]:
        raise ExportError(
            f"the chat template of {model.name!r} renders the start text in another way when it is its default; "
            "remove special tokens and role markers from the text"
        )
    return _embed(soft, model, row.ids[: row.slot[1]]), chats[0].slot[1]


def _peft(soft: SoftPrompt, model: ChatModel, folder: Path) -> None:
    from safetensors.torch import save_file

    head, cut = _head(soft, model, folder)
    config = text_config(model.config)
    adapter = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _base(model),
        "revision": model.revision,
        "inference_mode": True,
        "prompt_tuning_init": "RANDOM",
        "num_virtual_tokens": len(head),
        "token_dim": model.hidden_size,
        "num_layers": model.n_layers,
        "num_attention_heads": getattr(config, "num_attention_heads", 1),
        "num_transformer_submodules": 1,
    }
    (folder / "adapter_config.json").write_text(
        json.dumps(adapter, indent=2) + "\n", encoding="utf-8"
    )
    save_file({"prompt_embeddings": head.float()}, folder / "adapter_model.safetensors")
    code = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = PeftModel.from_pretrained({_loading(model)}, ".")
chat = tokenizer.apply_chat_template([{{"role": "user", "content": "{PROBES[0]}"}}], add_generation_prompt=True, return_dict=False)
ids = torch.tensor([chat[{cut}:]], device=model.device)
print(tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=50, do_sample=False)[0, ids.shape[1] :]))"""
    text = f"""The {len(head)} virtual tokens are the chat's head with the soft prompt in it. PEFT puts them first, so only what follows is
sent: the tokenizer here renders a chat under the start text, and its first {cut} ids are cut off. A naive use, with the
whole chat behind the virtual tokens, gives another model input."""
    _readme(soft, model, folder, "A PEFT prompt-tuning adapter", text, "import torch\n" + code)


def _vllm(soft: SoftPrompt, model: ChatModel, folder: Path) -> None:
    head, cut = _head(soft, model, folder)
    torch.save(head, folder / "head.pt")
    body = completion_body(
        prompt_embeds(soft, model, PROBES[0]), _base(model), max_tokens=50, temperature=0
    )
    (folder / "request.json").write_text(json.dumps(body) + "\n", encoding="utf-8")
    code = f"""import base64, io, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, head = AutoTokenizer.from_pretrained("."), torch.load("head.pt", weights_only=True)
table = {_loading(model)}.get_input_embeddings()
chat = tokenizer.apply_chat_template([{{"role": "user", "content": "{PROBES[0]}"}}], add_generation_prompt=True, return_dict=False)
buffer = io.BytesIO()
torch.save(torch.cat([head, table(torch.tensor(chat[{cut}:])).detach().to(head.dtype)]), buffer)
embeds = base64.b64encode(buffer.getvalue()).decode()
body = {{"model": {_quoted(_base(model))}, "prompt_embeds": embeds, "max_tokens": 50, "temperature": 0}}"""
    revision = f"--revision {shlex.quote(model.revision)} " if model.revision else ""
    dtype = str(head.dtype).removeprefix("torch.")  # vLLM has no float64
    text = f"""Serve the unchanged base model, and send `request.json` (the prompt of "{PROBES[0]}"):

    vllm serve {shlex.quote(_base(model))} {revision}--dtype {dtype} --enable-prompt-embeds
    curl http://localhost:8000/v1/completions -H 'Content-Type: application/json' -d @request.json

Untested on vLLM itself: the tensors were compared with the model's own forward pass, the body follows vLLM's documentation. Its
server trusts the tensors it gets: keep it away from untrusted clients. `head.pt` holds the chat's head with the soft prompt in
it; for a prompt of your own, put the embeddings of what follows behind it:"""
    _readme(soft, model, folder, "vLLM prompt embeddings", text, code)


# The soft tokens as tokens: plain transformers -----------------------------------------------------------------------------


def _plain(soft: SoftPrompt, model: ChatModel, folder: Path) -> None:
    if model.quantization or getattr(model.config, "quantization_config", None):
        raise ExportError(
            f"the plain form copies weights, and those of {model.name!r} are quantized; load it without quantization"
        )
    size, free = model.weight_bytes, shutil.disk_usage(folder).free
    if size > free:
        raise ExportError(
            f"the plain form needs {size / 1e9:.1f} GB in {folder.parent} and {free / 1e9:.1f} GB are free; leave it out, or make room"
        )
    first = model.n_embeddings
    rows = model.render(PROBES, soft)
    for soft_tokens in (_added_tokens, _characters):
        tokenizer, names = soft_tokens(model.tokenizer, len(soft.embeddings), folder)
        ids = tokenizer.convert_tokens_to_ids(names)
        wanted = [[ids[i - first] if i >= first else i for i in row.ids] for row in rows]
        if _save_tokenizer(tokenizer, "".join(names), model, folder) == wanted:
            break
    else:
        raise ExportError(
            f"the tokenizer of {model.name!r} splits the text around new tokens differently, so the plain form would not be exact; "
            "use the form peft or vllm"
        )
    state, n_rows = _with_rows(soft, model, ids)
    model.model.save_pretrained(folder, state_dict=state)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (config["text_config"] if "text_config" in config else config)["vocab_size"] = n_rows
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    generation["suppress_tokens"] = ids
    path.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    code = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".", dtype="auto")
chat = tokenizer.apply_chat_template([{{"role": "user", "content": "{PROBES[0]}"}}], add_generation_prompt=True, return_tensors="pt")
out = model.generate(**chat, max_new_tokens=50, do_sample=False)
print(tokenizer.decode(out[0, chat["input_ids"].shape[1] :]))"""
    text = f"""The whole model ({size / 1e9:.2f} GB) with {len(ids)} more tokens, which the chat template puts into the slot of the system message
where a chat has none. `generation_config.json` keeps the model from uttering them (`suppress_tokens`); another server than
transformers must be told so too."""
    beware = ""
    if soft_tokens is _characters:
        beware = (
            f"\nRemove the private-use characters U+{ord(names[0]):04X} to U+{ord(names[-1]):04X} from it too: "
            "in a query, each would be a soft token."
        )
    _readme(soft, model, folder, "A model folder for plain transformers", text, code, beware)


def _added_tokens(tokenizer: Any, n: int, folder: Path) -> tuple[Any, list[str]]:
    """Special tokens <soft_0> ...: text on both sides of one is tokenized apart."""
    from tokenizers import AddedToken

    names = [f"<soft_{i}>" for i in range(n)]
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens(
        [AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True
    )
    return extended, names


def _characters(tokenizer: Any, n: int, folder: Path) -> tuple[Any, list[str]]:
    """Private-use characters in the vocabulary itself, for tokenizers that put a space after each special token."""
    names = [chr(0xE000 + i) for i in range(n)]
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer.get_vocab()
    taken = {i: token for token, i in vocabulary.items()}
    model = state["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] |= {token: i for i, token in taken.items()}  # added tokens keep their ids
        model["vocab"] |= {name: max(taken) + 1 + i for i, name in enumerate(names)}
    elif isinstance(model.get("vocab"), list):
        listed = len(model["vocab"])
        model["vocab"] += [
            [taken.get(i, f"<unused_{i}>"), -1e9] for i in range(listed, max(taken) + 1)
        ]
        model["vocab"] += [[name, 0.0] for name in names]
    path.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    return type(tokenizer).from_pretrained(folder), names


def _with_rows(
    soft: SoftPrompt, model: ChatModel, ids: Sequence[int]
) -> tuple[dict[str, torch.Tensor], int]:
    """The model's state with the soft rows at `ids` of the input embedding, and its number of rows.

    A head that is not tied keeps its rows, and gets zeros for those beyond them.
    """
    table, head = model.model.get_input_embeddings().weight, model.model.get_output_embeddings()
    n_rows = max(len(table), max(ids) + 1)

    def extended(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [tensor.detach(), tensor.new_zeros(n_rows - len(tensor), *tensor.shape[1:])]
        )

    new = {
        tensor.data_ptr(): extended(tensor)
        for tensor in (table, head.weight, getattr(head, "bias", None))
        if tensor is not None
    }
    new[table.data_ptr()][list(ids)] = torch.tensor(soft.embeddings).to(table)
    return {
        name: new.get(tensor.data_ptr(), tensor)
        for name, tensor in model.model.state_dict().items()
    }, n_rows


# Both --------------------------------------------------------------------------------------------------------------------


def _save_tokenizer(tokenizer: Any, text: str, model: ChatModel, folder: Path) -> list[list[int]]:
    """Saves a tokenizer whose chat template puts `text` where the system message goes, unless the chat has one of its own.

    Returns the ids of the PROBES under it, as read back from the folder.
    """
    literal = json.dumps(text, ensure_ascii=False)
    if model.renderer.system_role:
        default = f"{{% set messages = [{{'role': 'system', 'content': {literal}}}] + messages %}}"
    else:
        default = f"{{% set messages = [{{'role': 'user', 'content': {literal} + '\\n\\n' + messages[0]['content']}}] + messages[1:] %}}"
    tokenizer.chat_template = f"{{% if messages[0]['role'] != 'system' %}}{default}{{% endif %}}{model.tokenizer.get_chat_template()}"
    tokenizer.save_pretrained(folder)
    saved = type(tokenizer).from_pretrained(folder)
    chats = [[{"role": "user", "content": probe}] for probe in PROBES]
    return [
        list(saved.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
        for chat in chats
    ]


_ABOUT = "The soft prompt `"  # how the second paragraph of every README begins


def _readme(
    soft: SoftPrompt,
    model: ChatModel,
    folder: Path,
    title: str,
    text: str,
    code: str,
    beware: str = "",
) -> None:
    trained = soft.config.get("method", "start text, untrained")
    page = f"""# {title}

{_ABOUT}{soft.name}` ({trained}, {len(soft.embeddings)} tokens) of `{model.name}`, model {soft.model[:12]}, in {model.dtype_name}.

{text}

```python
{code}
```

Strip the query, and break up special tokens in it if it comes from outside: the template here does neither.{beware}
"""
    (folder / "README.md").write_text(page, encoding="utf-8")
