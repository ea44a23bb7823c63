"""The types of the C++ extension (csrc/cpu). A call gets addresses: shapes, types and strides are the caller's word."""

from torch import Tensor

# Rows of heads: address, and elements from slot to slot, from head to head and from row to row.
Heads = tuple[int, int, int, int]
# A number for every slot, or (address of int32 [batch], what is added to each).
Count = int | tuple[int, int]

def instruction_sets() -> list[str]: ...
def thread_pool() -> str: ...

class Linear:
    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        norm: str = "none",
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
        eps: float = 0.0,
        activation: str = "none",
        instruction_set: str = "auto",
    ) -> None: ...
    def __call__(
        self, x: int, rows: int, x_stride: int, combine: str, other: int, other_stride: int, out: int, threads: int
    ) -> None: ...

class Attention:
    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        causal: bool,
        scale: float,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        instruction_set: str = "auto",
    ) -> None: ...
    def __call__(
        self,
        dtype: str,
        batch: int,
        rows: int,
        q: Heads,
        k: Heads,
        v: Heads,
        cached: bool,
        past: Count,
        start: Count,
        length: Count,
        out: int,
        threads: int,
    ) -> None: ...
    def append(
        self,
        dtype: str,
        batch: int,
        k: Heads,
        v: Heads,
        keys: Heads,
        values: Heads,
        past: Count,
        length: Count,
        threads: int,
    ) -> None: ...
