"""What batches are about: the `about` that whoever writes one gives it, checked and summed up."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .batches import check_key, depth_of, dump


def check_about(about: Mapping[str, Any]) -> dict[str, Any]:
    """`about` as a dict. Raises ValueError where it is not JSON, or nested too deep to be read."""
    try:
        dump(plain := dict(about))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`about` must be JSON (str, finite numbers, bool, None, lists, dicts): {error}"
        ) from error
    if depth_of(plain) > 20:
        raise ValueError("`about` must be JSON of at most 20 dicts and lists in one another")
    return plain


def check_batch(keys: Sequence[str], n: int) -> bool:
    """Whether there is anything to write. Raises ValueError."""
    if len(keys) != n:
        raise ValueError(f"{len(keys)} keys for {n} rows; give one key per row")
    for key in keys:
        check_key(key)
    if len(set(keys)) != n:
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"key {twice} occurs twice in one batch; write each row once")
    return n > 0


def merge_about(abouts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What batches have in common; a field in which they differ becomes the list of its values.

    Of witnesses, the best one of each dtype and soft prompt is enough.
    """
    merged: dict[str, Any] = {}
    if witnesses := witnesses_of(abouts):
        ranked = sorted(witnesses, key=depth_and_length)
        merged["witness"] = list({(w["dtype"], w["soft"]): w for w in ranked}.values())
    for name in sorted({name for about in abouts for name in about} - {"witness"}):
        values = values_of(abouts, name)
        listed = any(isinstance(about.get(name), list) for about in abouts)
        merged[name] = values if listed or len(values) != 1 else values[0]
    return merged


def values_of(abouts: Iterable[Mapping[str, Any]], name: str) -> list[Any]:
    """Distinct values of a field over batches, by first appearance; lists are taken apart."""
    seen: dict[str, Any] = {}
    for about in abouts:
        value = about.get(name)
        for item in value if isinstance(value, list) else [value] if value is not None else []:
            seen.setdefault(json.dumps(item, sort_keys=True), item)
    return list(seen.values())


def certificates_of(abouts: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The distinct parity certificates of batches; none of another program's."""
    numbers = ("checked", "max_abs", "max_rel")
    return [
        value
        for value in values_of(abouts, "certificate")
        if isinstance(value, dict)
        and isinstance(value.get("way"), str)
        and all(type(value.get(name)) in (int, float) for name in numbers)
    ]


def witnesses_of(abouts: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The distinct witnesses of batches: token ids and what the model computed there.

    Those of another program are left out.
    """
    kinds = {"soft": str, "layer": int, "dtype": str, "width": int, "size": float}
    return [
        value
        for value in values_of(abouts, "witness")
        if isinstance(value, dict)
        and all(type(value.get(name)) is kind for name, kind in kinds.items())
        and _numbers(value.get("ids"), int)
        and _numbers(value.get("state"), float)
    ]


def depth_and_length(witness: Mapping[str, Any]) -> tuple[bool, int, int]:
    """Sorts witnesses up to the one that sees most of a model; layer -1 is the last of all."""
    return witness["layer"] == -1, witness["layer"], len(witness["ids"])


def _numbers(value: Any, kind: type) -> bool:
    return isinstance(value, list) and value != [] and all(type(item) is kind for item in value)


def sum_up(certificates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One certificate for at least one: every way, all rows checked, the largest differences."""
    return {
        "way": ", ".join(
            dict.fromkeys(way for one in certificates for way in one["way"].split(", "))
        ),
        "checked": sum(one["checked"] for one in certificates),
        "max_abs": max(one["max_abs"] for one in certificates),
        "max_rel": max(one["max_rel"] for one in certificates),
    }
