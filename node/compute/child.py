"""A process that computes the shards of one job in one slot: reads frames, writes frames.

Imports torch. It has a socket to the daemon and nothing else: no files, no privileges.
"""

import os
import socket
import struct
from collections.abc import Callable
from typing import Final

import torch

from meshd.node.compute.confinement import (
    die_with_parent,
    limit_files,
    limit_memory,
    limit_processor_time,
)
from meshd.node.compute.framing import (
    FRAME,
    MAX_TEXT,
    FramingError,
    Kind,
    frame,
    parse_fields,
    parse_frame,
)
from meshd.node.workloads.errors import WorkloadError
from meshd.node.workloads.interpreter import Interpreter, infer_rows, load
from meshd.node.workloads.rows import unpack
from meshd.node.workloads.training.rounds import close_round
from meshd.node.workloads.training.settings import TrainSettings
from meshd.node.workloads.training.shard import run_shard

_ALLOCATION = ("DefaultCPUAllocator", "can't allocate memory", "bad_alloc", "not enough memory")


def run(sock: socket.socket, parent: int, memory_bytes: int, threads: int) -> None:
    """Answer requests until the daemon closes its end. The limits are set here, for good."""
    die_with_parent(parent)
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    limit_files()
    limit_memory(memory_bytes)
    interpreter: Interpreter | None = None
    while (request := _read_frame(sock, memory_bytes)) is not None:
        kind, payload = request
        try:
            if kind is Kind.PROGRAM:
                interpreter = load(payload)
                reply, answer = Kind.DONE, b""
            elif kind in _WORK and interpreter is not None:
                (seconds,) = struct.unpack_from("<I", payload)
                limit_processor_time(seconds)
                reply, answer = Kind.DONE, _WORK[kind](interpreter, payload[4:])
            else:
                raise FramingError(f"a frame of kind {kind.name} has no place here")
        except WorkloadError as error:
            reply, answer = Kind.FAILED, _text(error)
        except MemoryError:
            reply, answer = Kind.MEMORY, b""
        except (RuntimeError, ValueError, IndexError, TypeError, OverflowError) as error:
            # What a kernel refuses that the table of operators let through.
            out_of_memory = any(sign in str(error) for sign in _ALLOCATION)
            reply, answer = (Kind.MEMORY, b"") if out_of_memory else (Kind.FAILED, _text(error))
        del payload, request
        sock.sendall(frame(reply, len(answer)))
        sock.sendall(answer)


def train(interpreter: Interpreter, payload: memoryview) -> bytes:
    """Return digest and contribution of the shard in `payload` (see errands.py)."""
    lines, seed, place, state, inputs = parse_fields(payload)
    round_, shard = struct.unpack("<QQ", place)
    settings = TrainSettings.parse(lines.decode().split("\n"))
    rows = unpack(inputs)
    done = run_shard(interpreter, state, rows, settings, seed=seed, round_=round_, shard=shard)
    return done.end_digest + done.contribution


def close(interpreter: Interpreter, payload: memoryview) -> bytes:
    """Return a flag for each contribution in `payload`, 1 if gated out, and the next state."""
    lines, numbers, state, *contributions = parse_fields(payload)
    round_, *weights = struct.unpack(f"<{len(numbers) // 8}Q", numbers)
    settings = TrainSettings.parse(lines.decode().split("\n"))
    closed = close_round(
        state, contributions, weights, interpreter.program, settings, round_=round_
    )
    return bytes(at in closed.gated for at in range(len(contributions))) + closed.state


def _infer(interpreter: Interpreter, payload: memoryview) -> bytes:
    return infer_rows(interpreter, unpack(payload))


_WORK: Final[dict[Kind, Callable[[Interpreter, memoryview], bytes]]] = {
    Kind.ROWS: _infer,
    Kind.TRAIN: train,
    Kind.CLOSE: close,
}


def _read_frame(sock: socket.socket, most: int) -> tuple[Kind, memoryview] | None:
    head = _read(sock, FRAME.size)
    if head is None:
        return None
    kind, length = parse_frame(bytes(head))
    if length > most:
        raise FramingError(f"a frame of {length} bytes")
    payload = _read(sock, length)
    return None if payload is None else (kind, payload)


def _read(sock: socket.socket, length: int) -> memoryview | None:
    view = memoryview(bytearray(length))
    at = 0
    while at < length:
        received = sock.recv_into(view[at:])
        if not received:
            return None
        at += received
    return view


def _text(error: Exception) -> bytes:
    return str(error).encode("utf-8", "replace")[:MAX_TEXT]


def end(status: int) -> None:
    """Leave without running anything that the server had registered for its own exit."""
    os._exit(status)
