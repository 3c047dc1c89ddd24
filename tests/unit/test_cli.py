"""The meshd command as its user meets it: processes, their words and their exit codes."""

import errno
import importlib.metadata
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import trio

from meshd.config.job import JobSpec
from meshd.config.reading import keys_of
from meshd.config.schema import Config, variable_of
from meshd.node.cli import cli, main
from meshd.node.cli.failures import printable
from meshd.node.compute.toy import affine_program
from meshd.node.control.api import ControlError
from meshd.node.demo.options import DemoOptions

DOCS = Path(__file__).resolve().parents[2] / "docs"
JOB = "0x" + "3f" + "ab" * 31
ALICE = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"
HEAVY = ("torch", "libp2p", "web3", "trio", "pydantic", "numpy", "rich", "eth", "coincurve")
QUICK = (
    *(("status",), ("peers",), ("wallet",), ("pause",), ("resume",), ("earnings",)),
    *(("job", "ls"), ("job", "show", JOB), ("job", "why", JOB), ("job", "logs", JOB)),
)


class Ended:
    """What a finished command said."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def meshd(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run a command in this process, in an empty home, and return what it said."""
    home = tmp_path / "home"
    home.mkdir()
    for name in list(os.environ):
        if name.startswith(("MESHD_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Ended:
        code = main([str(argument) for argument in arguments])
        said = capfd.readouterr()
        return Ended(code, said.out, said.err)

    return run


async def process(*arguments: object, code: str | None = None) -> Ended:
    """Run a command as a process of its own."""
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "meshd.node.cli"]
    ended = await trio.run_process(
        [*command, *map(str, arguments)], capture_stdout=True, capture_stderr=True, check=False
    )
    return Ended(ended.returncode, ended.stdout.decode(), ended.stderr.decode())


def commands(group: click.Group = cli, path: str = "meshd") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield f"{path} {name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")


@pytest.mark.parametrize("command", QUICK)
async def test_asking_a_daemon_loads_nothing_heavy(daemon_dir: Path, command) -> None:
    code = (
        "import sys; from meshd.node.cli import main; code = main(); "
        f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    ended = await process(*command, "--data-dir", daemon_dir, code=code)
    assert (ended.code, ended.err) == (0, "[]\n")


async def test_status_takes_less_than_a_fifth_of_a_second_of_computing(daemon_dir: Path) -> None:
    seconds = []
    for _ in range(3):
        begin = resource.getrusage(resource.RUSAGE_CHILDREN)
        ended = await process("status", "--data-dir", daemon_dir)
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(end.ru_utime - begin.ru_utime + end.ru_stime - begin.ru_stime)
        assert ended.code == 0
    assert min(seconds) < 0.2  # processor time, so that a busy machine does not matter


async def test_status_reads_well_and_has_json(daemon_dir: Path, fake_node) -> None:
    ended = await process("status", "--data-dir", daemon_dir)
    assert "daemon   0.1.0, process 42, up 1 h 1 min" in ended.out
    assert "chain    7, block 12, http://127.0.0.1:8545" in ended.out
    ended = await process("status", "--data-dir", daemon_dir, "--json")
    assert json.loads(ended.out) == await fake_node.status()


async def test_what_a_peer_says_cannot_steer_the_terminal(daemon_dir: Path) -> None:
    ended = await process("peers", "--data-dir", daemon_dir)
    assert "\x1b" not in ended.out
    assert r"evil\x1b[2Jdevice" in ended.out
    assert printable("a\nb\r\u202e") == "a\nb\\r\\u202e"


async def test_the_daemon_is_found_by_environment_and_config_file(daemon_dir, meshd) -> None:
    os.environ["MESHD_DATA_DIR"] = str(daemon_dir)
    try:
        assert (await trio.to_thread.run_sync(meshd, "wallet")).out.startswith("address")
    finally:
        del os.environ["MESHD_DATA_DIR"]
    config = Path(os.environ["HOME"]) / ".config" / "meshd" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(f'data_dir = "{daemon_dir}"\n')
    assert (await trio.to_thread.run_sync(meshd, "wallet")).code == 0


async def test_a_job_is_followed_from_its_file_to_its_receipts(
    daemon_dir: Path, fake_node, tmp_path: Path
) -> None:
    for name in ("my.program", "my.data"):
        (tmp_path / name).write_bytes(b"")
    file = tmp_path / "job.toml"
    file.write_text(
        'program = "my.program"\ndata = "my.data"\nprice = "0.002"\ncap = "50"\ndeadline = "2h"\n'
    )
    fake_node.happens("running", "shard 3 accepted")
    fake_node.happens("settled", "paid")
    at = ("--data-dir", daemon_dir)
    ended = await process("job", "submit", file, "--watch", *at)
    assert f"job {JOB} is announced: 16 shards, at most 50 MCC" in ended.out
    assert "4/16, 1 rejected, 2 re-issued" in ended.out
    assert "shard 3 accepted" in ended.out
    assert ended.err == "meshd: note: small committee: you trust its quorum\n"
    assert "4/16" in (await process("job", "ls", *at)).out
    shown = (await process("job", "show", "3fab", *at)).out
    assert "small committee: you trust its quorum" in shown
    assert "0.5 burnt" in shown
    assert "0.002" in (await process("job", "receipts", JOB, *at)).out
    out = await process("job", "result", JOB, "--out", tmp_path / "r", *at)
    assert out.out == f"wrote 2 rows, 10 bytes, to {tmp_path / 'r'}\n"
    assert (await process("job", "cancel", JOB, *at)).out == f"job {JOB} is cancelled\n"


async def test_a_daemon_is_paused_and_resumed(daemon_dir: Path, fake_node) -> None:
    at = ("--data-dir", daemon_dir)
    ended = await process("pause", *at)
    assert ended.out == "paused: the daemon takes no new shards; it finishes 2 shards\n"
    assert "paused   takes no new shards: `meshd resume`" in (await process("status", *at)).out
    assert (await process("resume", *at)).out == "resumed: the daemon takes shards again\n"
    assert "paused" not in (await process("status", *at)).out
    assert json.loads((await process("pause", "--json", *at)).out)["paused"] is True


async def test_earnings_are_shown_by_job_and_by_payment(daemon_dir: Path, fake_node) -> None:
    at = ("--data-dir", daemon_dir)
    shown = (await process("earnings", *at)).out
    assert "1.5 MCC" in shown
    assert "0.25 MCC" in shown
    assert re.search(r"^0x3fcdcdcdcdcdcdcd +- +- +0$", shown, re.M)
    assert "0x" + "55" * 32 in (await process("earnings", "--payments", *at)).out
    answer = json.loads((await process("earnings", "--json", *at)).out)
    assert answer == await fake_node.earnings()


async def test_why_a_job_waits_is_told_by_shard_and_by_node(daemon_dir: Path, fake_node) -> None:
    at = ("--data-dir", daemon_dir)
    told = (await process("job", "why", JOB, *at)).out
    assert told.count("no worker has it; attempt 0 ended: lapsed") == 20
    assert "and 10 more: --shards 30 shows them" in told
    assert r"it asks 2, the job pays 1\x1b[2J" in told
    assert "more:" not in (await process("job", "why", JOB, "--shards", 30, *at)).out
    answer = json.loads((await process("job", "why", JOB, "--json", *at)).out)
    assert len(answer["shards"]) == 30


async def test_a_jobs_log_is_printed_page_by_page(daemon_dir: Path, fake_node) -> None:
    at = ("--data-dir", daemon_dir)
    ended = await process("job", "logs", JOB, *at)
    assert [line.split()[2] for line in ended.out.splitlines()] == ["job-terms", "assignment"]
    ended = await process("job", "logs", JOB, "--kind", "assignment", "--json", *at)
    assert [json.loads(line)["text"] for line in ended.out.splitlines()] == ["shard 3"]
    ended = await process("job", "logs", JOB, "--after", 1, *at)
    assert len(ended.out.splitlines()) == 1


async def test_a_job_is_tried_again_until_another_deadline(daemon_dir: Path, fake_node) -> None:
    at = ("--data-dir", daemon_dir)
    ended = await process("job", "retry", JOB, "--deadline", "2h", *at)
    assert "is announced: 16 shards, at most 50 MCC" in ended.out
    assert fake_node.calls == [("job_retry", bytes.fromhex(JOB[2:]), 7200)]
    ended = await process("job", "retry", JOB, "--deadline", "tomorrow", *at)
    assert (ended.code, "is not a duration" in ended.err) == (2, True)


async def test_one_part_of_a_result_is_written(daemon_dir: Path, fake_node, tmp_path) -> None:
    out = tmp_path / "part.rows"
    await process("job", "result", JOB, "--part", 3, "--out", out, "--data-dir", daemon_dir)
    assert fake_node.calls == [("job_part", bytes.fromhex(JOB[2:]), 3, out)]


async def test_watching_with_json_prints_a_line_an_event(daemon_dir: Path, fake_node) -> None:
    fake_node.happens("running")
    fake_node.happens("failed")
    ended = await process("job", "watch", JOB, "--json", "--data-dir", daemon_dir)
    assert [json.loads(line)["state"] for line in ended.out.splitlines()] == ["running", "failed"]
    assert ended.code == 1
    assert ended.err == "meshd: the job failed: `meshd job show` says why\n"


async def test_a_replay_prints_rounds_and_its_result_which_is_its_exit_code(
    daemon_dir: Path, fake_node
) -> None:
    at = ("--data-dir", daemon_dir)
    fake_node.replays("equal", "equal")
    ended = await process("replay", JOB, *at)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines() == [r"round 0: equal\x1b[2J", r"end 0: equal\x1b[2J"]
    ended = await process("replay", JOB, "--round", 3, "--json", *at)
    events = [json.loads(line) for line in ended.out.splitlines()]
    assert [event["event"] for event in events] == ["shard", "shard", "round", "end"]
    assert fake_node.calls[-1] == ("job_replay", bytes.fromhex(JOB[2:]), 3)
    for result in ("different", "other-class"):
        fake_node.replayed.clear()
        fake_node.replays("equal", result)
        assert (await process("replay", JOB, *at)).code == 1


async def test_a_replay_that_cannot_be_says_why_in_one_line(daemon_dir: Path, fake_node) -> None:
    fake_node.fault = ControlError("usage", "job 0x3f is inference", "see `meshd job show`")
    ended = await process("replay", JOB, "--data-dir", daemon_dir)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "meshd: job 0x3f is inference: see `meshd job show`\n"
    ended = await process("replay", JOB, "--round", -1, "--data-dir", daemon_dir)
    assert (ended.code, "--round" in ended.err) == (2, True)


async def test_a_wrong_job_is_told_in_one_line_with_exit_code_2(daemon_dir, tmp_path) -> None:
    file = tmp_path / "job.toml"
    file.write_text("progam = 'x'\n")
    ended = await process("job", "submit", file, "--data-dir", daemon_dir)
    assert ended.code == 2
    assert ended.err == "meshd: job.toml: unknown key 'progam': did you mean 'program'?\n"
    ended = await process("job", "submit", tmp_path / "none.toml", "--data-dir", daemon_dir)
    assert "cannot be read" in ended.err
    assert len(ended.err.splitlines()) == 1


def test_a_stake_is_checked_before_a_daemon_is_asked(meshd) -> None:
    ended = meshd("stake", "1,5")
    assert (ended.code, ended.err) == (
        2,
        "meshd: '1,5' is not an amount of MCC: write digits like 12 or 0.5\n",
    )


def test_without_a_daemon_one_line_says_where_and_how(meshd, tmp_path: Path) -> None:
    ended = meshd("status", "--data-dir", tmp_path)
    assert ended.code == 69
    assert ended.err == (
        f"meshd: no daemon runs on {tmp_path}: start one with `meshd up`, "
        "or name its directory with --data-dir\n"
    )


def test_wrong_use_is_one_line_with_exit_code_2(meshd) -> None:
    ended = meshd("stauts")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "stauts" in ended.err
    ended = meshd("stake")
    assert ended.err == "meshd: Missing argument 'AMOUNT'. (see `meshd stake --help`)\n"
    assert meshd("job").code == 2


def test_the_version_is_that_of_the_package(meshd) -> None:
    assert meshd("--version").out == f"meshd {importlib.metadata.version('meshd')}\n"


def test_every_command_explains_itself_and_takes_json() -> None:
    for path, command in commands():
        assert command.help, path
        assert command.get_short_help_str(58)[-3:] != "...", path
        if not isinstance(command, click.Group):
            assert command.epilog, path
            options = {name for option in command.params for name in option.opts}
            assert "--json" in options or path in ("meshd up", "meshd chain dev"), path


def test_a_valid_configuration_is_confirmed_and_shown(meshd, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(
        json.dumps({"chain_id": 7, "mcc": ALICE, "registry": ALICE, "escrow": ALICE})
    )
    ended = meshd("config", "check", "--deployment", "d.json", "--preset", "validator")
    assert ended.out == "the configuration is right: network dev, chain 7, roles validator\n"
    shown = meshd("config", "show", "--deployment", "d.json", "--set", "worker.slots=3").out
    (tmp_path / "shown.toml").write_text(shown)
    again = meshd("config", "show", "--config", "shown.toml")
    assert (again.out, again.code) == (shown, 0)
    assert "slots = 3" in shown
    assert json.loads(meshd("config", "show", "--config", "shown.toml", "--json").out)["network"]


def test_a_wrong_configuration_exits_with_78(meshd, tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text("rolse = []\nchain.deployment = 'd.json'\n")
    ended = meshd("config", "check", "--config", "node.toml")
    assert (ended.code, ended.err) == (
        78,
        "meshd: node.toml: unknown key 'rolse': did you mean 'roles'?\n",
    )
    assert meshd("up", "--config", "node.toml").code == 78
    assert meshd("up", "--config", "none.toml").code == 78
    assert meshd("up", "--set", "slots").code == 2
    assert meshd("up", "--ephemeral", "--data-dir", "x").code == 2
    (tmp_path / "node.toml").write_text("chain.deployment = 'none.json'\n")
    assert meshd("config", "check", "--config", "node.toml").code == 78


def test_listening_beyond_loopback_warns(meshd, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(
        json.dumps({"chain_id": 7, "mcc": ALICE, "registry": ALICE, "escrow": ALICE})
    )
    public = ("--deployment", "d.json", "--listen", "/ip4/0.0.0.0/tcp/4001")
    assert meshd("config", "check", *public).code == 78
    ended = meshd("config", "check", *public, "--set", "allow_public=true")
    assert ended.code == 0
    assert "without a sandbox" in ended.err


def test_a_key_file_that_others_may_read_stops_the_daemon_with_78(meshd, tmp_path: Path) -> None:
    key = tmp_path / "data" / "identity.key"
    key.parent.mkdir()
    key.write_text("11" * 32)
    key.chmod(0o644)
    ended = meshd("up", "--data-dir", key.parent, "--deployment", "d.json")
    assert ended.code == 78
    assert ended.err == (
        f"meshd: key file {key} has mode 0644: others may read it; run: chmod 600 {key}\n"
    )


def test_chain_commands_refuse_what_they_cannot_do(meshd, tmp_path: Path) -> None:
    ended = meshd("chain", "fund", "0x12")
    assert (ended.code, ended.err) == (
        2,
        "meshd: '0x12' is not an address: write 0x and 40 hex digits\n",
    )
    assert "needs --deployment" in meshd("chain", "fund", ALICE, "--mcc", "5").err
    ended = meshd("chain", "deploy", "--out", "d.json", "--data-dir", tmp_path)
    assert (ended.code, "no key file" in ended.err) == (2, True)


def test_demo_passes_its_options_on(meshd, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[DemoOptions] = []

    class Demo:
        @staticmethod
        def main(options: DemoOptions) -> int:
            taken.append(options)
            return 1

    monkeypatch.setitem(sys.modules, "meshd.node.demo", Demo)
    assert meshd("demo", "--json", "x.json", "--seed", "7", "--keep").code == 1
    assert taken == [
        DemoOptions(("infer", "train"), 4, 3, True, 7, Path("x.json"), Path("demo-out"))
    ]
    assert "use one of infer" in meshd("demo", "--jobs", "mine").err


def test_a_dataset_is_made_and_inspected_without_a_daemon(meshd, tmp_path: Path) -> None:
    rows = [{"tokens": [i, i + 1], "weight": i / 2} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    added = meshd(
        "data", "add", "rows.jsonl", "--out", "rows.data", "--rows-per-chunk", 2, "--json"
    )
    assert added.code == 0, added.err
    described = json.loads(added.out)
    assert (described["rows"], described["chunks"]) == (5, 3)
    assert described["columns"] == [
        {"name": "tokens", "dtype": "i64", "shape": [2]},
        {"name": "weight", "dtype": "f32", "shape": []},
    ]
    assert json.loads(meshd("data", "inspect", "rows.data", "--json").out) == described
    assert "5 in 3 chunks" in meshd("data", "inspect", "rows.data").out
    head = meshd("data", "head", "rows.data", "--from", 1, "--rows", 2, "--json").out
    assert json.loads(head) == rows[1:3]
    shown = meshd("data", "head", "rows.data").out.splitlines()
    assert shown[0].split() == ["ROW", "tokens", "weight"]
    assert shown[-1].split() == ["4", "[4,", "5]", "2.0"]
    assert meshd("data", "head", "rows.data", "--from", 9).out == "rows.data has 5 rows\n"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.pkl", b"\x80\x04", "not a file that can be added"),
        ("rows.csv", b"1,2\n", "not a file that can be added"),
        ("rows.jsonl", b'{"a": 1}\n{"b": 1}\n', "line 2 has the keys"),
        ("rows.jsonl", b'{"a": [1]}\n{"a": [1, 2]}\n', "pad the rows"),
        ("rows.jsonl", b'{"a": [[1], [1, 2]]}\n', "ragged"),
        ("rows.jsonl", b'{"a": NaN}\n', "finite"),
        ("rows.jsonl", b'{"a": "x"}\n', "only numbers"),
        ("rows.jsonl", b'{"a": 99999999999999999999}\n', "does not fit into i64"),
        ("rows.jsonl", b"[1]\n", "not an object"),
        ("rows.jsonl", b"{\n", "not JSON"),
        ("rows.npz", b"PK\x03\x04", "no archive of plain arrays"),
        ("rows.npz", b"\x80\x04N.", "no archive of plain arrays"),
        ("rows.safetensors", b"\x08", "too few"),
        ("rows.jsonl", b"", "column"),
    ],
)
def test_files_that_are_no_columns_are_refused_in_one_line(
    meshd, tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(content)
    ended = meshd("data", "add", name, "--out", "out.data")
    assert ended.code == 2
    assert told in ended.err
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "out.data").exists()


def test_a_dataset_that_is_foreign_cut_or_changed_is_refused(meshd, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    assert meshd("data", "add", "rows.jsonl", "--out", "good.data").code == 0
    good = (tmp_path / "good.data").read_bytes()
    flipped = good[:-1] + bytes([good[-1] ^ 1])
    for content, told in (
        (good[:-1], "bytes, its chunks need"),
        (good[:20], "ends inside its manifest"),
        (b"", "is not a dataset"),
        (b"PK\x03\x04" * 10, "is not a dataset"),
        (flipped, "not those of the manifest"),
    ):
        (tmp_path / "bad.data").write_bytes(content)
        ended = meshd("data", "inspect", "bad.data")
        assert (ended.code, told in ended.err) == (2, True), ended.err
    assert "No such file" in meshd("data", "inspect", "none.data").err


@pytest.mark.parametrize("name", ["model.pt2", "model.pt", "model.pkl", "model.onnx"])
def test_formats_that_carry_code_are_refused_by_name_with_the_reason(meshd, name: str) -> None:
    ended = meshd("program", "inspect", name)
    assert ended.code == 2
    assert ended.err.startswith(f"meshd: {name} is not a program: ")
    assert "meshd program export" in ended.err


def test_a_file_that_is_no_program_is_refused_by_its_content(meshd, tmp_path: Path) -> None:
    (tmp_path / "renamed.program").write_bytes(b"\x80\x04pickle-in-disguise")
    ended = meshd("program", "inspect", "renamed.program")
    assert (ended.code, "unpickling runs code" in ended.err) == (2, True)
    assert meshd("program", "inspect", "none.program").code == 1


def test_a_module_is_exported_and_inspected(meshd, tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(
        "from torch import nn\n"
        "class Tiny(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.linear = nn.Linear(4, 2)\n"
        "    def forward(self, x):\n"
        "        return self.linear(x).relu()\n"
    )
    code = subprocess.run(
        [
            *(sys.executable, "-m", "meshd.node.cli", "program", "export", "tiny.py:Tiny"),
            *("--input", "x=f32[4]", "--out", "tiny.program"),
        ],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert code.returncode == 0, code.stderr
    described = json.loads(meshd("program", "inspect", "tiny.program", "--json").out)
    assert described["inputs"] == [{"name": "x", "dtype": "f32", "shape": [4]}]
    assert described["parameters"] == 10
    assert described["units"] > 0
    (tmp_path / "rows.jsonl").write_text('{"x": [1.5, 2, 3, 4]}\n' * 3)
    assert meshd("data", "add", "rows.jsonl", "--out", "rows.data").code == 0
    ended = meshd("program", "verify", "tiny.program", "--data", "rows.data", "--json")
    assert ended.code == 0, ended.out
    answer = json.loads(ended.out)
    assert [check["check"] for check in answer["checks"]] == [
        *("form", "shapes", "cost", "run", "rows"),
    ]
    shown = meshd("program", "verify", "tiny.program", "--rows", 8).out
    assert "ok    run: equal bits in two processes, on 2 and 3 rows" in shown


def test_a_module_with_a_loss_is_exported_for_training(tmp_path: Path) -> None:
    (tmp_path / "loss.py").write_text(
        "from torch import nn, randn\n"
        "class Loss(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.linear = nn.Linear(4, 2)\n"
        "    def forward(self, x):\n"
        "        return self.linear(x).square().mean()\n"
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "meshd.node.cli", "program", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)

    made = run("export", "loss.py:Loss", "--input", "x=f32[4]", "--training", "--out", "my.program")
    assert made.returncode == 0, made.stderr
    described = json.loads(run("inspect", "my.program", "--json").stdout)
    assert described["trains"]
    verified = run("verify", "my.program")
    assert b"ok    run: it computes a loss and trains 2 weights" in verified.stdout
    assert verified.returncode == 0


def test_a_program_that_cannot_run_on_its_data_fails_its_verification(meshd, tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"y": 1}\n{"y": 2}\n{"y": 3}\n')
    assert meshd("data", "add", "rows.jsonl", "--out", "rows.data").code == 0
    (tmp_path / "affine.program").write_bytes(affine_program(steps=2))
    ended = meshd("program", "verify", "affine.program", "--data", "rows.data")
    assert (ended.code, "fail  run: " in ended.out) == (1, True), ended.out
    (tmp_path / "cut.program").write_bytes(affine_program(steps=2)[:-1])
    ended = meshd("program", "verify", "cut.program")
    assert (ended.code, "fail  program: " in ended.out) == (1, True)
    assert meshd("program", "verify", "none.program").code == 1
    assert meshd("program", "verify", "model.pt2").code == 2


def test_a_completion_script_is_printed_for_each_shell(meshd) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "_MESHD_COMPLETE" in meshd("completion", shell).out
    assert "bashrc" in json.loads(meshd("completion", "bash", "--json").out)["file"]
    assert meshd("completion", "cmd").code == 2


def test_an_interrupt_is_quiet_and_exits_with_130(meshd, monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("meshd.node.cli.status.client", interrupted)
    ended = meshd("status")
    assert (ended.code, ended.err) == (130, "\nmeshd: interrupted\n")


def test_errors_inside_groups_are_told_and_bugs_are_called_bugs(meshd, monkeypatch) -> None:
    from meshd.p2p.network import Unreachable

    error: Exception = ExceptionGroup(
        "nursery", [ExceptionGroup("n", [Unreachable("bob is away")])]
    )

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("meshd.node.cli.status.client", fails)
    ended = meshd("status")
    assert (ended.code, ended.err) == (69, "meshd: bob is away\n")
    error = OSError(errno.EADDRINUSE, "Address already in use")
    ended = meshd("status")
    assert ended.code == 78
    assert "choose another" in ended.err
    error = ZeroDivisionError("division by zero")
    ended = meshd("status")
    assert ended.code == 1
    assert "internal error: ZeroDivisionError" in ended.err
    with pytest.raises(ZeroDivisionError):
        meshd("--traceback", "status")


async def test_a_closed_pipe_is_no_error_worth_words(daemon_dir: Path) -> None:
    command = f"{sys.executable} -m meshd.node.cli job receipts {JOB} --data-dir {daemon_dir} | :"
    ended = await trio.run_process(["sh", "-c", command], capture_stderr=True, check=False)
    assert ended.stderr == b""


def test_the_docs_have_a_heading_for_every_command_and_no_other() -> None:
    text = (DOCS / "cli.md").read_text()
    documented = re.findall(r"^#+ `(meshd [a-z ]+)`$", text, re.MULTILINE)
    assert documented == [path for path, _ in commands()]


def test_the_docs_name_every_option_of_every_command() -> None:
    text = (DOCS / "cli.md").read_text()
    parts = re.split(r"^#+ `(.*)`$", text, flags=re.MULTILINE)[1:]
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    common = {"--json", "--data-dir", "--help", "-h"}
    for path, command in commands():
        for option in command.params:
            if isinstance(option, click.Option):
                for name in set(option.opts) - common:
                    assert f"`{name}" in sections[path], (path, name)


def test_the_docs_have_a_heading_for_every_key_and_no_other() -> None:
    text = (DOCS / "configuration.md").read_text()
    daemon, _, job = text.partition("\n# Job descriptions")
    heading = re.compile(r"^#+ `([a-z_.]+)`$", re.MULTILINE)
    assert heading.findall(daemon) == list(keys_of(Config))
    assert heading.findall(job) == list(keys_of(JobSpec))
    for key in keys_of(Config):
        assert f"`{variable_of(key)}`" in daemon
