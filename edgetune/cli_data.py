"""The verb group `data`: what is in a set of rows, before a model learns it, and rows that a model writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from edgetune.cli import DEFAULT_STORE, MAX_SEED, StoreFolder, app
from edgetune.errors import UsageError
from edgetune.terminal import console, quiet

if TYPE_CHECKING:
    from edgetune.data.check.examine import Input, Template
    from edgetune.data.formats import Format
    from edgetune.recipe_data import Data
    from edgetune.recipe_training import Prefer

MAX_LENGTH = 512
data = typer.Typer(
    help="Look at rows before a model learns them, or let it write some.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data, name="data")


@data.command()
def check(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="training rows: files, `datasets` folders, org/name; those of --recipe if absent"),
    ] = None,
    base: Annotated[str | None, typer.Option(help="model under whose template lengths and masks are measured")] = None,
    recipe: Annotated[Path | None, typer.Option(help="recipe whose base, files and data.check limits are used")] = None,
    heldout: Annotated[Path | None, typer.Option(help="held-out rows, looked for among the training rows")] = None,
    format: Annotated[str | None, typer.Option(help="row format; told by the keys of each row if absent")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="tokens; the recipe's, or 512, if absent")] = None,
    json: Annotated[Path | None, typer.Option(help="write everything that was found here")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page for people here")] = None,
    store: StoreFolder = DEFAULT_STORE,
) -> None:
    """Count lengths, duplicates, leaks, labels, languages, personal data; 3 where something is over its limit.

    Of a recipe, rows of `prefer` are checked after those of `data`, and written beside them as NAME-prefer.
    """
    from edgetune.artifact import write_text
    from edgetune.data.check.examine import examine
    from edgetune.data.check.page import render_page
    from edgetune.data.check.summary import print_summary
    from edgetune.recipe import load_recipe
    from edgetune.recipe_data import DataCheck

    loaded = load_recipe(recipe) if recipe is not None else None
    rows = loaded.data if loaded is not None else None
    form = _format(format)
    inputs = _inputs(files or [], rows, heldout, form)
    name = base if base is not None or loaded is None else loaded.base
    template = _template(name, store) if name is not None else None
    parts = [("", inputs, max_length or (rows.max_length if rows is not None else MAX_LENGTH))]
    if loaded is not None and loaded.prefer is not None and not files:
        held = [one for one in inputs if one.heldout]
        parts.append(("-prefer", [_preferred(loaded.prefer, form), *held], max_length or loaded.prefer.max_length))
    over = False
    for ending, part, tokens in parts:
        found = examine(part, rows.check if rows is not None else DataCheck(), tokens, template)
        over = over or bool(found.over or found.uneven)
        print_summary(found, console())
        for path, text in ((json, found.model_dump_json(indent=1) + "\n"), (html, render_page(found))):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path.with_stem(path.stem + ending), text)
    raise typer.Exit(3 if over else 0)


@data.command()
def write(
    model: Annotated[str, typer.Argument(help="base as in a recipe, or a model artifact's folder")],
    out: Annotated[Path, typer.Option(help="JSONL file to write; it must not exist")],
    tokens: Annotated[int, typer.Option(min=1, help="tokens in all rows together")] = 16_384,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens of a question, and of an answer")] = 256,
    temperature: Annotated[float, typer.Option(min=0.01, help="lower is more of a kind")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="of what is drawn")] = 0,
    device: str = "cpu",
    store: StoreFolder = DEFAULT_STORE,
) -> None:
    """Let a model write questions and answers, or plain text where it has no chat template, to calibrate it with."""
    quiet()
    from edgetune.artifact import Store
    from edgetune.compress import written
    from edgetune.devices import check_device
    from edgetune.progress import reporting
    from edgetune.single import open_model, refuse_existing

    refuse_existing(out)
    check_device(device)
    source = open_model(model, Store(store), console())
    out.parent.mkdir(parents=True, exist_ok=True)
    with reporting(console(), "write") as progress:
        n = written.write(
            source, out, n_tokens=tokens, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
            device=device, progress=progress,
        )  # fmt: skip
    typer.echo(f"{out}: {n} rows")


def _preferred(prefer: Prefer, form: Format) -> Input:
    """Rows of preference training, in the one format that its method reads where neither flag nor recipe names it."""
    from edgetune.data.check.examine import Input

    read: Format = "kto" if prefer.method == "kto" else "auto" if prefer.method == "grpo" else "preference"
    told = next((one for one in (form, prefer.format) if one != "auto"), read)
    return Input(Path(prefer.train), form=told, limit=prefer.train_rows, supervised=prefer.method == "grpo")


def _inputs(files: Sequence[Path], rows: Data | None, heldout: Path | None, form: Format) -> list[Input]:
    """Training rows of the command line or the recipe, then held-out rows likewise."""
    from edgetune.data.check.examine import Input

    told = form if form != "auto" or rows is None else rows.format
    if files:
        found = [Input(path, form=told) for path in files]
    elif rows is not None:
        found = [
            Input(Path(one.path), False, told if one.format == "auto" else one.format, rows.train_rows, supervised=True)
            for one in rows.sources
        ]
    else:
        raise UsageError("data check: name files with training rows, or a --recipe")
    if heldout is not None:
        return [*found, Input(heldout, heldout=True, form=told)]
    if rows is not None and rows.heldout is not None:
        found.append(Input(Path(rows.heldout), True, told, rows.heldout_rows, supervised=True))
    return found


def _format(name: str | None) -> Format:
    from edgetune.data.formats import Format

    known: tuple[Format, ...] = get_args(Format)
    for form in known:
        if form == (name or "auto"):
            return form
    raise UsageError(f"--format {name!r} is not known; use {', '.join(known)}")


def _template(base: str, store: Path) -> Template:
    """Read the tokenizer of a base, which is made into an artifact where the store has none."""
    quiet()
    from transformers import AutoTokenizer

    from edgetune.artifact import Store
    from edgetune.data.check.examine import Template
    from edgetune.data.golden import Golden
    from edgetune.single import open_model

    model = open_model(base, Store(store), console())
    tokenizer = AutoTokenizer.from_pretrained(model.path, local_files_only=True)
    return Template(base, tokenizer, Golden.read(model.path).stop_ids)
