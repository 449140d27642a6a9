"""Exact probabilities of replies: that one opens as a refusal, and the loss of given answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray

from ..collect.certificates import certify_numbers
from ..collect.inputs import Keep, check_prompts, check_queries, keeper, usable
from ..collect.recheck import loaded_and_usable, longest_witness, row_witness, unchanged
from ..collect.states import CHUNK_ROWS
from ..model.chat import ChatModel
from ..model.errors import ChatModelError
from ..model.generation import Generation
from ..model.passes import log_probabilities
from ..model.rendering import Prompt
from ..model.replies import reply_ids
from ..store.batches import row_key
from ..store.store import Store
from .strings import phrases


class _Calibration(Protocol):
    """What `calibrate_refusal` returns: log odds (n, 1) to probabilities (n,)."""

    def probability(self, Z: ArrayLike) -> NDArray[np.float64]: ...


def refusal_probability(
    model: ChatModel,
    queries: pd.DataFrame,
    prompts: Mapping[str, Prompt],
    *,
    openings: Sequence[str] | None = None,
    calibration: _Calibration | None = None,
    store: Store | None = None,
) -> pd.DataFrame:
    """The probability that a reply begins with one of some openings. Nothing is sampled.

    It is exact at temperature 1 without cuts, for replies tokenized as the tokenizer writes the
    openings. Tokens that the generation configuration suppresses throughout are left out, as in
    sampling. Sampled and judged rates differ: a refusal may open otherwise, and top-p drops what is
    rare. `calibrate_refusal` fits one to the other.

    Parameters
    ----------
    model : ChatModel
    queries : DataFrame with query_id, text
    prompts : mapping of names to safety prompts, text or soft
    openings : sequence of str, optional
        The default is the string judge's phrases.
    calibration : Direction, optional
        What `calibrate_refusal` returned.
    store : Store, optional
        What is found there is read, what is computed is kept.

    Returns
    -------
    DataFrame with query_id, prompt, sample, response, judge, log_odds, refused
        refused is the probability, in [0, 1], calibrated where a calibration is given; log_odds is
        not. sample 0, response "" and judge "first tokens" make it a table of one more judge for
        `benchmark_table`.

    Raises
    ------
    ValueError
        Where no opening has a token.
    ChatModelError
        Where log probabilities hold NaN or infinity.
    ParityError
        Where those of the longest row differ from a plain pass by more than rounding explains.

    Examples
    --------
    >>> from analysis_lib import ChatModel, load_queries, refusal_probability
    >>> model, queries = ChatModel.load("organism"), load_queries("anchor").head(2)
    >>> table = refusal_probability(model, queries, {"none": ""}, openings=["I cannot"])
    >>> len(table), bool(table["refused"].between(0, 1).all())
    (2, True)
    """
    check_queries(queries)
    check_prompts(prompts)
    texts = [phrase.strip() for phrase, _ in phrases()] if openings is None else list(openings)
    starts = {tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts}
    # An opening that begins with another adds nothing.
    starts = {s for s in starts if s and not any(s[:n] in starts for n in range(1, len(s)))}
    if not starts:
        raise ValueError("no opening has a token; give texts such as 'I cannot'")
    parts = []
    keep = keeper()
    for name, prompt in prompts.items():
        replies = [sorted(starts)] * len(queries)
        found = _reply_log_p(
            model,
            queries["text"].tolist(),
            name,
            prompt,
            replies,
            store,
            keep,
            never=model.generation.never,
        )
        p = np.array([np.exp(log_p).sum() for log_p in found]).clip(1e-9, 1 - 1e-9)
        part = {"query_id": queries["query_id"].tolist(), "prompt": name}
        parts.append(pd.DataFrame(part | {"log_odds": np.log(p / (1 - p))}))
    table = pd.concat(parts, ignore_index=True)
    log_odds = table["log_odds"].to_numpy()
    if calibration is None:
        refused = 1 / (1 + np.exp(-log_odds))
    else:
        refused = calibration.probability(log_odds[:, None])
    return table.assign(sample=0, response="", judge="first tokens", refused=refused)[
        ["query_id", "prompt", "sample", "response", "judge", "log_odds", "refused"]
    ]


def next_token_loss(
    model: ChatModel,
    queries: pd.DataFrame,
    answers: pd.DataFrame,
    prompts: Mapping[str, Prompt],
    *,
    store: Store | None = None,
) -> pd.DataFrame:
    """The loss of given answers under each prompt: what a prompt costs on text that stays likely.

    Parameters
    ----------
    model : ChatModel
    queries : DataFrame with query_id, text
        Those without an answer are left out.
    answers : DataFrame with query_id, response
        One or several a query, such as answers to harmless questions, sampled without a prompt.
        With the column end, an answer that ended by itself (end = "eos") is charged for ending.
    prompts : mapping of names to safety prompts, text or soft
    store : Store, optional
        What is found there is read, what is computed is kept.

    Returns
    -------
    DataFrame with query_id, prompt, n_tokens, loss
        The mean loss over the n_tokens of a query's answers, in nats a token.

    Raises
    ------
    ValueError
        Where the answers lack a column, or none belongs to one of the queries.
    ChatModelError
        Where an end is to be charged and the tokenizer has no token for it, or log probabilities
        hold NaN or infinity.
    ParityError
        Where those of the longest row differ from a plain pass by more than rounding explains.

    Examples
    --------
    >>> from analysis_lib import ChatModel, load_queries, next_token_loss
    >>> model, queries = ChatModel.load("organism"), load_queries("facts").head(1)
    >>> answers = queries[["query_id"]].assign(response=queries["answer"])
    >>> table = next_token_loss(model, queries, answers, {"none": ""})
    >>> list(table.columns), bool(table["loss"].iloc[0] > 0)
    (['query_id', 'prompt', 'n_tokens', 'loss'], True)
    """
    check_queries(queries)
    check_prompts(prompts)
    given = _tokens_of_answers(model, queries, answers)
    asked = queries.iloc[sorted(given)]
    own = [given[i] for i in sorted(given)]
    n_tokens = [sum(map(len, replies)) for replies in own]
    parts = []
    keep = keeper()
    for name, prompt in prompts.items():
        found = _reply_log_p(model, asked["text"].tolist(), name, prompt, own, store, keep)
        loss = [-log_p.sum() / n for log_p, n in zip(found, n_tokens, strict=True)]
        part = {"query_id": asked["query_id"].tolist(), "prompt": name}
        parts.append(pd.DataFrame(part | {"n_tokens": n_tokens, "loss": loss}))
    return pd.concat(parts, ignore_index=True)


def _tokens_of_answers(
    model: ChatModel, queries: pd.DataFrame, answers: pd.DataFrame
) -> dict[int, list[tuple[int, ...]]]:
    """{position of a query: token ids of its answers}, of the queries that have one."""
    if lacking := {"query_id", "response"} - set(answers):
        raise ValueError(
            f"the answers lack the column {', '.join(sorted(lacking))}; give query_id and response"
        )
    place = {query_id: i for i, query_id in enumerate(queries["query_id"])}
    kept = answers[answers["query_id"].isin(place) & answers["response"].notna()]
    ended = (kept["end"] == "eos").tolist() if "end" in kept else [False] * len(kept)
    tokens = reply_ids(model, kept["response"].tolist(), ended) if len(kept) else []
    given: dict[int, list[tuple[int, ...]]] = {}
    for query_id, ids in zip(kept["query_id"], tokens, strict=True):
        if ids:
            given.setdefault(place[query_id], []).append(ids)
    if not given:
        raise ValueError(
            "no answer belongs to one of the queries; give answers to the same queries"
        )
    return given


def _reply_log_p(
    model: ChatModel,
    texts: Sequence[str],
    name: str,
    prompt: Prompt,
    replies: Sequence[Sequence[tuple[int, ...]]],
    store: Store | None,
    keep: Keep,
    *,
    never: tuple[int, ...] = (),
) -> list[NDArray[np.float64]]:
    """For each text, the log probability of each of its replies (token ids), float64.

    The token ids `never` are left out of what may be said.
    """
    if not texts:
        return []
    suppressed = Generation(frozenset(), never=never)
    store = usable(store, model)
    rows = model.render(texts, prompt)
    keys = [""] * len(rows)
    found: dict[int, NDArray[np.float64]] = {}
    if store is not None:
        fixed: dict[str, Any] = {"kind": "log_probability", **model.key_parts()}
        fixed |= {"never": list(never)} if never else {}
        keys = [
            row_key(ids=row.ids, soft=row.soft, replies=own, **fixed)
            for row, own in zip(rows, replies, strict=True)
        ]
        kept = store.read_responses(keys)
        found = {i: np.array(kept[key]["log_p"]) for i, key in enumerate(keys) if key in kept}
        if len(found) < len(rows):
            store = loaded_and_usable(store, model)
        store = unchanged(store, model, longest_witness(store, model, keys, rows[0].soft), prompt)
        found = found if store is not None else {}
    missing = [i for i in range(len(rows)) if i not in found]
    soft = None if isinstance(prompt, str) else prompt.embeddings
    for at in range(0, len(missing), CHUNK_ROWS):
        part = missing[at : at + CHUNK_ROWS]
        heads = [rows[i].ids for i in part for _ in replies[i]]
        own = [reply for i in part for reply in replies[i]]
        with torch.no_grad(), model.forward.soft_tokens(soft):
            sums = _sums(model, heads, own, suppressed)
            seen = row_witness(model, [rows[i] for i in part]) if store is not None else {}
        found |= zip(part, np.split(sums, np.cumsum([len(replies[i]) for i in part])[:-1]))
        if store is not None:
            new = {keys[i]: {"log_p": found[i].tolist()} for i in part}  # queries may render alike
            about = {
                "model": model.fingerprint,
                "model_name": model.name,
                "prompts": [name],
                "witness": seen,
            }
            keep(store.write_responses, list(new), list(new.values()), about=about)
    return [found[i] for i in range(len(rows))]


def _sums(
    model: ChatModel,
    heads: Sequence[tuple[int, ...]],
    replies: Sequence[tuple[int, ...]],
    suppressed: Generation,
) -> NDArray[np.float64]:
    """The log probability of each reply, certified. Raises ChatModelError where one is not finite."""
    of = partial(log_probabilities, model.forward, allowed=suppressed.allowed)
    each = of(heads, replies)
    sums = np.array([log_p.sum() for log_p in each])
    if not np.isfinite(sums).all():
        raise ChatModelError(
            f"log probabilities of {model.name!r} hold NaN or infinity in {model.dtype_name}, "
            "and nothing of this batch is kept; load the model with dtype='float32' or "
            "'bfloat16', or copy its weights again"
        )
    longest = max(range(len(heads)), key=lambda i: len(heads[i]) + len(replies[i]))

    def numbers(rows: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(of([heads[i] for i in rows], [replies[i] for i in rows])[0])

    def plain() -> torch.Tensor:
        with model.forward.run_plainly():
            return numbers([longest])

    mine, again = torch.from_numpy(each[longest]), partial(numbers, [longest, 0])
    certify_numbers(model.forward, "log probabilities", mine, plain, again, least=1.0)
    return sums
