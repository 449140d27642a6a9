"""The form for plain transformers: the whole model, with the soft tokens as tokens of their own."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...model.chat import ChatModel
from ...model.llama_tokens import read_tokenizer, take_as_it_is
from ...model.soft_prompt import SoftPrompt
from .page import write_readme
from .parts import PROBES, ExportError, save_tokenizer

TEXT = """\
The whole model ({size:.2f} GB) with {n} more tokens. The chat template puts them into the slot of
the system message where a chat has none. `generation_config.json` keeps the model from uttering them
(`suppress_tokens`). A server other than transformers must be told so, too."""

CODE = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), \
AutoModelForCausalLM.from_pretrained(".", dtype="auto")
chat = tokenizer.apply_chat_template([{{"role": "user", "content": "{PROBES[0]}"}}], \
add_generation_prompt=True, return_tensors="pt")
out = model.generate(**chat, max_new_tokens=50, do_sample=False)
print(tokenizer.decode(out[0, chat["input_ids"].shape[1] :]))"""

BEWARE = """
Remove the private-use characters U+{first:04X} to U+{last:04X} from it too: in a query, each would
be a soft token."""


def write_plain(soft: SoftPrompt, model: ChatModel, folder: Path) -> None:
    """Write a model folder for plain transformers.

    Parameters
    ----------
    soft : SoftPrompt
        What is exported.
    model : ChatModel
        The model it belongs to, whose weights are copied.
    folder : Path
        Where it goes.

    Raises
    ------
    ExportError
        For quantized weights, where the disk is too small, and where the tokenizer splits the text
        around new tokens differently.
    """
    _refuse_weights(model, folder)
    model.model.config.save_pretrained(folder)  # by it transformers chooses the tokenizer's class
    names, ids = _soft_ids(soft, model, folder)
    state, n_rows = _with_rows(soft, model, ids)
    model.model.save_pretrained(folder, state_dict=state)
    config = _read(folder / "config.json")
    (config["text_config"] if "text_config" in config else config)["vocab_size"] = n_rows
    _write(folder / "config.json", config)
    path = folder / "generation_config.json"
    generation = _read(path) if path.is_file() else {}
    _write(path, generation | {"suppress_tokens": ids})
    text = TEXT.format(size=model.weight_bytes / 1e9, n=len(ids))
    beware = ""
    if len(names[0]) == 1:  # the soft tokens are characters, which a query may hold
        beware = BEWARE.format(first=ord(names[0]), last=ord(names[-1]))
    title = "A model folder for plain transformers"
    write_readme(soft, model, folder, title, text, CODE, beware)


def _refuse_weights(model: ChatModel, folder: Path) -> None:
    if model.quantization or getattr(model.config, "quantization_config", None):
        raise ExportError(
            f"the plain form copies weights, and those of {model.name!r} are quantized; "
            "load it without quantization"
        )
    size, free = model.weight_bytes, shutil.disk_usage(folder).free
    if size > free:
        raise ExportError(
            f"the plain form needs {size / 1e9:.1f} GB in {folder.parent} and {free / 1e9:.1f} GB "
            "are free; leave it out, or make room"
        )


def _soft_ids(soft: SoftPrompt, model: ChatModel, folder: Path) -> tuple[list[str], list[int]]:
    """Names and ids of the soft tokens, in a tokenizer that renders as `ChatModel.render` does."""
    first = model.n_embeddings
    rows = model.render(PROBES, soft)
    for soft_tokens in (_added_tokens, _characters):
        tokenizer, names = soft_tokens(model.tokenizer, len(soft.embeddings), folder)
        ids = tokenizer.convert_tokens_to_ids(names)
        wanted = [[ids[i - first] if i >= first else i for i in row.ids] for row in rows]
        if save_tokenizer(tokenizer, "".join(names), wanted, model, folder):
            return names, ids
    raise ExportError(
        f"the tokenizer of {model.name!r} splits the text around new tokens differently, so the "
        "plain form would not be exact; use the form peft or vllm"
    )


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
    """Private-use characters, for tokenizers that put a space after special tokens."""
    names = [chr(0xE000 + i) for i in range(n)]
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    state = _read(path)
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
    take_as_it_is(folder)
    return read_tokenizer(folder), names


def _with_rows(
    soft: SoftPrompt, model: ChatModel, ids: Sequence[int]
) -> tuple[dict[str, torch.Tensor], int]:
    """The model's state with the soft rows at `ids` of the input embedding, and its rows' number.

    A head that is not tied keeps its rows, and gets zeros for those beyond them.
    """
    table, head = model.model.get_input_embeddings().weight, model.model.get_output_embeddings()
    n_rows = max(len(table), max(ids) + 1)

    def extended(tensor: torch.Tensor) -> torch.Tensor:
        missing = tensor.new_zeros(n_rows - len(tensor), *tensor.shape[1:])
        return torch.cat([tensor.detach(), missing])

    new = {
        tensor.data_ptr(): extended(tensor)
        for tensor in (table, head.weight, getattr(head, "bias", None))
        if tensor is not None
    }
    new[table.data_ptr()][list(ids)] = torch.tensor(soft.embeddings).to(table)
    state = model.model.state_dict()
    return {name: new.get(tensor.data_ptr(), tensor) for name, tensor in state.items()}, n_rows


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
