"""Scalars in the file format that TensorBoard reads.

A file is a row of records:  length (8 bytes) | checksum of it (4) | event | checksum of it (4)
An event is a protocol buffer: wall_time = 1 (double), step = 2 (integer), and file_version = 3
(string) or summary = 5, which holds values = 1 of tag = 1 (string), simple_value = 2 (float).
Source: tensorflow/core/util/event.proto and lib/io/record_writer.h, as published.
"""

import struct
import time

POLYNOMIAL = 0x82F63B78  # CRC-32C, bits reversed
VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5  # wire types


class EventFile:
    """Appends scalars to `events.out.tfevents.*` in a folder, one file a run or resumed run."""

    def __init__(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{time.time_ns()}.mamba2"
        self.append(event(0, field(3, BYTES, b"brain.Event:2")))

    def add(self, step, scalars):
        """scalars: numbers by tag."""
        values = b"".join(
            field(1, BYTES, field(1, BYTES, tag.encode()) + field(2, FOUR_BYTES, float(value)))
            for tag, value in scalars.items()
        )
        self.append(event(step, field(5, BYTES, values)))

    def append(self, data):
        length = struct.pack("<Q", len(data))
        with self.path.open("ab") as file:
            file.write(length + checksum(length) + data + checksum(data))


def event(step, content):
    return field(1, EIGHT_BYTES, time.time()) + field(2, VARINT, step) + content


def field(number, kind, value):
    """One field of a protocol buffer."""
    key = varint(number << 3 | kind)
    if kind == VARINT:
        return key + varint(value)
    if kind == BYTES:
        return key + varint(len(value)) + value
    return key + struct.pack("<d" if kind == EIGHT_BYTES else "<f", value)


def varint(value):
    """Seven bits a byte, the lowest first, the top bit set on all but the last."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out + bytes([value]))


def checksum(data):
    """The CRC-32C, rotated and shifted so that the checksum of a checksum is no accident."""
    crc = crc32c(data)
    rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + 0xA282EAD8) & 0xFFFFFFFF)


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (POLYNOMIAL if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
