"""Atomic writes: the old file or the new one, and nothing left beside it."""

import hashlib
import os
import stat

import pytest

from octavo import files


def test_write_atomic_replaces_and_keeps_the_users_file_mode(tmp_path):
    path = tmp_path / "a.txt"
    files.write_atomic(path, "première 中文\n")
    assert path.read_text(encoding="utf-8") == "première 中文\n"
    files.write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("operation", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, operation):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, operation, fail)
    with pytest.raises(OSError, match="No space"):
        files.write_json(path, {"new": 2})
    monkeypatch.undo()
    assert path.read_text() == '{\n  "old": 1\n}\n'
    assert os.listdir(tmp_path) == ["a.json"]


def test_what_is_written_is_on_disk_before_its_name_and_then_the_name(tmp_path, monkeypatch):
    done: list[object] = []
    fsync, replace = os.fsync, os.replace

    def forced(descriptor):
        status = os.fstat(descriptor)
        done.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_size)
        fsync(descriptor)

    def renamed(source, target):
        done.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", forced)
    monkeypatch.setattr(os, "replace", renamed)
    files.write_atomic(tmp_path / "a", b"0123456789")
    assert done == [10, "renamed", "folder"]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data)[:3]))
    files.write_atomic(tmp_path / "a", b"0123456789")
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_sha256_file_equals_hashlib(tmp_path):
    data = os.urandom(files.BLOCK_BYTES + 17)
    (tmp_path / "a").write_bytes(data)
    assert files.sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_make_folder_makes_those_above_it(tmp_path):
    files.make_folder(tmp_path / "a" / "b" / "c")
    files.make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
