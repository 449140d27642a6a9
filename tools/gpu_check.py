"""What this project computes on a GPU, compared with plain forward passes there, then the bench.

    python -m tools.gpu_check --out bench/results/gpu.json       under 8 minutes on one GPU
    python -m tools.gpu_check --device cpu --shape none          the same comparisons on a CPU

It runs from a checkout and needs the core dependencies alone. Each line is a check of one tiny
random model in one dtype. A failed check does not end the run: the exit status is 1 at its end.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from analysis_lib import (
    AnchorSpace,
    ChatModel,
    DROConfig,
    SoftPrompt,
    fit_direction,
    hidden_states,
    next_token_loss,
    sample_responses,
    train_dro,
)
from bench.gpu import GPU_SIZES, gpu_rows
from bench.table import as_json, head, line, machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from tiny_models import FAMILIES, OWN_ATTENTION, PROMPTS, QUERIES, SAFETY, build

CHECKED = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "mixtral", "gpt_oss", "mamba",
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Check:
    """One comparison: what was measured, its limit, and whether it holds (None: not made)."""

    what: str
    model: str
    dtype: str
    measured: float | None
    limit: float | None
    passed: bool | None
    note: str
    seconds: float


@dataclass(frozen=True)
class Subject:
    """A tiny model on the device, and the same weights in float32, computed plainly."""

    chat: ChatModel
    plain: ChatModel

    @classmethod
    def of(cls, family: str, dtype: str, device: str) -> Subject:
        made = build(family, dtype=getattr(torch, dtype))
        same = copy.deepcopy(made.model).float().to(device)
        wrap = partial(ChatModel.wrap, tokenizer=made.tokenizer, name=made.name)
        return cls(wrap(made.model.to(device)), wrap(same))


Measured = tuple[float, float, str]  # what was measured, its limit, a note
Way = Callable[[Subject], Measured]


@torch.no_grad()
def plain_pass(chat: ChatModel, row: Any, soft: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """One row by itself: states (2, d) after the first block and at the end; the logits (n, v)."""
    table, ids = chat.model.get_input_embeddings(), torch.tensor(row.ids, device=chat.device)
    n = chat.n_embeddings
    inputs = table(ids.clamp(max=n - 1))
    if soft is not None:
        rows = torch.as_tensor(soft, dtype=inputs.dtype, device=chat.device)
        scale = getattr(table, "embed_scale", 1.0)
        inputs = torch.where((ids >= n)[:, None], rows[(ids - n).clamp(min=0)] * scale, inputs)
    first: list[torch.Tensor] = []
    hook = chat.forward.blocks[0].register_forward_hook(
        lambda m, a, out: first.append(out[0] if isinstance(out, tuple) else out)
    )
    try:
        out = chat.model(inputs_embeds=inputs[None], output_hidden_states=True, use_cache=False)
    finally:
        hook.remove()
    states = torch.stack([first[0][0, -1], out.hidden_states[-1][0, -1]])
    return {"states": states.float().cpu().numpy(), "logits": out.logits[0].float().cpu().numpy()}


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, in root mean squares of b."""
    return float(np.abs(a - b).max() / np.sqrt(np.square(b).mean()))


def states_of(subject: Subject, soft: SoftPrompt | None) -> Measured:
    """States under three prompts, or under a soft prompt, against plain float32 passes.

    The limit comes from the plain way: twice its own rounding in this dtype.
    """
    chat, prompts = subject.chat, PROMPTS if soft is None else {"soft": soft}
    got = hidden_states(chat, QUERIES, prompts, layers=(1, -1))
    embeddings = None if soft is None else soft.embeddings
    worst = rounding = 0.0
    for at, (query_id, name) in enumerate(zip(got.rows["query_id"], got.rows["prompt"])):
        text = QUERIES.set_index("query_id").loc[query_id, "text"]
        (row,) = chat.render([text], prompts[name])
        exact = plain_pass(subject.plain, row, embeddings)["states"]
        rounding = max(
            rounding,
            *map(relative, plain_pass(chat, row, embeddings)["states"], exact),
        )
        worst = max(worst, *map(relative, np.asarray(got.states[at], np.float32), exact))
    way = {key: got.certificate[key] for key in ("max_rel", "way") if key in got.certificate}
    return worst, 2 * rounding + 1e-4, f"plain rounding {rounding:.1e}; certificate {way}"


def text_states(subject: Subject) -> Measured:
    return states_of(subject, None)


def soft_states(subject: Subject) -> Measured:
    return states_of(subject, SoftPrompt.from_text(subject.chat, SAFETY, name="soft"))


def greedy_texts(subject: Subject) -> Measured:
    """Greedy replies against a plain loop that runs the whole row for each token.

    A text may differ only where the two best logits of the loop nearly tie: by no more than twice
    the rounding of a plain pass. The measured figure is the smallest gap of a text that differs.
    """
    chat = subject.chat
    options: dict[str, Any] = {"n_samples": 1, "temperature": 0, "max_new_tokens": 12}
    got = sample_responses(chat, QUERIES, {"p": SAFETY}, **options)
    worst, rounding, equal = 0.0, 0.0, 0
    for text, reply in zip(QUERIES["text"], got["response"]):
        (row,) = chat.render([text], SAFETY)
        ids, gap = list(row.ids), np.inf
        while len(ids) - len(row.ids) < options["max_new_tokens"]:
            at = type(row)(tuple(ids), row.slot, row.soft)
            logits = plain_pass(chat, at)["logits"][-1]
            exact = plain_pass(subject.plain, at)["logits"][-1]
            rounding = max(rounding, float(np.abs(exact - logits).max()))
            second, first = np.sort(logits)[-2:]
            gap = min(gap, float(first - second))
            ids.append(int(logits.argmax()))
            if ids[-1] in chat.generation.stop_ids:
                break
        said = chat.tokenizer.decode(ids[len(row.ids) :], skip_special_tokens=True).strip()
        equal += said == reply
        worst = worst if said == reply else max(worst, gap)
    return worst, 2 * rounding, f"{equal} of {len(got)} texts equal the plain loop's"


def losses(subject: Subject) -> Measured:
    """The loss of given answers, in nats a token, against plain float32 passes."""
    chat = subject.chat
    answers = QUERIES[["query_id"]].assign(response="Sure, here is how to bake bread.")
    got = next_token_loss(chat, QUERIES, answers, {"p": SAFETY})["loss"].to_numpy()
    own = chat.tokenizer(answers["response"][0], add_special_tokens=False)["input_ids"]
    plain: dict[str, list[float]] = {"exact": [], "rounded": []}
    for text in QUERIES["text"]:
        (row,) = chat.render([text], SAFETY)
        at = type(row)((*row.ids, *own), row.slot, row.soft)
        for name, model in (("exact", subject.plain), ("rounded", chat)):
            logits = torch.from_numpy(plain_pass(model, at)["logits"][-len(own) - 1 : -1])
            log_p = logits.double().log_softmax(-1)[range(len(own)), own]
            plain[name].append(float(-log_p.mean()))
    exact = np.array(plain["exact"])
    rounding = float(np.abs(np.array(plain["rounded"]) - exact).max())
    return float(np.abs(got - exact).max()), 2 * rounding + 1e-4, f"plain rounding {rounding:.1e}"


def dro_steps(subject: Subject) -> Measured:
    """The losses of four DRO steps against those of the same weights in float32."""
    found = hidden_states(subject.plain, QUERIES, PROMPTS)
    states, rows = found.at(-1)
    space = AnchorSpace.fit(states, 2)
    Z, harmful = space.transform(states), rows["harmful"].astype(float).to_numpy()
    fit = fit_direction(Z, harmful, name="harmfulness", groups=rows["query_id"])
    history = []
    for chat in (subject.chat, subject.plain):
        config = DROConfig(epochs=2, batch_size=3)
        soft = train_dro(chat, QUERIES, SAFETY, space, fit, fit, config, progress=False)
        history.append(soft.history["loss"].to_numpy())
    ours, exact = history
    limit = 1e-3 if subject.chat.dtype_name == "float32" else 0.1
    return float(np.abs(ours - exact).max()), limit, f"{len(ours)} steps, loss {exact[0]:.2f}"


def replies_alone(subject: Subject) -> Measured:
    """The share of sampled replies that differ between a batch and one query at a time.

    In float32 none may. In half precision the figure is only told.
    """
    chat, options = subject.chat, {"n_samples": 4, "max_new_tokens": 12}
    key = ["query_id", "sample"]
    whole = sample_responses(chat, QUERIES, {"p": SAFETY}, **options).set_index(key)["response"]
    changed = 0
    for i in range(len(QUERIES)):
        alone = sample_responses(chat, QUERIES.iloc[[i]], {"p": SAFETY}, **options)
        one = alone.set_index(key)["response"]
        changed += int((one != whole.loc[one.index]).sum())
    limit = 0.0 if chat.dtype_name == "float32" else 1.0
    return changed / len(whole), limit, f"{changed} of {len(whole)} replies"


WAYS: dict[str, Way] = {
    "states": text_states,
    "soft tokens": soft_states,
    "greedy": greedy_texts,
    "loss of answers": losses,
    "DRO": dro_steps,
    "alone": replies_alone,
}


def smaller_packs(device: str) -> Measured | None:
    """Capture on a device whose memory is taken but for a little: packs are halved, states stay."""
    if torch.device(device).type != "cuda":
        return None
    chat = Subject.of("llama", "float32", device).chat
    many = QUERIES.loc[QUERIES.index.repeat(200)].reset_index(drop=True)
    many["query_id"] = [f"q{i}" for i in range(len(many))]
    many["text"] = [f"{text} {i}" for i, text in enumerate(many["text"])]
    before = hidden_states(chat, many, PROMPTS).states
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(max(0, free - (24 << 20)), dtype=torch.uint8, device=device)
    try:
        after = hidden_states(chat, many, PROMPTS).states
    finally:
        del taken
        torch.cuda.empty_cache()
    return relative(after, before), 1e-4, f"packs divided by {chat.forward.pack_divisor}"


def spread(device: str) -> Measured | None:
    """`device="auto"` gives the states of one device."""
    try:
        import accelerate  # noqa: F401
    except ModuleNotFoundError:
        return None
    made = build("llama")
    with tempfile.TemporaryDirectory() as folder:
        made.model.save_pretrained(folder)
        made.tokenizer.save_pretrained(folder)
        chats = [
            ChatModel.load(folder, device=asked, dtype="float32") for asked in ("auto", device)
        ]
        auto, one = (hidden_states(chat, QUERIES, PROMPTS).states for chat in chats)
        return relative(auto, one), 1e-4, f"on {chats[0].device}"


OTHERS: dict[str, tuple[Callable[[str], Measured | None], str]] = {
    "smaller packs": (smaller_packs, "needs a GPU"),
    "device auto": (spread, "needs accelerate"),
}


def checks(families: Sequence[str], dtypes: Sequence[str], device: str) -> Iterator[Check]:
    """Every check, one after the other; what raises is a failed check with its message."""
    for family in families:
        for dtype in dtypes:
            try:
                subject = Subject.of(family, dtype, device)
            except Exception as error:
                yield failed("build", family, dtype, error, 0.0)
                continue
            for what, way in WAYS.items():
                yield made(what, family, dtype, partial(way, subject), "")
    for what, (check, lacks) in OTHERS.items():
        yield made(what, "llama", "float32", partial(check, device), lacks)


def made(
    what: str, model: str, dtype: str, way: Callable[[], Measured | None], lacks: str
) -> Check:
    begin = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = way()
    except Exception as error:
        return failed(what, model, dtype, error, time.perf_counter() - begin)
    seconds = round(time.perf_counter() - begin, 2)
    if found is None:
        return Check(what, model, dtype, None, None, None, f"not made: {lacks}", seconds)
    measured, limit, note = found
    return Check(what, model, dtype, measured, limit, bool(measured <= limit), note, seconds)


def failed(what: str, model: str, dtype: str, error: Exception, seconds: float) -> Check:
    at = traceback.extract_tb(error.__traceback__)[-1]
    note = f"{type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno})"
    return Check(what, model, dtype, None, None, False, note[:400], round(seconds, 2))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = sorted(FAMILIES | OWN_ATTENTION)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--families", nargs="+", choices=known, default=CHECKED, metavar="FAMILY")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, metavar="DTYPE")
    parser.add_argument("--shape", choices=[*GPU_SIZES, "none"], default="7b", help="of the bench")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON too")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where a check failed or a bench row differs from the plain way, else 0."""
    args = parse(arguments)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        print("no GPU at hand: give --device cpu for the comparisons alone")
        return 1
    transformers.logging.set_verbosity_error()
    begin, found = time.perf_counter(), []
    about = machine(args.device)
    print(json.dumps(about), flush=True)
    for check in checks(args.families, args.dtypes, args.device):
        found.append(check)
        told = {None: "-", True: "ok", False: "FAILED"}[check.passed]
        numbers = "" if check.measured is None else f"{check.measured:.1e} <= {check.limit:.1e}"
        cells = (told, check.model, check.dtype, check.what, numbers, check.note)
        print(" | ".join(cells), flush=True)
    rows = []
    if args.shape != "none":
        organism = ChatModel.load("organism", device="cpu", dtype="float32")
        print(head(timed=True), flush=True)
        for row in gpu_rows(organism, args.shape, args.device):
            rows.append(row)
            print(line(row, timed=True), flush=True)
    bad = [check for check in found if check.passed is False]
    differ = [row for row in rows if row.equal is False]
    print(f"{len(found)} checks, {len(bad)} failed; {len(rows)} bench rows, {len(differ)} differ")
    if args.out:
        text = as_json(rows, about, time.perf_counter() - begin)
        whole = json.loads(text) | {"checks": [asdict(check) for check in found]}
        args.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return int(bool(bad or differ))


if __name__ == "__main__":
    sys.exit(main())
