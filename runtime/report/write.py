"""The three files of a report: the evidence as JSON, the page, the summary. Each is written whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgetune.artifact import file_digest, write_text
from edgetune.errors import ArtifactError
from edgetune.runtime.engine import first_line
from edgetune.runtime.evidence import SCHEMA_VERSION, Report
from edgetune.runtime.report.html import render_html
from edgetune.runtime.report.markdown import render_markdown
from edgetune.runtime.report.view import build_view


def write_report(report: Report, folder: Path) -> dict[str, Path]:
    """Write report.json, report.html and report.md, and give their paths by "json", "html" and "md"."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"report.{kind}" for kind in ("json", "html", "md")}
    write_text(paths["json"], dump_report(report))
    view = build_view(report)
    write_text(paths["html"], render_html(view, digest=file_digest(paths["json"])))
    write_text(paths["md"], render_markdown(view))
    return paths


def dump_report(report: Report) -> str:
    """Give the evidence as standard JSON. A figure that is not finite is written as "NaN" or "Infinity"."""
    return json.dumps(_finite(report.model_dump()), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def read_report(path: Path) -> Report:
    """Read report.json again. Raises ArtifactError where it is missing, damaged or of another version."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: it is not JSON ({error}); write the report again") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(f"{path} has schema_version {version!r}, this edgetune reads {SCHEMA_VERSION}")
    try:
        return Report.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{path} is damaged at {where}: {first['msg']}; write the report again") from error


@contextmanager
def damaged_at(*paths: Path) -> Iterator[None]:
    """Say of reports that were read, where parts do not fit each other, that one is damaged: ArtifactError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        found = f"{type(error).__name__}: {first_line(error)}"
        where = " or ".join(map(str, paths))
        raise ArtifactError(f"{where} is damaged: its parts do not fit ({found}); write the report again") from error


def json_schema() -> dict[str, Any]:
    """Give the JSON Schema of report.json."""
    return Report.model_json_schema()
