"""Files that survive a kill: written whole or not at all, locked, hashed; texts read from them."""

from __future__ import annotations

from .atomic import (
    check_output,
    mark_folder,
    move_folder,
    replacing,
    replacing_folder,
    write_json,
    write_text,
)
from .child_process import in_child
from .hashing import (
    MANIFEST,
    fault_of,
    file_sha256,
    json_sha256,
    tensor_bytes,
    tensor_sha256,
    write_manifest,
)
from .locks import holder, locked
from .stages import Stages, Watcher
from .text_files import is_text, read_text_file

__all__ = [
    "MANIFEST",
    "Stages",
    "Watcher",
    "check_output",
    "fault_of",
    "file_sha256",
    "holder",
    "in_child",
    "is_text",
    "json_sha256",
    "locked",
    "mark_folder",
    "move_folder",
    "read_text_file",
    "replacing",
    "replacing_folder",
    "tensor_bytes",
    "tensor_sha256",
    "write_json",
    "write_manifest",
    "write_text",
]
