"""Tensors as Python expressions: by their values, or by their shape alone."""

from __future__ import annotations

import base64
import textwrap
import zlib

import torch

from demp_fx.errors import EmitError

# Longest tensor that is written number by number; beyond it the bytes are packed.
READABLE = 4096

UNPACK = '''

def _unpack(data: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor whose bytes `data` holds: zlib inside base85."""
    raw = bytearray(zlib.decompress(base64.b85decode(data)))
    return torch.frombuffer(raw, dtype=dtype).reshape(shape)
'''


def blank(tensor: torch.Tensor) -> str:
    """Zeros of the same shape and dtype, to be filled from the weights file."""
    return f"torch.zeros({tuple(tensor.shape)}, dtype={tensor.dtype})"


def literal(tensor: torch.Tensor, name: str) -> str:
    """The tensor itself, exact to the bit; `name` is for the error message."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise EmitError(f"the constant '{name}' cannot be written as Python ({tensor.layout})")
    values = tensor.detach().cpu().contiguous()
    if not values.numel():
        return blank(values)
    if values.numel() <= READABLE and _prints_exactly(values):
        numbers = str(values.reshape(-1).tolist() if values.ndim else values.item())
        if len(numbers) > 40:
            numbers = "\n" + textwrap.indent(textwrap.fill(numbers, 84), " " * 12)
        shape = f".reshape{tuple(values.shape)}" if values.ndim > 1 else ""
        return f"torch.tensor({numbers}, dtype={values.dtype}){shape}"
    packed = zlib.compress(values.reshape(-1).view(torch.uint8).numpy().tobytes(), 9)
    text = base64.b85encode(packed).decode()
    lines = "\n".join(f'            "{line}"' for line in textwrap.wrap(text, 84))
    return f"_unpack(\n{lines},\n            {values.dtype}, {tuple(values.shape)})"


def _prints_exactly(values: torch.Tensor) -> bool:
    """Whether `tolist` prints as Python that reads back the same: not infinities, not NaN."""
    return not values.is_complex() and bool(torch.isfinite(values).all())
