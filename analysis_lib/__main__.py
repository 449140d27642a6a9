"""The command line: one thin layer over the library.

Exit status: 0 done, 1 a run failed or found damage, 2 wrong arguments or inputs (the message says what to do), 130 interrupted,
141 the reader of the output went away.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .store.upkeep import DAY, parse_bytes, parse_days

EXAMPLES = """examples:
  python -m analysis_lib reproduce
  python -m analysis_lib reproduce --model mistralai/Mistral-7B-Instruct-v0.2 --prompt my_prompt.txt --out my_report
  python -m analysis_lib reproduce --model mistralai/Mistral-7B-Instruct-v0.2 --prompt my_prompt.txt --dry-run
  python -m analysis_lib export my_report/soft_prompts/dro_my_prompt.safetensors --model mistralai/Mistral-7B-Instruct-v0.2 --out served --form vllm
  python -m analysis_lib cache ls
  python -m analysis_lib cache prune --older-than 30d --dry-run
  python -m analysis_lib organism card
"""


def _reproduce(args: argparse.Namespace) -> int:
    from .data.prompts import load_safety_prompts
    from .data.queries import load_anchor_queries, load_heldout_queries

    if args.store is not None:
        os.environ["ANALYSIS_LIB_STORE"] = str(args.store.absolute())
    if args.prompt is not None:
        load_safety_prompts(args.prompt)
    load_heldout_queries(args.heldout, load_anchor_queries(args.queries or "anchor"))
    model = _model(args)
    if args.guard is not None:
        from .judge.models import chat_judge
        from .model.chat import ChatModel

        chat_judge(
            ChatModel.load(args.guard, device=args.device, dtype=args.dtype)
        )  # loads no weights
    from .report.reproduce import plan, reproduce

    asked = {
        "prompt": args.prompt,
        "queries": args.queries,
        "heldout": args.heldout,
        "guard": args.guard,
    }
    if args.dry_run:
        table = plan(model, args.out, **asked)
        print(table.round({"seconds": 1, "GB": 2}).to_string(index=False))
        print(
            f"About {table['seconds'].sum() / 60:.1f} minutes for these, trainings that are in the store included"
        )
        print(
            "Not counted: wrapped queries, trials of a weight and probabilities (09), consoles (05, 07), the notebooks' own work"
            + ", the guard's verdicts (06)" * bool(args.guard)
        )
        return 0
    jobs = args.jobs or (2 if model.name == "organism" else 1)  # each notebook loads the model
    return (
        0
        if reproduce(model, args.out, **asked, template=args.template, forms=args.form, jobs=jobs)
        else 1
    )


def _model(args: argparse.Namespace) -> Any:
    from .model.chat import ChatModel

    name = f"{args.model}@{args.revision}" if args.revision else args.model
    return ChatModel.load(name, device=args.device, dtype=args.dtype, template=args.template)


def _export(args: argparse.Namespace) -> int:
    from .model.soft_prompt import SoftPrompt
    from .train.export import export

    model = _model(args)
    soft = SoftPrompt.load(args.soft_prompt, model)
    if args.form and "plain" in args.form:
        print(f"plain: {model.weight_bytes / 1e9:.2f} GB of weights")
    written = export(soft, model, args.out, args.form)
    for form, folder in written.items():
        print(f"{form:<6} {folder / 'README.md'}")
    if args.form is None and "plain" not in written:
        print(
            f"plain left out: it copies {model.weight_bytes / 1e9:.2f} GB of weights; --form plain writes it"
        )
    return 0


def _cache(args: argparse.Namespace) -> int:
    from .store import upkeep
    from .store.batches import StoreError
    from .store.store import Store

    store = Store(args.store)
    if args.store is not None and not store.folder.exists():
        raise StoreError(
            f"there is no store at {args.store}; check the path, or leave --store out for the default"
        )
    if args.action == "info":
        lines = [f"{key:<17} {value}" for key, value in upkeep.info(store).items()]
        print(_printable("\n".join(lines)))
        return 0
    if args.action == "prune":
        limits = {name: getattr(args, name) for name in ("older_than", "model", "max_bytes")}
        table = upkeep.prune(store, spare=0.0 if args.now else DAY, dry_run=args.dry_run, **limits)
    elif args.action == "compact":
        table = upkeep.compact(store, spare=0.0 if args.now else DAY)
    else:
        table = {"ls": upkeep.ls, "verify": upkeep.verify}[args.action](store)
    text = (
        table.to_string(index=False)
        if len(table)
        else f"{args.action}: nothing to report in {store.folder}"
    )
    print(_printable(text))
    if "younger than a day" in text or ("spared" in table and table["spared"].any()):
        print(
            "files younger than a day stay; --now takes them too, when nothing else uses the store"
        )
    return int(args.action == "verify" and bool((table["status"] != "ok").any()))


def _printable(text: str) -> str:
    """Names in a store may come from anybody: what would steer the terminal is written out."""
    control = r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
    return re.sub(control, lambda found: f"\\u{ord(found[0]):04x}", text)


def _organism(args: argparse.Namespace) -> int:
    from .organism import FOLDER

    if args.action == "train":
        from .organism.train import train

        out = args.out or FOLDER
        print("\n".join(f"{key:<12} {value}" for key, value in train(out, seed=args.seed).items()))
        print(f"written to {out}; measure it with `python -m analysis_lib organism card`")
        return 0
    import pandas as pd

    from .organism.card import write

    card = write()
    with pd.option_context("display.max_colwidth", 90, "display.width", 160):
        print(card.claims.round(3).to_string(index=False))
        print(card.rates.round(3).to_string(index=False))
        print(card.dro.round(3).to_string(index=False))
    print(f"written to {FOLDER / 'CARD.md'}")
    return 0


def _download(args: argparse.Namespace) -> int:
    from .data.download import download

    for name, path in download(args.out).items():
        print(f"{name:<18} {path}")
    return 0


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` for argparse, which shows a ValueError's own words only so."""

    def checked(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return checked


def _name(text: str) -> str:
    if not text:
        raise ValueError("the model's name is empty; `cache ls` shows the names")
    return text


def _place(text: str) -> Path:
    if not text:
        raise ValueError("the store's folder has no name; leave --store out for the default")
    return Path(text)


def _jobs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is no number of notebooks; write 1 or more")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis_lib",
        description="Representation analysis of safety prompts for chat language models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def model_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--model",
            default="organism",
            help="a hub id or a model folder; default: the embedded organism",
        )
        sub.add_argument(
            "--revision",
            help="a branch, tag or commit of the hub id; --model ID@REVISION says the same",
        )
        sub.add_argument(
            "--dtype",
            help="float32, bfloat16, float16, float64; default: float32 on a CPU (the organism: float64), else bfloat16",
        )
        sub.add_argument(
            "--device",
            help="cpu, cuda, cuda:1, auto for all GPUs; default: cuda where there is one",
        )
        sub.add_argument(
            "--template",
            metavar="FILE",
            help="a chat template in place of the tokenizer's own: a .jinja file or a name",
        )
        sub.add_argument(
            "--form",
            "--to",
            action="append",
            type=lambda form: {"safetensors": "plain"}.get(form, form),
            choices=["peft", "vllm", "plain"],
            help="may be repeated; default: peft, vllm, and plain where it copies less than 1 GB of weights",
        )

    sub = command(
        "reproduce",
        _reproduce,
        "run every notebook and write executed copies, tables and one HTML report",
    )
    model_options(sub)
    sub.add_argument("--prompt", type=Path, help="a text file with your own safety prompt")
    sub.add_argument("--queries", help="a .csv or .jsonl file with your own labelled queries")
    sub.add_argument(
        "--heldout",
        action="append",
        metavar="SET",
        help="a query set, or a file, to compare prompts on; may be repeated",
    )
    sub.add_argument(
        "--guard",
        metavar="MODEL",
        help="a chat model that judges replies to harmful queries as well, as Llama Guard",
    )
    sub.add_argument(
        "--store",
        type=_argument(_place),
        help="default: ANALYSIS_LIB_STORE, else the user's cache folder",
    )
    sub.add_argument("--out", type=Path, default=Path("reports"), help="default: reports")
    sub.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be done and what it costs, run nothing",
    )
    sub.add_argument(
        "--jobs",
        type=_argument(_jobs),
        help="notebooks run at a time (default 2 on the organism, 1 on any other model)",
    )

    sub = command(
        "export",
        _export,
        "write a soft prompt as a PEFT adapter, vLLM prompt embeddings or a plain model folder",
    )
    sub.add_argument(
        "soft_prompt",
        type=Path,
        metavar="SOFT_PROMPT",
        help="a .safetensors file of SoftPrompt.save, or of the study",
    )
    model_options(sub)
    sub.add_argument(
        "--out", type=Path, required=True, help="the folder that gets one folder a form"
    )

    cache = command(
        "cache", _cache, "look at, check and clean the store of hidden states and responses"
    )
    actions = cache.add_subparsers(dest="action", required=True)
    for action, text in {
        "ls": "what is kept, by kind, model and dtype",
        "info": "folder, format, counts, parity certificates",
        "verify": "read every byte; exit status 1 where a file is damaged",
        "prune": "remove the files that meet every condition given, and what killed processes left; "
        "files younger than a day stay",
        "compact": "merge small files and drop damaged rows; files younger than a day stay",
    }.items():
        sub = actions.add_parser(action, help=text, description=text)
        sub.add_argument(
            "--store",
            type=_argument(_place),
            help="default: ANALYSIS_LIB_STORE, else the user's cache folder",
        )
        if action == "prune":
            sub.add_argument(
                "--older-than",
                type=_argument(parse_days),
                metavar="AGE",
                help="files older than this: 12h, 30d, 4w",
            )
            sub.add_argument(
                "--model",
                type=_argument(_name),
                help="files of this model (name, or beginning of its fingerprint)",
            )
            sub.add_argument(
                "--max-bytes",
                type=_argument(parse_bytes),
                metavar="SIZE",
                help="oldest files until the rest fits: 500MB, 2GB",
            )
            sub.add_argument(
                "--dry-run", action="store_true", help="say what would go, remove nothing"
            )
        if action in ("prune", "compact"):
            sub.add_argument(
                "--now",
                action="store_true",
                help="also files younger than a day; only when nothing else uses the store",
            )

    organism = command(
        "organism", _organism, "train the embedded model, or measure it and write its card"
    )
    actions = organism.add_subparsers(dest="action", required=True)
    sub = actions.add_parser("train", help="train it from its generated corpus, in minutes")
    sub.add_argument("--out", type=Path, help="the model folder; default: the embedded model's own")
    sub.add_argument("--seed", type=int, default=2024)
    actions.add_parser("card", help="measure it and write its CARD.md")

    sub = command("download", _download, "fetch the official query sets, pinned by SHA-256")
    sub.add_argument(
        "--out", type=Path, help="default: ANALYSIS_LIB_DATA, else the user's cache folder"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if (args.command, getattr(args, "action", "")) == ("cache", "prune"):
        if args.older_than is None and args.model is None and args.max_bytes is None:
            parser.error("say what to prune: --older-than 30d, --max-bytes 2GB or --model NAME")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda text, kind, *where: print(
                _printable(f"{kind.__name__}: {text}"), file=sys.stderr
            )
            status = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(
            "interrupted; what was computed is kept in the store, and the same command goes on from there",
            file=sys.stderr,
        )
        return 130
    except (
        BrokenPipeError
    ):  # `| head` has read enough; what is still buffered must not raise again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"{where}{error.strerror or error}; check the path, its permissions and the space left",
            file=sys.stderr,
        )
        return 2
    except Exception as error:
        if not type(error).__module__.startswith(
            "analysis_lib"
        ):  # no error of ours is a fault: show where it lies
            raise
        print(_printable(f"{type(error).__name__}: {error}"), file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
