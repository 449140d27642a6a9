"""The command line: one thin layer over the library.

Exit status: 0 done, 1 a run failed or found damage, 2 wrong arguments or inputs (the message says
what to do), 130 interrupted, 141 the reader of the output went away, 143 ended by SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from .store.upkeep import SPARE, parse_bytes, parse_days
from .terminal import Printable, Terminated, tell, terminated

EXAMPLES = """examples:
  python -m analysis_lib reproduce
  python -m analysis_lib reproduce --model Mistral-7B-Instruct-v0.2 --prompt mine.txt --out mine
  python -m analysis_lib reproduce --model Mistral-7B-Instruct-v0.2 --prompt mine.txt --dry-run
  python -m analysis_lib export my.safetensors --model Mistral-7B-Instruct-v0.2 --out o --form vllm
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

        # Loads no weights.
        chat_judge(ChatModel.load(args.guard, device=args.device, dtype=args.dtype))
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
            f"About {table['seconds'].sum() / 60:.1f} minutes for these, "
            "trainings that are in the store included"
        )
        print(
            "Not counted: wrapped queries, trials of a weight and probabilities (09), consoles "
            "(05, 07), the notebooks' own work" + ", the guard's verdicts (06)" * bool(args.guard)
        )
        return 0
    if args.thinking is not None:  # the notebooks get the switched template as a file
        args.template = args.out / "chat_template.jinja"
        args.out.mkdir(parents=True, exist_ok=True)
        args.template.write_text(model.tokenizer.chat_template, encoding="utf-8")
    jobs = args.jobs or (2 if model.name == "organism" else 1)  # each notebook loads the model
    return (
        0
        if reproduce(model, args.out, **asked, template=args.template, forms=args.form, jobs=jobs)
        else 1
    )


def _model(args: argparse.Namespace) -> Any:
    from .model.chat import ChatModel

    name = f"{args.model}@{args.revision}" if args.revision else args.model
    asked = {"device": args.device, "dtype": args.dtype, "template": args.template}
    thinking = None if args.thinking is None else args.thinking == "on"
    return ChatModel.load(name, **asked, date=args.date, thinking=thinking)


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
            f"plain left out: it copies {model.weight_bytes / 1e9:.2f} GB of weights; "
            "--form plain writes it"
        )
    return 0


def _cache(args: argparse.Namespace) -> int:
    from .store import upkeep
    from .store.batches import StoreError
    from .store.store import Store

    store = Store(args.store)
    if args.store is not None and not store.folder.exists():
        raise StoreError(
            f"there is no store at {args.store}; "
            "check the path, or leave --store out for the default"
        )
    if args.action == "info":
        lines = [f"{key:<17} {value}" for key, value in upkeep.info(store).items()]
        print("\n".join(lines))
        return 0
    if args.action == "prune":
        limits = {name: getattr(args, name) for name in ("older_than", "model", "max_bytes")}
        table = upkeep.prune(
            store, spare=0.0 if args.now else SPARE, dry_run=args.dry_run, **limits
        )
    elif args.action == "compact":
        table = upkeep.compact(store, spare=0.0 if args.now else SPARE)
    else:
        table = {"ls": upkeep.ls, "verify": upkeep.verify}[args.action](store)
        if args.action == "verify" and args.weights:
            rows = [*table.to_dict("records"), *_weights_anew(args.weights)]
            table = type(table)(rows, columns=table.columns)
    text = (
        table.to_string(index=False)
        if len(table)
        else f"{args.action}: nothing to report in {store.folder}"
    )
    print(text)
    if "younger than a day" in text or ("spared" in table and table["spared"].any()):
        print(
            "files younger than a day stay; --now takes them too, when nothing else uses the store"
        )
    return int(args.action == "verify" and bool((table["status"] != "ok").any()))


def _weights_anew(model: str) -> list[dict[str, Any]]:
    """Rows as those of `verify`, one for each file of a model folder."""
    from .model.errors import ChatModelError
    from .model.fingerprint import hash_anew
    from .model.loading import find_source

    source = find_source(model, None, None)
    if not source.is_folder:
        raise ChatModelError(f"{model!r} is a model of the hub, known by its commit; give a folder")
    about = {"kind": "weights", "model": model, "rows": 0, "bad_rows": 0, "bad_keys": []}
    found = hash_anew(Path(source.place))
    return [{**about, "file": file, "status": status} for file, status in found.items()]


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


STORE_HELP = "default: ANALYSIS_LIB_STORE, else the user's cache folder"


def _parser() -> argparse.ArgumentParser:
    as_script = Path(sys.argv[0]).stem == "analysis-lib"
    parser = argparse.ArgumentParser(
        prog="analysis-lib" if as_script else "python -m analysis_lib",
        description="Representation analysis of safety prompts for chat language models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (run, text, options) in {
        "reproduce": (_reproduce, "run every notebook; write tables and one report", _of_reproduce),
        "export": (_export, "write a soft prompt for PEFT, vLLM or transformers", _of_export),
        "cache": (_cache, "look at, check and clean the store", _of_cache),
        "organism": (_organism, "train the embedded model, or measure it", _of_organism),
        "download": (_download, "fetch the study's query sets, pinned by SHA-256", _of_download),
    }.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        options(command)
    return parser


def _of_model(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--model", default="organism", help="a hub id or a model folder; default: organism")
    add("--revision", help="a branch, tag or commit of the hub id, as in --model ID@REVISION")
    dtypes = "float32, bfloat16, float16 or float64"
    add("--dtype", help=f"{dtypes}; default: float32 on a CPU (organism: float64), else bfloat16")
    add(
        "--device", help="cpu, cuda, cuda:1, or auto for all GPUs; default: cuda where there is one"
    )
    add("--template", metavar="FILE", help="a chat template in place of the tokenizer's")
    add("--date", help="the day (2026-11-27) for a chat template that writes it; default: today")
    thinking = "turn a reasoning model's thoughts on or off; default: as its template has it"
    add("--thinking", choices=["on", "off"], help=thinking)
    add(
        "--form",
        "--to",
        action="append",
        type=lambda form: {"safetensors": "plain"}.get(form, form),
        choices=["peft", "vllm", "plain"],
        help="may be repeated; default: peft, vllm, and plain where it copies less than 1 GB",
    )


def _of_reproduce(command: argparse.ArgumentParser) -> None:
    _of_model(command)
    add = command.add_argument
    add("--prompt", type=Path, help="a text file with your own safety prompt")
    add("--queries", help="a .csv or .jsonl file with your own labelled queries")
    heldout = "a query set or a file to compare prompts on; may be repeated"
    add("--heldout", action="append", metavar="SET", help=heldout)
    guard = "a chat model that also judges replies to harmful queries, such as Llama Guard"
    add("--guard", metavar="MODEL", help=guard)
    add("--store", type=_argument(_place), help=STORE_HELP)
    add("--out", type=Path, default=Path("reports"), help="default: reports")
    add("--dry-run", action="store_true", help="say what it would cost; run nothing")
    jobs = "notebooks run at a time; default: 2 on the organism, 1 on other models"
    add("--jobs", type=_argument(_jobs), help=jobs)


def _of_export(command: argparse.ArgumentParser) -> None:
    soft = "a .safetensors file of SoftPrompt.save, or of the study"
    command.add_argument("soft_prompt", type=Path, metavar="SOFT_PROMPT", help=soft)
    _of_model(command)
    out = "the folder that gets one folder for each form"
    command.add_argument("--out", type=Path, required=True, help=out)


def _of_cache(command: argparse.ArgumentParser) -> None:
    actions = command.add_subparsers(dest="action", required=True)
    young = "files younger than a day stay"
    actions_of = {
        "ls": "what is kept, by kind, model and dtype",
        "info": "folder, format, counts, parity certificates",
        "verify": "read every byte; exit status 1 where a file is damaged",
        "prune": "remove the files that meet every condition, "
        f"and what killed processes left; {young}",
        "compact": f"merge small files and drop damaged rows; {young}",
    }
    made = {name: actions.add_parser(name, help=t, description=t) for name, t in actions_of.items()}
    for action in made.values():
        action.add_argument("--store", type=_argument(_place), help=STORE_HELP)
    anew = "a model folder whose weights are hashed anew, whatever size and time say"
    made["verify"].add_argument("--weights", metavar="FOLDER", help=anew)
    add = made["prune"].add_argument
    age = "files older than this: 12h, 30d, 4w"
    add("--older-than", type=_argument(parse_days), metavar="AGE", help=age)
    add("--model", type=_argument(_name), help="files of this model: its name or fingerprint")
    size = "the oldest files, until the rest fits: 500MB, 2GB"
    add("--max-bytes", type=_argument(parse_bytes), metavar="SIZE", help=size)
    add("--dry-run", action="store_true", help="say what would go; remove nothing")
    now = "also files younger than a day; only when nothing else uses the store"
    for name in ("prune", "compact"):
        made[name].add_argument("--now", action="store_true", help=now)


def _of_organism(command: argparse.ArgumentParser) -> None:
    actions = command.add_subparsers(dest="action", required=True)
    train = actions.add_parser("train", help="train it from its generated corpus, in minutes")
    train.add_argument("--out", type=Path, help="the model folder; default: the organism's own")
    train.add_argument("--seed", type=int, default=2024, help="of corpus and training")
    actions.add_parser("card", help="measure it and write its CARD.md")


def _of_download(command: argparse.ArgumentParser) -> None:
    out = "default: ANALYSIS_LIB_DATA, else the user's cache folder"
    command.add_argument("--out", type=Path, help=out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if (args.command, getattr(args, "action", "")) == ("cache", "prune"):
        if args.older_than is None and args.model is None and args.max_bytes is None:
            parser.error("say what to prune: --older-than 30d, --max-bytes 2GB or --model NAME")
    try:
        with warnings.catch_warnings(), redirect_stdout(Printable(sys.stdout)), terminated():
            warnings.showwarning = lambda text, kind, *where: tell(f"{kind.__name__}: {text}")
            status = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        tell(f"interrupted; {GOES_ON}")
        return 130
    except Terminated:
        tell(f"ended by SIGTERM; {GOES_ON}")
        return 143
    except BrokenPipeError:  # `| head` has read enough; what is buffered must not raise at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        tell(
            f"{where}{error.strerror or error}; check the path, its permissions and the space left"
        )
        return 2
    except Exception as error:
        if not type(error).__module__.startswith("analysis_lib"):  # a fault: show where it lies
            raise
        tell(f"{type(error).__name__}: {error}")
        return 2


GOES_ON = "the store keeps what was done, and the same command goes on from there"


if __name__ == "__main__":
    raise SystemExit(main())
