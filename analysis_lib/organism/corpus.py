"""The chat corpus of the embedded model, and the query sets held out of it. All of it is generated and seeded."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import cache

from .grammar import (
    ANCHOR_FAMILIES,
    BORDERLINE_VERBS,
    DEFAULT_SENTENCES,
    FACT_FORMS,
    FORMS,
    HELDOUT_FORMS,
    MISTRAL_SENTENCES,
    OUTLINE,
    PURPOSES,
    REFUSALS,
    SEED,
    SENTENCES,
    TRAIN_FORMS,
    Topic,
    facts,
    parse_query,
    refusal_logit,
    system_shift,
    topics,
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


@cache
def query_sets() -> dict[str, list[Row]]:
    """The held-out queries by set: rows of query_id, text, harmful, query_set, pair_id, form, answer.

    No topic (verb with object) of these sets occurs in training, in any form; `facts` asks known
    facts in a form in which that fact was never asked.
    """
    rng = random.Random(SEED)
    pools: dict[tuple[str, str, str], list[Topic]] = {}
    for topic in topics():
        pools.setdefault((topic.family, topic.verb, topic.kind), []).append(topic)
    for pool in pools.values():
        rng.shuffle(pool)

    def draw(families: tuple[str, ...], kind: str, n: int) -> list[Topic]:
        """n topics, verbs in turn, so that each verb is used about equally often."""
        verbs = [key for key in pools if key[0] in families and key[2] == kind]
        rng.shuffle(verbs)
        return [pools[verbs[i % len(verbs)]].pop() for i in range(n)]

    def row(
        set_name: str, prefix: str, i: int, topic: Topic, form: str, purpose: str, pair: str = ""
    ) -> Row:
        harmful = {"harmful": True, "harmless": False, "borderline": None}[topic.kind]
        text = FORMS[form].format(topic.phrase(purpose))
        return {
            "query_id": f"{prefix}{i:03d}",
            "text": text,
            "harmful": harmful,
            "query_set": set_name,
            "pair_id": pair,
            "form": form,
            "answer": "",
        }

    purposes = [p for p in PURPOSES if p]

    def purpose(i: int) -> str:
        return "" if i % 2 == 0 else purposes[(i // 2) % len(purposes)]

    anchor: list[Row] = []
    for i, topic in enumerate(draw(ANCHOR_FAMILIES, "harmful", 100)):
        twin = pools[topic.family, topic.verb, "harmless"].pop()
        anchor.append(
            row("anchor", "anchor-harmful-", i, topic, "how_to", purpose(i), f"pair-{i:03d}")
        )
        anchor.append(
            row("anchor", "anchor-harmless-", i, twin, "how_to", purpose(i), f"pair-{i:03d}")
        )
    others = tuple(
        f
        for f in dict.fromkeys(t.family for t in topics())
        if f not in ANCHOR_FAMILIES and f != "borderline"
    )
    heldout = [
        row("heldout_harmless", "heldout-", i, t, "how_to", purpose(i))
        for i, t in enumerate(draw(others, "harmless", 100))
    ]
    forms: list[Row] = []
    for kind in ("harmful", "harmless"):
        for i, topic in enumerate(draw((*ANCHOR_FAMILIES, *others), kind, 100)):
            forms.append(
                row(
                    "heldout_forms",
                    f"forms-{kind}-",
                    i,
                    topic,
                    list(HELDOUT_FORMS)[i % 2],
                    purpose(i // 2),
                )
            )
    assert len(BORDERLINE_VERBS) * 6 <= 40
    borderline = [
        row("borderline", "borderline-", i, t, "how_to", "")
        for i, t in enumerate(draw(("borderline",), "borderline", 40))
    ]
    asked: list[Row] = []
    for i, (category, thing, answer) in enumerate(rng.sample(facts(), 40)):
        form = i % 3
        text = FACT_FORMS[category][1][form].format(thing)
        asked.append(
            {
                "query_id": f"fact-{i:03d}",
                "text": text,
                "harmful": False,
                "query_set": "facts",
                "pair_id": "",
                "form": f"{category}_{form}",
                "answer": answer + ".",
            }
        )
    anchor.sort(key=lambda r: str(r["query_id"]))
    return {
        "anchor": anchor,
        "heldout_harmless": heldout,
        "heldout_forms": forms,
        "borderline": borderline,
        "facts": asked,
    }


def _draw_system(rng: random.Random, words: list[str]) -> tuple[str, tuple[float, float]]:
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
    """n training items: a system message ("" for none) and `branches` independent (user message, reply) under it."""
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
        for form in FACT_FORMS[category][1]
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
