"""Our streaming safetensors reader and writer against the library, and against hostile headers."""

import json

import pytest
import torch

from octavo.errors import CheckpointError
from octavo.training import tensor_file


def test_the_safetensors_library_reads_ours_and_ours_reads_its_own(tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = {"a": torch.randn(3, 5), "b": torch.arange(3, dtype=torch.uint8), "c": torch.tensor(2.0).bfloat16()}
    tensor_file.write(tmp_path / "ours.safetensors", tensors)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    for loaded in (load_file(tmp_path / "ours.safetensors"), tensor_file.read(tmp_path / "theirs.safetensors")[0]):
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_hostile_header_is_refused_without_allocating(tmp_path):
    def header(table: dict) -> bytes:
        text = json.dumps(table).encode()
        return len(text).to_bytes(8, "little") + text

    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    cases = {
        "longer": (1 << 62).to_bytes(8, "little") + b"{}",
        "ends early": b"abc",
        "cannot be read": (9).to_bytes(8, "little") + b"[" * 9,
        "does not fit": header({"a": {**one, "shape": [1 << 50, 1 << 50]}}) + b"1234",
        "fit": header({"a": {**one, "shape": [-1]}}) + b"1234",
        "fit the": header({"a": {**one, "dtype": "OBJECT"}}) + b"1234",
        "not fit the": header({"a": one, "b": one}) + b"1234",
        "says 4": header({"a": one}) + b"12345678",
        "header cannot": header({"a": [1, 2]}),
        "header cannot be": header({"a": {**one, "data_offsets": [0, 2, 4]}}) + b"1234",
        "header cannot be read": header({"a": {**one, "data_offsets": [0]}}) + b"1234",
        "its entry": header({"a": {**one, "data_offsets": [0, "4"]}}) + b"1234",
        "its entry 'a'": header({"a": {**one, "dtype": ["F32"]}}) + b"1234",
        "its entry 'a' does": header({"a": {**one, "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}}),
        "its entry 'a' does not": header({"a": {**one, "shape": [1] * 100}}) + b"1234",
        "its entry 'a' does not fit": header({"a": {**one, "shape": "1"}}) + b"1234",
    }
    for number, (message, data) in enumerate(cases.items()):
        file = tmp_path / f"{number}.safetensors"
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            tensor_file.read(file)
