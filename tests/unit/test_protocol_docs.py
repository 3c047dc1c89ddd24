"""docs/protocol.md names every message, every field, its type and its limit, and no others."""

import re
from pathlib import Path

import pytest

from meshd.p2p.codec import ATTACHING, ENVELOPE_TAG, MAX_FRAME, type_string
from meshd.p2p.messages import (
    JOB_LOG_KINDS,
    MESSAGES,
    MIB,
    PROTOCOL,
    Message,
    job_topic,
    jobs_topic,
)

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "protocol.md").read_text()
SECTIONS = {
    name: text for name, text in re.findall(r"^### `([^`]+)`\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)
}
every_message = pytest.mark.parametrize("model", MESSAGES.values(), ids=list(MESSAGES))


def test_the_page_describes_every_message_and_no_other() -> None:
    assert set(SECTIONS) == set(MESSAGES)


@every_message
def test_the_page_describes_every_field_in_order_with_its_type(model: type[Message]) -> None:
    text = type_string(model)
    members = [member.split(" ") for member in text[text.index("(") + 1 : -1].split(",")]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| (.+) \|$", SECTIONS[model.kind], re.M)
    assert [(wire, solidity) for wire, solidity, _ in rows] == [
        (wire, solidity) for solidity, wire in members
    ]
    assert all(len(meaning) > 2 for _, _, meaning in rows)


@every_message
def test_the_page_says_how_a_message_is_signed_sent_and_limited(model: type[Message]) -> None:
    (line,) = re.findall(r"^\*([^*].*)\*$", SECTIONS[model.kind], re.M)
    facts = line.split(" · ")
    size = model.max_size
    limit = f"{size // MIB} MiB" if size >= MIB else f"{size // 1024} KiB"
    assert facts[:2] == ["EIP-712" if model.typed else "envelope", f"at most {limit}"]
    assert facts[2]
    assert ("entry of the job log" in facts) is (model.kind in JOB_LOG_KINDS)
    assert ("carries attachments" in facts) is (model.kind in ATTACHING)


def test_the_page_names_version_topics_and_tags() -> None:
    assert f"version, which is **{PROTOCOL}** now" in PAGE
    assert f"`{jobs_topic('<network>')}`" in PAGE
    job = job_topic("<network>", b"").replace("//", "/<job id in hex>/")
    assert f"`{job}`" in PAGE
    assert ENVELOPE_TAG.decode().replace("\0", "\\0") in PAGE
    assert f"a frame to {MAX_FRAME // MIB} MiB" in PAGE
