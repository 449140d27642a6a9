"""New models and tokenizers, made rather than loaded: what the organism is trained from."""

from __future__ import annotations

from typing import Any


def new_llama(**settings: Any) -> Any:
    """A Llama model with random weights; settings are those of transformers' LlamaConfig."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**settings))


def fast_tokenizer(backend: Any, **special: Any) -> Any:
    """A transformers tokenizer around one of the tokenizers package.

    special: its special tokens by role.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)
