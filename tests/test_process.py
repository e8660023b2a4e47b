"""Child processes return their result in a file, whatever happens to them."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import fake_driver
import pytest
from fake_driver import Machine
from gpu_machines import MIG, SLICE, TWO

from tuning import files, process
from tuning.errors import DataError, Stopped, TransientError


@pytest.fixture
def room(tmp_path, monkeypatch):
    """Write a module `tuning.<name>` that a child can run; gives back a function that runs it."""
    package = tmp_path / "more"
    package.mkdir()

    def start(body, value=None, **options):
        source = "import sys\nfrom tuning import process\n" + textwrap.dedent(body)
        (package / "probe_room.py").write_text(
            source + "\nif __name__ == '__main__':\n    sys.exit(process.serve(work))\n"
        )
        launcher = f"import tuning; tuning.__path__.append({str(package)!r})\n"
        (package / "sitecustomize.py").write_text(launcher)
        monkeypatch.setenv("PYTHONPATH", str(package))
        return process.run(
            "probe_room",
            tmp_path / "request.json",
            value or {},
            log=tmp_path / "log",
            **options,
        )

    return start


def test_the_answer_comes_back(room):
    """The child gets the request's value and its return value is the answer."""
    assert room("def work(r): return {'twice': 2 * r['n']}", {"n": 21}) == {"twice": 42}


def test_an_error_for_people_keeps_kind_and_text(room):
    """A DataError raised in the child is that DataError here."""
    with pytest.raises(DataError, match=r"DATA-201 line 3: is bad. Change: mend it."):
        room(
            """
            from tuning.errors import DataError
            def work(r): raise DataError.at("DATA-201", "line 3", "is bad", "mend it")
            """
        )


def test_a_bug_is_told_from_an_answer_and_its_traceback_kept(room, tmp_path):
    """Any other exception is status 1; the log has the traceback."""
    with pytest.raises(process.ChildDied) as caught:
        room("def work(r): return {}['missing']")

    assert caught.value.status == 1
    assert "KeyError: 'missing'" in (tmp_path / "log").read_text()


def test_a_full_disk_is_transient_and_names_the_file(room):
    """ENOSPC anywhere in the child is exit 20, not a bug."""
    with pytest.raises(TransientError, match="RUN-120 /data/x: no space left"):
        room("def work(r): raise OSError(28, 'No space left on device', '/data/x')")


def test_a_killed_child_leaves_no_answer_even_if_an_old_one_was_there(room, tmp_path):
    """SIGKILL is seen as such; the answer of an earlier child is not taken for this one's."""
    files.write_json(tmp_path / "request.result.json", {"ok": {"stale": True}})

    with pytest.raises(process.ChildDied) as caught:
        room("import os, signal\ndef work(r): os.kill(os.getpid(), signal.SIGKILL)")

    assert caught.value.status == -signal.SIGKILL


def test_a_stop_is_passed_on_and_the_child_reports_how_it_ended(room, tmp_path):
    """SIGTERM goes to the child once; its own Stopped comes back."""
    asked = threading.Event()
    body = f"""
    import signal, threading
    from pathlib import Path
    from tuning.errors import Stopped
    def work(r):
        got = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: got.set())
        Path({str(tmp_path / "ready")!r}).touch()
        while not got.wait(0.05): pass
        raise Stopped.at("RUN-110", "train", "stopped", "run again")
    """

    def tick():
        if (tmp_path / "ready").exists():
            asked.set()

    with pytest.raises(Stopped):
        room(body, stop_asked=asked.is_set, tick=tick)


def test_children_see_no_secret_of_the_environment(room, monkeypatch):
    """Variables that carry credentials stay in the parent."""
    monkeypatch.setenv("HF_TOKEN", "canary")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")

    seen = room("import os\ndef work(r): return {'env': list(os.environ.values())}")

    assert "canary" not in seen["env"]


def test_a_child_does_not_outlive_its_parent(tmp_path):
    """When the parent is killed the child ends too, and with it the lock it inherited."""
    body = textwrap.dedent(
        f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from pathlib import Path
        from tuning import process
        def work(r):
            Path({str(tmp_path / "pid")!r}).write_text(str(__import__("os").getpid()))
            time.sleep(60)
            return {{}}
        if __name__ == "__main__":
            process.follow_parent()
            sys.exit(process.serve(work))
        """
    )
    (tmp_path / "child.py").write_text(body)
    files.write_json(tmp_path / "r.json", {})
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, time; p = subprocess.Popen([sys.executable, *sys.argv[1:]], "
            "stdin=subprocess.PIPE); time.sleep(60)",
            str(tmp_path / "child.py"),
            str(tmp_path / "r.json"),
        ]
    )
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    child = int((tmp_path / "pid").read_text())

    parent.kill()
    parent.wait()

    wait_until(lambda: not alive(child))


def test_a_prewarmed_child_serves_one_request(room, tmp_path):
    """It imports its room before there is a request, and takes one."""
    body = """
    import os
    from pathlib import Path
    Path(__file__).with_name('loaded').write_text(str(os.getpid()))
    def work(r): return {'pid': os.getpid(), 'twice': 2 * r['n']}
    """
    assert room(body, {"n": 1})["twice"] == 2  # writes the module
    loaded = tmp_path / "more" / "loaded"
    loaded.unlink()
    with process.Prewarmed("probe_room", log=tmp_path / "log") as child:
        wait_until(loaded.exists)
        first = room(body, {"n": 21}, prewarmed=child)
        second = room(body, {"n": 4}, prewarmed=child)

    assert [42, 8] == [first["twice"], second["twice"]]
    assert first["pid"] != second["pid"]


def test_an_unused_prewarmed_child_ends(room, tmp_path):
    """It gets no request, or cannot be imported: it ends, and a new child takes the request."""
    room("def work(r): return {}")
    with process.Prewarmed("probe_room", log=tmp_path / "log") as child:
        pid = child._child.pid
        assert alive(pid)
    assert not alive(pid)
    with process.Prewarmed("no_such_room", log=tmp_path / "log") as child:
        wait_until(lambda: child._child.poll() is not None)
        assert room("def work(r): return {'n': 1}", prewarmed=child) == {"n": 1}


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


SEES = f"""
import os, runpy
ask = runpy.run_path({str(Path(process.__file__).with_name("plan") / "probe.py")!r})["ask"]
SEEN = [card["name"] for card in ask()["devices"]]  # as an import that initialises CUDA
def work(r):
    variable, allocator = map(os.environ.get, ("CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF"))
    return dict(variable=variable, allocator=allocator, names=SEEN)
"""


SERVES = "import sys\nfrom tuning import process\nif __name__ == '__main__':\n"
SERVES += "    sys.exit(process.serve(work))\n"


@pytest.mark.parametrize("prewarmed", [False, True])
@pytest.mark.parametrize(
    ("visible", "first", "names"),
    [
        (None, "0", ["NVIDIA H100 80GB HBM3"]),
        ("1,0", "1", ["Tesla T4"]),
        ("GPU-bbbb,GPU-aaaa", "GPU-bbbb", ["Tesla T4"]),
        (f"{MIG},0", MIG, [SLICE]),
        ("", "", []),
    ],
)
def test_a_single_rank_sees_one_gpu_from_its_first_import(
    visible, first, names, prewarmed, room, tmp_path, monkeypatch
):
    """Its parent hides the others, also from a child that waits for its request."""
    fake_driver.install(Machine("580.65.06", 13000, TWO), tmp_path, monkeypatch)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if not prewarmed:
        seen = room(SEES)
    else:
        room("def work(r): return {}")  # writes the module's folder
        (tmp_path / "more" / "probe_room.py").write_text(SEES + SERVES)
        with process.Prewarmed("probe_room", log=tmp_path / "log") as child:
            seen = room(SEES, prewarmed=child)

    assert (first, names) == (seen["variable"], seen["names"])


def test_each_of_several_ranks_sees_all_gpus(room, tmp_path, monkeypatch):
    """They choose by their local rank, and NCCL must reach the others."""
    fake_driver.install(Machine("580.65.06", 13000, TWO), tmp_path, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    seen = room(SEES, group=process.Group(2))

    assert ("0,1", 2) == (seen["variable"], len(seen["names"]))


def test_a_childs_allocator_grows_its_segments_unless_the_user_says_otherwise(room, monkeypatch):
    """torch reads the older variable first: where it is set, the newer one is left alone."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert "expandable_segments:True" == room(SEES)["allocator"]
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:128")
    assert "max_split_size_mb:128" == process.clean_environment()["PYTORCH_ALLOC_CONF"]
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "garbage_collection_threshold:0.8")
    assert "PYTORCH_ALLOC_CONF" not in process.clean_environment()


def test_a_failed_rank_does_not_wait_for_its_communicator(room, tmp_path):
    """A thread that never ends, as of a collective whose peers are gone, keeps nobody waiting."""
    body = """
        import os, threading, time
        from tuning.errors import DataError
        def work(r):
            if os.environ["RANK"] == "1":
                threading.Thread(target=time.sleep, args=(600,)).start()
                raise DataError.at("DATA-200", "rows", "are wrong", "mend them")
            time.sleep(600)
    """
    begin = time.monotonic()

    with pytest.raises(DataError, match="DATA-200"):
        room(body, group=process.Group(2))

    assert time.monotonic() - begin < 90


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_result_that_is_lost_is_no_bug(room, ranks):
    """The child ended well, and what it answered is gone: worth another try."""
    body = """
        import os
        def work(r):
            os._exit(0)
    """
    with pytest.raises(process.ChildDied) as died:
        room(body, group=process.Group(ranks))

    assert 0 == died.value.status
