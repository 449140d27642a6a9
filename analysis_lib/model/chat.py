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
from .fingerprint import digest_in_memory, digest_of_source, refuse_change, state_of
from .forward import Forward
from .generation import Generation, generation_of, read_generation
from .llama_tokens import warn_of_ids
from .loading import (
    bytes_of_weights,
    choose_device,
    choose_dtype,
    embeddings_of_file,
    find_source,
    load_weights,
    read_source,
)
from .reasoning import switch_thinking
from .rendering import Prompt, Rendered, Renderer
from .tampering import refuse_prompt_learning
from .template_checks import Day


class ChatModel:
    """A causal language model with a chat template; its weights are loaded at the first use.

    Open one with `ChatModel.load` or `ChatModel.wrap`. Tokenizer and configuration are read at
    once, the weights at the first use of `.model` or `.forward`. `n_layers` counts the blocks,
    `hidden_size` the dimensions of a state, `n_embeddings` the rows of the input embeddings; soft
    tokens take the ids from there on. `dtype_name` is the dtype without "torch.".

    Examples
    --------
    >>> from analysis_lib import ChatModel
    >>> model = ChatModel.load("organism")
    >>> model.n_layers, model.hidden_size, len(model.fingerprint)
    (4, 128, 64)
    >>> tuple(model.embedding_table().shape), sorted(model.key_parts()), model.loaded
    ((1536, 128), ['dtype', 'model'], False)
    >>> model.about()["prompt_goes"]
    'into the system message'
    >>> model.model.training, model.loaded
    (False, True)
    >>> model.unload()
    >>> model.loaded
    False
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
        date: Day = None,
    ):
        self.name, self.source, self.revision = name, source, revision
        self.dtype, self.template, self.quantization = dtype, template, quantization
        self.asked_device, self.dtype_name = device, str(dtype).removeprefix("torch.")
        self.renderer = Renderer(tokenizer, config, name=name, template=template, day=date)
        text = text_config(config)
        self.n_layers, self.hidden_size = int(text.num_hidden_layers), int(text.hidden_size)
        self.config, self.n_embeddings = config, self.renderer.n_embeddings
        # Held while something changes how the model computes.
        self.lock = threading.RLock()
        self._forward: Forward | None = None
        # The state of the weights when they were read from `source`.
        self._loaded: tuple[Any, ...] | None = None
        # That state, and the fingerprint taken of it.
        self._hashed: tuple[tuple[Any, ...] | None, str] | None = None
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
        date: Day = None,
        thinking: bool | None = None,
    ) -> ChatModel:
        """Opens a model; its weights stay on disk until they are used.

        Weights are read from safetensors only, and a folder's weights from that folder only. A
        repository's own code never runs. transformers picks the attention implementation: SDPA
        where the architecture has it.

        Parameters
        ----------
        name : str or Path
            "organism" (the embedded model), a local folder, a hub id, or a name of
            `study_models()`. A study name ("vicuna-7b-v1.5") stands for its hub id, its revision
            and the study's chat template.
        revision : str, optional
            A branch, tag or commit of the hub. "org/model@REVISION" says the same.
        device : str, optional
            Default: ANALYSIS_LIB_DEVICE, else "cuda" where there is one, else "cpu". "auto"
            spreads the weights over all GPUs and needs accelerate.
        dtype : str or torch.dtype, optional
            Default: ANALYSIS_LIB_DTYPE, else float32 on a CPU and bfloat16 elsewhere. The
            embedded model takes float64 on a CPU, so that whole trainings repeat on other
            processors and numbers of threads to the printed digit.
        template : str or Path, optional
            A file with a Jinja chat template, or the name of one of the study's (`TEMPLATES`).
            Default: the tokenizer's.
        quantization : str, optional
            "8bit" or "4bit". Needs bitsandbytes; for capture and sampling only.
        date : str or datetime.date, optional
            The day, as "2026-11-27", for a template that writes it; it stays. Default:
            ANALYSIS_LIB_DATE, else today.
        thinking : bool, optional
            Turns a reasoning model's thoughts on or off, by its template's own switch. Default: as
            the template has it.

        Returns
        -------
        ChatModel

        Raises
        ------
        ChatModelError
            For an unknown id or folder, no network, a gated model, or pickled weights only; an
            adapter beside the model; a configuration or index that names other files or code; a
            missing chat template, one that cannot be rendered, or one without a switch for
            thinking; a missing tokenizer, or one
            without offsets; a device or dtype that torch does not have; a missing package. `.model`
            raises it where the folder has changed since, or a checkpoint lacks tensors.

        Examples
        --------
        >>> from analysis_lib import ChatModel
        >>> model = ChatModel.load("organism", dtype="float32", device="cpu")
        >>> model.name, model.dtype_name, model.device.type
        ('organism', 'float32', 'cpu')
        """
        source = find_source(str(name), revision, template)
        config, tokenizer, commit = read_source(source)
        if thinking is not None:
            switch_thinking(source.name, tokenizer, thinking)
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
            date=date,
        )
        chat._files = source.files
        # A template that cannot be rendered is told now.
        warn_of_ids(source.name, source.place, commit, tokenizer, chat.renderer.frame(""))
        if source.is_folder:
            _ = chat._weight_map, chat.generation
        return chat

    @classmethod
    def wrap(
        cls, model: Any, tokenizer: Any, *, name: str = "in-memory", date: Day = None
    ) -> ChatModel:
        """Makes a chat model of transformers objects in memory.

        Parameters
        ----------
        model : transformers.PreTrainedModel
            It is put into eval mode and frozen. A PEFT model that puts learned tokens before the
            chat is refused with ChatModelError.
        tokenizer : transformers.PreTrainedTokenizerFast
            A fast tokenizer with a chat template.
        name, date
            The model's name in tables and messages; the day, see `load`.

        Returns
        -------
        ChatModel

        Examples
        --------
        >>> from analysis_lib import ChatModel
        >>> organism = ChatModel.load("organism")
        >>> ChatModel.wrap(organism.model, organism.tokenizer, name="mine").loaded
        True
        """
        refuse_prompt_learning(model, name)
        spread = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
        chat = cls(
            name,
            "",
            None,
            "auto" if spread else str(model.device),
            model.dtype,
            tokenizer,
            model.config,
            date=date,
        )
        chat._forward = _passes(chat, model.eval().requires_grad_(False))
        return chat

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._forward is not None

    @property
    def forward(self) -> Forward:
        """The forward passes of the loaded model, for one thread at a time; loads the weights."""
        with self.lock:
            if self._forward is None:
                _ = self._weight_map
                model = load_weights(
                    self.name,
                    self.source,
                    self.revision,
                    device=self.asked_device,
                    dtype=self.dtype,
                    quantization=self.quantization,
                )
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
        """Gives the weights' memory back until the next use; a model in memory alone keeps it."""
        with self.lock:
            if self.source and self._forward is not None:
                self._forward = self._loaded = None
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    @property
    def device(self) -> torch.device:
        """Where token ids and soft embeddings go; to know it under "auto", weights are loaded."""
        return (
            self.forward.device if self.asked_device == "auto" else torch.device(self.asked_device)
        )

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the weights in this dtype and quantization, known without loading them."""
        if self.loaded:
            return int(self.model.get_memory_footprint())
        return bytes_of_weights(self.config, self.dtype, self.quantization)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of configuration and weights, 64 hex digits.

        Of a folder the content is hashed, of a hub model its id and commit. Weights, modules and
        numbers of modules that were changed in memory (not through `.data`) are hashed anew.
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
        """The model's part in a stored row's key: {"model": fingerprint, "dtype": name}."""
        return {"model": self.fingerprint, "dtype": self.dtype_name}

    def _refuse_change(self) -> None:
        refuse_change(self.name, self.source, self._files)

    @cached_property
    def _weight_map(self) -> dict[str, str] | None:
        return weight_map(self.name, self.source, self.revision) if self.source else None

    @cached_property
    def generation(self) -> Generation:
        """How replies end and what they never hold, without loading weights."""
        return generation_of(
            self.name,
            read_generation(self.name, self.source, self.revision, self.config)
            if self.source
            else self.model.generation_config,
            self.renderer,
        )

    def render(self, queries: Sequence[str], prompt: Prompt = "") -> list[Rendered]:
        """Renders each query under the prompt, with the generation prompt, as token ids.

        A model without a system role gets the prompt in front of the query, and says so. Soft
        tokens take their start text's places, or stand `apart`. White space at the ends of a text
        is left out. Special tokens and role markers are broken by a space. Both are said.

        Parameters
        ----------
        queries : sequence of str
            The users' messages.
        prompt : str or SoftPrompt
            The safety prompt; the text "" means no system message.

        Returns
        -------
        list of Rendered
            One a query: token ids, the place of the system message's tokens, the digest of soft
            embeddings, and what became of the query's text.

        Raises
        ------
        ChatModelError
            For a text that is not valid Unicode, or longer with its prompt than the context. Where
            the template changes the prompt, or drops the query. For another model's soft prompt.

        Examples
        --------
        >>> from analysis_lib import ChatModel
        >>> model = ChatModel.load("organism")
        >>> row = model.render(["How to bake bread?"], "Be kind.")[0]
        >>> model.tokenizer.decode(row.ids[slice(*row.slot)])
        'Be kind.'
        """
        if not isinstance(prompt, str):
            prompt.check(self)
        return self.renderer.render(queries, prompt)

    def about(self) -> dict[str, Any]:
        """What a record of a run says of the model, as a dict; loads no weights.

        name, revision, fingerprint, dtype, quantization, template, template_sha256, template_date
        (the day that the template writes, None for most), prompt_goes ("into the system message" or
        "in front of the query"), default_system (what the template puts in by itself, "" for most).
        """
        return {
            "name": self.name,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype_name,
            "quantization": self.quantization,
            **self.renderer.about(),
        }

    def embedding_table(self) -> torch.Tensor:
        """The input embeddings (n_embeddings, hidden_size).

        Where the weights are not loaded, the table alone is read from its file, in the file's
        dtype. Raises ChatModelError where the folder changed after the model was opened.
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
