"""Files that are whole or not there: written under a temporary name, flushed to the disk, renamed."""

import json
import os


def write_bytes(path, content):
    """content as a file; an OSError (a full disk) leaves what was there before and no partial"""
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
    """value as indented JSON"""
    write_bytes(path, json.dumps(value, indent=1).encode())
