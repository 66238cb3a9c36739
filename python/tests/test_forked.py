"""gpu_vllm/forked.py: programs that begin in a process which has imported what they need."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

FORKED = pathlib.Path(__file__).parent / "gpu_vllm" / "forked.py"


def wait_until(happens, seconds=30):
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)


@pytest.fixture(name="server")
def fixture_server(tmp_path):
    path = str(tmp_path / "socket")
    environment = os.environ | {"FORKED_MODULES": "fractions"}
    with subprocess.Popen(
        [sys.executable, FORKED, "serve", path], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline().startswith("READY")
        yield path, process
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        assert process.wait(30) == 0


def run(path, program, *arguments, **others):
    command = [sys.executable, FORKED, "run", path, program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **others)


def write(folder, text):
    (folder / "neighbour.py").write_text("NAME = 'neighbour'\n")
    program = folder / "program.py"
    program.write_text(text)
    return str(program)


def test_a_program_has_the_arguments_environment_folder_and_output_of_its_caller(server, tmp_path):
    path, process = server
    program = write(
        tmp_path,
        "import sys\n"
        "imported = 'fractions' in sys.modules\n"
        "import os, neighbour\n"
        "print(sys.argv[1:], os.environ['GIVEN'], os.getcwd(), neighbour.NAME, imported, os.getppid())\n"
        "print('an error', file=sys.stderr)\n",
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    ended = run(path, program, "a b", "c", cwd=folder, env={"GIVEN": "yes"})
    assert ended.stdout == f"['a b', 'c'] yes {folder} neighbour True {process.pid}\n"
    assert (ended.stderr, ended.returncode) == ("an error\n", 0)


@pytest.mark.parametrize(
    "ends, status, said",
    [
        ("raise SystemExit(7)", 7, ""),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit('no such model')", 1, "no such model\n"),
        ("raise ValueError('what failed')", 1, "ValueError: what failed"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 128 + signal.SIGTERM, ""),
    ],
)
def test_a_callers_status_is_its_programs(server, tmp_path, ends, status, said):
    ended = run(server[0], write(tmp_path, ends))
    assert ended.returncode == status and said in ended.stderr


def test_a_program_ends_with_its_caller_and_what_it_has_started_too(server, tmp_path):
    program = write(
        tmp_path,
        "import subprocess, sys\nchild = subprocess.Popen(['sleep', '60'])\nprint(child.pid, flush=True)\nchild.wait()\n",
    )
    with subprocess.Popen(
        [sys.executable, FORKED, "run", server[0], program], stdout=subprocess.PIPE, text=True
    ) as caller:
        child = int(caller.stdout.readline())
        caller.kill()
    wait_until(lambda: not is_alive(child))
    # And the next caller finds the server as it was.
    assert run(server[0], write(tmp_path, "print('next')")).stdout == "next\n"


def is_alive(process):
    try:
        state = pathlib.Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    # Ended, and nobody has asked for its status yet.
    return state != "Z"


def test_programs_run_side_by_side(server, tmp_path):
    meet = tmp_path / "met"
    os.mkfifo(meet)
    program = write(tmp_path, "import sys\nopen(sys.argv[1], sys.argv[2]).close()\n")
    command = [sys.executable, FORKED, "run", server[0], program, str(meet)]
    # Each waits for the other.
    both = [subprocess.Popen([*command, mode]) for mode in ("r", "w")]
    assert [process.wait(30) for process in both] == [0, 0]


def test_a_caller_without_a_server_says_so(tmp_path):
    ended = run(str(tmp_path / "socket"), "program.py")
    assert ended.returncode != 0 and "No such file" in ended.stderr
