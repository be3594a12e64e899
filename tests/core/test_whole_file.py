"""Files that are written whole: with real full disks, real kills, and folders that are none."""

import ast
import json
import os
import signal
import stat
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import cli
from core.errors import NotWritten
from core.whole_file import replacing, write_together, write_whole

ROOT = Path(__file__).parent.parent.parent
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's limits and devices")
POSIX = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")

# What a full disk is to a program: a file may not grow beyond 1000 bytes.
LIMITED = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
"""
# Ended as by a power cut, when it is about to move a file into its place for the n-th time.
KILLED_AT = """
import os, signal, sys
moves = []
def watch(event, arguments):
    if event == "os.rename":
        moves.append(arguments)
        if len(moves) == {}:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
"""
SAVE = """
import sys
from pathlib import Path
from core import metadata
import cli
from core.errors import NotWritten
from core.events import Result
from core.request import TextToImage
request = TextToImage.parse(prompt="a fox", seed=7).resolved("mini")
png = b"new" * int(sys.argv[2])
result = Result(png, {"new": True}, request, (128, 128), "mini", "", {"total": 1.0})
try:
    metadata.save(result, Path(sys.argv[1]))
except NotWritten as error:
    print(error)
    sys.exit(error.exit_code)
"""


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def limited(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command of the command line where no file may grow beyond 1000 bytes."""
    return python(LIMITED + "import sys, cli\nsys.exit(cli.main(sys.argv[1:]))", *arguments)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_what_is_written_is_there_and_nothing_else(tmp_path: Path) -> None:
    write_whole(tmp_path / "new", b"one")
    write_whole(tmp_path / "new", b"two")
    write_together({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    with replacing(tmp_path / "c") as file:
        file.write(b"3")
    assert content(tmp_path) == {"new": b"two", "a": b"1", "b": b"2", "c": b"3"}


def test_a_name_may_be_as_long_as_names_can_be(tmp_path: Path) -> None:
    name = "n" * 255
    write_whole(tmp_path / name, b"one")
    assert content(tmp_path) == {name: b"one"}


@POSIX
def test_a_new_file_has_the_umasks_mode_and_an_old_one_keeps_its_own(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "old").chmod(0o640)
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "new", b"one")
        write_whole(tmp_path / "old", b"two")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "old")] == [0o640, 0o640]
    os.umask(before)
    write_whole(tmp_path / "usual", b"one")
    assert stat.S_IMODE((tmp_path / "usual").stat().st_mode) == 0o666 & ~before


@POSIX
def test_a_symlink_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "target"
    target.write_bytes(b"old")
    (tmp_path / "link").symlink_to("elsewhere/target")
    (tmp_path / "to-nothing").symlink_to("elsewhere/new")
    write_together({tmp_path / "link": b"one", tmp_path / "to-nothing": b"two"})
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "to-nothing").is_symlink()
    assert content(tmp_path / "elsewhere") == {"target": b"one", "new": b"two"}


@LINUX
def test_a_device_is_written_to_and_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "null.png").symlink_to("/dev/null")
    (tmp_path / "full.png").symlink_to("/dev/full")
    write_whole(tmp_path / "null.png", b"one")
    with pytest.raises(NotWritten, match=r"full\.png could not be written .*No space left on device.*make room"):
        write_whole(tmp_path / "full.png", b"one")
    assert all(stat.S_ISCHR(os.stat(name).st_mode) for name in ("/dev/null", "/dev/full"))


def test_what_is_in_the_way_is_told_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "x.png", tmp_path / "folder", tmp_path / "absent" / "x.png"):
        with pytest.raises(NotWritten) as refused:
            write_whole(path, b"new")
        assert str(refused.value).startswith(f"{path} could not be written (")
        assert refused.value.values["path"] == str(path)
    with pytest.raises(NotWritten):  # both or none
        write_together({tmp_path / "file": b"new", tmp_path / "folder": b"new"})
    assert content(tmp_path) == {"file": b"old"}


def test_a_file_that_may_not_be_written_to_is_not_replaced_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_bytes(b"old")
    (tmp_path / "mine").chmod(0o444)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write to anything
    with pytest.raises(NotWritten, match="Permission denied"):
        write_whole(tmp_path / "mine", b"new")
    assert content(tmp_path) == {"mine": b"old"}


def test_an_exception_of_the_callers_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")

    def write_and_fail() -> None:
        with replacing(tmp_path / "old") as file:
            file.write(b"new")
            raise KeyError

    with pytest.raises(KeyError):
        write_and_fail()
    assert content(tmp_path) == {"old": b"old"}


@LINUX
@pytest.mark.parametrize("old", [True, False], ids=["over-another", "new"])
def test_a_full_disk_leaves_image_and_json_as_they_were_and_reports_it(tmp_path: Path, old: bool) -> None:
    before = {"fox.png": b"old", "fox.json": b"{}"} if old else {}
    for name, data in before.items():
        (tmp_path / name).write_bytes(data)
    done = python(LIMITED + SAVE, tmp_path / "fox.png", 1000)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith(f"{tmp_path / 'fox.png'} could not be written (File too large): make room")
    assert content(tmp_path) == before


@LINUX
def test_where_the_json_has_no_room_the_image_does_not_change_either(tmp_path: Path) -> None:
    (tmp_path / "fox.png").write_bytes(b"old")
    (tmp_path / "fox.json").symlink_to("/dev/full")
    done = python(SAVE, tmp_path / "fox.png", 1)
    assert done.returncode == 1
    assert "fox.json could not be written" in done.stdout
    assert (tmp_path / "fox.png").read_bytes() == b"old"


@POSIX
def test_a_kill_in_the_midst_of_writing_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    code = """
import os, signal, sys
from pathlib import Path
from core.whole_file import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write(b"new" * 100_000)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert python(code, tmp_path / "old").returncode == -signal.SIGKILL
    assert (tmp_path / "old").read_bytes() == b"old"
    write_whole(tmp_path / "old", b"new")
    assert (tmp_path / "old").read_bytes() == b"new"


@POSIX
def test_a_kill_before_the_first_move_leaves_the_old_files(tmp_path: Path) -> None:
    before = {"fox.png": b"old", "fox.json": b"{}"}
    for name, data in before.items():
        (tmp_path / name).write_bytes(data)
    done = python(KILLED_AT.format(1) + SAVE, tmp_path / "fox.png", 1)
    assert done.returncode == -signal.SIGKILL
    assert {name: data for name, data in content(tmp_path).items() if not name.endswith(".part")} == before
    assert python(SAVE, tmp_path / "fox.png", 1).returncode == 0  # and nothing is in the way
    assert (tmp_path / "fox.png").read_bytes() == b"new"
    assert json.loads((tmp_path / "fox.json").read_text()) == {"new": True}


@POSIX
def test_a_kill_between_the_moves_leaves_each_file_whole(tmp_path: Path) -> None:
    (tmp_path / "fox.png").write_bytes(b"old")
    assert python(KILLED_AT.format(2) + SAVE, tmp_path / "fox.png", 1).returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "fox.json").read_text()) == {"new": True}
    assert (tmp_path / "fox.png").read_bytes() == b"old"  # where the new one is, the JSON is too


@pytest.fixture
def no_room() -> Iterator[None]:
    """No file of this process may grow beyond 1000 bytes meanwhile."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.slow
@LINUX
@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.usefixtures("no_room")
def test_a_drawn_image_that_has_no_room_is_told_with_the_seed_that_draws_it_again(
    tmp_path: Path, as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fox.png").write_bytes(b"old")
    command = ["generate", "a fox", "--seed", "7", "--steps", "1", "--weights", "mini", "--device", "cpu"]
    command += ["--out", str(tmp_path / "fox.png"), *(["--json"] if as_json else [])]
    assert cli.main(command) == 1
    printed = capsys.readouterr()
    last = printed.err.splitlines()[-1]
    assert last.startswith(f"{tmp_path / 'fox.png'} could not be written (File too large): make room")
    assert last.endswith("; the same picture comes again with --seed 7")
    assert "Traceback" not in printed.err
    assert json.loads(printed.out)["error"]["code"] == "not_written" if as_json else not printed.out
    assert content(tmp_path) == {"fox.png": b"old"}


@LINUX
def test_a_control_image_that_has_no_room_is_told(tmp_path: Path) -> None:
    Image.effect_noise((256, 256), 80).save(tmp_path / "in.png")
    (tmp_path / "out.png").write_bytes(b"old")
    before = content(tmp_path)
    flags = ["--preprocessor", "gray", "--weights", "mini", "--out", tmp_path / "out.png"]
    done = limited("preprocess", "--image", tmp_path / "in.png", *flags)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{tmp_path / 'out.png'} could not be written (File too large)")
    assert content(tmp_path) == before


@LINUX
@pytest.mark.usefixtures("no_room")
def test_what_training_takes_where_it_exists_is_never_there_in_part(tmp_path: Path) -> None:
    import mini.config
    from train_mini import export

    # torch ends its archive all the same, and so raises an error of its own on top of the disk's.
    with pytest.raises(RuntimeError) as failed:
        export.take_back(mini.config.FOLDER, tmp_path)
    assert "File too large" in "".join(traceback.format_exception(failed.value))
    assert content(tmp_path) == {}


def test_every_tensor_that_training_keeps_is_written_whole() -> None:
    targets = [
        (path.name, ast.unparse(call.args[1] if ast.unparse(call.func) == "torch.save" else call.args[0]))
        for path in (ROOT / "train_mini").glob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("torch.save", "np.save")
    ]
    assert len(targets) > 9
    assert [(name, target) for name, target in targets if target != "file"] == []  # what `replacing` yields
