"""General ability by AlpacaEval: instructions in, answers and verdicts in the package's form.

    alpaca_eval --model_outputs answers.json --output_path DIR

judges the file against text-davinci-003 (the study's reference; another one by --reference_outputs)
and writes DIR/.../annotations.json. Any local judge may write the same file: a list of objects with
instruction, generator_2 and preference. Source: github.com/tatsu-lab/alpaca_eval (README,
metrics/winrate.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from .files import DataError, read_text


def load_instructions(path: str | Path, n: int | None = 100) -> pd.DataFrame:
    """The first n instructions of a json list of objects with `instruction`, as a query table.

    n is 100 in the study; None takes all. query_id is alpaca-0001, ..., harmful False, query_set
    "alpaca_eval". Raises DataError naming file and entry.
    """
    entries = _entries(Path(path), "instruction")[:n]
    texts = [entry["instruction"].strip() for entry in entries]
    ids = [f"alpaca-{i:04d}" for i in range(1, len(texts) + 1)]
    table = pd.DataFrame(
        {"query_id": ids, "text": texts, "harmful": False, "query_set": "alpaca_eval"}
    )
    return table.astype({"harmful": "boolean"})


def write_alpaca_eval(
    responses: pd.DataFrame, queries: pd.DataFrame, path: str | Path, *, generator: str
) -> None:
    """Writes one response a query, of one prompt, as the package's model outputs.

    The fields are instruction, output, generator and dataset. generator: the name under which the
    package lists these answers, such as "my-model under my-prompt".
    """
    if responses["prompt"].nunique() != 1 or responses["query_id"].duplicated().any():
        raise ValueError(
            "one file holds one answer a query under one prompt; "
            "keep one prompt and one sample of the responses"
        )
    about = queries.set_index("query_id")
    if lacking := set(responses["query_id"]) - set(about.index):
        raise ValueError(
            f"query {min(lacking)!r} is not in the queries' table; pass the table that was sampled"
        )
    asked = about.loc[responses["query_id"]]
    answers = [
        {"instruction": instruction, "output": output, "generator": generator, "dataset": dataset}
        for instruction, output, dataset in zip(
            asked["text"], responses["response"], asked["query_set"], strict=True
        )
    ]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(answers, indent=2, ensure_ascii=False), encoding="utf-8")


def read_alpaca_eval(path: str | Path, queries: pd.DataFrame, *, prompt: str) -> pd.DataFrame:
    """Wins from the package's annotations.json: [query_id, prompt, value] for `metric_table`.

    value is the preference for our answer: 1 a win, 0 a loss, 0.5 a draw, or between them where the
    annotator gives a probability; NaN where it gave none. Instructions that are no query are left
    out. Raises DataError naming the entry.
    """
    path = Path(path)
    ids = dict(zip(queries["text"], queries["query_id"], strict=True))
    rows = []
    entries = _entries(path, "instruction", "generator_2")
    if len(names := {entry["generator_2"] for entry in entries}) > 1:
        raise DataError(
            f"{path}: annotations of several generators ({', '.join(sorted(names))}); "
            "give one file a generator"
        )
    for number, entry in enumerate(entries, start=1):
        preference = entry.get("preference")
        number_given = isinstance(preference, int | float) and not isinstance(preference, bool)
        if preference is not None and not (
            number_given and (preference == 0 or 1 <= preference <= 2)
        ):
            raise DataError(
                f"{path}, entry {number}: preference {preference!r}; "
                "it is 1 to 2 (2: ours wins), 0 for a draw, or null"
            )
        if (query_id := ids.get(entry["instruction"].strip())) is not None:
            value = (
                float("nan") if preference is None else 0.5 if preference == 0 else preference - 1
            )
            rows.append((query_id, prompt, value))
    if not rows:
        raise DataError(
            f"{path}: none of its instructions is among the queries; "
            "pass the queries that were answered"
        )
    return pd.DataFrame(rows, columns=["query_id", "prompt", "value"])


def _entries(path: Path, *fields: str) -> list[dict[str, Any]]:
    content = read_text(path)
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: cannot be read as JSON ({error}); "
            f"give a list of objects with {', '.join(fields)}"
        ) from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: not a list of objects; give one with {', '.join(fields)} in each")
    for number, entry in enumerate(entries, start=1):
        for field in fields:
            if (
                not isinstance(entry, dict)
                or not isinstance(entry.get(field), str)
                or not entry[field].strip()
            ):
                raise DataError(
                    f"{path}, entry {number}: no text in {field!r}; give every object one"
                )
    return entries
