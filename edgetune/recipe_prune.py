"""What a pruned model keeps."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from edgetune.closed import Closed, Count
from edgetune.recipe_export import Calibration


class Prune(Closed):
    """Fewer blocks (ShortGPT, arXiv:2403.03853) and narrower ones (Minitron, arXiv:2407.14679), in plain shapes."""

    layers: Count | None = Field(None, description="decoder blocks that stay")
    intermediate_size: Count | None = Field(None, description="feed-forward neurons of each block that stay")
    kv_heads: Count | None = Field(None, description="key/value heads of each block that stay, with their query heads")
    hidden_size: Count | None = Field(None, description="channels of the residual stream that stay")
    vocabulary: Count | None = Field(
        None, exclude_if=lambda value: value is None,
        description="tokens that stay: special ones, bytes, and those that training rows and general text use most",
    )  # fmt: skip
    search: Literal["influence", "kl"] = Field(
        "influence", description="which blocks go: those that turn their input least, or one by one what costs least KL"
    )
    search_samples: Count = Field(8, description="kl: calibration samples that it is measured on")
    calibration: Calibration = Calibration()

    @model_validator(mode="after")
    def _something(self) -> Prune:
        if not self.cuts_blocks and self.vocabulary is None:
            raise ValueError(
                "prune removes nothing; give layers, intermediate_size, kv_heads, hidden_size or vocabulary"
            )
        if self.search == "kl" and self.layers is None:
            raise ValueError("search: kl chooses among blocks; give layers, or leave search out")
        for key, why in self.unread.items():
            if key in self.model_fields_set:
                raise ValueError(f"{key} is {why}; remove it")
        return self

    @model_serializer(mode="wrap")
    def _what_is_read(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key not in self.unread}

    @property
    def unread(self) -> dict[str, str]:
        """Keys that nothing reads, and why."""
        samples = {} if self.search == "kl" else {"search_samples": "read with search: kl only"}
        return samples | ({} if self.cuts_blocks else {"calibration": "not read where only vocabulary is cut"})

    @property
    def cuts_blocks(self) -> bool:
        """Whether something goes that is chosen by activations."""
        return any(size is not None for size in (self.layers, self.intermediate_size, self.kv_heads, self.hidden_size))
