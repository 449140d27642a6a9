"""A chat model with one slot: the system message, as text or as soft tokens. The only room that imports transformers."""

from __future__ import annotations

import difflib
import gc
import hashlib
import json
import os
import re
import threading
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from .data import ROOT

_SYSTEM, _USER = "Xq7 system slot 7qX", "Xq7 user slot 7qX"


TEMPLATES = tuple(sorted(path.stem for path in (ROOT / "templates").glob("*.jinja")))
"""Names of the study's chat templates."""


_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


class ChatModelError(ValueError):
    """The model cannot be used as a chat model; the message says why and what to do."""


def study_models() -> pd.DataFrame:
    """The eight models of the study: model (its name there), hub_id, revision ("" where none is known), template, note."""
    return pd.read_csv(ROOT / "models.csv", keep_default_na=False)


@runtime_checkable
class SoftTokens(Protocol):
    """What the system slot takes besides text: embeddings (length, d) and the text whose place they take."""

    @property
    def name(self) -> str: ...

    @property
    def embeddings(self) -> NDArray[np.float32]: ...

    @property
    def start_text(self) -> str: ...


Prompt = str | SoftTokens


@dataclass(frozen=True)
class Rendered:
    """One rendered chat, ready for the forward pass.

    ids   token ids; ids >= the model's embedding rows are soft tokens (row = id - embedding rows)
    slot  (start, stop) positions of the system message's tokens; (0, 0) without one
    soft  SHA-256 of the soft embeddings, "" for text
    """

    ids: tuple[int, ...]
    slot: tuple[int, int]
    soft: str = ""


class ChatModel:
    """A causal language model with a chat template. Weights are loaded at the first use of `.model`."""

    def __init__(
        self,
        name: str,
        source: str,
        revision: str | None,
        device: str,
        dtype: torch.dtype,
        tokenizer: Any,
        config: Any,
        *,
        template: str = "tokenizer",
        quantization: str | None = None,
    ):
        self.name, self.source, self.revision = name, source, revision
        self.dtype, self.template, self.quantization = dtype, template, quantization
        self.tokenizer, self.config = tokenizer, config
        self._device = device
        self._lock = threading.RLock()  # soft tokens, captures and samplings change how the model computes: one thread at a time
        self._frames: dict[str, tuple[str, str]] = {}
        self._said: set[str] = set()
        self._loaded: tuple | None = None  # the state of the weights when they were read from `source`
        self._hashed: tuple[tuple | None, str] | None = None  # that state and its fingerprint
        self._files: dict[str, tuple[int, int, int]] = {}  # of a folder, as they were when it was opened
        self.system_role = self._finds_system_role()

    @classmethod
    def load(
        cls,
        name: str | Path = "organism",
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        template: str | Path | None = None,
        quantization: str | None = None,
    ) -> ChatModel:
        """Opens "organism" (the embedded model), a local folder, a hub id, or one of the study's models by its name there.

        A name of `study_models()` ("vicuna-7b-v1.5") stands for its hub id, revision and the study's chat template.
        revision: a branch, tag or commit of the hub; "org/model@REVISION" says the same.
        device: ANALYSIS_LIB_DEVICE, else "cuda" where there is one, else "cpu"; "auto" spreads the weights over all GPUs
        (needs accelerate).
        dtype: ANALYSIS_LIB_DTYPE, else float32 on a CPU and bfloat16 elsewhere; the embedded model takes float64 on a CPU,
        so that whole trainings repeat on other processors and numbers of threads to the printed digit.
        template: a file with a Jinja chat template, or the name of one of the study's (`TEMPLATES`); default: the tokenizer's.
        quantization: "8bit" or "4bit" (needs bitsandbytes), for capture and sampling only.
        The attention implementation is the one transformers picks, SDPA where the architecture has it.
        Never runs a repository's own code and reads weights from safetensors only, those of a folder from that folder. A
        folder that changes while its model is open, and a checkpoint that lacks tensors, are ChatModelErrors of `.model`.
        Raises ChatModelError: unknown id or folder, no network, gated, pickled weights only, an adapter beside the model, a
        configuration or index that names other files or code, no chat template or one that
        cannot be rendered, no tokenizer or one without offsets, a device or dtype that torch does not have, a package that lacks.
        """
        from transformers import AutoConfig, AutoTokenizer
        from transformers.utils import cached_file, extract_commit_hash

        name = str(name)
        base, _, at = (name, "", "") if _folder(name) else name.partition("@")
        source = str(ROOT / "organism") if base == "organism" else base
        if at and revision and at != revision:
            raise ChatModelError(f"{name!r} names the revision {at!r}, and revision={revision!r} another; give one of them")
        folder, revision = _folder(source), revision or at or None
        local = folder is not None
        if local and revision:
            raise ChatModelError(f"{base!r} is no model of the hub, so it has no revision {revision!r}; leave that out")
        study = {} if local else study_models().set_index("model").to_dict("index")
        if source in study:
            known = study[source]
            source, revision = str(known["hub_id"]), revision or known["revision"] or None
            template = template or known["template"]
        files = _files(folder) if folder else {}  # before anything is read
        if folder:
            source = str(folder)
            if not (folder / "config.json").is_file():
                raise ChatModelError(
                    f"the folder {name} holds no config.json, so it is no model; give the folder that save_pretrained wrote"
                )
            if not any(folder.glob("*.safetensors")):
                raise ChatModelError(
                    f"the folder {name} holds no *.safetensors; pickled weights can run code on load and are not read: "
                    "save the model again with save_pretrained(..., safe_serialization=True)"
                )
            if not any((folder / file).exists() for file in _VOCABULARIES):
                raise ChatModelError(
                    f"{name!r} comes without a tokenizer; save it into the same folder with tokenizer.save_pretrained"
                )
            adapter = str(folder) if (folder / "adapter_config.json").exists() else None
        elif source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise ChatModelError(
                f"there is no folder {name}; give 'organism', an existing model folder or a hub id such as 'org/model'"
            )
        try:
            if not local:  # one commit for all files; it stands for the weights in the fingerprint
                found = cached_file(source, "config.json", revision=revision)
                revision = extract_commit_hash(found, None) or revision
                adapter = cached_file(
                    source, "adapter_config.json", revision=revision, _raise_exceptions_for_missing_entries=False
                )
            config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        except Exception as error:
            meant = () if source in {model["hub_id"] for model in study.values()} else tuple(map(str, study))
            raise ChatModelError(_load_advice(name, error, meant=meant)) from error
        if adapter:
            raise ChatModelError(
                f"{name!r} holds an adapter beside the model, and which of both is meant is not clear; merge the adapter "
                "(merge_and_unload) and save the model, or take adapter_config.json away"
            )
        _refuse_configuration(name, config)
        if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
            raise ChatModelError(
                f"{name!r} comes without a tokenizer; save it into the same folder with tokenizer.save_pretrained"
            )
        if template is not None:
            tokenizer.chat_template = _read_template(template)
        if not tokenizer.chat_template:
            raise ChatModelError(
                f"no chat template in {name!r}; choose an instruction-tuned model, or pass template=FILE or one of {', '.join(TEMPLATES)}"
            )
        if not tokenizer.is_fast:
            raise ChatModelError(
                f"{name!r} has no fast tokenizer, which is needed to locate the system message; install the package `tokenizers` builds for it"
            )
        gpu = torch.cuda.is_available()
        device = device or os.environ.get("ANALYSIS_LIB_DEVICE") or ("cuda" if gpu else "cpu")
        try:
            torch.empty(0, device="cpu" if device == "auto" else device)
        except (RuntimeError, AssertionError) as error:  # a torch built without CUDA asserts
            raise ChatModelError(
                f"torch has no device {device!r} here; give 'cpu', 'cuda' on a machine with a GPU, or 'auto' for several"
            ) from error
        if quantization not in (None, "8bit", "4bit"):
            raise ChatModelError(f"unknown quantization {quantization!r}; give '8bit' or '4bit', or leave it out")
        for package, wanted in (("accelerate", device == "auto" or quantization), ("bitsandbytes", quantization)):
            if wanted and find_spec(package) is None:
                asked = "device='auto'" if device == "auto" else f"quantization={quantization!r}"
                raise ChatModelError(f"{asked} needs the package {package}, which is not installed; pip install {package}")
        dtype = dtype or os.environ.get("ANALYSIS_LIB_DTYPE") or None
        if dtype is None:
            on_cpu = torch.float64 if name == "organism" else torch.float32
            dtype = (
                torch.bfloat16 if quantization or (gpu if device == "auto" else torch.device(device).type != "cpu") else on_cpu
            )
        else:
            named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
            if not isinstance(named, torch.dtype) or not named.is_floating_point:
                raise ChatModelError(f"unknown dtype {dtype!r}; give 'float64', 'float32', 'bfloat16' or 'float16'")
            dtype = named
        form = "tokenizer" if template is None else Path(template).name
        chat = cls(name, source, revision, device, dtype, tokenizer, config, template=form, quantization=quantization)
        chat._files = files
        chat._frame("")  # a template that cannot be rendered is told now
        if local:
            _ = chat._weight_map, chat.stop_ids
        return chat

    @property
    def settings(self) -> dict[str, str]:
        """The environment under which `load` opens a model on the same device and in the same dtype, where they are not the default."""
        gpu = torch.cuda.is_available()
        on_cpu = not gpu if self._device == "auto" else torch.device(self._device).type == "cpu"
        dtype = torch.bfloat16 if not on_cpu else torch.float64 if self.name == "organism" else torch.float32
        asked = {"ANALYSIS_LIB_DEVICE": self._device} if self._device != ("cuda" if gpu else "cpu") else {}
        return asked | ({"ANALYSIS_LIB_DTYPE": self.dtype_name} if self.dtype != dtype else {})

    @classmethod
    def wrap(cls, model: Any, tokenizer: Any, *, name: str = "in-memory") -> ChatModel:
        """A chat model around transformers objects already in memory."""
        spread = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
        chat = cls(name, "", None, "auto" if spread else str(model.device), model.dtype, tokenizer, model.config)
        chat.__dict__["model"] = model.eval().requires_grad_(False)
        return chat

    @cached_property
    def model(self) -> Any:
        """The transformers model, in eval mode, frozen; loaded here."""
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig
        from transformers.utils import logging

        options: dict[str, Any] = {}
        if self.quantization:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_8bit=self.quantization == "8bit",
                load_in_4bit=self.quantization == "4bit",
                bnb_4bit_compute_dtype=self.dtype,
                bnb_4bit_quant_type="nf4",
            )
        if self.quantization or self._device == "auto":
            options["device_map"] = "auto" if self._device == "auto" else {"": self._device}
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        _ = self._weight_map
        options |= {"revision": self.revision, "dtype": self.dtype, "use_safetensors": True, "trust_remote_code": False}
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(self.source, output_loading_info=True, **options)
        except Exception as error:
            raise ChatModelError(_load_advice(self.name, error)) from error
        finally:
            if bars:
                logging.enable_progress_bar()
        model, report = loaded
        _refuse_random_weights(self.name, report)
        self._refuse_change()
        model = (model if "device_map" in options else model.to(self._device)).eval().requires_grad_(False)
        self._loaded = _state_of(model)
        return model

    def unload(self) -> None:
        """Gives the weights' memory back; they are loaded again at the next use. A model in memory alone keeps them."""
        with self._lock:
            if self.source and self.__dict__.pop("model", None) is not None:
                self._loaded = None
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    @property
    def device(self) -> torch.device:
        """Where token ids and soft embeddings go: the device of the input embedding. With "auto", weights are loaded to know."""
        if self._device != "auto":
            return torch.device(self._device)
        embedding = self.model.get_input_embeddings()
        hook = getattr(embedding, "_hf_hook", None)  # accelerate's: with offloaded weights, where they are worked with
        return torch.device(getattr(hook, "execution_device", None) or embedding.weight.device)

    @property
    def body(self) -> Any:
        """The decoder without its vocabulary head; of a model that also takes images, the language part."""
        decoder = self.model.get_decoder()
        return decoder if decoder is not self.model else self.model.model

    @property
    def blocks(self) -> Any:
        """The decoder's blocks, a ModuleList."""
        n = self.text_config.num_hidden_layers
        lists = [m for m in self.body.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n]
        if not lists:
            raise ChatModelError(f"{self.name!r} has no list of {n} blocks; layers other than -1 cannot be read")
        return lists[0]

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config(decoder=True)

    @property
    def n_layers(self) -> int:
        return int(self.text_config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        return int(self.text_config.hidden_size)

    @cached_property
    def weight_bytes(self) -> int:
        """Memory of the weights in this dtype and quantization, known without loading them."""
        if "model" in self.__dict__:
            return int(self.model.get_memory_footprint())
        model = self._without_weights()
        bits = {None: torch.finfo(self.dtype).bits, "8bit": 8, "4bit": 4}[self.quantization]
        head = model.get_output_embeddings()
        linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]  # what is quantized
        packed = sum(m.weight.numel() for m in linear)
        return int(sum(p.nbytes for p in model.parameters()) - packed * (torch.finfo(self.dtype).bits - bits) / 8)

    def _without_weights(self) -> Any:
        """The model's modules and the shapes of their weights alone."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config, dtype=self.dtype)

    @property
    def n_embeddings(self) -> int:
        """Rows of the input embedding matrix; soft tokens take the ids from here on."""
        return int(self.text_config.vocab_size)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of configuration and weights: of their content for a folder, of id and commit for a hub model.

        Weights changed in memory (assigned, or in place outside `.data`) are hashed anew.
        """
        state = _state_of(self.model) if "model" in self.__dict__ and not self.quantization else self._loaded
        if self._hashed is None or self._hashed[0] != state:
            self._hashed = state, self._fingerprint(in_memory=state != self._loaded or not self.source)
        return self._hashed[1]

    def _fingerprint(self, in_memory: bool) -> str:
        digest = hashlib.sha256((self.quantization or "").encode())
        if in_memory:
            digest.update(json.dumps(self.config.to_dict(), sort_keys=True, default=str).encode())
            tensors = {**dict(self.model.named_buffers()), **self.model.state_dict()}  # with buffers that are not saved
            for key, tensor in sorted(tensors.items()):
                if tensor.is_meta:
                    raise ChatModelError(
                        f"weights of {self.name!r} are offloaded, so that its fingerprint cannot be taken; open it with ChatModel.load"
                    )
                digest.update(key.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif Path(self.source).is_dir():
            for file in (Path(self.source) / name for name in _files(Path(self.source))):
                digest.update(f"{file.name}:{_file_digest(file)}".encode())
            self._refuse_change()
        else:
            digest.update(f"{self.source}@{self.revision}".encode())
        return digest.hexdigest()

    def key_parts(self) -> dict[str, str]:
        """What a stored row's key says of the model: fingerprint and dtype."""
        return {"model": self.fingerprint, "dtype": self.dtype_name}

    @property
    def hooked(self) -> str:
        """The first module with a forward hook of the user's, which may change what the model computes; "" without one."""
        for name, module in self.model.named_modules() if "model" in self.__dict__ else ():
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                owner = str(getattr(hook, "__module__", "")).partition(".")[0]
                if owner not in ("torch", "transformers", "accelerate", "analysis_lib"):
                    return name or "the model"
        return ""

    @cached_property
    def tokenizer_digest(self) -> str:
        """SHA-256 of what turns token ids into text."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()  # left from the last call, and set anew by the next
        backend.no_truncation()
        return hashlib.sha256(backend.to_str().encode()).hexdigest()

    def _refuse_change(self) -> None:
        if self._files and _files(Path(self.source)) != self._files:
            raise ChatModelError(
                f"the files of {self.name!r} changed after the model was opened; open it again with ChatModel.load, so that what is "
                "computed is kept as the new model's"
            )

    @cached_property
    def _weight_map(self) -> dict[str, str] | None:
        return _weight_map(self.name, self.source, self.revision) if self.source else None

    @property
    def work_dtype(self) -> torch.dtype:
        """Precision of what is computed around the model (losses, soft prompts, probabilities): at least float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @cached_property
    def _generation(self) -> Any:
        """The generation configuration, without loading weights."""
        from transformers import GenerationConfig

        if not self.source:
            return self.model.generation_config
        from transformers.utils import cached_file

        found = cached_file(
            self.source, "generation_config.json", revision=self.revision, _raise_exceptions_for_missing_entries=False
        )
        if found is None:  # the file is optional
            return GenerationConfig()
        try:
            config = GenerationConfig.from_pretrained(self.source, revision=self.revision or "main")
            strings = [config.stop_strings] if isinstance(config.stop_strings, str) else config.stop_strings or []
            ids = [config.eos_token_id] if isinstance(config.eos_token_id, int) else config.eos_token_id or []
            if not all(isinstance(text, str) for text in strings) or not all(i is None or isinstance(i, int) for i in ids):
                raise TypeError("stop_strings or eos_token_id are no texts and no numbers")
            return config
        except Exception as error:
            raise ChatModelError(
                f"generation_config.json of {self.name!r} cannot be read ({type(error).__name__}: {str(error).splitlines()[0][:200]}); mend it "
                "or take it away: it says where a reply ends"
            ) from error

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a reply: the tokenizer's and the generation configuration's."""
        ids: set[int] = set()
        for found in (self.tokenizer.eos_token_id, self._generation.eos_token_id):
            ids.update([found] if isinstance(found, int) else (i for i in found or [] if i is not None))
        return frozenset(ids)

    @cached_property
    def stop_strings(self) -> tuple[str, ...]:
        """Strings that end a reply, of the generation configuration."""
        found = self._generation.stop_strings or ()
        return (found,) if isinstance(found, str) else tuple(found)

    # Rendering

    def render(self, queries: Sequence[str], prompt: Prompt = "") -> list[Rendered]:
        """Renders each query under the prompt, with the generation prompt, through the chat template.

        Text "" means no system message. A model without a system role gets the prompt in front of the query, and says so once.
        Soft tokens take exactly the positions of their start text's tokens. Special tokens and role markers
        inside a query are broken by a space, so that no query opens a new role. Raises ChatModelError where a text is no
        valid Unicode, or is longer with its prompt than the model's context.
        """
        if not queries:
            return []
        text = prompt if isinstance(prompt, str) else prompt.start_text
        system = self._escape(text.strip(), "a prompt")
        head, _ = self._frame(system)
        texts = [self._apply(system, self._escape(q.strip(), "a query")) for q in queries]
        if system and not self.system_role:
            self._say(f"the chat template of {self.name!r} takes no system message; prompts stand in front of the query")
        if not system and self.default_system:
            self._say(
                f"without a system message the chat template of {self.name!r} puts in its own, so that no prompt is not none: "
                f"{self.default_system[:60]!r}; pass a template without it"
            )
        if not system:
            return self._check_length([Rendered(ids, (0, 0)) for ids, _ in self._encode(texts, 0, len(head))], queries)
        begin = self._system_start()
        end = begin + len(system)
        soft, digest = None, ""
        if not isinstance(prompt, str):
            length = len(prompt.embeddings)
            soft = tuple(range(self.n_embeddings, self.n_embeddings + length))
            digest = soft_digest(prompt.embeddings)
        out = []
        for ids, offsets in self._encode(texts, end, len(head)):
            inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > begin]
            start, stop = inside[0], inside[-1] + 1
            if soft is None:
                out.append(Rendered(ids, (start, stop)))
            else:
                out.append(Rendered((*ids[:start], *soft, *ids[stop:]), (start, start + len(soft)), digest))
        return self._check_length(out, queries)

    def _encode(self, texts: list[str], slot_end: int, head: int) -> list[tuple[tuple[int, ...], list[tuple[int, int]]]]:
        """Token ids of each text and, at least up to character `slot_end`, their offsets.

        Text on both sides of a special token is tokenized apart. So what precedes the last special token between the
        characters `slot_end` and `head` is tokenized once, where the first and the last text show that this changes nothing.
        """

        def whole(part: list[str]) -> list[tuple[tuple[int, ...], list[tuple[int, int]]]]:
            encoded = self.tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
            return [(tuple(ids), offsets) for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"])]

        ids, offsets = whole(texts[:1])[0]
        found = [(i + 1, start, stop) for i, (token, (start, stop)) in enumerate(zip(ids, offsets)) if token in self._special_ids]
        cuts = [n for n, start, stop in found if slot_end <= start and stop <= head]
        if not cuts or len({text[: offsets[cuts[-1] - 1][1]] for text in texts}) > 1:
            return whole(texts)
        n, cut = cuts[-1], offsets[cuts[-1] - 1][1]
        tails = self.tokenizer([text[cut:] for text in texts], add_special_tokens=False)["input_ids"]
        out = [((*ids[:n], *tail), offsets[:n]) for tail in tails]
        if out[0][0] != ids or out[-1][0] != whole(texts[-1:])[0][0]:
            return whole(texts)
        return out

    def _check_tokens(self, rows: Sequence[Rendered], queries: Sequence[str]) -> None:
        for row, query in zip(rows, queries):
            ids = (*row.ids[: row.slot[0]], *row.ids[row.slot[1] :]) if row.soft else row.ids
            if max(ids) >= self.n_embeddings:
                raise ChatModelError(
                    f"the query {query[:60]!r} has a token that {self.name!r} has no embedding for (its tokenizer knows more than "
                    f"{self.n_embeddings} tokens); give the model its own tokenizer, or drop the query"
                )

    def _check_length(self, rows: list[Rendered], queries: Sequence[str]) -> list[Rendered]:
        self._check_tokens(rows, queries)
        longest = max(range(len(rows)), key=lambda i: len(rows[i].ids))
        context = getattr(self.text_config, "max_position_embeddings", None)
        if context and len(rows[longest].ids) > context:
            raise ChatModelError(
                f"the query {queries[longest][:60]!r} has {len(rows[longest].ids)} tokens with its prompt, and the context of "
                f"{self.name!r} {context}; shorten or drop it"
            )
        return rows

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special)

    def _apply(self, system: str, query: str) -> str:
        if self.system_role:
            messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": query}]
        else:
            messages = [{"role": "user", "content": f"{system}\n\n{query}" if system else query}]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template raises what it likes
            raise ChatModelError(
                f"the chat template of {self.name!r} ({self.template}) cannot be rendered: {type(error).__name__}: {error}; "
                f"mend it, or pass template=FILE or one of {', '.join(TEMPLATES)}"
            ) from error

    @cached_property
    def default_system(self) -> str:
        """The system message that the template puts in where none is given; "" for most models."""
        if not self.system_role:
            return ""
        before, _, after = self._frame(_SYSTEM)[0].partition(_SYSTEM)
        head = self._frame("")[0]
        if len(head) < len(before) + len(after) or not (head.startswith(before) and head.endswith(after)):
            return ""
        return head[len(before) : len(head) - len(after)].strip()

    @property
    def template_digest(self) -> str:
        """SHA-256 of the chat template."""
        return hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()

    def about(self) -> dict[str, Any]:
        """What a record of a run says of the model; loads no weights."""
        return {
            "name": self.name,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype_name,
            "quantization": self.quantization,
            "template": self.template,
            "template_sha256": self.template_digest,
            "prompt_goes": "into the system message" if self.system_role else "in front of the query",
            "default_system": self.default_system,
        }

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, stacklevel=3)

    def _frame(self, system: str) -> tuple[str, str]:
        """The rendered text before and after the query."""
        if system not in self._frames:
            head, found, tail = self._apply(system, _USER).partition(_USER)
            if not found:
                raise ChatModelError(f"the chat template of {self.name!r} drops the user message; it cannot be used")
            self._frames[system] = head, tail
        return self._frames[system]

    def _system_start(self) -> int:
        return self._apply(_SYSTEM, _USER).index(_SYSTEM)

    def _finds_system_role(self) -> bool:
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
        try:
            return _SYSTEM in self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:  # a template refuses the role by raising what it likes
            return False

    @cached_property
    def _markers(self) -> re.Pattern[str]:
        """Special tokens of the tokenizer and the template's role markers: bracketed ones, and labels such as "USER:"."""
        special = set(self.tokenizer.all_special_tokens) | {
            t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special
        }
        framed = self._apply(_SYSTEM, _USER)
        for before in framed.replace(_SYSTEM, _USER).split(_USER):
            special.update(re.findall(r"[<\[][^\s<>\[\]]{1,40}[>\]]+|<<[^<>]+>>|\w+:(?=\s*$)", before))
        return re.compile("|".join(re.escape(s) for s in sorted(special, key=len, reverse=True) if len(s) > 1) or r"(?!)")

    def _escape(self, text: str, what: str) -> str:
        if re.search("[\ud800-\udfff]", text):
            raise ChatModelError(f"{what} holds half of a Unicode pair, which is no character: {text[:60]!r}; mend the text")

        def broken(text: str) -> str:
            return self._markers.sub(lambda m: m[0][0] + " " + m[0][1:], text)

        escaped = broken(text)
        if self._markers.search(folded := unicodedata.normalize("NFKC", escaped)):  # what many tokenizers do first
            escaped = broken(folded)
        if escaped != text:
            warnings.warn(
                f"{what} holds a special token or role marker of {self.name!r}; it was broken by a space: {text[:60]!r}",
                stacklevel=4,
            )
        return escaped

    # Soft tokens

    def embed_text(self, text: str) -> NDArray[np.float32]:
        """Embeddings (length, d) of a system message's tokens exactly as rendered in context."""
        if not text.strip():
            raise ChatModelError("a soft prompt starts at a text prompt; give its text, not an empty one")
        row = self.render(["x"], text)[0]
        table = self._embedding_table()
        ids = torch.tensor(row.ids[row.slot[0] : row.slot[1]], device=table.device)
        return table[ids].to(self.dtype).float().cpu().numpy()

    def _embedding_table(self) -> torch.Tensor:
        """The input embeddings (rows, d); where the weights are not loaded, read alone from their file, in the file's dtype."""
        if "model" not in self.__dict__ and (table := self._embeddings_of_file()) is not None:
            return table
        return self.model.get_input_embeddings().weight.detach()

    def _embeddings_of_file(self) -> torch.Tensor | None:
        """None where the files do not hold the embeddings under the name and in the shape that the model has for them."""
        from safetensors import SafetensorError, safe_open
        from transformers.utils import cached_file

        if self.quantization or getattr(self.config, "quantization_config", None):
            return None
        model = self._without_weights()
        weight = model.get_input_embeddings().weight
        name = next(name for name, parameter in model.named_parameters() if parameter is weight)
        files = self._weight_map
        try:
            file = cached_file(self.source, "model.safetensors" if files is None else files[name], revision=self.revision)
            with safe_open(file, framework="pt") as tensors:
                table = tensors.get_tensor(name)
        except (OSError, KeyError, SafetensorError):  # loading the whole model tells what is wrong
            return None
        self._refuse_change()
        return table if table.shape == weight.shape else None

    @contextmanager
    def soft_tokens(self, embeddings: torch.Tensor | NDArray | None) -> Iterator[None]:
        """Within this context, token ids from `n_embeddings` on stand for the rows of embeddings (length, d).

        A tensor that requires grad receives gradients. Model and tokenizer are left as found. Another thread that enters
        this context waits; with None, that is all it does.
        """
        with self._lock:
            yield from self._with_soft_tokens(embeddings)

    def _with_soft_tokens(self, embeddings: torch.Tensor | NDArray | None) -> Iterator[None]:
        if embeddings is None:
            yield
            return
        model = self.model
        base = model.get_input_embeddings()
        rows = torch.as_tensor(embeddings, device=self.device)
        if rows.requires_grad and self.quantization:
            raise ChatModelError(
                f"{self.name!r} is loaded in {self.quantization}, for capture and sampling only; load it without quantization to train"
            )
        if rows.dim() != 2 or rows.shape[1] != self.hidden_size:
            raise ChatModelError(
                f"soft tokens of shape {tuple(rows.shape)} do not fit {self.name!r}, whose embeddings have {self.hidden_size} dimensions"
            )
        model.set_input_embeddings(_SoftEmbedding(base, rows))
        try:
            yield
        finally:
            model.set_input_embeddings(base)

    def nearest_tokens(self, embeddings: NDArray, *, n: int = 1) -> list[list[tuple[str, float]]]:
        """For each row of embeddings (length, d), the n vocabulary tokens of largest cosine, with it."""
        table = torch.nn.functional.normalize(self._embedding_table().to(self.dtype).float().cpu(), dim=1)
        rows = torch.nn.functional.normalize(torch.as_tensor(embeddings, dtype=torch.float32), dim=1)
        top = (rows @ table.T).topk(n, dim=1)
        return [
            [(self.tokenizer.decode([int(i)]), round(float(c), 4)) for i, c in zip(ids, cos)]
            for ids, cos in zip(top.indices, top.values)
        ]


class _SoftEmbedding(torch.nn.Module):
    """The input embedding with extra rows. Keeps the base module as it is."""

    def __init__(self, base: torch.nn.Module, rows: torch.Tensor):
        super().__init__()
        self.base, self.rows = base, rows
        self.n = int(base.weight.shape[0])  # type: ignore[arg-type, index]

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight  # type: ignore[return-value]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        soft = ids >= self.n
        plain = self.base(ids.masked_fill(soft, 0))
        if not soft.any():
            return plain
        rows = self.rows.to(plain.dtype) * getattr(self.base, "embed_scale", 1.0)
        return torch.where(soft.unsqueeze(-1), rows[(ids - self.n).clamp(min=0)], plain)


def load_classifier(name: str | Path, *, revision: str | None = None, device: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a text-classification model: a local folder or a hub id, frozen; safetensors only, no remote code.

    Raises ChatModelError as `ChatModel.load` does.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    name = str(name)
    safe: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        _refuse_configuration(name, AutoConfig.from_pretrained(name, **safe))
        _weight_map(name, name, revision)
        tokenizer = AutoTokenizer.from_pretrained(name, **safe)
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, **safe
        )
    except ChatModelError:
        raise
    except Exception as error:
        raise ChatModelError(_load_advice(name, error)) from error
    model, report = loaded
    _refuse_random_weights(name, report)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval().requires_grad_(False), tokenizer


def _read_template(name_or_file: str | Path) -> str:
    path = ROOT / "templates" / f"{name_or_file}.jinja" if str(name_or_file) in TEMPLATES else Path(name_or_file).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ChatModelError(
            f"no chat template can be read from {str(path)!r} ({error}); give a Jinja file, or one of {', '.join(TEMPLATES)}"
        ) from error


def _folder(name: str) -> Path | None:
    """The folder of that name, whole, so that a later change of the working folder does not move it; None where there is none."""
    try:
        path = Path(name).expanduser()
        return path.resolve() if path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a NUL
        return None


def _files(folder: Path) -> dict[str, tuple[int, int, int]]:
    """{name: (bytes, modification time in ns, inode)} of what a model folder's fingerprint covers."""
    paths = [*sorted(folder.glob("*.safetensors")), folder / "model.safetensors.index.json", folder / "config.json"]
    stats = {path.name: path.stat() for path in paths if path.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats.items()}


def _refuse_configuration(name: str, config: Any) -> None:
    """A configuration may name code of the hub and files of its own choice."""
    asked = [str(getattr(config, f"_{what}_implementation_internal", "")) for what in ("attn", "experts")]
    if "/" in " ".join(asked):
        raise ChatModelError(
            f"the configuration of {name!r} asks for compiled code of the hub, which is never run; take the entry "
            '"attn_implementation" (or "experts_implementation") out of its config.json'
        )
    if getattr(config, "transformers_weights", None):
        raise ChatModelError(
            f"the configuration of {name!r} names its own file of weights, which is not read; take the entry "
            '"transformers_weights" out of its config.json'
        )


def _weight_map(name: str, source: str, revision: str | None) -> dict[str, str] | None:
    """{tensor: file} of a checkpoint in several files, None of one in a single file. Raises ChatModelError: see `load`."""
    from transformers.utils import cached_file

    found: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    try:
        if cached_file(source, "model.safetensors", **found):
            return None
        index = cached_file(source, "model.safetensors.index.json", **found)
    except OSError as error:  # the network, say
        raise ChatModelError(_load_advice(name, error)) from error
    if index is None:
        return None
    try:
        files = dict(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ChatModelError(
            f"model.safetensors.index.json of {name!r} names no files ({type(error).__name__}); copy or download the model again"
        ) from error
    for file in files.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ChatModelError(
                f"model.safetensors.index.json of {name!r} names {str(file)[:80]!r}, which is no *.safetensors beside it; only such "
                "files are read: copy or download the model again"
            )
    return files


def _refuse_random_weights(name: str, report: Mapping[str, Any]) -> None:
    """transformers draws at random what a checkpoint does not hold, and goes on."""
    lacking = sorted({str(key) for kind in ("missing_keys", "mismatched_keys") for key in report.get(kind) or ()})
    if lacking:
        raise ChatModelError(
            f"the files of {name!r} do not hold {len(lacking)} of the model's tensors ({', '.join(lacking[:3])}{', ...' * (len(lacking) > 3)}), "
            "which would be drawn at random; copy or download the model again, or mend its config.json"
        )


def _state_of(model: Any) -> tuple:
    """What changes when a weight is assigned or changed in place; cheap, and of no meaning outside this process."""
    tensors = (*model.parameters(), *model.buffers())
    kinds = frozenset(map(type, model.modules())) - {_SoftEmbedding}  # a block may have been wrapped
    return (kinds, *((w.data_ptr(), 0 if w.is_inference() else w._version) for w in tensors if not w.is_meta))


def soft_digest(embeddings: NDArray) -> str:
    """SHA-256 of soft embeddings: what a cached row of theirs is keyed by."""
    return hashlib.sha256(np.ascontiguousarray(embeddings, dtype=np.float32).tobytes()).hexdigest()


def _file_digest(path: Path) -> str:
    """SHA-256 of a file, remembered by (path, size, modification time): a 14 GB model is hashed once."""
    from platformdirs import user_cache_path

    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()
    memo = user_cache_path("analysis_lib") / "digests" / key
    with suppress(OSError, ValueError):
        if re.fullmatch("[0-9a-f]{64}", known := memo.read_text()):
            return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        part = memo.with_suffix(f".{os.getpid()}")
        part.write_text(digest)
        part.replace(memo)
    except OSError:
        pass  # a memo only: without it the file is hashed again
    return digest


def _load_advice(name: str, error: Exception, *, meant: Sequence[str] = ()) -> str:
    """One line that says what to do, from an error of the libraries below. meant: names of the study that may have been."""
    text = f"{type(error).__name__}: {error}"
    names = {one.lower(): one for one in meant}
    near = difflib.get_close_matches(name.partition("@")[0].rpartition("/")[2].lower(), names)
    similar = f"; models of the study with a similar name: {', '.join(names[one] for one in near)}" if near else ""
    said = text.replace(name, "")  # a folder called "401" says nothing about the network
    if "SafetensorError" in said:
        return f"the weights of {name!r} are damaged or incomplete ({error}); copy or download the model again"
    if "trust_remote_code" in said:
        return f"{name!r} needs its own Python code, which is never run; choose a model that transformers supports itself"
    if re.search(r"sentencepiece|protobuf|tiktoken", said):
        return f"the tokenizer of {name!r} is a SentencePiece file, which has to be converted; pip install sentencepiece protobuf"
    if "safetensors" in said:
        return f"{name!r} offers no safetensors weights; pickled weights can run code on load and are not read: choose another revision or convert it"
    if re.search(r"gated repo|gatedrepo|\b40[13]\b", said, re.IGNORECASE):
        return f"{name!r} is gated or private; accept its terms on its page and log in with `hf auth login`{similar}"
    if re.search(r"offline|connect|resolve|network", said, re.IGNORECASE):
        return f"{name!r} is not in the local cache and the hub cannot be reached; check the network, or give a local folder{similar}"
    if re.search(r"not a valid model identifier|\b404\b|Repository ?Not ?Found", said):
        return f"{name!r} is no model of the hub and no folder; check the spelling, or give 'organism'{similar}"
    return f"{name!r} cannot be loaded: {text.splitlines()[0][:300]}"
