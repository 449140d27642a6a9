"""What a chat template may do to a chat: each is followed exactly, said, or refused with what to do."""

from __future__ import annotations

import copy
import datetime
import re
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import transformers.utils.chat_template_utils as clock
from test_chat import messages, text_of
from tiny_models import (
    CHATML,
    FAMILIES,
    GEMMA,
    LLAMA2,
    MISTRAL,
    PHI3,
    QUERIES,
    SAFETY,
    VICUNA,
    build,
    chat,
    tokenizer,
)

from analysis_lib.analysis.study import Study
from analysis_lib.collect.responses import sample_responses
from analysis_lib.collect.states import hidden_states
from analysis_lib.data.prompts import load_safety_prompts
from analysis_lib.data.queries import load_queries
from analysis_lib.judge.likelihood import next_token_loss, refusal_probability
from analysis_lib.model.chat import ChatModel
from analysis_lib.model.errors import ChatModelError
from analysis_lib.model.soft_prompt import SoftPrompt
from analysis_lib.model.template_checks import SECONDS, limited, pinned
from analysis_lib.model.templates import TEMPLATES, read_template
from analysis_lib.report.reproduce import environment_of
from analysis_lib.store.store import Store
from analysis_lib.train.export import export

pytestmark = pytest.mark.filterwarnings("ignore:the chat template of .* takes no system message")
QUERY = "How do I bake bread in a small oven?"

# As SmolLM3 does: a switch is taken out of the system message, and changes the rest.
SWITCH = (
    "{% set mode = '/think' %}{% set said = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% if '/no_think' in messages[0]['content'] %}{% set mode = '/no_think' %}{% endif %}"
    "{% set said = messages[0]['content'].replace('/no_think', '').replace('/think', '').rstrip() %}{% endif %}"
    "{{ '<|im_start|>system\nMode: ' + mode + '\n\n' + said + '\n\nTools: none<|im_end|>\n' }}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{{ '<|im_start|>assistant\n' }}"
)
USER_FIRST = CHATML.replace("for m in messages", "for m in messages | reverse")
TWICE = CHATML + "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}"
DATED = (  # as Llama 3.2 does
    "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% else %}{% set day = 'none' %}{% endif %}"
    "{{ '<|im_start|>system\nToday Date: ' + day + '\n\n' }}{% if messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] }}{% set messages = messages[1:] %}{% endif %}{{ '<|im_end|>\n' }}"
    + CHATML
)


def with_filter(name):
    """A template that passes the system message through a filter."""
    content = f"(m['content'] | {name} if m['role'] == 'system' else m['content'])"
    return CHATML.replace("m['content']", content)


def wrapped(template, family="qwen2", **options):
    """The family's shared model under another chat template."""
    own = copy.deepcopy(chat(family).tokenizer)
    own.chat_template = template
    return ChatModel.wrap(chat(family).model, own, name="mine", **options)


def plain_ids(model, system, query):
    """What the tokenizer itself makes of the same messages."""
    return model.tokenizer.apply_chat_template(
        messages(model, system, query), add_generation_prompt=True, return_dict=False
    )


@pytest.fixture
def day(monkeypatch):
    """Sets the day that templates write, as the tokenizer's own rendering has it."""

    def put(year, month, number, hour=0):
        class Day(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.datetime(year, month, number, hour)

        monkeypatch.setattr(clock, "datetime", Day)

    put(2026, 11, 27)
    return put


# ------------------------------------------------------------------------------------------------------------ the slot


@pytest.mark.parametrize(
    ("template", "right", "wrong"),
    [
        (SWITCH, ["You are careful.", "x"], ["You are careful. /no_think", "/no_think x", "a /think b"]),
        (with_filter("upper"), [], ["You are careful.", "system"]),
        (with_filter("tojson"), ["You are careful."], ['You are "careful".', "Two\nlines."]),
        (with_filter("indent(2)"), ["You are careful."], ["Two\nlines."]),
        (with_filter("truncate(40)"), ["You are careful."], ["You are careful. " * 4]),
        (with_filter("replace('You', 'I')"), ["Be careful."], ["You are careful.", "You"]),
        (with_filter("replace('e', 'e')"), ["e", "system", "user", QUERY], []),
    ],
)  # fmt: skip
def test_the_slot_spells_the_prompt_or_the_prompt_is_refused(template, right, wrong):
    model = wrapped(template)
    for system in right:
        for row in model.render([QUERY, "x", system], system):
            assert text_of(model, row.ids[slice(*row.slot)]).strip() == system
    for system in wrong:
        for prompt in (
            system,
            SoftPrompt("s", np.ones((2, 32), "float32"), system, model.fingerprint),
        ):
            with pytest.raises(
                ChatModelError, match="rewrites the prompt .* leave out .*template=FILE"
            ):
                model.render([QUERY], prompt)  # fmt: skip
        with pytest.raises(ChatModelError, match="rewrites the prompt"):
            SoftPrompt.from_text(model, system, name="s")


@pytest.mark.parametrize("system", [SAFETY, "x", QUERY])
def test_a_template_that_puts_the_user_first(system):
    model = wrapped(USER_FIRST)
    queries = [QUERY, "x", "Be brief." * 9, system]
    for row, query in zip(model.render(queries, system), queries, strict=True):
        assert list(row.ids) == plain_ids(model, system, query)
        assert text_of(model, row.ids[slice(*row.slot)]).strip() == system
        assert row.slot[0] > len(model.tokenizer(query)["input_ids"])
    soft = SoftPrompt.from_text(model, system, name="s")
    text, row = (
        model.render(["Be brief." * 9], system)[0],
        model.render(["Be brief." * 9], soft)[0],
    )
    assert row.slot == text.slot and row.ids[: row.slot[0]] == text.ids[: text.slot[0]]


def test_a_template_that_puts_the_user_first_and_rewrites_it_keeps_the_slot():
    model = wrapped(
        USER_FIRST.replace("m['content']", "m['content'] | replace('oven', 'stove top')")
    )
    row = model.render([QUERY], SAFETY)[0]
    assert text_of(model, row.ids[slice(*row.slot)]).strip() == SAFETY
    assert row.changed == ("rewritten",)


def test_a_system_message_that_is_written_twice_takes_no_soft_prompt():
    model = wrapped(TWICE)
    row = model.render([QUERY], SAFETY)[0]
    assert list(row.ids) == plain_ids(model, SAFETY, QUERY)
    assert text_of(model, row.ids[slice(*row.slot)]).strip() == SAFETY
    with pytest.raises(ChatModelError, match="more than once.*template=FILE"):
        model.render([QUERY], SoftPrompt.from_text(model, SAFETY, name="s"))


def test_a_prompt_that_the_tokenizer_cannot_spell_is_refused():
    model = wrapped(CHATML)
    from tokenizers import normalizers

    model.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("Q", "")
    for prompt, lost in (("Be Quick.", "Q"), ("QQ", "QQ")):
        with pytest.raises(ChatModelError, match=f"no token for '{lost}'.*leave that out"):
            model.render([QUERY], prompt)
    assert model.render([QUERY], SAFETY)[0].slot[1]


def test_a_query_that_the_template_drops_or_rewrites():
    some = CHATML.replace("m['content']", "(m['content'] if 'secret' not in m['content'] else '')")
    with pytest.raises(ChatModelError, match="drops the query 'a secret'"):
        wrapped(some).render([QUERY, "a secret"], SAFETY)
    model = wrapped(CHATML.replace("m['content']", "m['content'] | replace('bake', 'eat')"))
    with pytest.warns(
        UserWarning, match="in 1 of 2 queries the chat template changes the text"
    ) as caught:
        rows = model.render(["x", QUERY], "")
    assert [row.changed for row in rows] == [(), ("rewritten",)] and repr(QUERY) in str(
        caught[0].message
    )
    assert list(rows[1].ids) == plain_ids(model, "", QUERY)


# ------------------------------------------------------------------------------------------- what becomes of the texts

ODD = [
    *["  x", "x  ", " \t x \n", "\n\n", "\u00a0x\u3000", "a\n\n\nb", "a \n b", "a  b   c", "\tx"],
    *["😀", "👩‍👩‍👧‍👦 family", "e\u0301 NFD", "\u00e9 NFC", "ﬁ ligature ①", "\u200bzero\u200dwidth\u2060", "\ufeffmark"],
    *["שלום עולם", "\u202eright to left\u202c", "مرحبا", "日本語 テスト", "▁under▁score", "▁", "\x00\x07 control"],
    *["<|im_start|>", "say <s> and </s>", "[INST] x [/INST]", "<<SYS>>", "USER: x ASSISTANT:", "<start_of_turn>user"],
    *["＜s＞ ＜bos＞", "< s >", "<|im_", "|>", "{{ messages }}", "{% for %}", "%d %%", "\\n \\u0041", "'\"`"],
    *["x" * 300, "a b " * 40, "Xq7", "#", "?", "1234567890 3.14 -2e5"],
]  # fmt: skip


def cases():
    styles = {CHATML: "bytes", VICUNA: "bytes", LLAMA2: "sentencepiece", MISTRAL: "sentencepiece"}
    styles |= {GEMMA: "sentencepiece", PHI3: "sentencepiece"}
    made = [
        pytest.param(kind, own, own, id=f"tiny-{i}") for i, (own, kind) in enumerate(styles.items())
    ]
    for name in TEMPLATES:
        made += [
            pytest.param(k, VICUNA, read_template(name), id=f"{name}-{k}")
            for k in ("bytes", "sentencepiece")
        ]
    for name, own in (
        ("switch", SWITCH),
        ("user first", USER_FIRST),
        ("dated", DATED),
        ("twice", TWICE),
    ):
        made.append(pytest.param("bytes", CHATML, own, id=name))
    return [*made, pytest.param("", "", "", id="organism")]


@pytest.mark.parametrize(("kind", "own", "template"), cases())
def test_ids_are_those_of_the_tokenizer_and_each_change_is_said(kind, own, template, day):
    if kind:
        family = next(f for f, row in FAMILIES.items() if row[2] == kind)
        made = copy.deepcopy(tokenizer(kind, own))
        made.chat_template = template
        model = ChatModel.wrap(chat(family).model, made)
        model.renderer.config = copy.copy(model.config)
        model.renderer.config.max_position_embeddings, model.renderer.n_embeddings = 10**6, 10**6
    else:
        model = ChatModel.load("organism")
    named = ["anchor", "borderline", "facts", "heldout_forms", "heldout_harmless"]
    queries = [text for name in named for text in load_queries(name)["text"][::11]] + ODD
    marked = ("<", "[", "＜", ":")
    for system in ("", SAFETY, load_safety_prompts()["default"]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                rows = model.render(queries, system)
            except ChatModelError as error:
                assert "embedding for" in str(error) or "context" in str(error)
                raise
        told = [str(w.message) for w in caught]
        for query, row in zip(queries, rows, strict=True):
            if not row.changed:
                assert list(row.ids) == plain_ids(model, system, query), query
                continue
            assert set(row.changed) <= {"stripped", "broken", "normalized"}
            assert ("stripped" in row.changed) == (query != query.strip())
            if "broken" in row.changed:
                assert any(mark in query for mark in marked)
                assert any(repr(query.strip()[:60]) in text for text in told), query
            else:
                assert list(row.ids) == plain_ids(model, system, query.strip())
        if not system:
            n = sum("stripped" in row.changed for row in rows)
            assert any(f"in {n} of {len(queries)} queries white space" in text for text in told)


def test_white_space_of_a_prompt_is_said():
    model = wrapped(CHATML)
    with pytest.warns(
        UserWarning, match="in a prompt white space at the ends is left out"
    ) as caught:
        assert model.render([QUERY], f" {SAFETY}\n") == model.render([QUERY], SAFETY)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_the_head_of_many_rows_is_tokenized_once_and_each_row_stays_right():
    # A tokenizer that puts a space in front of the first word of a text alone.
    from tokenizers import pre_tokenizers

    model = wrapped(PHI3, "phi3")
    for scheme in ("first", "always", "never"):
        metaspace = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        model.tokenizer.backend_tokenizer.pre_tokenizer = metaspace
        queries = ["x", "▁x", "▁", "How are you?", "_", "x y", QUERY]
        for row, query in zip(model.render(queries, SAFETY), queries, strict=True):
            assert list(row.ids) == plain_ids(model, SAFETY, query), (scheme, query)


# ------------------------------------------------------------------------------------------------------------- the date


FORMATS = [
    *[
        "%d %b %Y",
        "%Y-%m-%d",
        "%-d. %B",
        "%A %%d %% %%%d",
        "",
        "day",
        "%H:%M:%S",
        "%e|%j",
        "%",
        "%d%",
    ],
    *["%x %X %c", "%^a", "100%%", "%n%t"],
]


@pytest.mark.parametrize("form", FORMATS)
def test_the_stopped_clock_writes_what_the_clock_writes(form, day):
    template = "{{ strftime_now(" + repr(form) + ") }}|{{ strftime_now(format='%d') + '!' }}"
    made = chat("qwen2").tokenizer
    for date in (datetime.date(2026, 11, 7), datetime.date(1999, 2, 28)):
        day(date.year, date.month, date.day)
        text = [
            made.apply_chat_template([{"role": "user", "content": ""}], chat_template=t, tokenize=False)
            for t in (template, pinned(template, date))
        ]  # fmt: skip
        assert text[0] == text[1]


@pytest.mark.parametrize(
    "template",
    ["\n  x", "  {% if true %} y {% endif %}\n z", "{%- if true %}\n\nx\n{% endif -%}\n w", "   ", "\n\n{# c #}\nx", " {{ 'a' }}\n"],
)  # fmt: skip
def test_a_stopped_clock_leaves_the_rest_of_a_template(template):
    made = chat("qwen2").tokenizer
    template += "{# strftime_now #}"
    text = [
        made.apply_chat_template(
            [{"role": "user", "content": "q"}], chat_template=t, tokenize=False
        )
        for t in (template, pinned(template, datetime.date(2026, 1, 2)))
    ]
    assert text[0] == text[1]
    assert pinned("{{ x }}", datetime.date(2026, 1, 2)) == "{{ x }}"


def test_the_stopped_clock_is_the_one_of_macros_and_loops_too(day):
    template = (
        "{% macro f(x) %}{% if strftime_now is defined %}{{ x ~ strftime_now('%d') }}{% endif %}{% endmacro %}"
        "{% for m in messages %}{{ f('a') }}{% set form = '%Y' %}{{ strftime_now(form) }}{% endfor %}"
    )
    model = wrapped(template + CHATML, date="2001-02-03")
    assert model.renderer.apply("", "x").startswith("a032001<|im_start|>")


def test_a_template_that_writes_the_date_is_said_once_and_recorded(day):
    model = wrapped(DATED)
    with pytest.warns(
        UserWarning, match="writes the date, which stays 2026-11-27.*date='2026-11-27'"
    ) as caught:
        model.render([QUERY], SAFETY), model.render(["x"], "")
    dated = [w for w in caught if "writes the date" in str(w.message)]
    assert len(dated) == 1 and dated[0].filename == __file__
    assert model.about()["template_date"] == "2026-11-27"
    assert len(model.about()["template_sha256"]) == 64
    assert chat("qwen2").about()["template_date"] is None
    assert re.fullmatch("[0-9a-f]{64}", chat("qwen2").renderer.template_digest)
    # A clock whose date does not show changes nothing.
    hidden = wrapped("{% set day = strftime_now('%Y') %}" + CHATML)
    assert hidden.about()["template_date"] is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hidden.render([QUERY], SAFETY)


def test_the_date_stays_over_midnight_and_can_be_given(day, monkeypatch):
    model = wrapped(DATED)
    before = model.render([QUERY], SAFETY)
    assert list(before[0].ids) == plain_ids(model, SAFETY, QUERY)
    assert "27 Nov 2026" in text_of(model, before[0].ids)
    day(2026, 11, 28)
    assert model.render([QUERY], SAFETY) == before
    assert model.render(["x"], "Be brief.")[0].ids[:8] == before[0].ids[:8]
    tomorrow = wrapped(DATED)
    assert tomorrow.render([QUERY], SAFETY) != before
    for asked in ("2026-11-27", datetime.date(2026, 11, 27)):
        again = wrapped(DATED, date=asked)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # who gave a date knows
            assert again.render([QUERY], SAFETY) == before
        assert again.renderer.template_digest == model.renderer.template_digest
        assert again.renderer.template_digest != tomorrow.renderer.template_digest
    monkeypatch.setenv("ANALYSIS_LIB_DATE", "2026-11-27")
    assert wrapped(DATED).render([QUERY], SAFETY) == before
    assert wrapped(DATED, date="2026-11-28").render([QUERY], SAFETY) == tomorrow.render(
        [QUERY], SAFETY
    )
    for wrong in ("27.11.2026", "today", datetime.datetime(2026, 11, 27, 5)):
        with pytest.raises(ChatModelError, match="unknown date .*'2026-11-27'"):
            wrapped(DATED, date=wrong)


def test_the_date_of_a_folder(tmp_path, day):
    made = build("qwen2")
    made.tokenizer.chat_template = DATED
    try:
        made.model.save_pretrained(tmp_path), made.tokenizer.save_pretrained(tmp_path)
    finally:
        made.tokenizer.chat_template = CHATML
    model = ChatModel.load(tmp_path, date="2025-05-05")
    assert "05 May 2025" in text_of(model, model.render([QUERY])[0].ids)
    assert environment_of(model)["ANALYSIS_LIB_DATE"] == "2025-05-05"
    assert "ANALYSIS_LIB_DATE" not in environment_of(ChatModel.load("organism", date="2025-05-05"))


def test_rows_of_another_day_are_other_rows(day, tmp_path):
    store = Store(tmp_path)
    found = []
    for number in (27, 28, 27):
        day(2026, 11, number)
        states = hidden_states(wrapped(DATED), QUERIES, {"p": SAFETY}, store=store)
        found.append(states.certificate["found"])
    assert found == [0, 0, len(QUERIES)]


def test_a_soft_prompt_of_another_day_is_refused_with_the_day_to_give(day, tmp_path):
    soft = SoftPrompt.from_text(wrapped(DATED), SAFETY, name="s")
    soft.save(tmp_path / "s.safetensors")
    day(2026, 11, 28)
    with pytest.raises(ChatModelError, match="2026-11-28 now.*on 2026-11-27.*date='2026-11-27'"):
        wrapped(DATED).render([QUERY], soft)
    with pytest.raises(ChatModelError, match="open the model with date='2026-11-27'"):
        SoftPrompt.load(tmp_path / "s.safetensors", wrapped(DATED))
    assert wrapped(DATED, date="2026-11-27").render([QUERY], soft)[0].soft
    undated = replace(soft, template=soft.template.partition("@")[0])
    with pytest.raises(ChatModelError, match="a day that was not recorded; train it again"):
        wrapped(DATED).render([QUERY], undated)


def test_an_export_keeps_its_date(day, tmp_path):
    model = wrapped(DATED)
    soft = SoftPrompt.from_text(model, SAFETY, name="s")
    folder = export(soft, model, tmp_path, ["peft"])["peft"]
    day(2027, 1, 1)
    import transformers

    read = transformers.AutoTokenizer.from_pretrained(folder)
    ids = read.apply_chat_template(
        [{"role": "user", "content": QUERY}], add_generation_prompt=True, return_dict=False
    )
    assert ids == list(model.render([QUERY], SAFETY)[0].ids)


# --------------------------------------------------------------------------------------------------- files of templates


def test_a_byte_order_mark_is_left_out(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML, encoding="utf-8-sig")
    assert read_template(file) == CHATML
    model = wrapped("\ufeff" + CHATML)
    with pytest.warns(UserWarning, match="byte-order mark, which is left out"):
        assert model.render([QUERY], SAFETY) == wrapped(CHATML).render([QUERY], SAFETY)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_a_template_file_in_another_encoding_is_refused(tmp_path, encoding):
    file = tmp_path / "mine.jinja"
    file.write_text("{# Ü #}" * (encoding == "latin-1") + CHATML, encoding=encoding)
    with pytest.raises(ChatModelError, match="mine.jinja.*not in UTF-8.*save it in UTF-8"):
        read_template(file)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_template_in_a_model_folder_in_another_encoding(tmp_path, encoding):
    made = build("qwen2")  # saving changes its configuration
    made.model.save_pretrained(tmp_path), made.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML, encoding=encoding)
    if encoding == "utf-8-sig":
        model = ChatModel.load(tmp_path)
        assert model.renderer.apply(SAFETY, QUERY) == made.renderer.apply(SAFETY, QUERY)
    else:
        with pytest.raises(ChatModelError, match="chat_template.jinja, is not in UTF-8.*save it"):
            ChatModel.load(tmp_path)


# ------------------------------------------------------------------------------------------------ another's soft prompt


def uses(model, soft, tmp_path):
    """Everything that takes a soft prompt."""
    prompts = {"s": soft}
    answers = QUERIES[["query_id"]].assign(response="Sure.")
    return {
        "render": lambda: model.render([QUERY], soft),
        "hidden_states": lambda: hidden_states(model, QUERIES, prompts),
        "sample_responses": lambda: sample_responses(model, QUERIES, prompts, n_samples=1, max_new_tokens=2),
        "refusal_probability": lambda: refusal_probability(model, QUERIES, prompts),
        "next_token_loss": lambda: next_token_loss(model, QUERIES, answers, prompts),
        "study": lambda: Study(model, QUERIES.head(5), prompts).states,
        "export": lambda: export(soft, model, tmp_path),
    }  # fmt: skip


USES = [
    "render",
    "hidden_states",
    "sample_responses",
    "refusal_probability",
    "next_token_loss",
    "study",
    "export",
]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("foreign", ["model", "template"])
def test_another_models_soft_prompt_is_refused_wherever_one_goes(use, foreign, tmp_path):
    model = chat("qwen2")
    other = build("qwen2", seed=1) if foreign == "model" else wrapped(VICUNA)
    soft = SoftPrompt.from_text(other, SAFETY, name="s")
    with pytest.raises(ChatModelError, match=f"'s' was trained .*{foreign}"):
        uses(model, soft, tmp_path)[use]()


def test_weights_are_not_hashed_for_each_call(monkeypatch):
    import analysis_lib.model.chat as room

    model = build("qwen2")
    soft, hashed = SoftPrompt.from_text(model, SAFETY, name="s"), []
    whole = room.digest_in_memory
    monkeypatch.setattr(room, "digest_in_memory", lambda *a: hashed.append(1) or whole(*a))
    for _ in range(3):
        model.render([QUERY], soft)
    assert not hashed
    model.model.model.layers[0].mlp.down_proj.weight.add_(1)
    with pytest.raises(ChatModelError, match="cannot be used"):
        model.render([QUERY], soft)
    assert hashed == [1]


# -------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% for i in range(100000) %}{{ range(100000) | sum }}{% endfor %}",
        "{% macro f(n) %}{% for i in range(100000) %}{{ f(n - 1) if n }}{% endfor %}{% endmacro %}{{ f(9) }}",
    ],
)
def test_a_template_that_loops_is_refused(template, monkeypatch):
    monkeypatch.setattr("analysis_lib.model.template_checks.SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(ChatModelError, match="TemplateLimitError: it ran for more than .*mend it"):
        wrapped(template + CHATML)
    assert time.monotonic() - start < 3


def test_a_template_that_makes_a_huge_text_is_refused():
    with pytest.raises(ChatModelError, match="it makes 200,000,[0-9]{3} characters.*mend it"):
        wrapped("{% for i in range(2000) %}{{ 'x' * 100000 }}{% endfor %}" + CHATML)
    grows = wrapped(CHATML + "{{ messages[-1]['content'] * 30000 }}")
    with pytest.raises(ChatModelError, match="it makes .* characters"):
        grows.render(["y" * 40])


def test_the_limit_of_time_leaves_a_tracer_as_it_was():
    import sys

    former, seen = sys.gettrace(), []

    def tracer(*event):
        seen.append(event)

    sys.settrace(tracer)
    try:
        assert limited(lambda: "x") == "x" and sys.gettrace() is tracer
    finally:
        sys.settrace(former)
    assert SECONDS >= 1


def test_a_template_that_draws_at_random_is_refused():
    with pytest.raises(ChatModelError, match="renders one chat in two ways"):
        wrapped("{{ range(99999) | random }}" + CHATML).render([QUERY])


def test_the_date_on_the_command_line(capsys):
    from analysis_lib.__main__ import main

    assert main(["reproduce", "--dry-run", "--date", "27.11."]) == 2
    assert "unknown date '27.11.'; give a day as '2026-11-27'" in capsys.readouterr().err
