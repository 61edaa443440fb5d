"""Files that are whole or missing: written under a temporary name, flushed to the disk, renamed. And locks.

A file system may lack a feature: SMB, FUSE and the drives of WSL refuse to flush a folder, NFS, Lustre and
mounted cloud drives may refuse locks. That costs a warning, never a file."""

import atexit
import errno
import hashlib
import json
import os
import sys
import warnings

NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
warned = set()  # the features whose lack was reported already


def warn_once(feature, text):
    """Print a warning on stderr, once for each feature."""
    if feature not in warned:
        warned.add(feature)
        print(f"warning: {text}", file=sys.stderr)


def write_bytes(path, content):
    """Write content as a file. An OSError (a full disk) leaves what was there before, and no partial."""
    partial = f"{path}.tmp-{os.getpid()}"
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        if os.path.exists(partial):
            os.remove(partial)
        raise


def write_json(path, value):
    """Write a value as indented JSON, as write_bytes."""
    write_bytes(path, json.dumps(value, indent=1).encode())


def read_json(path):
    """Return the object that a JSON file holds, {} if it is missing or damaged."""
    try:
        with open(path, "rb") as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def sync_folder(path):
    """Flush a folder to the disk, so that a rename in it survives a power cut, if the file system can."""
    if os.name == "nt":  # a folder cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        text = f"the file system of {path} cannot flush a folder ({error.strerror})"
        warn_once("fsync", f"{text}; a power cut may undo the last rename")
    finally:
        os.close(handle)


def sha256(path):
    """Return the sha256 of a file's content, in hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(path, timeout=0.3):
    """Lock the file at path for this process, until release() or the end of the process; return the lock.

    If the file system has no locks, a file with the process and its host is used instead; one that a dead
    process of this host left is taken over. Raises BlockingIOError, with the holder as its text, if another
    process has the lock after `timeout` seconds (is_locked takes it for a moment), OSError if the file cannot
    be written."""
    with warnings.catch_warnings(action="ignore"):  # without fcntl it warns of what is reported below
        import filelock

    for lock_type, name in ((filelock.FileLock, path), (filelock.SoftFileLock, f"{path}.owner")):
        held = lock_type(name)
        try:
            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always")
                held.acquire(timeout=timeout)
        except filelock.Timeout as error:
            raise BlockingIOError(errno.EAGAIN, holder(error.lock_file)) from None
        except (NotImplementedError, OSError) as error:  # the first is the ENOSYS of older versions
            if name != path or getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
                raise
            continue
        if notes or name != path:  # newer versions take a file themselves after ENOSYS, and warn
            warn_once("lock", f"the file system of {path} has no locks; the file {name} is used instead")
        atexit.register(held.release)  # the file that is used instead of a lock outlives the process
        return held


def holder(path):
    """Return who holds the lock file at path, in words."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            pid, host = file.read(1000).split()[:2]
        who = f"process {pid[:20]} of host {host[:100]!r}"
    except (OSError, ValueError):  # a true lock: the file is empty
        who = "another process"
    return f"{who} (if it has ended, delete {path})"


def is_locked(path):
    """Return whether a live process holds lock(path); if that cannot be known, it counts as held."""
    if not (os.path.exists(path) or os.path.exists(f"{path}.owner")):
        return False
    try:
        held = lock(path, timeout=0)
        held.release()
        atexit.unregister(held.release)
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    try:
        import fcntl  # Windows has none

        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (ModuleNotFoundError, OSError):
        return True
    return False


def set_aside(folder):
    """Rename a folder to a name that is free; return its new path."""
    path = folder + ".aside"
    while os.path.exists(path):
        path += "x"
    os.rename(folder, path)
    return path


def is_hf_folder(path):
    """Return whether a path is a folder with a model in the form of Hugging Face, whole or not."""
    if not os.path.isdir(path):
        return False
    names = os.listdir(path)
    return "generation_config.json" in names or any(name.endswith(".safetensors") for name in names)
