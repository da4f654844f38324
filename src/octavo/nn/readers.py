"""The table of readers: what ``reader`` of attention can be. A new one is one file and one line here."""

from __future__ import annotations

from octavo.nn.reader import FullReader, Reader, WindowReader
from octavo.nn.reader_blocks import InfLlmReader, LongHeadsReader
from octavo.nn.reader_lambda import LambdaReader
from octavo.nn.reader_memory import ExternalMemoryReader
from octavo.nn.reader_parallel import ParallelWindowsReader
from octavo.nn.reader_rerope import LeakyReRopeReader, ReRopeReader
from octavo.nn.reader_sparse import FixedReader, StridedReader

READERS: dict[str, type[Reader]] = {
    "full": FullReader,
    "window": WindowReader,
    "strided": StridedReader,
    "fixed": FixedReader,
    "rerope": ReRopeReader,
    "leaky_rerope": LeakyReRopeReader,
    "lambda": LambdaReader,
    "external_memory": ExternalMemoryReader,
    "longheads": LongHeadsReader,
    "infllm": InfLlmReader,
    "parallel_windows": ParallelWindowsReader,
}
