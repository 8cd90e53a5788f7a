"""What a GGUF file holds, read quickly: its metadata, and where its tensors lie.

The reader of the `gguf` package makes several Python objects of each token, which takes seconds for a vocabulary of
150,000. It is the reader here, too, but for the arrays.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFEndian, GGUFReader, GGUFValueType

from medusa.errors import MedusaError


class QuickReader(GGUFReader):
    """Reads a file; `metadata` are its values, without `texts` but for lists of texts. The weights are memory-mapped.

    Raises what a damaged file makes the library, numpy or struct raise.
    """

    def __init__(self, path: Path, *, texts: bool = True) -> None:
        self._texts = texts
        self._arrays: dict[int, list[Any]] = {}
        super().__init__(path)
        self.metadata: dict[str, Any] = {}
        for name, field in self.fields.items():
            array = self._arrays.get(id(field.parts[-1]))
            self.metadata[name] = field.contents() if array is None else array
        self._arrays.clear()

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[np.ndarray], list[int], list[GGUFValueType]]:
        if GGUFValueType(raw_type) != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count, start = int(self._get(orig_offs + 4, np.uint64)[0]), orig_offs + 12
        if kind == GGUFValueType.STRING:
            values, end = self._strings(start, count)
        elif (number := self.gguf_scalar_to_np.get(kind)) is not None:
            numbers = self._get(start, number, count)
            if len(numbers) != count:
                raise ValueError(f"an array of {count} numbers reaches past the end")
            values, end = numbers.tolist(), start + numbers.nbytes
        else:
            raise ValueError(f"an array of the type {kind.name} is not known")
        whole = np.asarray(self.data[orig_offs:end])  # its identity names the values
        self._arrays[id(whole)] = values
        return end - orig_offs, [whole], [], [GGUFValueType.ARRAY, kind]

    def _strings(self, start: int, count: int) -> tuple[list[str], int]:
        data = memoryview(self.data)  # type: ignore[arg-type]  # of which the types do not know
        length = struct.Struct(">Q" if self.endianess == GGUFEndian.BIG else "<Q").unpack_from
        values, place = [], start
        for _ in range(count):
            (size,) = length(data, place)
            place += 8
            if place + size > len(data):
                raise ValueError("a text reaches past the end")
            if self._texts:
                values.append(str(data[place : place + size], "utf-8"))
            place += size
        return values, place


def open_reader(path: Path, *, texts: bool = True) -> QuickReader:
    """The reader of a file. Raises MedusaError: it is damaged or cut short."""
    try:
        return QuickReader(path, texts=texts)
    except Exception as error:  # the reader trusts the file, and fails in as many ways as a file can be damaged
        raise MedusaError(f"{path} is damaged or cut short ({error}): get the file again") from error


# Words at the end of a model's name that tell how a file was made, and not whose weights are in it.
_OF_FILES = re.compile(r"(-(gguf|awq|gptq|i?q\d\w*|f16|bf16|f32|hf))+$")


def name_inside(path: Path) -> str | None:
    """What a file calls its model, in lower case, such as qwen2.5-coder-0.5b-instruct: the last part of its Hub id, as
    a rule. None where it does not say.

    Raises MedusaError: it is damaged or cut short.
    """
    metadata = open_reader(path, texts=False).metadata
    parts = [metadata.get(f"general.{part}") for part in ("basename", "size_label", "finetune")]
    if not all(isinstance(part, str) and part for part in parts[:2]):
        return None
    return _OF_FILES.sub("", "-".join(part for part in parts if isinstance(part, str) and part).lower())
