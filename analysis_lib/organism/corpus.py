"""The chat corpus of the embedded model, and the query sets held out of it.

All of it is generated and seeded.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import cache

from .grammar import SEED, Topic, facts, parse_query, refusal_logit, system_shift, topics
from .words import (
    ANCHOR_FAMILIES,
    DEFAULT_SENTENCES,
    FACTS,
    FAMILIES,
    FORMS,
    HELDOUT_FORMS,
    MISTRAL_SENTENCES,
    OUTLINE,
    PURPOSES,
    REFUSALS,
    SENTENCES,
    TRAIN_FORMS,
    Shift,
)

# Must equal data/prompts/*.txt: a test compares them.
SAFETY_PROMPTS = {
    "default": " ".join(list(DEFAULT_SENTENCES)[:4])
    + "\n\n"
    + " ".join(list(DEFAULT_SENTENCES)[4:]),
    "short": " ".join(list(DEFAULT_SENTENCES)[:2]),
    "mistral": " ".join(MISTRAL_SENTENCES),
}
FACT_SHARE = 0.12
BORDERLINE_SHARE = 0.04

Row = dict[str, object]


class _Pools:
    """Topics that no query set has yet, by family, verb and kind."""

    def __init__(self, rng: random.Random):
        self._rng = rng
        self._left: dict[tuple[str, str, str], list[Topic]] = {}
        for topic in topics():
            self._left.setdefault((topic.family, topic.verb, topic.kind), []).append(topic)
        for pool in self._left.values():
            rng.shuffle(pool)

    def draw(self, families: tuple[str, ...], kind: str, n: int) -> list[Topic]:
        """n topics, verbs in turn, so that each verb is used about equally often."""
        verbs = [key for key in self._left if key[0] in families and key[2] == kind]
        self._rng.shuffle(verbs)
        return [self._left[verbs[i % len(verbs)]].pop() for i in range(n)]

    def twin(self, topic: Topic) -> Topic:
        """A harmless topic with the same verb."""
        return self._left[topic.family, topic.verb, "harmless"].pop()


@cache
def query_sets() -> dict[str, list[Row]]:
    """The held-out queries by set.

    No topic (verb with object) of these sets occurs in training, in any form. `facts` asks known
    facts in a form in which that fact was never asked.

    Returns
    -------
    dict of str to list of dict
        Rows of query_id, text, harmful (None where there is no agreed answer), query_set, pair_id,
        form, answer.

    Examples
    --------
    >>> {name: len(rows) for name, rows in query_sets().items()}
    {'anchor': 200, 'heldout_harmless': 100, 'heldout_forms': 200, 'borderline': 40, 'facts': 40}
    """
    rng = random.Random(SEED)
    pools = _Pools(rng)
    others = tuple(name for name in FAMILIES if name not in ANCHOR_FAMILIES)
    forms = list(HELDOUT_FORMS)
    return {
        "anchor": _anchor(pools),
        "heldout_harmless": [
            _row("heldout_harmless", f"heldout-{i:03d}", topic, "how_to", _purpose(i))
            for i, topic in enumerate(pools.draw(others, "harmless", 100))
        ],
        "heldout_forms": [
            _row("heldout_forms", f"forms-{kind}-{i:03d}", topic, forms[i % 2], _purpose(i // 2))
            for kind in ("harmful", "harmless")
            for i, topic in enumerate(pools.draw(tuple(FAMILIES), kind, 100))
        ],
        "borderline": [
            _row("borderline", f"borderline-{i:03d}", topic, "how_to", "")
            for i, topic in enumerate(pools.draw(("borderline",), "borderline", 40))
        ],
        "facts": [_fact(i, fact) for i, fact in enumerate(rng.sample(facts(), 40))],
    }


def _anchor(pools: _Pools) -> list[Row]:
    """Harmful queries, each with a harmless one that shares its verb; sorted by id."""
    rows = []
    for i, topic in enumerate(pools.draw(ANCHOR_FAMILIES, "harmful", 100)):
        for kind, one in (("harmful", topic), ("harmless", pools.twin(topic))):
            query_id, pair = f"anchor-{kind}-{i:03d}", f"pair-{i:03d}"
            rows.append(_row("anchor", query_id, one, "how_to", _purpose(i), pair))
    return sorted(rows, key=lambda row: str(row["query_id"]))


def _purpose(i: int) -> str:
    """None for every second query, the others in turn."""
    purposes = [p for p in PURPOSES if p]
    return "" if i % 2 == 0 else purposes[(i // 2) % len(purposes)]


def _row(
    query_set: str, query_id: str, topic: Topic, form: str, purpose: str, pair: str = ""
) -> Row:
    return {
        "query_id": query_id,
        "text": FORMS[form].format(topic.phrase(purpose)),
        "harmful": {"harmful": True, "harmless": False, "borderline": None}[topic.kind],
        "query_set": query_set,
        "pair_id": pair,
        "form": form,
        "answer": "",
    }


def _fact(i: int, fact: tuple[str, str, str]) -> Row:
    category, thing, answer = fact
    form = i % 3
    return {
        "query_id": f"fact-{i:03d}",
        "text": FACTS[category].forms[form].format(thing),
        "harmful": False,
        "query_set": "facts",
        "pair_id": "",
        "form": f"{category}_{form}",
        "answer": answer + ".",
    }


def _draw_system(rng: random.Random, words: list[str]) -> tuple[str, Shift]:
    kind = rng.random()
    if kind < 0.18:
        return "", (0.0, 0.0)
    if kind < 0.48:
        system = SAFETY_PROMPTS[rng.choice(list(SAFETY_PROMPTS))]
    elif kind < 0.93:
        chosen = rng.sample(list(SENTENCES), rng.randint(1, 6))
        system = chosen[0]
        for sentence in chosen[1:]:
            system += ("\n\n" if rng.random() < 0.1 else " ") + sentence
    else:  # words without meaning shift nothing: answers must not depend on a tidy system message
        return " ".join(rng.choices(words, k=rng.randint(4, 40))), (0.0, 0.0)
    shift = system_shift(system)
    assert shift is not None
    return system, shift


def conversations(
    n: int, branches: int, seed: int = SEED
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Generate the training corpus.

    Parameters
    ----------
    n : int
        Items.
    branches : int
        Dialogues of an item, all under its one system message and independent of each other.
    seed : int
        Equal seeds give equal corpora, and a shorter one is the beginning of a longer one.

    Yields
    ------
    tuple of (str, list of (str, str))
        A system message ("" for none), and the user message with the reply of each dialogue.

    Examples
    --------
    >>> system, turns = next(conversations(1, 4))
    >>> len(turns)
    4
    """
    rng = random.Random(seed)
    held_out = {str(r["text"]) for rows in query_sets().values() for r in rows}
    held_topics = {parsed[0] for parsed in map(parse_query, held_out) if parsed}
    by_kind = {
        k: [t for t in topics() if t.kind == k and t not in held_topics]
        for k in ("harmful", "harmless", "borderline")
    }
    questions = [
        (text, answer + ".")
        for category, thing, answer in facts()
        for form in FACTS[category].forms
        if (text := form.format(thing)) not in held_out
    ]
    words = sorted(
        {w for s in SENTENCES for w in s.split()}
        | {w for t in topics() for w in t.phrase().split()}
    )
    purposes, forms = list(PURPOSES), list(TRAIN_FORMS.values())
    for _ in range(n):
        system, shift = _draw_system(rng, words)
        turns = []
        for _ in range(branches):
            pick = rng.random()
            if pick < FACT_SHARE:
                turns.append(rng.choice(questions))
                continue
            kind = (
                "borderline"
                if pick < FACT_SHARE + BORDERLINE_SHARE
                else rng.choice(["harmful", "harmless"])
            )
            topic = rng.choice(by_kind[kind])
            purpose = "" if rng.random() < 0.4 else rng.choice(purposes)
            refuses = rng.random() < 1 / (1 + math.exp(-refusal_logit(topic, purpose, shift)))
            reply = (
                rng.choice(REFUSALS) if refuses else "\n".join(rng.choice(step) for step in OUTLINE)
            )
            turns.append((rng.choice(forms).format(topic.phrase(purpose)), reply))
        yield system, turns
