"""The border to the swarm: what is no canonical, well-signed message is a CodecError, no more."""

import struct
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshd.p2p import codec
from meshd.p2p.codec import ATTACHING, MAX_ATTACHED, MAX_FRAME, CodecError, Domain, decode, encode
from meshd.p2p.identity import Address, Identity
from meshd.p2p.messages import (
    MAX_CONTROL,
    MESSAGES,
    MIB,
    PROTOCOL,
    AuditResult,
    Cut,
    Encoded,
    LogEntries,
    Message,
    Offer,
    Open,
    OpenedRow,
    Progress,
    Receipt,
    Refused,
    Settlement,
    Stop,
    TermVote,
)

ALICE = Identity(b"\x0a" * 32)
DOMAIN = Domain("testnet", 31337, Address(b"\xee" * 20))
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
fixed = settings(
    derandomize=True, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def no_frame_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_VERIFIED", codec._Cache(0, 0))


def solidity_type(model: type[Message], name: str) -> str:
    metadata = model.model_fields[name].metadata
    return next(item.solidity for item in metadata if isinstance(item, Encoded))


def messages_of(model: type[Message]) -> st.SearchStrategy[Message]:
    fields = {name: values_of(solidity_type(model, name), name) for name in model.model_fields}
    return st.builds(model, **fields)


def values_of(solidity: str, name: str) -> st.SearchStrategy[Any]:
    if solidity.endswith("[]"):
        return st.lists(values_of(solidity[:-2], name), max_size=3).map(tuple)
    match solidity:
        case "bytes32":
            return st.binary(min_size=32, max_size=32)
        case "address":
            return st.binary(min_size=20, max_size=20)
        case "bytes" if name in ("signature", "signatures"):
            return st.binary(min_size=65, max_size=65)
        case "bytes":
            return st.binary(max_size=100)
        case "bool":
            return st.booleans()
        case "string":
            return st.text(max_size=20)
        case _ if solidity.startswith("uint"):
            return st.integers(0, 2 ** int(solidity.removeprefix("uint")) - 1)
        case _:
            return messages_of(next(m for m in MESSAGES.values() if m.__name__ == solidity))


any_message = st.sampled_from(list(MESSAGES.values())).flatmap(messages_of)


def refused_or_exact(kind: str, data: bytes) -> None:
    try:
        message = decode(kind, data)
    except CodecError:
        return
    assert encode(message) == data


def offer(**changes: Any) -> Offer:
    fields: dict[str, Any] = {
        "job_id": b"\x01" * 32,
        "payee": b"\x02" * 20,
        "ask": 10**20,
        "slots": 4,
        "numeric_class": b"\x03" * 32,
    }
    return Offer(**{**fields, **changes})


def plain_offer() -> dict[str, Any]:
    plain: dict[str, Any] = msgpack.unpackb(encode(offer()))
    return plain


# ---- canonical --------------------------------------------------------------------------


@fixed
@given(any_message)
def test_what_is_encoded_decodes_to_the_same_value(message: Message) -> None:
    data = encode(message)
    again = decode(message.kind, data)
    assert again == message
    assert type(again) is type(message)
    assert encode(again) == data


@fixed
@given(any_message, st.data())
def test_a_changed_byte_is_refused_or_another_canonical_message(
    message: Message, data: st.DataObject
) -> None:
    raw = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(["change", "drop", "insert", "cut", "repeat"])):
            case "change":
                raw[place] = data.draw(st.integers(0, 255))
            case "drop" if len(raw) > 1:
                del raw[place]
            case "insert":
                raw.insert(place, data.draw(st.integers(0, 255)))
            case "cut" if place:
                del raw[place:]
            case _:
                raw[place:place] = raw[place : place + 40]
    refused_or_exact(message.kind, bytes(raw))


@fixed
@given(st.sampled_from(list(MESSAGES)), st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(kind: str, data: bytes) -> None:
    refused_or_exact(kind, data)
    with pytest.raises(CodecError):
        DOMAIN.open(data)


packable = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=70)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=4)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@fixed
@given(any_message, packable, st.data())
def test_any_value_in_any_field_is_refused_or_canonical(
    message: Message, value: Any, data: st.DataObject
) -> None:
    plain = msgpack.unpackb(encode(message))
    plain[data.draw(st.sampled_from(list(plain)))] = value
    refused_or_exact(message.kind, msgpack.packb(plain))


@fixed
@given(packable)
def test_any_value_in_place_of_a_frame_is_refused(value: Any) -> None:
    for shape in (value, [value] * 7, ["testnet", PROTOCOL, "offer", 0, value, value, value]):
        with pytest.raises(CodecError):
            DOMAIN.open(msgpack.packb(shape))


# ---- one rule a case --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("slots", 4.0),
        ("slots", float("nan")),
        ("slots", float("inf")),
        ("slots", "4"),
        ("slots", True),
        ("slots", None),
        ("slots", -1),
        ("slots", 2**32),
        ("slots", [4]),
        ("slots", {}),
        ("slots", msgpack.ExtType(5, b"")),
        ("slots", msgpack.ExtType(5, b"abcd")),
        ("slots", msgpack.Timestamp(5)),
        ("ask", 5),
        ("ask", 5.0),
        ("ask", ""),
        ("ask", "05"),
        ("ask", "+5"),
        ("ask", "-5"),
        ("ask", "5 "),
        ("ask", "5\n"),
        ("ask", "0x5"),
        ("ask", "1e3"),
        ("ask", "1_000"),
        ("ask", "٣"),
        ("ask", str(2**256)),
        ("ask", "9" * 4000),
        ("payee", "\x02" * 20),
        ("payee", b"\x02" * 19),
        ("payee", b"\x02" * 21),
        ("payee", b""),
        ("jobId", [1] * 32),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(field: str, value: Any) -> None:
    plain = plain_offer()
    assert field in plain
    plain[field] = value
    with pytest.raises(CodecError, match="offer"):
        decode("offer", msgpack.packb(plain))


def test_the_highest_values_pass() -> None:
    message = offer(ask=2**256 - 1, slots=2**32 - 1)
    assert decode("offer", encode(message)) == message


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(CodecError, match="offer: unknown field 'tip'"):
        decode("offer", msgpack.packb({**plain_offer(), "tip": 1}))
    with pytest.raises(CodecError, match="offer: unknown field 'Slots'"):
        decode("offer", msgpack.packb({"Slots": 1, **plain_offer()}))


def test_a_missing_field_is_refused_by_name() -> None:
    plain = plain_offer()
    last = plain.pop("numericClass")
    with pytest.raises(CodecError, match="offer: field 'numericClass' is missing"):
        decode("offer", msgpack.packb(plain))
    plain.pop("slots")
    with pytest.raises(CodecError, match="'numericClass' where 'slots' goes"):
        decode("offer", msgpack.packb({**plain, "numericClass": last}))


def pairs(*items: tuple[Any, Any]) -> bytes:
    packed = b"".join(msgpack.packb(key) + msgpack.packb(value) for key, value in items)
    return bytes([0x80 + len(items)]) + packed


def test_a_repeated_field_is_refused() -> None:
    items = list(plain_offer().items())
    for repeated in (items + items[-1:], items[:1] + items, items[:1] * 2 + items[2:]):
        with pytest.raises(CodecError, match="missing, repeated or out of order"):
            decode("offer", pairs(*repeated))


def test_fields_in_another_order_are_refused() -> None:
    items = list(plain_offer().items())
    with pytest.raises(CodecError, match="out of order"):
        decode("offer", pairs(*items[::-1]))


@pytest.mark.parametrize("key", [1, None, b"jobId", [1], {}, 1.0])
def test_a_key_that_is_no_string_is_refused(key: Any) -> None:
    items = list(plain_offer().items())
    with pytest.raises(CodecError):
        decode("offer", pairs((key, items[0][1]), *items[1:]))


@pytest.mark.parametrize(
    ("value", "longer"),
    [
        (msgpack.packb(4), b"\xcc\x04"),
        (msgpack.packb(4), b"\xcd\x00\x04"),
        (msgpack.packb(4), b"\xd3" + struct.pack(">q", 4)),
        (msgpack.packb("slots"), b"\xd9\x05slots"),
        (msgpack.packb(b"\x02" * 20), b"\xc5\x00\x14" + b"\x02" * 20),
        (b"\x85", b"\xde\x00\x05"),
    ],
)
def test_a_second_encoding_of_the_same_value_is_refused(value: bytes, longer: bytes) -> None:
    data = encode(offer())
    assert data.count(value) >= 1
    with pytest.raises(CodecError, match="not canonical"):
        decode("offer", data.replace(value, longer, 1))


def test_bytes_after_the_end_are_refused() -> None:
    with pytest.raises(CodecError, match="bytes follow its end"):
        decode("offer", encode(offer()) + b"\xc0")


def test_every_cut_is_refused() -> None:
    data = encode(offer())
    for end in range(len(data)):
        with pytest.raises(CodecError):
            decode("offer", data[:end])


def test_text_that_is_not_utf8_is_refused() -> None:
    data = encode(Refused(reason="abcd"))
    for bad in (b"\xff\xfe\xfd\xfc", b"\xed\xa0\x80a", b"\xc0\xafab"):
        with pytest.raises(CodecError):
            decode("refused", data.replace(b"abcd", bad))


def test_a_text_over_its_length_is_refused() -> None:
    assert decode("refused", encode(Refused(reason="é" * 512)))
    with pytest.raises(CodecError, match="reason"):
        decode("refused", msgpack.packb({"reason": "a" * 513}))
    with pytest.raises(CodecError):
        decode("refused", msgpack.packb({"reason": "a" * 5000}))


def test_a_list_over_its_length_is_refused_before_it_is_read() -> None:
    plain = {
        "jobId": bytes(32),
        "term": 1,
        "orchestrator": bytes(20),
        "high": bytes(32),
        "signed": [bytes(32)] * 1024,
    }
    assert decode("term-vote", msgpack.packb(plain))
    plain["signed"] = [bytes(32)] * 1025
    with pytest.raises(CodecError, match="list of 1025 items exceeds the limit of 1024"):
        decode("term-vote", msgpack.packb(plain))
    claimed = msgpack.packb({**plain, "signed": []})[:-1] + b"\xdd\xff\xff\xff\xff"
    with pytest.raises(CodecError, match="list of 4294967295 items"):
        decode("term-vote", claimed)


def test_a_body_over_its_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(CodecError, match=f"{MAX_CONTROL + 1} bytes exceed the limit"):
        decode("offer", bytes(MAX_CONTROL + 1))


@pytest.mark.parametrize("kind", ["", "Offer", "offer\0", "x" * 100])
def test_an_unknown_kind_is_refused(kind: str) -> None:
    with pytest.raises(CodecError, match="unknown message kind"):
        decode(kind, encode(offer()))


def test_a_nested_message_is_checked_like_any_other() -> None:
    row = OpenedRow(index=1, row=b"r", salt=bytes(32), path=(bytes(32),))
    message = Open(
        job_id=bytes(32),
        commitment_hash=bytes(32),
        rows=(row, row),
        salt_seed=bytes(32),
        output=bytes(32),
        digests=(),
    )
    plain = msgpack.unpackb(encode(message))
    assert decode("open", msgpack.packb(plain)) == message
    rows: list[Any] = [
        {**plain["rows"][0], "index": 1.0},
        {**plain["rows"][0], "more": 1},
        {**plain["rows"][0], "path": [bytes(32)] * 33},
        dict(reversed(plain["rows"][0].items())),
        [],
        None,
    ]
    for broken in rows:
        with pytest.raises(CodecError, match="open"):
            decode("open", msgpack.packb({**plain, "rows": [plain["rows"][0], broken]}))


# ---- bombs ------------------------------------------------------------------------------


def nested_lists(size: int) -> bytes:
    return b"\x91" * size


def nested_maps(size: int) -> bytes:
    return b"\x81\xa1a" * (size // 3)


def empty_maps(size: int) -> bytes:
    count = min(size - 5, 2**16 - 1)
    return b"\xdc" + struct.pack(">H", count) + b"\x80" * count


def lists_of_lists(size: int) -> bytes:
    inner = b"\xdc\x0f\xff" + b"\x90" * 4095
    count = size // len(inner)
    return b"\xdc" + struct.pack(">H", count) + inner * count


def huge_promises(size: int) -> bytes:
    return b"\xdd\xff\xff\xff\xff" * (size // 5)


def long_numbers(size: int) -> bytes:
    return b"\xdb" + struct.pack(">I", size - 5) + b"9" * (size - 5)


def extensions(size: int) -> bytes:
    return b"\x91" + b"\xc9" + struct.pack(">I", size - 7) + b"\x05" + bytes(size - 7)


BOMBS = [
    nested_lists,
    nested_maps,
    empty_maps,
    lists_of_lists,
    huge_promises,
    long_numbers,
    extensions,
]


def in_every_field(kind: str, make: Callable[[int], bytes], size: int) -> list[bytes]:
    names = [name for name in msgpack.unpackb(FILLED[kind])]
    plain = msgpack.unpackb(FILLED[kind])
    built = []
    for name in names:
        parts = [
            msgpack.packb(key) + (make(size) if key == name else msgpack.packb(value))
            for key, value in plain.items()
        ]
        built.append(bytes([0x80 + len(parts)]) + b"".join(parts))
    return [make(size), *built]


FILLED = {
    "open": encode(
        Open(
            job_id=bytes(32),
            commitment_hash=bytes(32),
            rows=(),
            salt_seed=bytes(32),
            output=bytes(32),
            digests=(),
        )
    ),
    "log-entries": encode(
        LogEntries(job_id=bytes(32), term=0, seq=1, first=0, entries=(b"entry",))
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_costs_little_memory_and_time(bomb: Callable[[int], bytes]) -> None:
    size = 3 * MIB
    inputs: list[Callable[[], object]] = [
        partial(decode, kind, data) for kind in FILLED for data in in_every_field(kind, bomb, size)
    ]
    head = [msgpack.packb(item) for item in ("testnet", PROTOCOL, "open", 0)]
    frames = [
        bomb(size),
        b"\x97" + bomb(size),
        b"\x97" + b"".join(head) + bomb(size),
        b"\x97" + b"".join(head) + b"\xc4\x00\xc4\x00" + bomb(size),
        msgpack.packb(["testnet", PROTOCOL, "open", 0, bomb(size), bytes(65), []]),
    ]
    inputs += [partial(DOMAIN.open, data) for data in frames]
    for attempt in inputs:
        tracemalloc.start()
        began = time.process_time()
        with pytest.raises(CodecError):
            attempt()
        spent = time.process_time() - began
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 3 * size
        assert spent < 1


# ---- envelopes and frames ---------------------------------------------------------------


@fixed
@given(any_message, st.integers(0, 2**40))
def test_a_signed_message_opens_to_message_and_signer(message: Message, expires: int) -> None:
    sent = DOMAIN.sign(ALICE, message, expires=expires)
    got = DOMAIN.open(sent.raw)
    assert got == sent
    assert got.signer == ALICE.address
    assert got.expires == (0 if message.typed else expires)


@fixed
@given(any_message, st.data())
def test_no_change_to_a_frame_leaves_its_signer_the_author(
    message: Message, data: st.DataObject
) -> None:
    sent = DOMAIN.sign(ALICE, message, expires=2 * 10**9)
    raw = bytearray(sent.raw)
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    try:
        got = DOMAIN.open(bytes(raw))
    except CodecError:
        return
    assert got.signer != ALICE.address


@pytest.mark.parametrize(
    "other",
    [
        Domain("mainnet", 31337, Address(b"\xee" * 20)),
        Domain("testnet", 31338, Address(b"\xee" * 20)),
        Domain("testnet", 31337, Address(b"\xef" * 20)),
    ],
)
@pytest.mark.parametrize(
    "message", [offer(), Cut(job_id=bytes(32), term=0, epoch=1, payee=bytes(20))]
)
def test_a_message_of_another_domain_is_not_its_signers(other: Domain, message: Message) -> None:
    sent = other.sign(ALICE, message)
    if other.network != DOMAIN.network:
        with pytest.raises(CodecError, match="frame is for network 'mainnet'"):
            DOMAIN.open(sent.raw)
    else:
        assert DOMAIN.open(sent.raw).signer != ALICE.address


def reframed(message: Message, **changes: Any) -> bytes:
    names = ("network", "protocol", "kind", "expires", "body", "signature", "attached")
    fields = dict(zip(names, msgpack.unpackb(DOMAIN.sign(ALICE, message).raw), strict=True))
    return bytes(msgpack.packb(list({**fields, **changes}.values())))


def test_another_protocol_version_is_refused() -> None:
    with pytest.raises(CodecError, match=f"protocol {PROTOCOL + 1}"):
        DOMAIN.open(reframed(offer(), protocol=PROTOCOL + 1))


def test_what_may_reach_the_chain_has_no_expiry() -> None:
    cut = Cut(job_id=bytes(32), term=0, epoch=1, payee=bytes(20))
    assert DOMAIN.sign(ALICE, cut, expires=5).expires == 0
    with pytest.raises(CodecError, match="carries no expiry"):
        DOMAIN.open(reframed(cut, expires=5))


def test_a_changed_expiry_is_another_signers() -> None:
    assert DOMAIN.open(reframed(offer(), expires=2 * 10**9)).signer != ALICE.address


def test_an_envelope_expires_after_its_second() -> None:
    signed = DOMAIN.sign(ALICE, offer(), expires=1000)
    assert not signed.expired(1000.0)
    assert signed.expired(1000.1)
    assert not DOMAIN.sign(ALICE, offer()).expired(10.0**12)


def test_a_body_under_another_kind_is_not_its_signers() -> None:
    progress = encode(Progress(job_id=bytes(32), assignment_hash=bytes(32), done=1, total=2))
    for kind in set(MESSAGES) - {"progress"}:
        with pytest.raises(CodecError, match=kind):
            decode(kind, progress)


def test_an_envelopes_digest_binds_kind_and_expiry() -> None:
    class Halt(Stop):
        kind = "halt"

    stop, halt = Stop(job_id=bytes(32)), Halt(job_id=bytes(32))
    assert encode(stop) == encode(halt)
    digests = {DOMAIN.digest(stop), DOMAIN.digest(stop, expires=1), DOMAIN.digest(halt)}
    assert len(digests) == 3


def wire_fields(kind: str) -> list[str]:
    text = codec.type_string(MESSAGES[kind])
    return [member.split(" ")[1] for member in text[text.index("(") + 1 : -1].split(",")]


def test_bad_signatures_are_refused() -> None:
    signature = DOMAIN.sign(ALICE, offer()).signature
    s = int.from_bytes(signature[32:64], "big")
    high = signature[:32] + (ORDER - s).to_bytes(32, "big") + bytes([signature[64] ^ 7])
    for bad in (
        high,
        signature[:64],
        signature + b"\0",
        signature[:64] + b"\x00",
        signature[:64] + b"\x1d",
        bytes(64) + b"\x1b",
        b"\xff" * 64 + b"\x1b",
        b"",
        bytes(70_000),
    ):
        with pytest.raises(CodecError, match="offer: signature"):
            DOMAIN.open(reframed(offer(), signature=bad))


@pytest.mark.parametrize(
    "changes",
    [
        {"network": b"testnet"},
        {"protocol": True},
        {"protocol": 1.0},
        {"kind": 3},
        {"expires": -1},
        {"expires": 0.0},
        {"expires": None},
        {"body": "text"},
        {"signature": "text"},
        {"attached": None},
        {"attached": b""},
        {"attached": ["text"]},
        {"attached": [[]]},
        {"attached": {}},
        {"kind": "no-such-kind"},
    ],
)
def test_a_frame_of_other_types_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CodecError):
        DOMAIN.open(reframed(offer(), **changes))


def test_frames_of_another_length_are_refused() -> None:
    items = msgpack.unpackb(DOMAIN.sign(ALICE, offer()).raw)
    for broken in (items[:6], [*items, 0], [], items[::-1]):
        with pytest.raises(CodecError):
            DOMAIN.open(msgpack.packb(broken))
    with pytest.raises(CodecError, match="bytes follow its end"):
        DOMAIN.open(msgpack.packb(items) + b"\x00")


def test_a_second_encoding_of_a_frame_is_refused() -> None:
    raw = DOMAIN.sign(ALICE, offer()).raw
    for canonical, longer in ((b"\x97", b"\xdc\x00\x07"), (b"\xa5offer", b"\xd9\x05offer")):
        assert canonical in raw
        with pytest.raises(CodecError, match="frame is not canonical"):
            DOMAIN.open(raw.replace(canonical, longer, 1))


def test_only_what_binds_attachments_carries_them() -> None:
    assert {"term-vote", "term-start"} == ATTACHING
    vote = TermVote(job_id=bytes(32), term=1, orchestrator=bytes(20), high=bytes(32), signed=())
    sent = DOMAIN.sign(ALICE, vote, attached=(b"head", b""))
    assert DOMAIN.open(sent.raw).attached == (b"head", b"")
    for message in (offer(), Cut(job_id=bytes(32), term=0, epoch=1, payee=bytes(20))):
        with pytest.raises(CodecError, match="binds none"):
            DOMAIN.open(reframed(message, attached=[b"junk"]))
        with pytest.raises(CodecError, match="binds none"):
            DOMAIN.sign(ALICE, message, attached=(b"junk",))


def test_a_tampered_attachment_leaves_message_and_signer_and_is_seen_by_its_reader() -> None:
    vote = TermVote(job_id=bytes(32), term=1, orchestrator=bytes(20), high=bytes(32), signed=())
    sent = DOMAIN.sign(ALICE, vote, attached=(b"head", b"certificate"))
    got = DOMAIN.open(reframed(vote, attached=[b"other", b"certificate"]))
    assert (got.digest, got.signer) == (sent.digest, sent.signer)
    assert got != sent
    assert got.attached == (b"other", b"certificate")


def test_attachments_count_against_the_size_of_their_message() -> None:
    vote = TermVote(job_id=bytes(32), term=1, orchestrator=bytes(20), high=bytes(32), signed=())
    room = TermVote.max_size - len(encode(vote))
    assert DOMAIN.open(DOMAIN.sign(ALICE, vote, attached=(bytes(room),)).raw)
    with pytest.raises(CodecError, match="exceed the limit"):
        DOMAIN.open(reframed(vote, attached=[bytes(room + 1)]))
    with pytest.raises(CodecError, match="list of 4097 items exceeds"):
        DOMAIN.open(reframed(vote, attached=[b""] * (MAX_ATTACHED + 1)))


def test_a_frame_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(CodecError, match="exceeds the limit"):
        DOMAIN.open(bytes(MAX_FRAME + 1))


def test_what_no_peer_would_take_is_not_signed() -> None:
    entries = LogEntries(job_id=bytes(32), term=0, seq=1, first=0, entries=(bytes(4 * MIB),))
    with pytest.raises(CodecError, match=r"log-entries: \d+ bytes exceed"):
        DOMAIN.sign(ALICE, entries)


def test_verified_frames_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = codec._Cache(max_bytes=1000, max_frame=400)
    monkeypatch.setattr(codec, "_VERIFIED", cache)
    small = [DOMAIN.sign(ALICE, offer(slots=slots)) for slots in range(10)]
    large = DOMAIN.sign(ALICE, Refused(reason="x" * 512))
    assert cache.get((DOMAIN, large.raw)) is None
    kept = [signed for signed in small if cache.get((DOMAIN, signed.raw)) is not None]
    assert kept == small[-len(kept) :]
    assert 0 < sum(len(signed.raw) for signed in kept) <= 1000
    assert DOMAIN.open(kept[0].raw) is kept[0]
    assert DOMAIN.open(small[0].raw) == small[0]
    elsewhere = Domain("testnet", 1, DOMAIN.escrow)
    assert elsewhere.open(kept[-1].raw).signer != ALICE.address


# ---- values -----------------------------------------------------------------------------


def test_a_message_cannot_be_changed_or_made_of_wrong_types() -> None:
    message = offer()
    with pytest.raises(ValueError, match="frozen"):
        message.slots = 5
    for changes in ({"slots": "4"}, {"slots": True}, {"payee": b""}, {"tip": 1}):
        with pytest.raises(ValueError, match="validation error"):
            offer(**changes)
    with pytest.raises(ValueError, match="validation error"):
        Refused(reason="\ud800")


def test_an_enumeration_travels_as_its_number() -> None:
    progress = Progress(
        job_id=bytes(32), assignment_hash=bytes(32), done=AuditResult.SILENT, total=9
    )
    assert decode("progress", encode(progress)) == progress
    assert msgpack.unpackb(encode(progress))["done"] == 3


def test_amounts_travel_as_decimal_strings() -> None:
    receipt_fields = dict(zip(wire_fields("receipt"), Receipt.model_fields, strict=True))
    assert {
        wire for wire, name in receipt_fields.items() if solidity_type(Receipt, name) == "uint256"
    } == {"charged", "amount"}
    assert msgpack.unpackb(encode(offer(ask=10**30)))["ask"] == "1" + "0" * 30


def test_nothing_signed_has_a_float_field() -> None:
    for model in MESSAGES.values():
        for name, info in model.model_fields.items():
            assert info.annotation is not float, f"{model.__name__}.{name}"


def test_kinds_and_eip712_names_are_unique() -> None:
    assert len({model.kind for model in MESSAGES.values()}) == len(MESSAGES)
    assert len({model.__name__ for model in MESSAGES.values()}) == len(MESSAGES)
    assert Settlement.typed
    assert codec.type_string(Settlement).startswith("Settlement(bytes32 jobId,uint32 ")
