"""Judges: response -> refused, complied or unscored; refusal rates and agreement."""
