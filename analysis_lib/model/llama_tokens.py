"""Token ids of Llama-type tokenizers, which transformers 5 builds anew where 4 read their file.

They differ behind special tokens: transformers 4 put a "▁" in front of every text there (`▁[` of
`<s>[INST]`), and version 5 does so where the tokenizer's class is told `legacy=True`.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers

from .template_texts import USER
from .templates import study_models

_AS_IT_IS = {"tokenizer_class": "PreTrainedTokenizerFast"}


def keep_study_ids(place: str, tokenizer: Any) -> None:
    """Gives the tokenizer of a study model the ids that the study had; leaves others as they are.

    place is the hub's id. The study used transformers 4.37.
    """
    study = study_models().set_index("hub_id")["tokenizer"]
    if study.get(place) == "fast" and _is_llama_type(tokenizer.backend_tokenizer):
        _as_in_4(tokenizer.backend_tokenizer)


def warn_of_ids(
    name: str, place: str, revision: str | None, tokenizer: Any, frame: tuple[str, str]
) -> None:
    """Warns where a chat has other ids than transformers 4 gave it.

    Those are the ids of tokenizer.json. Without that file, they are known where the configuration
    leaves `legacy` open. frame: the rendered text before and after a query.
    """
    from transformers.utils import cached_file

    backend = tokenizer.backend_tokenizer
    if not _is_llama_type(backend):
        return
    kinds = ("missing_entries", "connection_errors")
    found: dict[str, Any] = {f"_raise_exceptions_for_{kind}": False for kind in kinds}
    former = Tokenizer.from_str(backend.to_str())
    if file := cached_file(place, "tokenizer.json", revision=revision, **found):
        told = Tokenizer.from_file(file)
        former.normalizer, former.pre_tokenizer = told.normalizer, told.pre_tokenizer
        said, entry = "its tokenizer.json has", json.dumps(_AS_IT_IS)[1:-1]
    else:
        config = cached_file(place, "tokenizer_config.json", revision=revision, **found)
        if config and "legacy" in json.loads(Path(config).read_text(encoding="utf-8")):
            return
        _as_in_4(former)
        said, entry = "transformers 4 had", '"legacy": true'
    chat, made = USER.join(frame), (backend, former)
    now, then = (each.encode(chat, add_special_tokens=False).tokens for each in made)
    if now != then:
        at = next((i for i, (a, b) in enumerate(zip(now, then)) if a != b), 0)
        warnings.warn(
            f"the tokenizer of {name!r} gives {now[at]!r} in a chat where {said} {then[at]!r}: this "
            "transformers builds tokenizers of Llama's kind anew; "
            f"to have the former ids, write {entry} into its tokenizer_config.json",
            stacklevel=3,
        )


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer that transformers reads from a folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def take_as_it_is(folder: Path) -> None:
    """Has every version of transformers take a folder's tokenizer.json as it is."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | _AS_IT_IS
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_llama_type(backend: Tokenizer) -> bool:
    """Whether "▁" stands for spaces by a pre-tokenizer, as in the classes of version 5."""
    return hasattr(backend.pre_tokenizer, "prepend_scheme")


def _as_in_4(backend: Tokenizer) -> None:
    """Puts "▁" in front of every text between special tokens."""
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.pre_tokenizer = None
