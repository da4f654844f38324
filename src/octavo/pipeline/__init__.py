"""A recipe made real, stage by stage: data, tokenizer, pretrain (or count), tune, eval, report.

Each stage leaves its result in the run folder and an entry in stages.json with a fingerprint of everything
it was made from. Run again, finished stages are kept and an interrupted one goes on where it was.
"""

from octavo.pipeline.job import Job
from octavo.pipeline.order import Stage, run, stages
from octavo.pipeline.text import read_documents, tokenise
from octavo.pipeline.training import Ready, ready

__all__ = ["Job", "Ready", "Stage", "read_documents", "ready", "run", "stages", "tokenise"]
