"""Representation analysis of safety prompts for chat language models.

Names are imported at their first use, so that `import analysis_lib` costs nothing and a core room never pulls in
plotly or Jupyter.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_ROOMS = {
    "benchmark": ["benchmark_table", "metric_table"],
    "capture": ["HiddenStates", "hidden_states"],
    "chat": ["ChatModel", "study_models"],
    "data": ["load_published", "load_queries", "load_safety_prompts"],
    "dro": ["DROConfig", "PromptTuningConfig", "SoftPrompt", "train_dro", "train_prompt_tuning"],
    "judge": [
        "BatchJudge",
        "is_refusal",
        "judge_agreement",
        "judge_responses",
        "published_judge",
        "refusal_rates",
        "verdict_is_final",
    ],
    "methods": ["ablations", "train_methods"],
    "model_judges": ["calibrate_refusal", "chat_judge", "classifier_judge", "next_token_loss", "refusal_probability"],
    "sampling": ["sample_responses"],
    "space": ["AnchorSpace", "Direction", "fit_direction", "mean_shifts"],
    "store.store": ["Store"],
    "wrappers": ["add_suffixes", "load_wrappers", "wrap_queries"],
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}
__all__ = sorted(_ROOM_OF)


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'analysis_lib' has no attribute {name!r}")
    return getattr(import_module(f".{_ROOM_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
