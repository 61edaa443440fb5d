"""Files and locks on file systems that lack a feature."""

import errno
import os
import stat
import subprocess
import sys
import warnings

import filelock
import pytest
from conftest import ROOT, final, train

from nanobit import files

NO_FOLDER_FSYNC = """
import errno, os, stat
real = os.fsync
def fsync(handle):
    if stat.S_ISDIR(os.fstat(handle).st_mode):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return real(handle)
os.fsync = fsync
"""
NO_LOCKS = """
import errno, fcntl, os
def flock(handle, how):
    raise OSError(errno.{code}, os.strerror(errno.{code}))
fcntl.flock = flock
"""


@pytest.fixture(params=["ENOTSUP", "ENOSYS"])
def no_locks(monkeypatch, request):
    """Replace the locks of the file system by none; return the end of the name of the file that stands in
    for one."""
    fcntl = pytest.importorskip("fcntl")
    code = getattr(errno, request.param)

    def refuse(handle, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(files, "warned", set())
    return "" if request.param == "ENOSYS" else ".owner"  # filelock itself handles ENOSYS


def locked_by_a_child(path, kill):
    """Lock path in another process, which is returned; if kill, end it while it holds the lock."""
    code = f"import sys; sys.path.insert(0, {ROOT!r}); from nanobit import files\n"
    code += f"lock = files.lock({str(path)!r})\n"
    code += "print(flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe)
    child.stdout.readline()
    if kill:
        child.kill()
        child.wait()
    return child


def test_a_lock_excludes_until_its_process_ends(tmp_path):
    """Two live processes exclude each other, a killed one leaves no lock."""
    path = tmp_path / ".lock"
    child = locked_by_a_child(path, kill=False)
    assert files.is_locked(path)
    with pytest.raises(BlockingIOError, match="another process"):
        files.lock(path)
    child.kill()
    child.wait()
    assert not files.is_locked(path)
    files.lock(path).release()


def test_without_locks_a_file_stands_in(tmp_path, no_locks, capsys):
    """Two live processes exclude each other, with one warning, and the holder is named."""
    path = str(tmp_path / ".lock")
    lock = files.lock(path)
    assert capsys.readouterr().err.count("has no locks") == 1
    with pytest.raises(BlockingIOError, match=f"process {os.getpid()} of host .* delete .*lock{no_locks}"):
        files.lock(path)
    if os.path.exists(path) and no_locks:  # as on another host, which has only this file
        os.remove(path)
    assert files.is_locked(path)
    assert "has no locks" not in capsys.readouterr().err
    lock.release()
    assert not files.is_locked(path)
    assert not os.path.exists(path + no_locks)


def test_a_system_without_fcntl_costs_no_foreign_warning(tmp_path, monkeypatch):
    """What filelock itself warns of when it is imported is not printed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "filelock"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with warnings.catch_warnings(record=True) as caught:
        files.lock(tmp_path / "x").release()
    assert not caught


def test_the_file_of_a_dead_process_is_taken_over(tmp_path, no_locks):
    """A killed process of this host blocks nobody."""
    path = str(tmp_path / ".lock")
    holder = filelock.SoftFileLock(path + no_locks)
    holder.acquire()
    with open(path + no_locks, encoding="utf-8") as file:
        text = file.read()
    holder.release()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with open(path + no_locks, "w", encoding="utf-8") as file:  # the same host, a process that has ended
        file.write("\n".join([str(child.pid), *text.split("\n")[1:2], ""]))
    files.lock(path).release()


def test_the_file_of_another_host_is_named(tmp_path, no_locks):
    """Whether a process of another host lives cannot be known; the file to delete is named."""
    path = str(tmp_path / ".lock")
    with open(path + no_locks, "w", encoding="utf-8") as file:
        file.write("42\nelsewhere\n")
    with pytest.raises(BlockingIOError) as busy:
        files.lock(path)
    assert busy.value.strerror == f"process 42 of host 'elsewhere' (if it has ended, delete {path}{no_locks})"


def test_a_lock_that_may_only_be_read(tmp_path, monkeypatch):
    """Other errors than a lack of locks are not hidden, and of a lock that only others may take it is known
    whether a process holds it."""
    path = tmp_path / ".lock"
    child = locked_by_a_child(path, kill=False)

    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(PermissionError):
        files.lock(path)
    assert files.is_locked(path)
    child.kill()
    child.wait()
    assert not files.is_locked(path)


def test_a_folder_that_cannot_be_flushed_costs_a_warning(tmp_path, monkeypatch, capsys):
    """One warning, no error, and no handle is left open."""
    real = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(files, "warned", set())
    first = os.open(tmp_path, os.O_RDONLY)
    os.close(first)
    files.sync_folder(tmp_path)
    files.sync_folder(tmp_path)
    assert capsys.readouterr().err.count("cannot flush a folder") == 1
    assert os.open(tmp_path, os.O_RDONLY) == first
    os.close(first)


@pytest.mark.parametrize("patch", [NO_FOLDER_FSYNC, NO_LOCKS.format(code="ENOLCK")])
def test_training_survives_a_poor_file_system(data_dir, out_dir, patch):
    """Without fsync of folders, and without locks, a run saves, resumes and ends complete."""
    changes = dict(max_steps=4, eval_every=0, sample_every=0, save_every=2)
    _, err = train(data_dir, out_dir, "poor", patch=patch, **changes | dict(max_steps=2))
    assert err.count("warning: the file system") == 1
    train(data_dir, out_dir, "poor", patch=patch, resume="auto", **changes)
    assert final(os.path.join(out_dir, "poor"), step=4)
