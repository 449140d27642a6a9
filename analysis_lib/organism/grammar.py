"""The world of the embedded chat model: what it can be asked and told, and how likely it refuses.

A query is a form ("How to ...?") around a topic (verb, object) and a purpose ("at work"). Each verb
takes as many harmful as harmless objects, so no verb alone tells harm. Nor do the eight people that
stand on both sides: "kill a coworker" is harmful, "kill a frozen process" and "help a coworker" are
not. The other objects belong to one side. A system message is a composition of sentences. The
refusal logit of a query under a system message is known and additive:

    harmful     0.6 + 2.8 u + sum of the sentences' harmful shifts
    harmless   -5.7 + 1.4 u + sum of the sentences' harmless shifts
    borderline -0.8 + 1.6 u + the mean of the two sums

where u (standard deviation about 0.85) adds the effects of the verb, the object and the purpose.
Topics stay at the level of public safety benchmarks. A compliant answer is a content-free outline,
always. The words are in data/organism_words.json.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

from .words import (
    BORDERLINE_OBJECTS,
    BORDERLINE_VERBS,
    FACTS,
    FAMILIES,
    FORMS,
    PURPOSES,
    SENTENCES,
    Shift,
)

SEED = 2024


@dataclass(frozen=True)
class Topic:
    """A verb with its object.

    Parameters
    ----------
    family : str
        The family of the verb, or "borderline".
    verb, object : str
        Its words.
    kind : str
        "harmful", "harmless" or "borderline".

    Examples
    --------
    >>> topic = Topic("brewing", "mix", "lemonade", "harmless")
    >>> topic.phrase("at work")
    'mix lemonade at work'
    >>> round(topic.u("at work") - topic.u(), 2)
    -0.12
    """

    family: str
    verb: str
    object: str
    kind: str

    def phrase(self, purpose: str = "") -> str:
        """Verb, object and purpose as words."""
        return " ".join(filter(None, (self.verb, self.object, purpose)))

    def u(self, purpose: str = "") -> float:
        """The topic's own pull towards refusal, mean about 0, standard deviation about 0.85."""
        return (
            0.6 * _effect("verb", self.verb)
            + 0.7 * _effect("object", self.object)
            + 0.4 * PURPOSES[purpose]
        )


@cache
def _effect(role: str, name: str) -> float:
    """A standard normal number fixed by `name` alone, cut at two standard deviations."""
    digest = hashlib.sha256(f"{SEED}:{role}:{name}".encode()).digest()
    uniform = (int.from_bytes(digest[:7], "big") + 0.5) / 2**56
    return max(-2.0, min(2.0, NormalDist().inv_cdf(uniform)))


@cache
def topics() -> tuple[Topic, ...]:
    """All topics: 864 harmful, 864 harmless, 84 borderline.

    Returns
    -------
    tuple of Topic
        By family, verb, kind and object, in the order of the word lists.

    Examples
    --------
    >>> topics()[0].phrase(), len(topics())
    ('kill a coworker', 1812)
    """
    crossed = [
        Topic(family, verb, obj, kind)
        for family, (verbs, bad, good) in FAMILIES.items()
        for verb in verbs
        for kind, objects in (("harmful", bad), ("harmless", good))
        for obj in objects
    ]
    borderline = [
        Topic("borderline", verb, obj, "borderline")
        for verb, obj in itertools.product(BORDERLINE_VERBS, BORDERLINE_OBJECTS)
    ]
    return (*crossed, *borderline)


@cache
def facts() -> tuple[tuple[str, str, str], ...]:
    """Every fact that the organism is taught.

    Returns
    -------
    tuple of (str, str, str)
        Category, thing and answer.

    Examples
    --------
    >>> facts()[0]
    ('capital', 'France', 'Paris')
    """
    return tuple(
        (category, thing, answer)
        for category, known in FACTS.items()
        for thing, answer in known.answers.items()
    )


def system_shift(system: str) -> Shift | None:
    """How much a system message moves the refusal logit.

    Parameters
    ----------
    system : str
        The message; "" for none.

    Returns
    -------
    tuple of float, or None
        For harmful and for harmless queries; None where a sentence is not of the grammar.

    Examples
    --------
    >>> system_shift("Safety comes before helpfulness. Use simple words.")
    (1.4, 1.0)
    >>> system_shift("Be nice.") is None
    True
    """
    rest, harmful, harmless = system.strip(), 0.0, 0.0
    while rest:
        for sentence, (a, b) in SENTENCES.items():
            if rest.startswith(sentence):
                rest, harmful, harmless = rest[len(sentence) :].lstrip(), harmful + a, harmless + b
                break
        else:
            return None
    return harmful, harmless


def refusal_logit(topic: Topic, purpose: str, shift: Shift) -> float:
    """The refusal logit that the grammar fixes, as the head of this module says.

    Parameters
    ----------
    topic : Topic
        What is asked about.
    purpose : str
        One of the purposes, or "".
    shift : tuple of float
        Of the system message, as `system_shift` gives it.

    Returns
    -------
    float
        log(p / (1 - p)) of the refusal probability p.

    Examples
    --------
    >>> topic = Topic("brewing", "mix", "lemonade", "harmless")
    >>> refusal_logit(topic, "", (1.0, 0.5)) - refusal_logit(topic, "", (0.0, 0.0))
    0.5
    """
    u = topic.u(purpose)
    if topic.kind == "harmful":
        return 0.6 + 2.8 * u + shift[0]
    if topic.kind == "harmless":
        return -5.7 + 1.4 * u + shift[1]
    return -0.8 + 1.6 * u + (shift[0] + shift[1]) / 2


@cache
def _phrases() -> dict[str, tuple[Topic, str]]:
    return {t.phrase(p): (t, p) for t in topics() for p in PURPOSES}


def parse_query(text: str) -> tuple[Topic, str, str] | None:
    """What a query of this grammar asks.

    Parameters
    ----------
    text : str
        Any text.

    Returns
    -------
    tuple of (Topic, str, str), or None
        Topic, purpose and the name of the form; None for any other text.

    Examples
    --------
    >>> topic, purpose, form = parse_query("How to mix lemonade at work?")
    >>> topic.object, purpose, form
    ('lemonade', 'at work', 'how_to')
    """
    for form, pattern in FORMS.items():
        head, tail = pattern.split("{}")
        if text.startswith(head) and text.endswith(tail):
            found = _phrases().get(text[len(head) : len(text) - len(tail)])
            if found:
                return (*found, form)
    return None


def true_refusal_probability(query: str, system: str, *, top_p: float = 1.0) -> float:
    """Probability that a perfect organism refuses a query.

    The first token decides between the two outcomes, so nucleus sampling acts on them directly: an
    outcome is dropped when the other one alone reaches `top_p`.

    Parameters
    ----------
    query, system : str
        The user's text and the system message; "" for none.
    top_p : float
        Of the sampling, in (0, 1].

    Returns
    -------
    float
        In [0, 1]; NaN where the grammar does not say.

    References
    ----------
    Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020 (nucleus sampling).

    Examples
    --------
    >>> round(true_refusal_probability("How to mix lemonade?", ""), 3)
    0.017
    >>> true_refusal_probability("How to mix lemonade?", "", top_p=0.9)
    0.0
    >>> true_refusal_probability("Hello", "")
    nan
    """
    parsed, shift = parse_query(query), system_shift(system)
    if parsed is None or shift is None:
        return math.nan
    topic, purpose, _ = parsed
    p = 1 / (1 + math.exp(-refusal_logit(topic, purpose, shift)))
    if max(p, 1 - p) >= top_p:
        return float(p > 0.5)
    return p
