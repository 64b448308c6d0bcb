"""The verb that tells what a recipe, or the shape of a model alone, will take: `plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgetune import terminal
from edgetune.cli import DEFAULT_STORE, StoreFolder, app
from edgetune.errors import UsageError

if TYPE_CHECKING:
    from edgetune.recipe import Recipe


@app.command()
def plan(
    recipe: Annotated[Path | None, typer.Argument(help="recipe file (YAML)", show_default=False)] = None,
    store: StoreFolder = DEFAULT_STORE,
    shape: Annotated[
        Path | None, typer.Option(help="config.json of any model: the memory that its training takes, no recipe needed")
    ] = None,
    memory_gb: Annotated[float | None, typer.Option(min=0.1, help="with --shape: memory that it must fit into")] = None,
    device: Annotated[str | None, typer.Option(help="with --shape: cuda or cpu; cuda if absent")] = None,
    gflops: Annotated[
        float | None, typer.Option(min=0.1, help="with --shape: matrix products of a device that is not here, GFLOP/s")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="with --shape: rows to train on once, for the time")] = None,
) -> None:
    """Check a recipe and show its stages, which are done, and what time and memory each will take. Nothing is made."""
    from edgetune.recipe import load_recipe

    loaded = load_recipe(recipe) if recipe is not None else None
    if shape is not None:
        _plan_shape(shape, loaded, memory_gb, device or "cuda", gflops, rows)
        return
    if loaded is None:
        raise typer.BadParameter("give a recipe, or --shape with the config.json of a model")
    read_elsewhere = {
        "--memory-gb": (memory_gb, f"set adapt.memory_gb in {recipe}"),
        "--device": (device, f"set device in {recipe}"),
        "--gflops": (gflops, "leave it out"),
        "--rows": (rows, f"set data.train_rows in {recipe}"),
    }
    for flag, (given, advice) in read_elsewhere.items():
        if given is not None:
            raise UsageError(f"{flag} is read with --shape only; {advice}")
    _plan_recipe(loaded, store)


def _plan_recipe(recipe: Recipe, store: Path) -> None:
    terminal.quiet()
    from rich.table import Table

    from edgetune import workload
    from edgetune.artifact import Store
    from edgetune.graph import why_not_run
    from edgetune.plan import plan as make_plan
    from edgetune.plan import preflight, rows_said, served

    console, ready = terminal.console(), preflight(recipe, weights=False)
    stages = make_plan(recipe, Store(store), ready)
    table = Table("Stage", "State", box=None, pad_edge=False)
    table.add_column("Time, about", justify="right")
    table.add_column("Memory, about", justify="right")
    for stage in stages:
        state = {True: "done", False: "to do", None: "later"}[stage.done]
        time, memory = "unknown", "unknown"
        if stage.cost is not None:
            time, memory = terminal.spoken(stage.cost.seconds), f"{stage.cost.memory_mib / 1024:.1f} GiB"
        table.add_row(stage.name, state, "" if stage.done else time, memory)
    console.print(workload.rows_line(recipe.data), highlight=False)
    console.print(table)
    for stage in stages:
        if stage.how is not None:
            console.print(f"{stage.name}: {stage.how}", highlight=False)
    for name, candidate in recipe.candidates.items():
        if (why := why_not_run(candidate)) is not None:
            console.print(f"{name}: will be built, not run: {why}")
        if (rules := served(candidate, ready.model_config)) is not None:
            console.print(f"{name}: {rules}", highlight=False)
    left = [stage.cost for stage in stages if not stage.done and stage.cost is not None]
    if left:
        total, peak = terminal.spoken(sum(cost.seconds for cost in left)), max(cost.memory_mib for cost in left)
        console.print(f"{total} left at most on this machine while it is idle, {peak / 1024:.1f} GiB at the peak")
    else:
        console.print("time and memory are not known for this architecture")
    if (said := rows_said(recipe)) is not None:
        console.print(f"accuracy: {said}")


def _plan_shape(
    shape: Path, recipe: Recipe | None, memory_gb: float | None, device: str, gflops: float | None, rows: int | None
) -> None:
    terminal.quiet()
    from rich.table import Table

    from edgetune.shape_plan import read_shape, shape_plan

    table = Table("Method", "How", box=None, pad_edge=False)
    for column in ("Memory, about", "A step, about", "All, about")[: None if rows or recipe else 2]:
        table.add_column(column, justify="right")
    for way in shape_plan(read_shape(shape), recipe, memory_gb, device, gflops, rows):
        memory = f"{way.peak_gb:.1f} GB" if way.peak_gb is not None else "does not fit"
        step = "not known here (--gflops tells)"
        if way.step_s is not None:
            step = f"{way.step_s:.2g} s" if way.step_s < 10 else terminal.spoken(way.step_s)
        times = [step, terminal.spoken(way.all_s) if way.all_s is not None else ""] if way.peak_gb is not None else []
        table.add_row(way.method, way.how, memory, *times[: len(table.columns) - 3])
    terminal.console().print(table, highlight=False)
