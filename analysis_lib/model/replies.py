"""Replies as token ids where they stand: behind the chat that they answer."""

from __future__ import annotations

from collections.abc import Sequence

from .chat import ChatModel
from .errors import ChatModelError
from .template_texts import USER

_REPLY = "Xq7 reply slot 7qX"


def reply_ids(
    model: ChatModel, replies: Sequence[str], ended: Sequence[bool]
) -> list[tuple[int, ...]]:
    """Token ids of replies as the chat template writes them behind the generation prompt.

    The template may put a space in front, and a tokenizer may write a text in other tokens at the
    beginning of a text than inside. A template that takes no replies gets the text as it is.

    Parameters
    ----------
    model : ChatModel
        Its weights are not loaded.
    replies : sequence of str
    ended : sequence of bool
        Whether a reply ended by itself: then the token follows by which the template ends a reply,
        or else the tokenizer's end-of-sequence token.

    Returns
    -------
    list of tuples
        One a reply.

    Raises
    ------
    ChatModelError
        Where a reply ended, and neither template nor tokenizer has a token for it.

    Examples
    --------
    >>> from analysis_lib import ChatModel
    >>> from analysis_lib.model.replies import reply_ids
    >>> model = ChatModel.load("organism")
    >>> ((*said, end),) = reply_ids(model, ["I am sorry."], [True])
    >>> model.tokenizer.decode(said), model.tokenizer.decode(end)
    ('I am sorry.', '<|im_end|>')
    """
    query = [{"role": "user", "content": USER}]
    asked = model.renderer.chat(query)
    head = asked[asked.index(USER) + len(USER) :]
    try:
        said = model.renderer.chat([*query, {"role": "assistant", "content": _REPLY}], first=True)
        before, found, after = said.partition(_REPLY)
    except ChatModelError:
        before, found, after = asked, "", ""
    lead = before[len(asked) :] if found and before.startswith(asked) else ""
    end = _end(model, after) if any(ended) else ()
    texts = _behind(model, head, [reply and lead + reply for reply in replies])
    return [(*ids, *end) if last else ids for ids, last in zip(texts, ended, strict=True)]


def turn_ids(model: ChatModel, replies: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of whole turns, from the query's end on, with the next generation prompt.

    So the study's prompt tuning takes them: markers of the role and all that follows are trained.

    Parameters
    ----------
    model : ChatModel
    replies : sequence of str

    Returns
    -------
    list of tuples
        One a reply.

    Raises
    ------
    ChatModelError
        Where the template takes no replies.

    Examples
    --------
    >>> from analysis_lib import ChatModel
    >>> from analysis_lib.model.replies import turn_ids
    >>> model = ChatModel.load("organism")
    >>> print(model.tokenizer.decode(turn_ids(model, ["I am sorry."])[0]))
    <|im_start|>assistant
    I am sorry.<|im_end|>
    <|im_start|>assistant
    <BLANKLINE>
    """
    query = [{"role": "user", "content": USER}]
    asked = model.renderer.chat(query, prompted=False)
    turns = []
    for reply in replies:
        said = model.renderer.chat([*query, {"role": "assistant", "content": reply}])
        if not said.startswith(asked):
            raise ChatModelError(
                f"the chat template of {model.name!r} writes a query otherwise where a reply "
                "follows; train with baseline='ours'"
            )
        turns.append(said[len(asked) :])
    return _behind(model, asked[asked.index(USER) + len(USER) :], turns)


def generation_prompt_ids(model: ChatModel) -> tuple[int, ...]:
    """Token ids of the generation prompt: what a rendered row ends with.

    Parameters
    ----------
    model : ChatModel

    Returns
    -------
    tuple of int
        Empty for a template without one.

    Raises
    ------
    ChatModelError
        Where the template writes a query otherwise without it.

    Examples
    --------
    >>> from analysis_lib import ChatModel
    >>> from analysis_lib.model.replies import generation_prompt_ids
    >>> model = ChatModel.load("organism")
    >>> model.tokenizer.decode(generation_prompt_ids(model))
    '<|im_start|>assistant\\n'
    """
    query = [{"role": "user", "content": USER}]
    asked, prompted = (model.renderer.chat(query, prompted=on) for on in (False, True))
    if not prompted.startswith(asked):
        raise ChatModelError(
            f"the chat template of {model.name!r} writes a query otherwise without the generation "
            "prompt; train with baseline='ours'"
        )
    head = asked[asked.index(USER) + len(USER) :]
    return _behind(model, head, [prompted[len(asked) :]])[0]


def _behind(model: ChatModel, head: str, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of texts behind a head; alone where a token would reach into both."""
    tokens = model.tokenizer([head, *(head + text for text in texts)], add_special_tokens=False)
    first, *rest = tokens["input_ids"]
    found = []
    for text, ids in zip(texts, rest, strict=True):
        if ids[: len(first)] != first:
            ids = [*first, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]
        found.append(tuple(ids[len(first) :]))
    return found


def _end(model: ChatModel, after: str) -> tuple[int, ...]:
    """The token by which the template ends a reply: the first of what follows that ends one."""
    ids = model.tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    for token in ids:
        if token in model.generation.stop_ids or token in model.renderer.special_ids:
            return (token,)
    eos = model.tokenizer.eos_token_id
    if eos is None:
        raise ChatModelError(
            f"the tokenizer of {model.name!r} has no end-of-sequence token to charge; "
            "drop the answers' column end"
        )
    return (int(eos),)
