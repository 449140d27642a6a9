"""Tiny random chat models of many architectures, with tokenizers trained here and chat templates in each family's style."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from functools import cache

import pandas as pd
import torch
import transformers
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, Unigram

from analysis_lib.model.chat import ChatModel

CORPUS = [
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.",
    "How do I bake bread in a small oven? How can I sharpen a pencil? How to boil an egg without a timer?",
    "I am sorry, but I cannot help with that. Sure, here is how to bake bread. As an assistant I answer questions.",
    "What is the best way to repair a broken chair and to paint the kitchen wall on a rainy day?",
    "USER: please ASSISTANT: of course. The quick brown fox jumps over the lazy dog; 0123456789 [x] <y> {z} # | / \\ ' \" ! * - _ = + @ $ % & ^ ~ `",
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set head = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set head = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (head if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA_SILENT = GEMMA.replace(
    "{{ raise_exception('System role not supported') }}", "{% set messages = messages[1:] %}"
)
VICUNA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}{% elif m['role'] == 'user' %}"
    "{{ 'USER: ' + m['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# family -> (configuration class, its settings besides the common ones, tokenizer, chat template)
_GQA = {"num_key_value_heads": 2, "intermediate_size": 48}
_WINDOW = {"sliding_window": 12}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "llama": ("LlamaConfig", _GQA, "sentencepiece", LLAMA2),
    "mistral": ("MistralConfig", _GQA | _WINDOW, "sentencepiece", MISTRAL),
    "qwen2": ("Qwen2Config", _GQA, "bytes", CHATML),
    "qwen3": ("Qwen3Config", _GQA | {"head_dim": 16}, "bytes", CHATML),
    "gemma2": (
        "Gemma2Config",
        _GQA | _WINDOW | {"head_dim": 8, "layer_types": _MIXED, "query_pre_attn_scalar": 8},
        "sentencepiece",
        GEMMA,
    ),
    "gemma3": (
        "Gemma3TextConfig",
        _GQA | _WINDOW | {"head_dim": 8, "layer_types": _MIXED},
        "sentencepiece",
        GEMMA_SILENT,
    ),
    "phi3": ("Phi3Config", _GQA | _WINDOW, "sentencepiece", PHI3),
    "gpt_neox": ("GPTNeoXConfig", {"intermediate_size": 48}, "bytes", VICUNA),
    "mixtral": (
        "MixtralConfig",
        _GQA | {"num_local_experts": 4, "num_experts_per_tok": 2},
        "sentencepiece",
        VICUNA,
    ),
    "llama4": (
        "Llama4TextConfig",
        _GQA
        | {
            "intermediate_size_mlp": 48,
            "head_dim": 8,
            "num_local_experts": 2,
            "attention_chunk_size": 12,
            "no_rope_layers": [1, 0, 1],
        },
        "bytes",
        CHATML,
    ),
    "mamba": ("MambaConfig", {"state_size": 8}, "bytes", CHATML),
    "jamba": (
        "JambaConfig",
        _GQA
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "num_experts": 2,
            "mamba_d_state": 8,
        },
        "bytes",
        CHATML,
    ),
}
OWN_ATTENTION = {  # shares prefixes; its attention is not the interface's, has sinks, or values of another width
    "diffllama": ("DiffLlamaConfig", _GQA, "bytes", CHATML),
    "falcon": (
        "FalconConfig",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "bias": False},
        "bytes",
        CHATML,
    ),
    "gpt_oss": (
        "GptOssConfig",
        _GQA
        | _WINDOW
        | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": _MIXED},
        "bytes",
        CHATML,
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            **{
                "intermediate_size": 48,
                "moe_intermediate_size": 16,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "head_dim": 4,
            },
            **{
                "first_k_dense_replace": 1,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 4,
            },
            **{"v_head_dim": 8, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1},
        },
        "bytes",
        CHATML,
    ),
}
PLAIN = {"mamba", "jamba", "llama4"}  # recurrent, or attention in chunks: computed row by row
WINDOWED = {"mistral", "gemma2", "gemma3", "phi3"}
NO_SYSTEM_ROLE = {"mistral", "gemma2", "gemma3"}

_SPECIAL = {
    CHATML: ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    LLAMA2: ["<unk>", "<s>", "</s>"],
    MISTRAL: ["<unk>", "<s>", "</s>"],
    VICUNA: ["<unk>", "<s>", "</s>"],
    GEMMA: ["<unk>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    GEMMA_SILENT: ["<unk>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    PHI3: ["<unk>", "<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
}
_BOS_EOS = {
    CHATML: ("<|endoftext|>", "<|im_end|>"),
    GEMMA: ("<bos>", "<eos>"),
    GEMMA_SILENT: ("<bos>", "<eos>"),
    PHI3: ("<s>", "<|end|>"),
}


def _pieces() -> list[tuple[str, float]]:
    """Characters and the corpus's most frequent parts of words, with log frequencies; UnigramTrainer's depend on the process."""
    words = [f"▁{word}" for text in CORPUS for word in text.split()]
    counts = Counter(
        word[i:j]
        for word in words
        for i in range(len(word))
        for j in range(i + 2, min(len(word), i + 9) + 1)
    )
    best = sorted(counts, key=lambda part: (-counts[part] * len(part), part))[:80]
    counts |= Counter({c: 1 for c in ["\n", "▁", *map(chr, range(33, 127))]})
    total = counts.total()
    return [
        (part, math.log(counts[part] / total)) for part in counts if len(part) == 1 or part in best
    ]


@cache
def tokenizer(kind: str, template: str):
    """ "bytes": byte-level BPE. "sentencepiece": Unigram with Metaspace, a space put in front, and BOS added on its own."""
    special = _SPECIAL[template]
    bos, eos = _BOS_EOS.get(template, ("<s>", "</s>"))
    if kind == "bytes":
        made = Tokenizer(BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=360, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        made.train_from_iterator(CORPUS, trainer)
    else:
        made = Tokenizer(
            Unigram([(s, 0.0) for s in special] + _pieces(), unk_id=special.index("<unk>"))
        )
        made.add_special_tokens(special)
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        made.decoder = decoders.Metaspace(prepend_scheme="always")
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        unk_token=None if kind == "bytes" else "<unk>",
        chat_template=template,
        additional_special_tokens=[s for s in special if s not in (bos, eos)],
    )


@cache
def _llama_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-pair encoding with "▁" for spaces and bytes for the rest."""
    made = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=["▁"], show_progress=False
    )
    made.train_from_iterator([*CORPUS, "[ [ ["], trainer)
    parts = json.loads(made.to_str())["model"]
    return parts["vocab"], [tuple(pair) for pair in parts["merges"]]


def llama_tokenizer(template: str, kind: str = "LlamaTokenizer", **options):
    """A tokenizer of Llama's kind, in transformers' own class; options such as legacy=True."""
    vocabulary, merges = _llama_vocabulary()
    made = getattr(transformers, kind)(vocab=dict(vocabulary), merges=list(merges), **options)
    made.chat_template = template
    made.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|end_of_turn|>"]}
    )
    return made


def as_in_transformers_4(made) -> Tokenizer:
    """What a fast tokenizer of Llama's kind was in transformers 4, of the same tokens."""
    former = Tokenizer.from_str(made.backend_tokenizer.to_str())
    former.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    former.pre_tokenizer = pre_tokenizers.Sequence([])
    return former


def llama_chat(made) -> ChatModel:
    """A small random Llama with a tokenizer of Llama's kind."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(made), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return ChatModel.wrap(model, made, name="tiny llama")


def build(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes
) -> ChatModel:
    """A new random model; weights large enough that attention and positions matter."""
    config_class, settings, kind, template = (FAMILIES | OWN_ATTENTION)[family]
    chosen = copy.deepcopy(tokenizer(kind, template))  # a test may change it
    common = {
        "vocab_size": -(-len(chosen) // 16) * 16,  # rounded up, as real models do
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": chosen.bos_token_id,
        "eos_token_id": chosen.eos_token_id,
        "pad_token_id": chosen.pad_token_id,
    }
    if family == "mamba":  # it has no attention, and its configuration no such name
        del common["num_attention_heads"]
    config = getattr(transformers, config_class)(**{**common, **settings, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return ChatModel.wrap(model, chosen, name=f"tiny {family}")


@cache
def chat(family: str) -> ChatModel:
    """The shared model of a family: leave it as it is."""
    return build(family)


GUARD = (  # the query and the response are data inside one user turn, as in Llama Guard
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles alternate') }}{% endif %}"
    "{% endfor %}{{ '<|im_start|>user\n' }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{{ '<|im_end|><|im_start|>assistant\n' }}"
)


def build_guard() -> ChatModel:
    """A guard whose next token is "safe" or "unsafe" by the sign of one number of its last state."""
    words = tokenizer("bytes", build("qwen2").tokenizer.chat_template)
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer.__class__.from_str(words.backend_tokenizer.to_str()),
        bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=GUARD,
    )  # fmt: skip
    words.add_tokens(["unsafe\n", "safe\n"])
    made = build("qwen2", vocab_size=-(-len(words) // 16) * 16, tie_word_embeddings=False)
    head = made.model.lm_head.weight
    head.zero_()
    head[words.convert_tokens_to_ids("safe\n"), 3] = 1.0
    head[words.convert_tokens_to_ids("unsafe\n"), 3] = -1.0
    return ChatModel.wrap(made.model, words, name="tiny guard")


QUERIES = pd.DataFrame(
    {
        "query_id": [f"q{i}" for i in range(6)],
        "text": [
            "How do I bake bread in a small oven?",
            "How do I bake bread without a timer?",
            "How can I sharpen a pencil?",
            "What is the best way to repair a broken chair and to paint the kitchen wall on a rainy day?",
            "How do I bake",
            "  How can I sharpen a pencil?\n",
        ],
        "harmful": pd.array([True, False, True, False, True, False], dtype="boolean"),
        "query_set": "tiny",
    }
)
SAFETY = "You are a helpful, respectful and honest assistant."
PROMPTS = {"none": "", "default": SAFETY, "long": CORPUS[0]}


@torch.no_grad()
def plain_states(chat_model: ChatModel, row, layers, embeddings=None) -> torch.Tensor:
    """States (len(layers), d) of one rendered row's last token, by one plain forward pass of the transformers model.

    With soft embeddings, their rows are put into the input embeddings by hand.
    """
    model = chat_model.model
    inputs = embedded(chat_model, row, embeddings)
    raw = {}
    last_block = chat_model.forward.blocks[-1].register_forward_hook(
        lambda m, a, out: raw.update(last=out[0] if isinstance(out, tuple) else out)
    )
    try:
        out = model(inputs_embeds=inputs, output_hidden_states=True, use_cache=False).hidden_states
    finally:
        last_block.remove()
    if (
        len(out) == chat_model.n_layers + 1 and chat_model.config.model_type == "mamba"
    ):  # its tuple begins after block 1
        out = (inputs, *out)
    by_layer = {i: out[i] for i in range(chat_model.n_layers)} | {
        chat_model.n_layers: raw["last"],
        -1: out[-1],
    }
    return torch.stack([by_layer[i][0, -1] for i in layers])


def embedded(chat_model: ChatModel, row, embeddings=None) -> torch.Tensor:
    """Input embeddings (1, length, d) of a rendered row; soft ids take the rows of `embeddings` in the scale of the model's own."""
    table = chat_model.model.get_input_embeddings()
    n = table.weight.shape[0]
    ids = torch.tensor(row.ids)
    out = table(ids.clamp(max=n - 1))
    if embeddings is not None:
        scale = (table(torch.tensor([5]))[0, 0] / table.weight[5, 0]).detach()
        soft = ids >= n
        out = torch.where(
            soft[:, None],
            torch.as_tensor(embeddings, dtype=out.dtype)[(ids - n).clamp(min=0)] * scale,
            out,
        )
    return out[None]


def said(chat_model: ChatModel, text: str, ended: bool) -> list[int]:
    """Token ids of a reply, found in the tokens of a whole chat with it; with its end token where it ended."""
    words, query = chat_model.tokenizer, [{"role": "user", "content": "How?"}]
    turns = [*query, {"role": "assistant", "content": text}]
    head, both = (
        words(part, add_special_tokens=False)["input_ids"]
        for part in (
            words.apply_chat_template(query, tokenize=False, add_generation_prompt=True),
            words.apply_chat_template(turns, tokenize=False),
        )
    )
    assert both[: len(head)] == head
    rest, special = both[len(head) :], set(words.all_special_ids)
    at = next(i for i, token in enumerate(rest) if token in special)
    end, ids = rest[at], rest[:at]
    while ids and (not text or words.decode(ids[:-1]).strip() == text):
        ids.pop()  # white space that the template writes behind the reply
    return ids + [end] * ended


def relative(a, b) -> float:
    """Largest absolute difference, relative to the root mean square of b."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return float((a - b).abs().max() / b.pow(2).mean().sqrt())
