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

import pandas as pd

from .thoughts import answers_of
from .user_files import DataError, json_entries


def load_instructions(path: str | Path, n: int | None = 100) -> pd.DataFrame:
    """Read instructions of AlpacaEval as a query table.

    Parameters
    ----------
    path : str or Path
        A JSON file: a list of objects with `instruction`.
    n : int or None
        How many are taken, from the first. The study takes 100; None takes all.

    Returns
    -------
    DataFrame
        [query_id, text, harmful, query_set]: alpaca-0001, ..., not harmful, of "alpaca_eval".

    Raises
    ------
    DataError
        Names the file and the entry that cannot be read.

    References
    ----------
    AlpacaEval: Li et al. 2023, github.com/tatsu-lab/alpaca_eval.

    Examples
    --------
    >>> import json, pathlib, tempfile
    >>> from analysis_lib import load_instructions
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "set.json"
    ...     _ = path.write_text(json.dumps([{"instruction": "Name a colour."}]))
    ...     table = load_instructions(path)
    >>> table["query_id"].tolist()
    ['alpaca-0001']
    """
    entries = json_entries(Path(path), "instruction")[:n]
    texts = [entry["instruction"].strip() for entry in entries]
    ids = [f"alpaca-{i:04d}" for i in range(1, len(texts) + 1)]
    table = pd.DataFrame(
        {"query_id": ids, "text": texts, "harmful": False, "query_set": "alpaca_eval"}
    )
    return table.astype({"harmful": "boolean"})


def write_alpaca_eval(
    responses: pd.DataFrame, queries: pd.DataFrame, path: str | Path, *, generator: str
) -> None:
    """Write one response for each query, under one prompt, as AlpacaEval's model outputs.

    Of a reasoning model's response, what follows the thoughts is written: "" where nothing does.

    Parameters
    ----------
    responses : DataFrame
        [query_id, prompt, response], one row a query, all under one prompt.
    queries : DataFrame
        The query table that was sampled: query_id, text, query_set.
    path : str or Path
        The JSON file to write: objects with instruction, output, generator and dataset.
    generator : str
        The name under which the package lists these answers: "my-model under my-prompt", say.

    Raises
    ------
    ValueError
        Several prompts, several responses to a query, or a query that is not in the table.

    Examples
    --------
    >>> import pandas as pd, pathlib, tempfile
    >>> from analysis_lib import write_alpaca_eval
    >>> queries = pd.DataFrame(
    ...     {"query_id": ["a"], "text": ["Name a colour."], "query_set": "alpaca_eval"}
    ... )
    >>> responses = pd.DataFrame({"query_id": ["a"], "prompt": "none", "response": ["Blue."]})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "outputs.json"
    ...     write_alpaca_eval(responses, queries, path, generator="organism")
    ...     print(pd.read_json(path)["output"].tolist())
    ['Blue.']
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
        {
            "instruction": instruction,
            "output": output or "",
            "generator": generator,
            "dataset": dataset,
        }
        for instruction, output, dataset in zip(
            asked["text"], answers_of(responses)[0], asked["query_set"], strict=True
        )
    ]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(answers, indent=2, ensure_ascii=False), encoding="utf-8")


def read_alpaca_eval(path: str | Path, queries: pd.DataFrame, *, prompt: str) -> pd.DataFrame:
    """Read wins from AlpacaEval's annotations.json, as values for `metric_table`.

    Parameters
    ----------
    path : str or Path
        The file that the package wrote, or a file of the same form by any local judge.
    queries : DataFrame
        The query table: query_id and text. Instructions that are no query are left out, with a
        warning.
    prompt : str
        The prompt under which the answers were sampled.

    Returns
    -------
    DataFrame
        [query_id, prompt, value]. value is the preference for our answer: 1 a win, 0 a loss, 0.5 a
        draw, or between them where the annotator gives a probability; NaN where it gave none.

    Raises
    ------
    DataError
        Names the file and the entry that cannot be read.

    Examples
    --------
    >>> import json, pandas as pd, pathlib, tempfile
    >>> from analysis_lib import read_alpaca_eval
    >>> queries = pd.DataFrame({"query_id": ["a"], "text": ["Name a colour."]})
    >>> entry = {"instruction": "Name a colour.", "generator_2": "organism", "preference": 2.0}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "annotations.json"
    ...     _ = path.write_text(json.dumps([entry]))
    ...     wins = read_alpaca_eval(path, queries, prompt="none")
    >>> wins["value"].tolist()
    [1.0]
    """
    path = Path(path)
    ids = dict(zip(queries["text"], queries["query_id"], strict=True))
    rows = []
    entries = json_entries(path, "instruction", "generator_2")
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
