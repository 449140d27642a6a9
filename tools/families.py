"""Every decoder family that this transformers builds, tiny and random: `python -m tools.families`.

States, soft prompts, greedy replies and log probabilities of each are compared with plain forward
passes, on rows past every window and switch, in float32 and bfloat16. The table is
`docs/families.md`. Name families to see their rows alone: `python -m tools.families phi3 mpt`.
"""

from __future__ import annotations

import copy
import math
import platform
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from analysis_lib.collect.certificates import ParityError
from analysis_lib.collect.responses import sample_responses
from analysis_lib.collect.states import hidden_states
from analysis_lib.judge.likelihood import next_token_loss
from analysis_lib.model.chat import ChatModel
from analysis_lib.model.errors import ChatModelError
from analysis_lib.model.passes import shares_prefixes
from analysis_lib.model.soft_prompt import SoftPrompt
from analysis_lib.model.steps import steps_from_cache

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
SECONDS = 20  # for one family in one dtype
NEW_TOKENS = 6
WINDOW = 12  # shorter than every row
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)
SAFETY = "Be kind, and be safe."
QUERIES = pd.DataFrame(
    {
        "query_id": ["a", "b", "c", "d"],
        "text": [
            "How do I bake bread?",
            "How do I bake bread without a timer?",
            "Why?",
            "What is the best way to repair a broken chair and to paint a wall? " * 2,
        ],
    }
)
ANSWER = " Take flour."

# What a tiny model has. A family takes what its configuration knows.
SMALL: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers"], 4),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4),
    **dict.fromkeys(
        ["intermediate_size", "ffn_dim", "n_inner", "d_ff", "intermediate_size_mlp"], 48
    ),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 16),
    **dict.fromkeys(["n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "num_key_value_heads"], 2),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"], 1),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "index_topk"], 16),
    **dict.fromkeys(["head_dim", "v_head_dim", "qk_nope_head_dim", "index_head_dim"], 8),
    **dict.fromkeys(["global_head_dim", "swa_head_dim", "mamba_d_state", "state_size"], 8),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "mamba_chunk_size"], 8),
    **dict.fromkeys(["hidden_size_per_layer_input"], 8),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim"], 16),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"], 4),
    **dict.fromkeys(["qk_rope_head_dim", "laurel_rank", "rotary_dim"], 4),
    **dict.fromkeys(["index_n_heads", "linear_num_key_heads", "altup_num_inputs"], 2),
    **dict.fromkeys(["num_kv_shared_layers"], 0),
    **dict.fromkeys(["sliding_window", "sliding_window_size", "window_size"], WINDOW),
    **dict.fromkeys(["attention_window_size", "local_attention"], WINDOW),
    **dict.fromkeys(["attention_chunk_size"], WINDOW),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len"], 512),
    **dict.fromkeys(["initializer_range", "init_std"], 0.3),
    "use_mamba_kernels": False,
    "mamba_n_groups": 1,
    "lru_width": 32,
    "is_decoder": True,
}
_LATENT = {"head_dim": 4, "num_key_value_heads": 4}
_MIXED = ["linear_attention", "full_attention"] * 2
_ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 64}
# What a family needs besides, or otherwise.
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["deepseek_v2", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"], _LATENT),
    **dict.fromkeys(["minicpm3", "axk1", "axk2", "deepseek_v3", "youtu", "longcat_flash"], _LATENT),
    **dict.fromkeys(["dots3_note", "dots3_note_text"], {"num_key_value_heads": 4}),
    **dict.fromkeys(["reformer"], {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 32]}),
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "bailing_hybrid": {"layer_types": _MIXED, **_LATENT},
    "kimi_linear": {"layer_types": _MIXED, **_LATENT},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_expand": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {"layer_types": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2},
    **dict.fromkeys(
        ["qwen4_exp", "qwen4_exp_text"],
        {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
        },
    ),
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "nemotron_h": {"n_groups": 1, "layers_block_type": ["mamba", "attention", "mlp", "mamba"]},
    "xlstm": {"num_heads": 2, "chunk_size": 8},
    "falcon_alibi": {"alibi": True, "new_decoder_architecture": False, "multi_query": False},
    "phi3_longrope": {
        "original_max_position_embeddings": 64,
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            **_ROPE,
        },
    },
    "llama_dynamic": {
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    },
    "llama_yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **_ROPE}},
}
VARIANTS = {
    "falcon_alibi": "falcon",
    "phi3_longrope": "phi3",
    "llama_dynamic": "llama",
    "llama_yarn": "llama",
}
# Encoders and translators that the same class can also run, and parts of models of other kinds.
NO_CHAT = re.compile(
    "bart|bert|bigbird|big_bird|blenderbot|camembert|data2vec|electra|^ernie$|^git$|marian|moshi|moss"
    "|musicgen|mvp|pegasus|prophetnet|reformer|roformer|trocr|whisper|xlm|xmod|xlnet|_assistant|ocr"
)
SHORT_FORM = ("llama", "gemma3_text", "phi3_longrope", "gpt_neo", "mpt", "mamba")


@dataclass
class Row:
    """What was found of one family in one dtype. Differences are relative to the numbers' size."""

    family: str
    way: str = ""
    states: float = math.nan
    rounding: float = math.nan
    soft: float | str = math.nan
    greedy: str = ""
    log_p: float = math.nan
    note: str = ""


def words() -> Any:
    """A tokenizer of bytes, so that lengths follow from texts."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    made.train_from_iterator(
        [], trainers.BpeTrainer(vocab_size=260, special_tokens=special, initial_alphabet=alphabet)
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
    )


def build(family: str, dtype: torch.dtype, tokenizer: Any) -> Any:
    """A random model of four blocks, its weights large enough that attention matters."""
    kind = VARIANTS.get(family, family)
    asked = transformers.CONFIG_MAPPING[kind]()
    config = asked.get_text_config(decoder=True)
    known = set(config.to_dict()) | set(config.attribute_map)
    size = {"vocab_size": 272, "vocab_size_per_layer_input": 272}
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    settings = {k: v for k, v in (SMALL | size | ids).items() if k in known}
    made = type(config)(**{**settings, **OWN.get(family, {})})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some begin at 0, and would hide a fault
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(0, 0.3)
    model.requires_grad_(False)
    return model.to(dtype)


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """TimeoutError after so many seconds."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"took over {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def off(a: Any, b: Any) -> float:
    """Largest difference relative to the root mean square of b."""
    a, b = torch.as_tensor(a).float(), torch.as_tensor(b).float()
    return float((a - b).abs().max() / b.pow(2).mean().sqrt())


@torch.no_grad()
def plain_state(fresh: Any, ids: Sequence[int], soft: Any = None, n: int = 0) -> torch.Tensor:
    """The last token's state of one row, by a model that ran nothing before.

    Ids from n on are rows of `soft`.
    """
    model = copy.deepcopy(fresh)
    body = model.get_decoder() if model.get_decoder() is not model else model.model
    inputs = {"input_ids": torch.tensor([ids])}
    if soft is not None:
        table = model.get_input_embeddings()
        rows = table(inputs["input_ids"].clamp(max=n - 1))
        scale = float(getattr(table, "embed_scale", 1.0))
        at = [i for i, token in enumerate(ids) if token >= n]
        rows[0, at] = torch.as_tensor(soft).to(rows.dtype) * scale
        inputs = {"inputs_embeds": rows}
    return body(**inputs, use_cache=False).last_hidden_state[0, -1].float()


@torch.no_grad()
def plain_logits(fresh: Any, ids: Sequence[int]) -> torch.Tensor:
    return copy.deepcopy(fresh)(torch.tensor([ids]), use_cache=False).logits[0].float()


@torch.no_grad()
def greedy_text(fresh: Any, chat: ChatModel, ids: Sequence[int], use_cache: bool = True) -> str:
    """The reply of `generate`, which for a row past a switch begins its cache anew."""
    given = torch.tensor([ids])
    out = copy.deepcopy(fresh).generate(
        given,
        attention_mask=torch.ones_like(given),
        do_sample=False,
        use_cache=use_cache,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=sorted(chat.generation.stop_ids),
        pad_token_id=chat.tokenizer.pad_token_id,
    )
    return str(chat.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)).strip()


def look_at(family: str, dtype: torch.dtype, tokenizer: Any) -> Row:
    """One row of the table."""
    row = Row(family)
    try:
        with within(SECONDS):
            fresh = build(family, dtype, tokenizer)
            fresh(torch.tensor([[3, 4, 5]]))
    except Exception as error:
        row.note = f"not built here: {brief(error)}"
        return row
    steps: tuple[Callable[[Row, Any, ChatModel], None], ...] = (states, soft, greedy, likelihood)
    try:
        chat = ChatModel.wrap(copy.deepcopy(fresh), tokenizer, name=family)
        with within(SECONDS):
            for step in steps:
                step(row, fresh, chat)
    except (ParityError, ChatModelError) as error:
        row.note = f"refused: {brief(error)}"
    except Exception as error:
        row.note = f"{'skipped' if isinstance(error, TimeoutError) else 'failed'}: {brief(error)}"
    return row


def brief(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error)).replace("|", "/")
    return f"{type(error).__name__}: {text[:110]}"


def states(row: Row, fresh: Any, chat: ChatModel) -> None:
    got = hidden_states(chat, QUERIES, {"none": "", "text": SAFETY}, progress=False)
    rows = [r for p in ("", SAFETY) for r in chat.render(QUERIES["text"].tolist(), p)]
    truth = [plain_state(fresh, r.ids) for r in rows]
    row.states = max(off(a[0], b) for a, b in zip(got.states, truth))
    row.way = str(got.certificate["way"])
    if shares_prefixes(chat.forward) and not steps_from_cache(chat.forward):
        row.way += ", replies plain"
    if chat.forward.dtype != torch.float32:
        wide = copy.deepcopy(fresh).float()
        row.rounding = max(off(b, plain_state(wide, r.ids)) for r, b in zip(rows, truth))


def soft(row: Row, fresh: Any, chat: ChatModel) -> None:
    prompt = SoftPrompt.from_text(chat, SAFETY, name="soft")
    noise = np.random.default_rng(0).normal(0, 0.1, prompt.embeddings.shape).astype(np.float32)
    moved = SoftPrompt("soft", prompt.embeddings + noise, SAFETY, prompt.model)
    try:
        got = hidden_states(chat, QUERIES, {"soft": moved}, progress=False)
    except ChatModelError as error:
        row.soft = "refused"
        row.note = brief(error)
        return
    rows = chat.render(QUERIES["text"].tolist(), moved)
    n = chat.n_embeddings
    truth = [plain_state(fresh, r.ids, moved.embeddings, n) for r in rows]
    row.soft = max(off(a[0], b) for a, b in zip(got.states, truth))


def greedy(row: Row, fresh: Any, chat: ChatModel) -> None:
    got = sample_responses(
        chat,
        QUERIES,
        {"text": SAFETY},
        n_samples=1,
        max_new_tokens=NEW_TOKENS,
        temperature=0,
        progress=False,
    )
    rows = chat.render(QUERIES["text"].tolist(), SAFETY)

    def equal(use_cache: bool) -> int:
        theirs = [greedy_text(fresh, chat, r.ids, use_cache) for r in rows]
        return sum(a == b for a, b in zip(got["response"], theirs))

    as_theirs = equal(True)
    row.greedy = f"{as_theirs} of {len(rows)}"
    if chat.forward.dtype == torch.float32 and as_theirs < len(rows):
        plain = f"{equal(False)} of {len(rows)} replies as of generate without its cache"
        row.note = "; ".join(filter(None, [plain, row.note]))


def likelihood(row: Row, fresh: Any, chat: ChatModel) -> None:
    answers = QUERIES[["query_id"]].assign(response=ANSWER)
    got = next_token_loss(chat, QUERIES, answers, {"text": SAFETY})["loss"].tolist()
    reply = chat.tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    worst = 0.0
    for mine, r in zip(got, chat.render(QUERIES["text"].tolist(), SAFETY)):
        logits = plain_logits(fresh, [*r.ids, *reply[:-1]])[-len(reply) :]
        log_p = torch.log_softmax(logits.double(), dim=-1)[range(len(reply)), reply]
        worst = max(worst, abs(mine + float(log_p.mean())))
    row.log_p = worst


# The page


def number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return "" if math.isnan(value) else f"{value:.1e}"


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown; rounding is left out where no row has it."""
    rounds = any(not math.isnan(row.rounding) for row in rows)
    heads = ["family", "way", "states", *["rounding"] * rounds, "soft", "greedy", "log p", "note"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        cells = [row.family, row.way, number(row.states), *[number(row.rounding)] * rounds]
        cells += [number(row.soft), row.greedy, number(row.log_p), row.note]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


PAGE_HEAD = """# Families

Every decoder family that transformers builds, tiny and random, against plain forward passes. Written
by `python -m tools.families` on {day}: Python {python}, torch {torch}, transformers {transformers},
{n} families in two dtypes, {minutes:.0f} minutes on a CPU.

- way: how states were computed. *tree*: shared beginnings once. *plain*: row by row. *replies plain*:
  states as a tree, replies without a cache.
- states, soft: the largest difference of a last-token state from the plain pass of its row alone,
  relative to its size; rows are longer than every window and lie on both sides of every switch. *soft*:
  the same under a soft prompt. *rounding*: how far the plain pass itself lies from float32. In
  bfloat16 a state may differ by more; the model is then asked in float32, where both ways must agree.
- greedy: replies equal to those of `generate`. Where its cache gives other replies than plain passes
  do, the note counts those of `generate` without a cache. In bfloat16 near-ties may fall either way.
- log p: the largest difference of a reply's mean log probability, in nats.
"""


def page(tables: dict[str, list[Row]], seconds: float) -> str:
    """The whole of docs/families.md."""
    head = PAGE_HEAD.format(
        day=date.today(),
        python=platform.python_version(),
        torch=torch.__version__.partition("+")[0],
        transformers=transformers.__version__,
        n=len(tables["float32"]),
        minutes=seconds / 60,
    )
    parts = [head]
    for dtype, rows in tables.items():
        built = [row for row in rows if not row.note.startswith("not built")]
        parts.append(f"## {dtype}\n\n{table(built)}\n")
    lacking = [row for row in tables["float32"] if row.note.startswith("not built")]
    lines = [f"- {row.family}: {row.note.partition(': ')[2]}" for row in lacking]
    parts.append("## Not built\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def every_family() -> list[str]:
    """Decoder families by name; of a model with images, its language part alone."""
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    chosen = {name for name in known if not NO_CHAT.search(name) and f"{name}_text" not in known}
    return sorted(chosen | set(VARIANTS))


def main(families: Sequence[str]) -> int:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = words()
    named = list(families) or every_family()
    start = time.perf_counter()
    tables = {}
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for family in named:
            found.append(look_at(family, dtype, tokenizer))
            print(str(dtype).removeprefix("torch."), table(found[-1:]).splitlines()[-1], flush=True)
        tables[str(dtype).removeprefix("torch.")] = found
    if not families:
        PAGE.write_text(page(tables, time.perf_counter() - start), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
