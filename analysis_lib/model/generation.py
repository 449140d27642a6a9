"""What a model's generation configuration says of its replies: their ends, and tokens never said."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..data.thoughts import CHANNELS
from .architecture import text_config
from .errors import ChatModelError
from .reasoning import Thoughts, thoughts_of
from .rendering import Renderer

_REPLY = "Xq7 reply 7qX"

# Settings that change what transformers generates and that sampling does not follow, each with
# the values that change nothing. Temperature, top-p and top-k are arguments of sampling.
NOT_FOLLOWED: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "sequence_bias": (),
    "guidance_scale": (1,),
    "min_p": (0,),
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "watermarking_config": (),
    "num_beams": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "token_healing": (False,),
    "max_time": (),
}


@dataclass(frozen=True)
class Generation:
    """How a model's replies end, and which tokens they never hold.

    stop_ids      token ids that end a reply
    stop_strings  texts that end a reply
    never         token ids that no reply holds
    never_first   token ids that no reply begins with
    thoughts      how thoughts before the answer are marked
    """

    stop_ids: frozenset[int]
    stop_strings: tuple[str, ...] = ()
    never: tuple[int, ...] = ()
    never_first: tuple[int, ...] = ()
    thoughts: Thoughts = Thoughts()

    def allowed(self, logits: torch.Tensor, *, first: bool = False) -> torch.Tensor:
        """The logits (..., vocabulary), -inf where a token is not allowed as the next one."""
        ids = (*self.never, *(self.never_first if first else ()))
        known = [i for i in ids if i < logits.shape[-1]]
        if not known:
            return logits
        return logits.index_fill(-1, torch.tensor(known, device=logits.device), -torch.inf)

    def key_parts(self) -> dict[str, Any]:
        """What of it a stored reply is keyed by."""
        marks = self.thoughts.marks
        some = {
            "never": list(self.never),
            "never_first": list(self.never_first),
            "thoughts": marks.closes if marks else "",
        }
        return {
            "stop_ids": sorted(self.stop_ids),
            "stop_strings": list(self.stop_strings),
            **{name: value for name, value in some.items() if value},
        }


def generation_of(name: str, config: Any, renderer: Renderer) -> Generation:
    """What is said of replies by transformers' generation configuration and by the tokenizer.

    A reply also ends with the token that a template given in place of the tokenizer's own puts
    behind one. Warns once of the settings that sampling does not follow. Raises ChatModelError
    where a setting is not of its kind.
    """
    try:
        ends, never, words = (
            _ids(config.eos_token_id),
            _ids(config.suppress_tokens),
            [_ids(word) for word in config.bad_words_ids or []],
        )
        # A bad word that ends a reply is no bad word to transformers.
        never += [word[0] for word in words if len(word) == 1 and word[0] not in ends]
        first = _ids(config.begin_suppress_tokens)
        strings = config.stop_strings or ()
        strings = (strings,) if isinstance(strings, str) else tuple(strings)
        if not all(isinstance(text, str) and text for text in strings):
            raise TypeError("stop_strings holds what is no text, or an empty one")
    except (TypeError, ValueError) as error:
        raise ChatModelError(_unreadable(name, error)) from error
    passed_over = [
        setting
        for setting, neutral in NOT_FOLLOWED.items()
        if getattr(config, setting, None) not in (None, *neutral)
    ]
    passed_over += ["bad_words_ids of several tokens"] * any(len(word) > 1 for word in words)
    if passed_over:
        warnings.warn(
            f"the generation configuration of {name!r} sets {', '.join(passed_over)}, which "
            "sampling does not follow; it follows the ends of replies, suppress_tokens, "
            "begin_suppress_tokens and bad_words_ids of one token",
            stacklevel=3,
        )
    stops = {*ends, *_ids(renderer.tokenizer.eos_token_id), *_ends_of_template(renderer)}
    return Generation(
        frozenset(stops),
        strings,
        tuple(sorted(set(never))),
        tuple(sorted(set(first))),
        thoughts_of(renderer.tokenizer, renderer.frame("")[1]),
    )


def _ids(found: Any) -> list[int]:
    """Token ids, of one or of several; what is None is left out. Raises TypeError."""
    several: Iterable[Any] = [found] if isinstance(found, int) else (found or [])
    ids = [i for i in several if i is not None]
    if not all(isinstance(i, int) for i in ids):
        raise TypeError(f"{found!r:.60} are no token ids")
    return ids


def _ends_of_template(renderer: Renderer) -> list[int]:
    """The special token that a given template puts behind a reply; none for the tokenizer's own.

    The tokenizer's own needs no such look: its model's configuration names its ends. Where a reply
    has channels, that token ends each of them.
    """
    if renderer.template == "tokenizer" or CHANNELS.opens in renderer.tokenizer.chat_template:
        return []
    said = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": _REPLY}]
    try:
        text = renderer.tokenizer.apply_chat_template(said, tokenize=False)
    except Exception:  # a template refuses a reply by raising what it likes
        return []
    behind = str(text).partition(_REPLY)[2].lstrip()
    special = {
        token.content: i
        for i, token in renderer.tokenizer.added_tokens_decoder.items()
        if token.special
    }
    ends = sorted((text for text in special if behind.startswith(text)), key=len)
    return [special[text] for text in ends[-1:]]


def read_generation(name: str, place: str, revision: str | None, config: Any) -> Any:
    """transformers' generation configuration of a model. Raises ChatModelError.

    It is that of generation_config.json, or of config.json where there is no such file.
    """
    from transformers import GenerationConfig
    from transformers.utils import cached_file

    found = cached_file(
        place,
        "generation_config.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
    )
    options: dict[str, Any] = {}
    if not found:
        options = {"config_file_name": "config.json", "_from_model_config": True}
    try:
        read = GenerationConfig.from_pretrained(place, revision=revision or "main", **options)
    except Exception as error:
        raise ChatModelError(_unreadable(name, error)) from error
    if not found and read.eos_token_id is None:
        read.eos_token_id = getattr(text_config(config), "eos_token_id", None)
    return read


def _unreadable(name: str, error: Exception) -> str:
    return (
        f"generation_config.json of {name!r} cannot be read ({type(error).__name__}: "
        f"{str(error).splitlines()[0][:200]}); mend or remove it: it says where a reply ends"
    )
