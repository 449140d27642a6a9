"""Chats of a single token, or whose last token is the prompt's: right, or refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import build, plain_states

from analysis_lib.collect.responses import sample_responses
from analysis_lib.collect.states import hidden_states
from analysis_lib.judge.likelihood import next_token_loss
from analysis_lib.model.chat import ChatModel
from analysis_lib.model.errors import ChatModelError
from analysis_lib.model.soft_prompt import SoftPrompt

FIRST = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
LAST = "{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}"
QUERIES = pd.DataFrame({"query_id": ["a", "b"], "text": ["A", "B"]})
ANSWERS = pd.DataFrame({"query_id": ["a", "b"], "response": ["Q", "no"]})


def bare(family, template):
    """A model whose template writes the messages alone."""
    made = build(family)
    made.tokenizer.chat_template = template
    return ChatModel.wrap(made.model, made.tokenizer)


@pytest.mark.parametrize("kind", ["no prompt", "text", "soft"])
@pytest.mark.parametrize("template", [FIRST, LAST])
@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "mamba"])
def test_the_shortest_chats_are_right(family, template, kind):
    model = bare(family, template)
    prompts = {"p": {"no prompt": "", "text": "Z"}.get(kind, "")}
    if kind == "soft":
        prompts = {"p": SoftPrompt.from_text(model, "Z", name="soft")}
    rows = model.render(QUERIES["text"].tolist(), prompts["p"])
    assert [len(row.ids) for row in rows] == [2 - (kind == "no prompt")] * 2
    layers, soft = (0, 1, -1), getattr(prompts["p"], "embeddings", None)
    got = hidden_states(model, QUERIES, prompts, layers=layers).states
    right = torch.stack([plain_states(model, row, layers, soft) for row in rows])
    assert np.allclose(got, right.float().numpy(), atol=1e-4)
    greedy = {"n_samples": 1, "max_new_tokens": 4, "temperature": 0}
    said = sample_responses(model, QUERIES, prompts, **greedy)["response"].tolist()
    loss = next_token_loss(model, QUERIES, ANSWERS, prompts)["loss"].to_numpy()
    with torch.no_grad():  # the plain way; a soft prompt made of a text is that text
        texts = model.render(QUERIES["text"].tolist(), "Z" if kind == "soft" else prompts["p"])
        for row, text, answer, found in zip(texts, said, ANSWERS["response"], loss, strict=True):
            ids = torch.tensor([row.ids])
            new = model.model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
            assert text == model.tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
            reply = model.tokenizer(answer, add_special_tokens=False)["input_ids"]
            logits = model.model(torch.tensor([[*row.ids, *reply]])).logits[0, ids.shape[1] - 1 :]
            log_p = torch.log_softmax(logits, dim=-1)[range(len(reply)), reply]
            assert found == pytest.approx(-log_p.mean().item(), abs=1e-4)


def test_a_chat_without_a_token_is_refused():
    model = bare("qwen2", FIRST)
    with pytest.raises(ChatModelError, match="has no token.*template=FILE"):
        model.render([""], "")
    soft = SoftPrompt.from_text(model, "Z", name="soft")
    assert len(model.render([""], soft)[0].ids) == 1
