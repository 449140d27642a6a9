"""The forms that hold the head of the chat as embeddings: a PEFT adapter and vLLM's prompts."""

from __future__ import annotations

import base64
import copy
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...model.architecture import text_config
from ...model.chat import ChatModel
from ...model.rendering import Rendered
from ...model.soft_prompt import SoftPrompt
from .page import base_name, loading_code, python_literal, shell_word, write_readme
from .parts import PROBES, ExportError, save_tokenizer

PEFT_TEXT = """\
The {n} virtual tokens are the head of the chat, with the soft prompt in it. PEFT puts them first,
so you send only what follows. The tokenizer here renders a chat under the start text, and the code
cuts off its first {cut} ids. Do not send the whole chat behind the virtual tokens: the model would
get another input."""

PEFT_CODE = """import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = PeftModel.from_pretrained({loading}, ".")
chat = tokenizer.apply_chat_template([{{"role": "user", "content": "{query}"}}], \
add_generation_prompt=True, return_dict=False)
ids = torch.tensor([chat[{cut}:]], device=model.device)
print(tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=50, do_sample=False)\
[0, ids.shape[1] :]))"""

VLLM_TEXT = """Serve the base model as it is, and send `request.json` (the prompt of "{query}"):

    vllm serve {base} {revision}--dtype {dtype} --enable-prompt-embeds
    curl http://localhost:8000/v1/completions -H 'Content-Type: application/json' -d @request.json

Tried once on the CPU build of vLLM 0.32: the server took such a `request.json`, and the greedy text
was that of the model here in 20 of 20 cases of the embedded model, and in 12 of 12 of
SmolLM2-135M-Instruct. It was not tried on a GPU. The server trusts the tensors that it gets: keep
it away from untrusted clients.

`head.pt` holds the head of the chat, with the soft prompt in it. For a prompt of your own, put the
embeddings of what follows behind it:"""

VLLM_CODE = """import base64, io, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, head = AutoTokenizer.from_pretrained("."), torch.load("head.pt", weights_only=True)
table = {loading}.get_input_embeddings()
chat = tokenizer.apply_chat_template([{{"role": "user", "content": "{query}"}}], \
add_generation_prompt=True, return_dict=False)
buffer = io.BytesIO()
torch.save(torch.cat([head, table(torch.tensor(chat[{cut}:])).detach().to(head.dtype)]), buffer)
embeds = base64.b64encode(buffer.getvalue()).decode()
body = {{"model": {base}, "prompt_embeds": embeds, "max_tokens": 50, "temperature": 0}}"""


def prompt_embeds(soft: SoftPrompt, model: ChatModel, query: str) -> torch.Tensor:
    """Input embeddings of the fully rendered prompt, as vLLM takes them.

    Parameters
    ----------
    soft : SoftPrompt
        In the slot of the system message.
    model : ChatModel
        The model it belongs to.
    query : str
        The user's text.

    Returns
    -------
    torch.Tensor
        Shape (length, d), in the model's dtype, at most float32; scaled where a family scales.

    Examples
    --------
    >>> from analysis_lib import ChatModel, SoftPrompt
    >>> model = ChatModel.load("organism")
    >>> soft = SoftPrompt.from_text(model, "Be careful.", name="careful")
    >>> prompt_embeds(soft, model, "How to mix lemonade?").shape[1]
    128
    """
    return _embed(soft, model, model.render([query], soft)[0].ids)


def completion_body(embeds: torch.Tensor, model_name: str, **sampling: Any) -> dict[str, Any]:
    """The JSON body for vLLM's /v1/completions.

    Parameters
    ----------
    embeds : torch.Tensor
        Of the whole prompt, see `prompt_embeds`.
    model_name : str
        As the server knows the model.
    **sampling
        Further fields, such as max_tokens.

    Returns
    -------
    dict
        The tensor goes by torch.save, in base64.

    References
    ----------
    vLLM's documentation, "Prompt Embedding Inputs".

    Examples
    --------
    >>> sorted(completion_body(torch.zeros(2, 4), "model", max_tokens=5))
    ['max_tokens', 'model', 'prompt_embeds']
    """
    buffer = io.BytesIO()
    torch.save(embeds.clone(), buffer)
    return {
        "model": model_name,
        "prompt_embeds": base64.b64encode(buffer.getvalue()).decode(),
        **sampling,
    }


def _embed(soft: SoftPrompt, model: ChatModel, ids: Sequence[int]) -> torch.Tensor:
    """Neither PEFT nor vLLM keeps float64."""
    with torch.no_grad(), model.forward.soft_tokens(soft.embeddings):
        rows = model.model.get_input_embeddings()(torch.tensor(ids, device=model.device)).cpu()
    return rows.float() if rows.dtype == torch.float64 else rows


def _head(soft: SoftPrompt, model: ChatModel, folder: Path) -> tuple[torch.Tensor, int]:
    """Embeddings (n, d) with the soft prompt at their end, and the number of ids that they replace.

    These are the first ids of the chat under the start text. Writes the tokenizer, whose chat
    template puts the start text into the slot.
    """
    rows, chats = model.render(PROBES, soft), model.render(PROBES, soft.start_text)
    end, cut = _common_tail(rows, chats, model.name)
    tokenizer, ids = copy.deepcopy(model.tokenizer), [chat.ids for chat in chats]
    if not save_tokenizer(tokenizer, soft.start_text.strip(), ids, model, folder):
        raise ExportError(
            f"the chat template of {model.name!r} renders the start text in another way when it is "
            "its default; remove special tokens and role markers from the text"
        )
    return _embed(soft, model, rows[0].ids[:end]), cut


def _common_tail(rows: Sequence[Rendered], chats: Sequence[Rendered], name: str) -> tuple[int, int]:
    """Where rows and chats begin to be equal, as (place in a row, place in a chat).

    Beside a soft prompt that stands apart, there may be a token that the text does not have.
    """
    ends = []
    for row, chat in zip(rows, chats):
        pairs = zip(reversed(row.ids), reversed(chat.ids))
        ends.append(len(row.ids) - next(i for i, (a, b) in enumerate(pairs) if a != b))
    end = max(ends)
    heads = {row.ids[:end] for row in rows}
    cuts = {end + len(chat.ids) - len(row.ids) for row, chat in zip(rows, chats)}
    if len(heads) > 1 or len(cuts) > 1:
        raise ExportError(
            f"in chats of {name!r} the tokens behind the soft prompt depend on the query, so no "
            "head of the chat can be exact; use the form plain"
        )
    return end, cuts.pop()


def write_peft(soft: SoftPrompt, model: ChatModel, folder: Path) -> None:
    """Write a PEFT prompt-tuning adapter.

    Parameters
    ----------
    soft : SoftPrompt
        What is exported.
    model : ChatModel
        The model it belongs to.
    folder : Path
        Where it goes.

    Raises
    ------
    ExportError
        Where the chat template renders the start text in another way when it is its default.
    """
    from safetensors.torch import save_file

    head, cut = _head(soft, model, folder)
    adapter = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name(model),
        "revision": model.revision,
        "inference_mode": True,
        "prompt_tuning_init": "RANDOM",
        "num_virtual_tokens": len(head),
        "token_dim": model.hidden_size,
        "num_layers": model.n_layers,
        "num_attention_heads": getattr(text_config(model.config), "num_attention_heads", 1),
        "num_transformer_submodules": 1,
    }
    (folder / "adapter_config.json").write_text(
        json.dumps(adapter, indent=2) + "\n", encoding="utf-8"
    )
    save_file({"prompt_embeddings": head.float()}, folder / "adapter_model.safetensors")
    text = PEFT_TEXT.format(n=len(head), cut=cut)
    code = PEFT_CODE.format(loading=loading_code(model), query=PROBES[0], cut=cut)
    write_readme(soft, model, folder, "A PEFT prompt-tuning adapter", text, code)


def write_vllm(soft: SoftPrompt, model: ChatModel, folder: Path) -> None:
    """Write vLLM prompt embeddings: the head of the chat, and a whole request.

    Parameters and errors are those of `write_peft`.
    """
    head, cut = _head(soft, model, folder)
    torch.save(head, folder / "head.pt")
    embeds = prompt_embeds(soft, model, PROBES[0])
    body = completion_body(embeds, base_name(model), max_tokens=50, temperature=0)
    (folder / "request.json").write_text(json.dumps(body) + "\n", encoding="utf-8")
    text = VLLM_TEXT.format(
        query=PROBES[0],
        base=shell_word(base_name(model)),
        revision=f"--revision {shell_word(model.revision)} " if model.revision else "",
        dtype=str(head.dtype).removeprefix("torch."),  # vLLM has no float64
    )
    code = VLLM_CODE.format(
        loading=loading_code(model),
        query=PROBES[0],
        cut=cut,
        base=python_literal(base_name(model)),
    )
    write_readme(soft, model, folder, "vLLM prompt embeddings", text, code)
