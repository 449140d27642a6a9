"""DOC analysis_lib.judge.likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from ..analysis.directions import Direction
from ..collect.inputs import check_prompts, check_queries, usable
from ..collect.states import CHUNK_ROWS
from ..model.chat import ChatModel
from ..model.errors import ChatModelError
from ..model.passes import log_probabilities
from ..model.rendering import Prompt
from ..store.batches import row_key
from ..store.store import Store
from .strings import phrases


def refusal_probability(
    model: ChatModel,
    queries: pd.DataFrame,
    prompts: Mapping[str, Prompt],
    *,
    openings: Sequence[str] | None = None,
    calibration: Direction | None = None,
    store: Store | None = None,
) -> pd.DataFrame:
    """The probability that a reply begins with one of the openings (default: the string judge's phrases); nothing is sampled.

    Exact at temperature 1 without cuts, for replies tokenized as the tokenizer writes the openings. Sampled and judged
    rates differ (a refusal may open otherwise, top-p drops what is rare): `calibrate_refusal` fits them.
    store: what is found is read, what is computed is kept.
    Returns [query_id, prompt, sample, response, judge, log_odds, refused]: refused is the probability, calibrated where a
    calibration is given; sample 0 and response "" make it a table of one more judge for `benchmark_table`.
    """
    check_queries(queries)
    check_prompts(prompts)
    texts = [phrase.strip() for phrase, _ in phrases()] if openings is None else list(openings)
    starts = {tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts}
    starts = {s for s in starts if s and not any(s[:n] in starts for n in range(1, len(s)))}
    if not starts:
        raise ValueError("no opening has a token; give texts such as 'I cannot'")
    parts = []
    for name, prompt in prompts.items():
        found = _reply_log_p(
            model, queries["text"].tolist(), name, prompt, [sorted(starts)] * len(queries), store
        )
        p = np.array([np.exp(log_p).sum() for log_p in found]).clip(1e-9, 1 - 1e-9)
        parts.append(
            pd.DataFrame(
                {
                    "query_id": queries["query_id"].tolist(),
                    "prompt": name,
                    "log_odds": np.log(p / (1 - p)),
                }
            )
        )
    table = pd.concat(parts, ignore_index=True)
    log_odds = table["log_odds"].to_numpy()
    refused = (
        1 / (1 + np.exp(-log_odds))
        if calibration is None
        else calibration.probability(log_odds[:, None])
    )
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
    """The loss of given answers under each prompt, in nats a token: what a prompt costs on text that should stay likely.

    answers: [query_id, response], one or several a query, such as harmless questions' answers sampled without a prompt;
    with the column end, an answer that ended by itself (end = "eos") is charged for ending. Queries without an answer are left out.
    store: what is found is read, what is computed is kept.
    Returns [query_id, prompt, n_tokens, loss]; the mean is over the tokens of a query's answers. ChatModelError where an
    end is to be charged and the tokenizer has no end-of-sequence token.
    """
    check_queries(queries)
    check_prompts(prompts)
    if lacking := {"query_id", "response"} - set(answers):
        raise ValueError(
            f"the answers lack the column {', '.join(sorted(lacking))}; give query_id and response"
        )
    place = {query_id: i for i, query_id in enumerate(queries["query_id"])}
    kept = answers[answers["query_id"].isin(place) & answers["response"].notna()]
    ends = kept["end"].tolist() if "end" in kept else [""] * len(kept)
    if "eos" in ends and model.tokenizer.eos_token_id is None:
        raise ChatModelError(
            f"the tokenizer of {model.name!r} has no end-of-sequence token to charge; drop the answers' column end"
        )
    tokens = (
        model.tokenizer(kept["response"].tolist(), add_special_tokens=False)["input_ids"]
        if len(kept)
        else []
    )
    replies = [
        (*ids, *([model.tokenizer.eos_token_id] if end == "eos" else []))
        for ids, end in zip(tokens, ends, strict=True)
    ]
    given: dict[int, list[tuple[int, ...]]] = {}
    for query_id, reply in zip(kept["query_id"], replies, strict=True):
        if reply:
            given.setdefault(place[query_id], []).append(reply)
    if not given:
        raise ValueError(
            "no answer belongs to one of the queries; give answers to the same queries"
        )
    asked = queries.iloc[sorted(given)]
    own = [given[i] for i in sorted(given)]
    n_tokens = [sum(map(len, replies)) for replies in own]
    parts = []
    for name, prompt in prompts.items():
        found = _reply_log_p(model, asked["text"].tolist(), name, prompt, own, store)
        loss = [-log_p.sum() / n for log_p, n in zip(found, n_tokens, strict=True)]
        parts.append(
            pd.DataFrame(
                {
                    "query_id": asked["query_id"].tolist(),
                    "prompt": name,
                    "n_tokens": n_tokens,
                    "loss": loss,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def _reply_log_p(
    model: ChatModel,
    texts: Sequence[str],
    name: str,
    prompt: Prompt,
    replies: Sequence[Sequence[tuple[int, ...]]],
    store: Store | None,
) -> list[np.ndarray]:
    """For each text, the log probability of each of its replies (token ids), float64."""
    store = usable(store, model)
    rows = model.render(texts, prompt)
    keys = [""] * len(rows)
    found: dict[int, np.ndarray] = {}
    if store is not None:
        fixed = {"kind": "log_probability", **model.key_parts()}
        keys = [
            row_key(ids=row.ids, soft=row.soft, replies=own, **fixed)
            for row, own in zip(rows, replies, strict=True)
        ]
        kept = store.read_responses(keys)
        found = {i: np.array(kept[key]["log_p"]) for i, key in enumerate(keys) if key in kept}
    missing = [i for i in range(len(rows)) if i not in found]
    for at in range(0, len(missing), CHUNK_ROWS):
        part = missing[at : at + CHUNK_ROWS]
        with (
            torch.no_grad(),
            model.forward.soft_tokens(None if isinstance(prompt, str) else prompt.embeddings),
        ):
            heads = [rows[i].ids for i in part for _ in replies[i]]
            each = log_probabilities(
                model.forward, heads, [reply for i in part for reply in replies[i]]
            )
        sums = np.array([log_p.sum() for log_p in each])
        if not np.isfinite(sums).all():
            raise ChatModelError(
                f"log probabilities of {model.name!r} hold NaN or infinity in {model.dtype_name}, and nothing of this batch is kept; load "
                "the model with dtype='float32' or 'bfloat16', or copy its weights again"
            )
        found |= zip(part, np.split(sums, np.cumsum([len(replies[i]) for i in part])[:-1]))
        if store is not None:
            new = {keys[i]: {"log_p": found[i].tolist()} for i in part}  # queries may render alike
            about = {"model": model.fingerprint, "model_name": model.name, "prompts": [name]}
            store.write_responses(list(new), list(new.values()), about=about)
    return [found[i] for i in range(len(rows))]
