"""Representation analysis of safety prompts for chat language models.

Names are imported at their first use, so that `import analysis_lib` costs nothing and a core room
never pulls in plotly or Jupyter.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_ROOMS = {
    "analysis.benchmark": ["benchmark_table", "metric_table"],
    "analysis.directions": [
        "Direction",
        "bootstrap_directions",
        "calibrate_refusal",
        "fit_direction",
        "separation",
    ],
    "analysis.estimators": ["logistic", "mean_difference", "published_estimator"],
    "analysis.metrics": ["Metric"],
    "analysis.published": ["load_published"],
    "analysis.space": ["AnchorSpace", "cosines", "mean_shifts"],
    "analysis.study": ["Study"],
    "collect.responses": ["sample_responses"],
    "collect.states": ["HiddenStates", "hidden_states"],
    "data.alpaca": ["load_instructions", "read_alpaca_eval", "write_alpaca_eval"],
    "data.prompts": ["load_safety_prompts"],
    "data.queries": ["load_anchor_queries", "load_heldout_queries", "load_queries"],
    "data.tables": ["save_table"],
    "data.units": ["query_units"],
    "data.wrappers": ["add_suffixes", "load_wrappers", "wrap_queries"],
    "judge.likelihood": ["next_token_loss", "refusal_probability"],
    "judge.models": ["chat_judge", "classifier_judge", "published_judge"],
    "judge.strings": [
        "is_refusal",
        "normalized_verdict_is_final",
        "string_normalized",
        "verdict_is_final",
    ],
    "judge.verdicts": [
        "RowJudge",
        "Unscored",
        "judge_agreement",
        "judge_responses",
        "refusal_rates",
        "text_judge",
    ],
    "model.chat": ["ChatModel"],
    "model.soft_prompt": ["SoftPrompt", "embed_text", "nearest_tokens"],
    "model.templates": ["study_models"],
    "store.store": ["Store"],
    "train.ablations": ["ablations", "cross_validate_unlikelihood", "train_methods"],
    "train.dro": ["DROConfig", "train_dro"],
    "train.tuning": ["PromptTuningConfig", "study_tuning", "train_prompt_tuning"],
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}
__all__ = sorted(_ROOM_OF)


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'analysis_lib' has no attribute {name!r}")
    return getattr(import_module(f".{_ROOM_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
