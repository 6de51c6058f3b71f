"""Compression by the system's libzstd, level 1, as Python has none before 3.14. Where there is no
libzstd: zlib, level 1, and `NAME` says so.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import zlib
from typing import Any

_LEVEL = 1


def _library() -> Any:
    found = ctypes.util.find_library("zstd")
    if found is None:
        return None
    library = ctypes.CDLL(found)  # its calls let go of the GIL
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    for name, result, arguments in (
        ("ZSTD_compressBound", size, [size]),
        ("ZSTD_compress", size, [pointer, size, pointer, size, ctypes.c_int]),
        ("ZSTD_decompress", size, [pointer, size, pointer, size]),
        ("ZSTD_isError", ctypes.c_uint, [size]),
        ("ZSTD_versionString", ctypes.c_char_p, []),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


_ZSTD = _library()
NAME = f"zstd {_ZSTD.ZSTD_versionString().decode()}" if _ZSTD else f"zlib {zlib.ZLIB_VERSION}"


def compress(data: memoryview) -> bytes | memoryview:
    """Of bytes in a row that can be written to."""
    if _ZSTD is None:
        return zlib.compress(data, _LEVEL)
    most = _ZSTD.ZSTD_compressBound(len(data))
    made = bytearray(most)
    nbytes = _ZSTD.ZSTD_compress(_address(made), most, _address(data), len(data), _LEVEL)
    return memoryview(made)[: _checked(nbytes)]


def decompress(data: bytearray, nbytes: int) -> bytes | bytearray:
    """To so many bytes. ValueError if they are others."""
    if _ZSTD is None:
        return zlib.decompress(data, bufsize=nbytes)
    made = bytearray(nbytes)
    if _checked(_ZSTD.ZSTD_decompress(_address(made), nbytes, _address(data), len(data))) != nbytes:
        raise ValueError("a frame has another size than expected")
    return made


def _address(data: bytearray | memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data))


def _checked(result: int) -> int:
    if _ZSTD.ZSTD_isError(result):
        raise ValueError("libzstd has failed")
    return result
