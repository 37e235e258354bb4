"""The frame around a snapshot's bytes.

Invariant: what comes out of `unframe` is what went into `frame`, byte for byte; everything else is one error that says what
is wrong with the bytes. No more memory is taken than the bytes at hand can account for.

    magic (8 bytes), schema version (4), is compressed (1), length as written (8), length of the content (8), checksum (16)

followed by the content. Numbers are little-endian; the checksum is BLAKE2b over the rest of the header and the content.
"""

from __future__ import annotations

import hashlib
import struct
import zlib

from trace_envs.snapshots.errors import SnapshotFormatError

MAGIC = b"TRACESNP"
_HEAD = struct.Struct("<IBQQ")
_CHECKSUM = 16
_HEADER = len(MAGIC) + _HEAD.size + _CHECKSUM
# Content that compresses better than this is stored as it is where it is large, so that few bytes cannot claim much memory.
_RATIO, _SMALL = 100, 1 << 24


def frame(content: bytes, version: int) -> bytes:
    """Returns the content in its frame."""
    data = zlib.compress(content, 6)
    compressed = len(data) < len(content) and _may_claim(len(content), len(data))
    if not compressed:
        data = content
    head = _HEAD.pack(version, compressed, len(data), len(content))
    return b"".join((MAGIC, head, _checksum(head, data), data))


def unframe(data: bytes, version: int) -> bytes:
    """Returns the content of a frame.

    Raises:
        SnapshotFormatError: The bytes are something else, were written by another version, are cut short or damaged.
    """
    if not data or data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise SnapshotFormatError(f"these {len(data)} bytes are not a snapshot (they do not begin with {MAGIC!r})")
    if len(data) < _HEADER:
        raise SnapshotFormatError(f"the snapshot is truncated: {len(data)} bytes of at least {_HEADER}")
    head = data[len(MAGIC) : len(MAGIC) + _HEAD.size]
    checksum = data[len(MAGIC) + _HEAD.size : _HEADER]
    found, compressed, length, size = _HEAD.unpack(head)
    if found != version:
        raise SnapshotFormatError(f"the snapshot was written by schema version {found}, this release reads {version}")
    whole = _HEADER + length
    if len(data) < whole:
        raise SnapshotFormatError(f"the snapshot is truncated: {len(data)} bytes of {whole}")
    if len(data) > whole:
        raise SnapshotFormatError(f"the snapshot is damaged: {len(data) - whole} bytes too many after its {whole}")
    body = data[_HEADER:]
    if _checksum(head, body) != checksum:
        raise SnapshotFormatError("the snapshot is damaged: its checksum does not match its content")
    if not compressed:
        return body
    if not _may_claim(size, length):
        raise SnapshotFormatError(f"the snapshot is damaged: {length} bytes cannot hold {size}")
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(body, size + 1)
    except zlib.error as error:
        raise SnapshotFormatError(f"the snapshot is damaged: its content does not unpack ({error})") from None
    if len(content) != size or not unpacker.eof:
        raise SnapshotFormatError(f"the snapshot is damaged: its content is not of the {size} bytes that it claims")
    return content


def _may_claim(size: int, length: int) -> bool:
    return size <= max(_SMALL, _RATIO * length)


def _checksum(head: bytes, data: bytes) -> bytes:
    digest = hashlib.blake2b(MAGIC + head, digest_size=_CHECKSUM)
    digest.update(data)
    return digest.digest()
