"""What `analysis-lib reproduce` leaves in its folder: the notebooks' results, figures, exports and `summary.json`."""

from __future__ import annotations

import ast
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from ..data.prompts import load_safety_prompts
from ..data.queries import HELDOUT_SETS, load_anchor_queries, load_heldout_queries, load_queries
from ..data.shipped import shipped
from ..judge.strings import verdict_is_final
from ..model.chat import ChatModel
from ..model.loading import default_device, default_dtype
from ..model.soft_prompt import SoftPrompt
from ..store.store import Store
from ..store.upkeep import info
from ..train.ablations import ablations
from ..train.dro import DROConfig
from ..train.export import export
from ..train.tuning import PromptTuningConfig
from .cost import estimate

PACKAGES = (
    "analysis-lib",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "pandas",
    "scikit-learn",
    "plotly",
)

# A notebook that assigns all of these in its cell tagged `parameters` trains the rows of `ablations`
# on the anchor queries, and samples every EVERY-th query of a set under each: the dry run counts it.
DECLARED = (
    "QUERY_SET",
    "EVERY",
    "N_SAMPLES",
    "DRO_EPOCHS",
    "TUNING_EPOCHS",
    "WEIGHTS",
    "COMPONENTS",
    "NORM_WEIGHTS",
)


class ReproduceError(Exception):
    """The notebooks cannot be run here; the message says what to do."""


def reproduce(
    model: ChatModel,
    out: Path,
    *,
    prompt: Path | None = None,
    queries: str | None = None,
    heldout: Sequence[str] | None = None,
    guard: str | None = None,
    template: str | None = None,
    forms: Sequence[str] | None = None,
    jobs: int = 1,
) -> bool:
    """Runs every notebook on the model into `out`, exports the soft prompts and writes `summary.json`.

    What was computed lies in the store: after an interruption the same call goes on from there. heldout: names or files of
    the query sets that prompts are compared on. guard: a chat model that judges replies to harmful queries as well, as in
    the study (`published_judge`); default: the string judge alone. forms: see `export`.
    Returns whether every notebook ran and every form was written. Raises ReproduceError where what runs notebooks lacks.
    """
    try:
        from .pictures import write_figures
        from .run_notebooks import run_notebooks
    except ModuleNotFoundError as error:
        raise ReproduceError(
            f"the notebooks cannot be run here: {error}; in the project's folder, pip install -e '.[notebooks]'"
        ) from error
    # What an earlier run left in the folder must not be told or exported as this one's.
    before = {path: path.stat().st_mtime_ns for path in (*_soft_prompts(out), *_tables(out))}
    given: dict[str, Any] = {
        "model": None if model.name == "organism" else model.name,
        "prompt": prompt,
        "queries": queries,
        "heldout": heldout,
        "guard": guard,
        "template": template,
    }
    # The notebooks run in another folder: the store's must be whole.
    env = {**environment_of(model), "ANALYSIS_LIB_STORE": str(Store().folder.absolute())}
    runs = run_notebooks(out, jobs=jobs, env=env, **given)
    figures = write_figures({run.notebook.stem: run.nb for run in runs}, out / "figures")
    new = _newer(_soft_prompts(out), before)
    exports = {path.stem: _export(path, model, out, forms) for path in new}
    text = None if prompt is None else prompt.read_text(encoding="utf-8").strip()
    summary = {
        "versions": _versions(),
        "model": {**model.about(), "device": str(model.device)},
        "prompt": None if prompt is None else {"file": prompt.name, "text": text},
        "queries": queries or "anchor",
        "heldout": list(heldout or HELDOUT_SETS),
        "guard": guard,
        "seeds": {"sampling": 0, **{name: e["config"].get("seed") for name, e in exports.items()}},
        "certificates": _certificates(model),
        "soft_prompts": exports,
        "notebooks": [
            {"name": run.notebook.name, "seconds": round(run.seconds, 1), "error": run.error}
            for run in runs
        ],
        "tables": [str(path.relative_to(out)) for path in _newer(_tables(out), before)],
        "figures": [str(path.relative_to(out)) for path in figures],
        "report": "report.html",
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    (out / "summary.json").write_text(text + "\n", encoding="utf-8")
    print(f"Summary: {out / 'summary.json'}")
    return not any(run.error for run in runs) and not any(e["error"] for e in exports.values())


def _export(path: Path, model: ChatModel, out: Path, forms: Sequence[str] | None) -> dict[str, Any]:
    """Exports a soft prompt of this run: its entry in the summary, with the error where it failed."""
    entry: dict[str, Any] = {"file": str(path.relative_to(out)), "config": {}, "exports": {}}
    try:
        soft = SoftPrompt.load(path, model)
        entry |= {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "length": len(soft.embeddings),
            "start_text": soft.start_text,
            "config": dict(soft.config),
        }
        tables = out / "tables"
        tables.mkdir(parents=True, exist_ok=True)
        soft.history.to_csv(tables / f"{path.stem}_history.csv", index=False)
        written = export(soft, model, out / "exports" / path.stem, forms)
        entry["exports"] = {form: str(place.relative_to(out)) for form, place in written.items()}
        print(f"Exported {path.stem}: " + ", ".join(map(str, written.values())))
        return entry | {"error": None}
    except Exception as failure:  # a full disk, say: hours of work must not end without a summary
        error = f"{type(failure).__name__}: {failure}"
        print(f"Not exported: {path.stem}: {error}")
        return entry | {"error": error}


def _versions() -> dict[str, str]:
    python = {"python": platform.python_version()}
    return python | {package: metadata.version(package) for package in PACKAGES}


def _certificates(model: ChatModel) -> list[Any]:
    kept = info(Store())["certificates"]
    return [c["certificate"] for c in kept if c["model"] == model.fingerprint]


def plan(
    model: ChatModel,
    out: Path,
    *,
    prompt: Path | None = None,
    queries: str | None = None,
    heldout: Sequence[str] | None = None,
    guard: str | None = None,
) -> pd.DataFrame:
    """What `reproduce` would still compute and its cost, from a short probe; prints where it would run and write.

    Returns [queries, step, rows, found, tokens, seconds, GB] (see `estimate`). The trained prompts are
    counted on the held-out queries as two more that nothing is known of. Rows that a notebook trains
    are counted as it declares them, see DECLARED. Not counted: replies to wrapped queries and of the
    trials of a weight, the probabilities and losses of replies, a guard's verdicts, the widgets'
    consoles.
    """
    prompts, store = load_safety_prompts(prompt), Store()
    start = next(
        (name for name in prompts if name not in load_safety_prompts()), "default"
    )  # what DRO starts from
    anchor = {start: prompts[start], **prompts}
    sampling: dict[str, Any] = {"n_samples": 20, "stop_when": verdict_is_final}
    anchors, tuning = load_anchor_queries(queries or "anchor"), PromptTuningConfig()
    asked = load_heldout_queries(heldout, anchors)
    whole = sampling if guard is None else {"n_samples": 20}  # a guard reads whole replies
    asked = asked.drop(columns="harmful")  # nothing is trained on them
    two = {**prompts, **_as_if_trained(prompts[start], 2)}
    every_layer = (*range(model.n_layers + 1), -1)
    options: dict[str, Any] = {"layers": every_layer, "tuning": tuning}
    costs = {
        "anchor": estimate(model, anchors, anchor, sampling=sampling, store=store, **options),
        "held out": estimate(model, asked, two, sampling=whole, store=store),
    }
    for path in sorted(shipped("notebooks").glob("[0-9][0-9]_*.ipynb")):
        declared = parameters_of(path)
        if set(DECLARED) <= set(declared):
            name = path.stem.partition("_")[2]
            costs[name] = cost_of_rows(model, prompts[start], declared, costs["anchor"], store)
    table = pd.concat(
        [cost.assign(queries=name) for name, cost in costs.items()], ignore_index=True
    )
    table["GB"] = table.pop("memory_bytes") / 1e9
    about = model.about()
    print(
        f"Would run the notebooks on {model.name!r} ({about['dtype']} on {model.device}), prompts {about['prompt_goes']}, into {out}"
    )
    print(f"The plain form of a soft prompt copies {model.weight_bytes / 1e9:.2f} GB of weights")
    return table[["queries", *table.columns.drop("queries")]]


def parameters_of(notebook: Path) -> dict[str, Any]:
    """The plain values that the cell tagged `parameters` of a notebook assigns, by name.

    Read as JSON: where a dry run is made there may be no Jupyter.
    """
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            assigned = ast.parse("".join(cell["source"])).body
            return {
                target.id: ast.literal_eval(node.value)
                for node in assigned
                if isinstance(node, ast.Assign)
                for target in node.targets
                if isinstance(target, ast.Name)
            }
    return {}


def _as_if_trained(text: str, n: int) -> dict[str, str]:
    """Prompts as long as the text, and in no store."""
    return {f"trained {i}": f"{text} {i}" for i in range(1, n + 1)}


def cost_of_rows(
    model: ChatModel, text: str, declared: Mapping[str, Any], anchor: pd.DataFrame, store: Store
) -> pd.DataFrame:
    """Of the rows of `ablations` that a notebook declares; `anchor` holds the cost of whole trainings."""
    rows = ablations(components=declared["COMPONENTS"], norm_weights=declared["NORM_WEIGHTS"])
    n_dro = sum(isinstance(row.config, DROConfig) for row in rows)
    # A weight is tried by two trainings on half of the queries each: as much as one on all of them
    n_tuned = len(rows) - n_dro + len(declared["WEIGHTS"])
    times = {
        "DRO": n_dro * declared["DRO_EPOCHS"] / DROConfig().epochs,
        "prompt tuning": n_tuned * declared["TUNING_EPOCHS"] / PromptTuningConfig().epochs,
    }
    trainings = anchor[anchor["step"].isin(times)].copy()
    for column in ("rows", "tokens", "seconds"):
        scaled = trainings[column] * trainings["step"].map(times)
        trainings[column] = scaled.astype(trainings[column].dtype)
    asked = load_queries(declared["QUERY_SET"]).drop(columns="harmful").iloc[:: declared["EVERY"]]
    sampling = {"n_samples": declared["N_SAMPLES"], "stop_when": verdict_is_final}
    prompts = _as_if_trained(text, len(rows))
    sampled = estimate(model, asked, prompts, sampling=sampling, store=store)
    return pd.concat([sampled.query("step == 'responses'"), trainings])


def environment_of(model: ChatModel) -> dict[str, str]:
    """The environment under which `load` opens a model on the same device, in the same dtype and on the same day, where they are not the default."""
    asked = (
        {}
        if model.asked_device == default_device()
        else {"ANALYSIS_LIB_DEVICE": model.asked_device}
    )
    own = model.dtype == default_dtype(model.name, model.asked_device)
    # A run may go on past midnight.
    day = {"ANALYSIS_LIB_DATE": model.renderer.date} if model.renderer.date else {}
    return asked | ({} if own else {"ANALYSIS_LIB_DTYPE": model.dtype_name}) | day


def _soft_prompts(out: Path) -> list[Path]:
    return sorted((out / "soft_prompts").glob("[!.]*.safetensors"))


def _newer(paths: Sequence[Path], before: Mapping[Path, int]) -> list[Path]:
    return [path for path in paths if path.stat().st_mtime_ns != before.get(path)]


def _tables(out: Path) -> list[Path]:
    return sorted((out / "tables").glob("*.csv"))
