"""Replies as tokens in their chat, and prompt tuning as the study's code does it."""

from __future__ import annotations

import random

import pandas as pd
import pytest
import torch
import transformers
from tiny_models import CHATML, QUERIES, SAFETY, build, chat, embedded

from analysis_lib import ChatModel, PromptTuningConfig, next_token_loss, study_tuning
from analysis_lib.model.replies import generation_prompt_ids, reply_ids, turn_ids
from analysis_lib.model.soft_prompt import SoftPrompt
from analysis_lib.train.tuning import train_prompt_tuning

REPLIES = ["I am sorry, but I cannot help with that.", "Sure, here is how to bake bread.", "A b"]


def whole(model, query, reply):
    """Token ids of a chat, of the chat with its reply, and of the reply's part as tokens of the whole."""
    messages = [{"role": "user", "content": query}, {"role": "assistant", "content": reply}]
    options = {"add_special_tokens": False}
    head = model.tokenizer(model.renderer.chat(messages[:1]), **options)["input_ids"]
    both = model.tokenizer.apply_chat_template(messages, tokenize=False)
    return head, model.tokenizer(both, **options)["input_ids"]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2", "phi3", "gpt_neox"])
def test_replies_are_the_tokens_of_the_chat_with_them(family):
    model = chat(family)
    for reply, ids in zip(REPLIES, reply_ids(model, REPLIES, [True] * 3), strict=True):
        head, both = whole(model, "How do I bake bread?", reply)
        rest = both[len(head) :]
        assert tuple(rest[: len(ids) - 1]) == ids[:-1]  # a template may write a space behind
        ends = [
            token
            for token in rest
            if token in model.generation.stop_ids | model.renderer.special_ids
        ]
        assert ids[-1] == ends[0]
        assert reply_ids(model, [reply], [False]) == [ids[:-1]]
        assert model.tokenizer.decode(ids[:-1]).strip() == reply


def test_in_its_chat_a_reply_may_have_other_tokens_than_alone():
    """Behind [/INST] the template writes a space, which is the piece's own; alone it has one as well."""
    model = chat("mistral")
    alone = model.tokenizer(REPLIES[0], add_special_tokens=False)["input_ids"]
    (ids,) = reply_ids(model, REPLIES[:1], [False])
    head, both = whole(model, "How?", REPLIES[0])
    assert list(ids) == both[len(head) : -1] != alone


def test_a_reply_ends_with_the_template_s_token():
    """Not with the tokenizer's end-of-sequence token, where the template uses another."""
    made = build("qwen2")
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made.tokenizer.backend_tokenizer,
        bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        chat_template=CHATML, additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    model = ChatModel.wrap(made.model, words, name="other end")
    end = words.convert_tokens_to_ids("<|im_end|>")
    ((*_, last),) = reply_ids(model, REPLIES[:1], [True])
    assert last == end != words.eos_token_id
    answers = QUERIES[["query_id"]].assign(response=REPLIES[0], end="eos")
    table = next_token_loss(model, QUERIES, answers, {"none": ""})
    n_tokens = len(reply_ids(model, REPLIES[:1], [True])[0])
    assert (table["n_tokens"] == n_tokens).all()
    row = model.render([QUERIES["text"][0]], "")[0].ids
    said = reply_ids(model, REPLIES[:1], [True])[0]
    logits = made.model(torch.tensor([[*row, *said]])).logits[0, len(row) - 1 : -1]
    plain = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(said))
    assert table["loss"][0] == pytest.approx(float(plain), rel=1e-5)


def judged(model, n=9):
    rows = [
        {
            "query_id": QUERIES["query_id"][i % len(QUERIES)],
            "prompt": "none" if i % 2 else "default",
            "response": REPLIES[i % 3] + f" {i}",
            "refused": float(i % 3 == 0),
        }
        for i in range(n)
    ]
    return pd.DataFrame(rows)


def study_loss(model, start, table, batch):
    """The study's two losses of a batch, each row by itself, from whole chats."""
    n_prompt = len(generation_prompt_ids(model))
    sums, counts = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for row in table.iloc[batch].itertuples():
        (head,) = model.render([row.text], start)
        turn = turn_ids(model, [row.response])[0][:101]
        ids = (*head.ids[: len(head.ids) - n_prompt], *turn)
        at = type(head)(ids, head.slot, head.soft)
        inputs = embedded(model, at, start.embeddings)
        logits = model.model(inputs_embeds=inputs).logits[0, len(ids) - len(turn) - 1 : -1]
        p = logits.double().softmax(-1)[range(len(turn)), list(turn)]
        loss = -p.log() if row.good else -(1 - p).clamp(min=1e-5).log()
        sums[row.good] += float(loss.sum())
        counts[row.good] += len(turn)
    return tuple(sums[kind] / max(1, counts[kind]) for kind in (True, False))


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_the_study_s_baseline_has_its_rows_order_tokens_and_losses(family):
    model = chat(family)
    responses = judged(model)
    config = study_tuning(model, batch_size=3, epochs=2, learning_rate=1e-9)
    soft = train_prompt_tuning(model, QUERIES, responses, SAFETY, config)

    table = responses.merge(QUERIES[["query_id", "text", "harmful"]], on="query_id")
    table["good"] = (table["refused"] == 1) == table["harmful"].astype(bool)
    table = table[(table["prompt"] != "none") | ~table["good"]].reset_index(drop=True)
    assert 3 < len(table) < len(responses)  # good replies without a prompt are left out
    order, generator, steps = list(range(len(table))), random.Random(42), []
    for _ in range(2):
        generator.shuffle(order)
        steps += [order[at : at + 3] for at in range(0, len(table) - 2, 3)]
    assert len(soft.history) == len(steps)
    start = SoftPrompt.from_text(model, SAFETY, name="start")
    for batch, row in zip(steps, soft.history.itertuples(), strict=True):
        good, bad = study_loss(model, start, table, batch)
        assert (row.likelihood, row.unlikelihood) == pytest.approx((good, bad), rel=1e-4, abs=1e-6)
        assert row.loss == pytest.approx(good + bad, rel=1e-4)


def test_whole_turns_begin_with_the_role_and_end_with_the_next_prompt():
    model = chat("qwen2")
    (ids,) = turn_ids(model, ["Sure."])
    text = "<|im_start|>assistant\nSure.<|im_end|>\n<|im_start|>assistant\n"
    assert model.tokenizer.decode(ids) == text
    (row,) = model.render(["How?"], "")
    prompt = generation_prompt_ids(model)
    assert row.ids[-len(prompt) :] == prompt == ids[: len(prompt)]


def test_the_weight_of_unlikelihood_follows_the_model():
    model = build("llama")
    for name, weight in {"meta-llama/Llama-2-7b-chat-hf": 5, "CodeLlama-7b-Instruct-hf": 5}.items():
        model.name = name
        assert study_tuning(model).weight_unlikelihood == weight
    model.name = "Mistral-7B-Instruct-v0.2"
    config = study_tuning(model)
    assert (config.weight_unlikelihood, config.batch_size, config.epochs) == (1, 50, 5)


def test_bad_inputs_of_the_study_s_baseline():
    model = chat("qwen2")
    config = study_tuning(model)
    with pytest.raises(ValueError, match=r"^\d responses are fewer than the 50 of one step"):
        train_prompt_tuning(model, QUERIES, judged(model), SAFETY, config)
    with pytest.raises(ValueError, match="needs the column prompt"):
        train_prompt_tuning(model, QUERIES, judged(model).drop(columns="prompt"), SAFETY, config)
    with pytest.raises(ValueError, match="no baseline 'theirs'; take 'ours' or 'study'"):
        PromptTuningConfig(baseline="theirs")
