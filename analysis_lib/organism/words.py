"""The words of the embedded model's grammar, read from data/organism_words.json."""

from __future__ import annotations

import json
from typing import NamedTuple

from ..data.shipped import ROOT

FILE = ROOT / "organism_words.json"


class Family(NamedTuple):
    """Verbs with the objects that make a topic harmful, and as many that make it harmless."""

    verbs: tuple[str, ...]
    harmful: tuple[str, ...]
    harmless: tuple[str, ...]


class Facts(NamedTuple):
    """Forms of a question, and the answer for each thing that it can be asked about."""

    forms: tuple[str, ...]
    answers: dict[str, str]


Shift = tuple[float, float]
"""How much a sentence moves the refusal logit of harmful and of harmless queries."""

_words = json.loads(FILE.read_text(encoding="utf-8"))


def _sentences(name: str) -> dict[str, Shift]:
    return {
        sentence: (harmful, harmless)
        for sentence, (harmful, harmless) in _words["sentences"][name].items()
    }


FAMILIES = {
    name: Family(*(tuple(family[part]) for part in Family._fields))
    for name, family in _words["families"].items()
}
ANCHOR_FAMILIES: tuple[str, ...] = tuple(_words["anchor_families"])
"""They feed the anchor queries; the verbs of the others are unseen there."""

BORDERLINE_VERBS: tuple[str, ...] = tuple(_words["borderline"]["verbs"])
BORDERLINE_OBJECTS: tuple[str, ...] = tuple(_words["borderline"]["objects"])

PURPOSES: dict[str, float] = _words["purposes"]
"""With their effect on a topic's pull towards refusal."""

TRAIN_FORMS: dict[str, str] = _words["train_forms"]
HELDOUT_FORMS: dict[str, str] = _words["heldout_forms"]
FORMS = TRAIN_FORMS | HELDOUT_FORMS

DEFAULT_SENTENCES = _sentences("default")
MISTRAL_SENTENCES = _sentences("mistral")
OTHER_SENTENCES = _sentences("other")
SENTENCES = DEFAULT_SENTENCES | MISTRAL_SENTENCES | OTHER_SENTENCES

REFUSALS: tuple[str, ...] = tuple(_words["refusals"])
"""Each opens with "I", and every outline with "Here": the first token decides."""

OUTLINE = tuple(tuple(step) for step in _words["outline"])
"""What each line of a compliant answer can be; it has no content, always."""

FACTS = {
    category: Facts(tuple(facts["forms"]), facts["answers"])
    for category, facts in _words["facts"].items()
}
