"""What to do where a model cannot be opened: one line a fault."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def near_names(name: str, known: Iterable[str]) -> str:
    """ "; models with a similar name: ...", of the known names and of the folders beside it."""
    path, names = Path(name.partition("@")[0]), {one.lower(): one for one in known}
    with suppress(OSError, RuntimeError, ValueError):
        beside = path.expanduser().parent.iterdir()
        names |= {p.name.lower(): str(p) for p in beside if (p / "config.json").is_file()}
    near = difflib.get_close_matches(path.name.lower(), names)
    return f"; models with a similar name: {', '.join(names[one] for one in near)}" if near else ""


def file_advice(name: str) -> str:
    """Of the name of a single file."""
    if name.lower().endswith(".gguf"):
        return gguf_advice(name, [Path(name).name])
    return f"{name!r} is a file, and a model is a folder; give the folder that holds it"


def gguf_advice(name: str, files: Iterable[str] = ()) -> str:
    found = f" ({', '.join(sorted(files)[:3])})" if files else ""
    return (
        f"{name!r} holds GGUF files{found}, quantized for llama.cpp, which are not read; "
        "give the model that they were made from, in the safetensors form"
    )


def no_model(name: str) -> str:
    """Of a repository of the hub without config.json."""
    if "gguf" in name.lower():
        return gguf_advice(name)
    return f"{name!r} holds no config.json, so it is no model; give the id of a chat model"


def adapter_advice(name: str, config_file: str | Path) -> str:
    """Of a folder or repository that holds a PEFT adapter and no model."""
    about: dict[str, object] = {}
    with suppress(OSError, ValueError):
        found = json.loads(Path(config_file).read_text(encoding="utf-8"))
        about = found if isinstance(found, dict) else {}
    kind = re.sub(r"\W", "", str(about.get("peft_type") or "PEFT"))[:40]
    base = about.get("base_model_name_or_path")
    base = base[:200] if isinstance(base, str) and base else "the base model"
    if re.search("PROMPT|PREFIX|P_TUNING|CPT|CARTRIDGE", kind):
        return (
            f"{name!r} holds an adapter alone ({kind}), and one that adds soft tokens, which "
            f"cannot be merged; open {base!r}, and train a soft prompt with train_dro or "
            "train_prompt_tuning"
        )
    return (
        f"{name!r} holds an adapter alone ({kind}), not the model {base!r} that it changes; merge "
        f"it: base = AutoModelForCausalLM.from_pretrained({base!r}); "
        "PeftModel.from_pretrained(base, ADAPTER).merge_and_unload().save_pretrained('merged'); "
        "tokenizer.save_pretrained('merged'); and give the folder 'merged'"
    )


def unmerged_advice(name: str, tensors: Iterable[str]) -> str:
    """Of weights that were saved with their adapter's tensors apart."""
    return (
        f"the files of {name!r} hold tensors of an adapter that was not merged "
        f"({_some(tensors)}), so they are not the model that was trained; open the adapter on its "
        "base model: PeftModel.from_pretrained(base, ADAPTER).merge_and_unload()"
        ".save_pretrained('merged'); tokenizer.save_pretrained('merged')"
    )


def untaken_advice(name: str, tensors: Iterable[str]) -> str:
    """Of tensors that lie inside the model's own layers and have no place there."""
    return (
        f"the files of {name!r} hold tensors that its configuration has no place for "
        f"({_some(tensors)}), so they are not of the model that config.json describes; take the "
        "config.json that was saved with the weights"
    )


def _some(tensors: Iterable[str]) -> str:
    names = sorted(tensors)
    return ", ".join(names[:3]) + f", and {len(names) - 3} more" * (len(names) > 3)


def no_tokenizer(name: str) -> str:
    return (
        f"{name!r} comes without a tokenizer; save it into the same folder "
        "with tokenizer.save_pretrained"
    )


def load_advice(name: str, error: Exception, *, meant: Iterable[str] = ()) -> str:
    """One line that says what to do, from an error of the libraries below.

    meant: names of models that the user may have meant.
    """
    text = f"{type(error).__name__}: {error}"
    similar = near_names(name, meant) if meant else ""
    said = text.replace(name, "")  # a folder called "401" says nothing about the network
    if "SafetensorError" in said:
        return (
            f"the weights of {name!r} are damaged or incomplete ({error}); "
            "copy or download the model again"
        )
    if "UnicodeDecodeError" in said:
        return (
            f"a text file of {name!r}, such as its chat_template.jinja, is not in UTF-8 ({error}); "
            "save it in UTF-8"
        )
    if "trust_remote_code" in said:
        return (
            f"{name!r} needs its own Python code, which is never run; choose a model that "
            "transformers supports itself"
        )
    if re.search(r"sentencepiece|protobuf|tiktoken", said):
        return (
            f"the tokenizer of {name!r} is a SentencePiece file, which has to be converted; pip "
            "install sentencepiece protobuf"
        )
    if "safetensors" in said:
        return (
            f"{name!r} offers no safetensors weights; pickled weights can run code on load and are "
            "not read: choose another revision or convert it"
        )
    if "does not appear to have a file named config.json" in said:
        return no_model(name)
    if re.search(r"gated repo|gatedrepo|\b40[13]\b", said, re.IGNORECASE):
        return (
            f"{name!r} is gated or private; "
            f"accept its terms on its page and log in with `hf auth login`{similar}"
        )
    if re.search(r"offline|connect|resolve|network", said, re.IGNORECASE):
        return (
            f"{name!r} is not in the local cache and the hub cannot be reached; check the network, "
            f"or give a local folder{similar}"
        )
    if re.search(r"not a valid model ident|Repo id must|\b404\b|Repository ?Not ?Found", said):
        return (
            f"{name!r} is no model of the hub and no folder; "
            f"check the spelling, or give 'organism'{similar}"
        )
    return f"{name!r} cannot be loaded: {text.splitlines()[0][:300]}"
