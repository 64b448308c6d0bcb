"""What all verbs do with the terminal: print to it, and keep libraries from it."""

from __future__ import annotations

import os
from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """Give the console that a verb prints to; of several processes that train together, the first one speaks."""
    from rich.console import Console

    from edgetune.adapt import processes

    return Console(quiet=not processes.is_first())


def quiet() -> None:
    """Keep other libraries' progress bars and remarks out of ours; called before they are imported, when they look."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"torch\.|transformers\.|bitsandbytes\.|peft\.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def spoken(seconds: float) -> str:
    """Say a prediction no more exactly than it is: "20 s", "7 min", "3 h"."""
    if seconds < 55:
        return f"{max(5, 5 * ceil(seconds / 5))} s"
    if seconds < 5400:
        return f"{ceil(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
