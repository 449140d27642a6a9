"""Safety prompts as trained embeddings, and embeddings as the nearest words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ..data.user_files import write_whole
from .chat import ChatModel
from .errors import ChatModelError
from .published_prompts import PUBLISHED, published_fields
from .template_checks import refuse_template


class SoftPromptError(ValueError):
    """A file holds no soft prompt, or cannot be written; the message says what to do."""


@dataclass(frozen=True)
class SoftPrompt:
    """A safety prompt as trained embeddings; it goes wherever a safety prompt's text goes.

    Parameters
    ----------
    name : str
        Its name in tables and files.
    embeddings : ndarray
        Shape (length, d), float32: rows of the input embedding space.
    start_text : str
        The text prompt whose tokens' place it takes, and where its training began.
    model, model_name : str
        Fingerprint and name of the model it belongs to.
    config : mapping
        The training's configuration.
    history : DataFrame
        One row a step: step, epoch, the losses and gradient_norm.
    template : str
        The chat template it was trained in, see `template_digest`; "" where it was not recorded.
    apart : bool
        Whether the text on both sides is tokenized as beside a special token, as the study does:
        many tokenizers of Llama's kind then put a "▁" in front. By default the other tokens of the
        chat are those that it has under the start text.

    Raises
    ------
    ValueError
        Where the embeddings are not of shape (length >= 1, d), or hold NaN or infinity.

    References
    ----------
    Lester, Al-Rfou and Constant 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning",
    arXiv 2104.08691; Zheng et al. 2024, arXiv 2401.18018.

    Examples
    --------
    >>> from analysis_lib import ChatModel, SoftPrompt
    >>> model = ChatModel.load("organism")
    >>> soft = SoftPrompt.from_text(model, "Be kind.", name="kind")
    >>> soft.name, soft.embeddings.shape
    ('kind', (4, 128))
    >>> model.render(["How to bake bread?"], soft)[0].slot
    (3, 7)
    """

    name: str
    embeddings: NDArray[np.float32]
    start_text: str
    model: str
    model_name: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    history: pd.DataFrame = field(default_factory=pd.DataFrame)
    template: str = ""
    apart: bool = False

    def __post_init__(self) -> None:
        shape = np.shape(self.embeddings)
        if len(shape) != 2 or not shape[0]:
            raise ValueError(
                f"soft prompt {self.name!r} has embeddings of shape {shape}; "
                "(length, d) with length >= 1 is needed"
            )
        if not np.isfinite(self.embeddings).all():
            raise ValueError(
                f"soft prompt {self.name!r} holds NaN or infinity; "
                "train again with a smaller learning rate"
            )

    @classmethod
    def from_text(
        cls, model: ChatModel, text: str, *, name: str, apart: bool = False
    ) -> SoftPrompt:
        """The soft prompt equal to a text prompt: its tokens' embeddings, exactly as rendered.

        Parameters
        ----------
        model : ChatModel
            The model it will belong to.
        text : str
            The text prompt.
        name : str
            Its name in tables and files.
        apart : bool
            Whether it is the study's start: the tokens of the text alone, and `apart` (see above).

        Returns
        -------
        SoftPrompt
            Without config and history.

        Raises
        ------
        ChatModelError
            Where the text is empty, or cannot be rendered.

        Examples
        --------
        >>> from analysis_lib import ChatModel, SoftPrompt
        >>> model = ChatModel.load("organism")
        >>> soft = SoftPrompt.from_text(model, "Be kind.", name="kind")
        >>> soft.start_text, soft.model == model.fingerprint
        ('Be kind.', True)
        """
        return cls(
            name,
            embed_text(model, text, apart=apart),
            text,
            model.fingerprint,
            model.name,
            template=model.renderer.template_digest,
            apart=apart,
        )

    def check(self, model: ChatModel) -> None:
        """Raises where the soft prompt belongs to another model or chat template.

        `ChatModel.render` asks it, so all that takes a soft prompt does.

        Raises
        ------
        ChatModelError
            Where it was trained on another model, in another chat template or on another day.

        Examples
        --------
        >>> from analysis_lib import ChatModel, SoftPrompt
        >>> model = ChatModel.load("organism")
        >>> SoftPrompt.from_text(model, "Be kind.", name="kind").check(model)
        """
        if self.model != model.fingerprint:
            raise ChatModelError(
                f"the soft prompt {self.name!r} was trained on {self.model_name!r} "
                f"({self.model[:12]}) and cannot be used on {model.name!r} "
                f"({model.fingerprint[:12]}); load the model it was trained on"
            )
        if self.template:
            refuse_template(self.name, self.template, model.name, model.renderer.template_digest)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file: tensor `soft_prompt` (length, d), all else as JSON metadata.

        Parameters
        ----------
        path : str or Path
            Where to; missing folders are made. A file of that name is replaced whole.

        Raises
        ------
        SoftPromptError
            Where no file can be written there.

        Examples
        --------
        >>> import tempfile
        >>> from analysis_lib import ChatModel, SoftPrompt
        >>> soft = SoftPrompt.from_text(ChatModel.load("organism"), "Be kind.", name="kind")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     soft.save(f"{folder}/kind.safetensors")
        ...     again = SoftPrompt.load(f"{folder}/kind.safetensors")
        >>> bool((again.embeddings == soft.embeddings).all())
        True
        """
        from safetensors.numpy import save

        meta = {
            k: getattr(self, k) for k in ("name", "start_text", "model", "model_name", "template")
        }
        history = json.dumps(self.history.to_dict("split", index=False))
        meta |= {"config": json.dumps(dict(self.config)), "history": history}
        meta |= {"apart": json.dumps(self.apart)}
        tensor = np.ascontiguousarray(self.embeddings, dtype=np.float32)
        content = save({"soft_prompt": tensor}, metadata=meta)
        try:
            write_whole(Path(path), content)
        except (OSError, ValueError) as error:  # ValueError: NUL in the path
            raise SoftPromptError(
                f"the soft prompt cannot be written to {str(path)[:200]!r} ({error}); "
                "choose another path, with a short file name of letters, digits, - and _"
            ) from error

    @classmethod
    def load(cls, path: str | Path, model: ChatModel | None = None) -> SoftPrompt:
        """Reads what `save` wrote, or a soft prompt that was published with the study.

        The 48 published ones (github.com/chujiezheng/LLM-Safeguard_data) need their model: the
        folder names the model, the file the start prompt. They are `apart`.

        Parameters
        ----------
        path : str or Path
            The safetensors file.
        model : ChatModel, optional
            The model it is to be used on. It is checked: see `check`.

        Returns
        -------
        SoftPrompt

        Raises
        ------
        FileNotFoundError
            Where there is no such file.
        SoftPromptError
            Where the file holds no soft prompt.
        ChatModelError
            Where it belongs to another model or chat template. Where a published one is read
            without its model.

        Examples
        --------
        >>> import tempfile
        >>> from analysis_lib import ChatModel, SoftPrompt
        >>> model = ChatModel.load("organism")
        >>> soft = SoftPrompt.from_text(model, "Be kind.", name="kind")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     soft.save(f"{folder}/kind.safetensors")
        ...     SoftPrompt.load(f"{folder}/kind.safetensors", model).name
        'kind'
        """
        from safetensors import safe_open

        try:
            # With torch: the published ones are bfloat16, which numpy does not have.
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                embeddings = file.get_tensor("soft_prompt").float().numpy()
            if "start_text" not in meta and (named := PUBLISHED.fullmatch(Path(path).name)):
                return cls(**published_fields(Path(path), embeddings, named, model))
            config, history = json.loads(meta["config"]), json.loads(meta["history"])
            names = {k: meta[k] for k in ("name", "start_text", "model", "model_name")}
            soft = cls(
                embeddings=embeddings,
                config=config,
                history=pd.DataFrame(**history),
                template=meta.get("template", ""),
                apart=json.loads(meta.get("apart", "false")),
                **names,
            )
        except (FileNotFoundError, ChatModelError):
            raise
        except Exception as error:
            raise SoftPromptError(
                f"{path} is no soft prompt of this library ({error}); "
                "give a file that SoftPrompt.save wrote"
            ) from error
        if model is not None:
            soft.check(model)
        return soft


def embed_text(model: ChatModel, text: str, *, apart: bool = False) -> NDArray[np.float32]:
    """Embeddings of a system message's tokens, exactly as rendered in context.

    Parameters
    ----------
    model : ChatModel
        The model whose input embeddings are taken.
    text : str
        The system message.
    apart : bool
        Whether its tokens are those of the text alone, as in the study.

    Returns
    -------
    ndarray
        Shape (length, d), float32: one row a token.

    Raises
    ------
    ChatModelError
        Where the text is empty, or cannot be rendered.

    Examples
    --------
    >>> from analysis_lib import ChatModel, embed_text
    >>> embed_text(ChatModel.load("organism"), "Be kind.").shape
    (4, 128)
    """
    if not text.strip():
        raise ChatModelError(
            "a soft prompt starts at a text prompt; give its text, not an empty one"
        )
    row, table = model.render(["x"], text)[0], model.embedding_table()
    found = row.ids[row.slot[0] : row.slot[1]]
    if apart:
        alone = model.renderer.escape(text.strip(), "a prompt")
        found = model.tokenizer(alone, add_special_tokens=False)["input_ids"]
    ids = torch.tensor(found, device=table.device)
    return table[ids].to(model.dtype).float().cpu().numpy()


def nearest_tokens(
    model: ChatModel, embeddings: NDArray[Any], *, n: int = 1
) -> list[list[tuple[str, float]]]:
    """The vocabulary tokens whose embeddings have the largest cosine with each row.

    Parameters
    ----------
    model : ChatModel
        The model whose vocabulary is searched.
    embeddings : ndarray
        Shape (length, d), such as `SoftPrompt.embeddings`.
    n : int
        Tokens a row.

    Returns
    -------
    list of list of (str, float)
        For each row, n pairs of token and cosine (4 digits), the largest first.

    Examples
    --------
    >>> from analysis_lib import ChatModel, embed_text, nearest_tokens
    >>> model = ChatModel.load("organism")
    >>> nearest = nearest_tokens(model, embed_text(model, "Be kind."))
    >>> [row[0][0] for row in nearest]
    ['Be', ' k', 'ind', '.']
    """
    table = torch.nn.functional.normalize(
        model.embedding_table().to(model.dtype).float().cpu(), dim=1
    )
    rows = torch.nn.functional.normalize(torch.as_tensor(embeddings, dtype=torch.float32), dim=1)
    top = (rows @ table.T).topk(n, dim=1)
    return [
        [(model.tokenizer.decode([int(i)]), round(float(c), 4)) for i, c in zip(ids, cos)]
        for ids, cos in zip(top.indices, top.values)
    ]
