"""A chat model with one slot: the system message, as text or as soft tokens."""

from __future__ import annotations

import gc
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .architecture import text_config
from .checks import weight_map
from .errors import ChatModelError
from .fingerprint import digest_in_memory, digest_of_source, state_of, weight_files
from .forward import Forward
from .loading import (
    bytes_of_weights,
    choose_device,
    choose_dtype,
    embeddings_of_file,
    find_source,
    load_weights,
    read_generation,
    read_source,
)
from .rendering import Prompt, Rendered, Renderer


class ChatModel:
    """A causal language model with a chat template. Weights are loaded at the first use of
    `.model`.
    """

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
        self.config = config
        self.asked_device, self.dtype_name = device, str(dtype).removeprefix("torch.")
        self.renderer = Renderer(tokenizer, config, name=name, template=template)
        text = text_config(config)
        self.n_layers, self.hidden_size = int(text.num_hidden_layers), int(text.hidden_size)
        self.n_embeddings = self.renderer.n_embeddings
        self.lock = threading.RLock()  # of what changes how the model computes
        self._forward: Forward | None = None
        self._loaded: tuple[Any, ...] | None = (
            None  # the state of the weights when they were read from `source`
        )
        self._hashed: tuple[tuple[Any, ...] | None, str] | None = (
            None  # that state and its fingerprint
        )
        self._files: Any = {}  # of a folder, as they were when it was opened

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
        """Opens "organism" (the embedded model), a local folder, a hub id, or one of the study's
        models by its name there.

        A name of `study_models()` ("vicuna-7b-v1.5") stands for its hub id, revision and the
        study's chat template. revision: a branch, tag or commit of the hub; "org/model@REVISION"
        says the same. device: ANALYSIS_LIB_DEVICE, else "cuda" where there is one, else "cpu";
        "auto" spreads the weights over all GPUs (needs accelerate). dtype: ANALYSIS_LIB_DTYPE, else
        float32 on a CPU and bfloat16 elsewhere; the embedded model takes float64 on a CPU, so that
        whole trainings repeat on other processors and numbers of threads to the printed digit.
        template: a file with a Jinja chat template, or the name of one of the study's
        (`TEMPLATES`); default: the tokenizer's. quantization: "8bit" or "4bit" (needs
        bitsandbytes), for capture and sampling only. The attention implementation is the one
        transformers picks, SDPA where the architecture has it. Never runs a repository's own code
        and reads weights from safetensors only, those of a folder from that folder. A folder that
        changes while its model is open, and a checkpoint that lacks tensors, are ChatModelErrors of
        `.model`. Raises ChatModelError: unknown id or folder, no network, gated, pickled weights
        only, an adapter beside the model, a configuration or index that names other files or code,
        no chat template or one that cannot be rendered, no tokenizer or one without offsets, a
        device or dtype that torch does not have, a package that lacks.
        """
        source = find_source(str(name), revision, template)
        config, tokenizer, commit = read_source(source)
        device = choose_device(device, quantization)
        chat = cls(
            source.name,
            source.place,
            commit,
            device,
            choose_dtype(dtype, source.name, device, quantization),
            tokenizer,
            config,
            template="tokenizer" if source.template is None else Path(source.template).name,
            quantization=quantization,
        )
        chat._files = source.files
        chat.renderer.frame("")  # a template that cannot be rendered is told now
        if source.is_folder:
            _ = chat._weight_map, chat.stop_ids
        return chat

    @classmethod
    def wrap(cls, model: Any, tokenizer: Any, *, name: str = "in-memory") -> ChatModel:
        """A chat model around transformers objects already in memory."""
        spread = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
        chat = cls(
            name,
            "",
            None,
            "auto" if spread else str(model.device),
            model.dtype,
            tokenizer,
            model.config,
        )
        chat._forward = _passes(chat, model.eval().requires_grad_(False))
        return chat

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._forward is not None

    @property
    def forward(self) -> Forward:
        """The forward passes of the loaded model; weights are loaded here. One thread at a time."""
        with self.lock:
            if self._forward is None:
                _ = self._weight_map
                where = {
                    "device": self.asked_device,
                    "dtype": self.dtype,
                    "quantization": self.quantization,
                }
                model = load_weights(self.name, self.source, self.revision, **where)  # type: ignore[arg-type]
                self._refuse_change()
                self._loaded = state_of(model)
                self._forward = _passes(self, model)
            return self._forward

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer that chats are rendered with."""
        return self.renderer.tokenizer

    @property
    def model(self) -> Any:
        """The transformers model, in eval mode, frozen."""
        return self.forward.model

    def unload(self) -> None:
        """Gives the weights' memory back; they are loaded again at the next use. A model in memory
        alone keeps them.
        """
        with self.lock:
            if self.source and self._forward is not None:
                self._forward = self._loaded = None
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    @property
    def device(self) -> torch.device:
        """Where token ids and soft embeddings go. With "auto", weights are loaded to know."""
        return (
            self.forward.device if self.asked_device == "auto" else torch.device(self.asked_device)
        )

    @cached_property
    def weight_bytes(self) -> int:
        """Memory of the weights in this dtype and quantization, known without loading them."""
        if self.loaded:
            return int(self.model.get_memory_footprint())
        return bytes_of_weights(self.config, self.dtype, self.quantization)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of configuration and weights: of their content for a folder, of id and commit for
        a hub model.

        Weights changed in memory (assigned, or in place outside `.data`) are hashed anew.
        """
        state = state_of(self.model) if self.loaded and not self.quantization else self._loaded
        if self._hashed is None or self._hashed[0] != state:
            if state != self._loaded or not self.source:
                digest = digest_in_memory(self.model, self.name, self.quantization)
            else:
                digest = digest_of_source(self.source, self.revision, self.quantization)
                self._refuse_change()
            self._hashed = state, digest
        return self._hashed[1]

    def key_parts(self) -> dict[str, str]:
        """What a stored row's key says of the model: fingerprint and dtype."""
        return {"model": self.fingerprint, "dtype": self.dtype_name}

    def _refuse_change(self) -> None:
        if self._files and weight_files(Path(self.source)) != self._files:
            raise ChatModelError(
                f"the files of {self.name!r} changed after the model was opened; open it again "
                "with ChatModel.load, so that what is "
                "computed is kept as the new model's"
            )

    @cached_property
    def _weight_map(self) -> dict[str, str] | None:
        return weight_map(self.name, self.source, self.revision) if self.source else None

    @cached_property
    def _generation(self) -> Any:
        """The generation configuration, without loading weights."""
        return (
            read_generation(self.name, self.source, self.revision)
            if self.source
            else self.model.generation_config
        )

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a reply: the tokenizer's and the generation configuration's."""
        ids: set[int] = set()
        for found in (self.tokenizer.eos_token_id, self._generation.eos_token_id):
            ids.update(
                [found] if isinstance(found, int) else (i for i in found or [] if i is not None)
            )
        return frozenset(ids)

    @cached_property
    def stop_strings(self) -> tuple[str, ...]:
        """Strings that end a reply, of the generation configuration."""
        found = self._generation.stop_strings or ()
        return (found,) if isinstance(found, str) else tuple(found)

    def render(self, queries: Sequence[str], prompt: Prompt = "") -> list[Rendered]:
        """Renders each query under the prompt, with the generation prompt, through the chat
        template.

        Text "" means no system message. A model without a system role gets the prompt in front of
        the query, and says so once. Soft tokens take exactly the positions of their start text's
        tokens. Special tokens and role markers inside a query are broken by a space, so that no
        query opens a new role. Raises ChatModelError where a text is no valid Unicode, or is longer
        with its prompt than the model's context.
        """
        return self.renderer.render(queries, prompt)

    def about(self) -> dict[str, Any]:
        """What a record of a run says of the model; loads no weights."""
        return {
            "name": self.name,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype_name,
            "quantization": self.quantization,
            "template": self.template,
            "template_sha256": self.renderer.template_digest,
            "prompt_goes": "into the system message"
            if self.renderer.system_role
            else "in front of the query",
            "default_system": self.renderer.default_system,
        }

    def embedding_table(self) -> torch.Tensor:
        """The input embeddings (rows, d); where the weights are not loaded, read alone from their
        file, in the file's dtype.
        """
        if not self.loaded and not self.quantization:
            table = embeddings_of_file(
                self.source, self.revision, self.config, self.dtype, self._weight_map
            )
            if table is not None:
                self._refuse_change()
                return table
        return self.model.get_input_embeddings().weight.detach()


def _passes(chat: ChatModel, model: Any) -> Forward:
    return Forward(
        model, name=chat.name, dtype=chat.dtype, trains=not chat.quantization, lock=chat.lock
    )
