"""Shapes and types of arrays and tensors in annotations: jaxtyping's names, the one place that imports them.

``Float[Tensor, "N 3"]`` is a float tensor of N rows and 3 columns. Where jaxtyping is not installed the same
expression is just ``Tensor``, so that the core runs with torch and numpy alone; shapes cannot be checked at run
time there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import (
        Bool,
        Float,
        Float32,
        Float64,
        Int,
        Int32,
        Int64,
        Integer,
        Real,
        Shaped,
        UInt8,
        UInt16,
        UInt32,
    )
else:
    try:
        from jaxtyping import (
            Bool,
            Float,
            Float32,
            Float64,
            Int,
            Int32,
            Int64,
            Integer,
            Real,
            Shaped,
            UInt8,
            UInt16,
            UInt32,
        )
    except ModuleNotFoundError as error:
        if error.name != "jaxtyping":
            raise  # a damaged installation, not a missing one

        class _Unchecked:
            """`_Unchecked[Tensor, "N 3"]` is `Tensor`."""

            def __class_getitem__(cls, array_and_shape: tuple[Any, str]) -> Any:
                return array_and_shape[0]

        Bool = Float = Float32 = Float64 = Int = Int32 = Int64 = Integer = _Unchecked
        Real = Shaped = UInt8 = UInt16 = UInt32 = _Unchecked

__all__ = [
    "Bool",
    "Float",
    "Float32",
    "Float64",
    "Int",
    "Int32",
    "Int64",
    "Integer",
    "Real",
    "Shaped",
    "UInt8",
    "UInt16",
    "UInt32",
]
