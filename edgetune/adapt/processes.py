"""Several processes train one adapter, as torchrun, accelerate or mpirun start them: the first one writes, all compute.

Each computes its share of a step's rows, so a step reads the same rows however many processes there are. What is no
training the first one does alone, and the others find it in the store.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.artifact import Artifact, Draft, Store, draft
from edgetune.errors import RecipeError, UsageError
from edgetune.recipe import Recipe

if TYPE_CHECKING:
    from transformers import TrainingArguments

# As accelerate reads them: torchrun's, then those of the kinds of MPI, which have no other before `join`.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM":
            "Megatron-LM"}  # fmt: skip


def count() -> int:
    """Processes of this training: what torchrun or MPI says, 1 without them."""
    return _told_by(SIZES, 1)


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return count() == 1 or _told_by(RANKS, 0) == 0


def _told_by(names: Sequence[str], otherwise: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), otherwise)


def refuse(verb: str) -> None:
    """Raise UsageError where a verb that works alone was started several times."""
    if count() > 1:
        raise UsageError(f"{verb} is one process, {count()} were started; let `edgetune adapt` train in {count()} "
                         f"processes, then run `edgetune {verb}` alone: it finds the adapter in the store")  # fmt: skip


def check_launch() -> None:
    """Raise UsageError where a launcher would shard weights, change the dtype, or started fewer than was asked."""
    for name, what in SHARDING.items():
        if os.environ.get(name, "").lower() == "true":
            raise UsageError(f"{what} shards weights, which are not gathered here; leave it out of accelerate's "
                             "configuration (distributed_type: MULTI_GPU), or use torchrun")  # fmt: skip
    if (dtype := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        raise UsageError(f"accelerate's mixed_precision is {dtype}, but training computes in what the recipe's device "
                         "does fast; set it to no (--mixed_precision no)")  # fmt: skip
    # accelerate names a port to meet at for several processes; on a CPU it starts one of them unless MPI does.
    started_alone = not any(name in os.environ for name in SIZES)
    if started_alone and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ:
        raise UsageError("accelerate launch was asked for several processes and started one, as it does on a CPU; "
                         "use --multi_gpu, which starts all of them there, or torchrun --nproc-per-node")  # fmt: skip


def check(recipe: Recipe) -> None:
    """Raise RecipeError where a recipe cannot be trained by so many processes."""
    n, config = count(), recipe.adapt
    if n == 1:
        return
    if recipe.prefer is not None or config is None:
        raise RecipeError(f"prefer trains in one process, {n} were started; start it alone")
    if config.unfreeze_steps is not None:
        raise RecipeError(f"adapt.unfreeze_steps is for one process, {n} were started; leave it out or start one")
    share(config.batch_size, config.micro_batch_size)


def share(batch: int, micro: int | None) -> tuple[int, int]:
    """Give the rows at once of each process, and how often they make a step. Raises RecipeError where it is uneven."""
    n = count()
    if batch % (n * (micro or 1)):
        asked = f" of micro_batch_size={micro}" if micro else ""
        raise RecipeError(f"adapt.batch_size={batch} cannot be shared evenly by {n} processes{asked}; change one")
    at_once = micro or batch // n
    return at_once, batch // (n * at_once)


def join(device: str) -> None:
    """Meet the other processes."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu")


def own_device(device: str) -> str:
    """Give the GPU of this process where the recipe says cuda."""
    return f"cuda:{_told_by(LOCAL_RANKS, 0)}" if count() > 1 and device == "cuda" else device


def hold_to(arguments: TrainingArguments, device: str) -> None:
    """Keep a trainer of one process on its GPU: transformers takes the first one, and spreads a batch over all."""
    import torch

    place = torch.device(device)
    if count() > 1 or place.type != "cuda":
        return
    assert arguments.device.type == "cuda", "it has looked for its devices"
    if place.index is not None:
        torch.cuda.set_device(place)
    arguments.__dict__["_setup_devices"] = torch.device("cuda", torch.cuda.current_device())
    arguments._n_gpu = 1


def wait() -> None:
    """Wait until every process has come here."""
    if count() > 1:
        import torch

        torch.distributed.barrier()


def _told(value: bool) -> bool:
    """Give what the first process says to the others."""
    from accelerate.utils import broadcast_object_list

    said = [value]
    broadcast_object_list(said, from_process=0)
    return bool(said[0])


def once(store: Store, made: str, make: Callable[[Path], Artifact], *, together: bool) -> tuple[Artifact, bool]:
    """`Store.once` for all processes: the first makes what is missing, with `together` all of them do."""
    if count() == 1:
        return store.once(made, make)
    if is_first():

        def begin(out: Path) -> Artifact:
            _told(together)
            return make(out)

        artifact, made_now = store.once(made, begin)
        if not made_now:
            _told(False)
    else:
        made_now = _told(False)
        if made_now:
            make(store.place(made))
    wait()
    return (artifact if is_first() else Artifact.open(store.place(made))), made_now


def drafted(out: Path, **kwargs: Any) -> AbstractContextManager[Draft]:
    """`draft` in the first process; in the others the same folders, in which they write nothing."""
    return draft(out, **kwargs) if is_first() else _followed(out)


@contextmanager
def _followed(out: Path) -> Iterator[Draft]:
    yield Draft(out.parent / f".{out.name}.draft", out.parent / f".{out.name}.work")
