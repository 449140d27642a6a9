"""What the model room raises."""

from __future__ import annotations


class ChatModelError(ValueError):
    """The model cannot be used as a chat model; the message says why and what to do."""
