"""What each stage of a training reads: the batch of every step, the held-out rows, and where they come from.

The pipeline trains on exactly these; ``octavo data show`` and ``octavo data check`` look at exactly these.
"""

from octavo.feed.chats import conversations
from octavo.feed.checking import check
from octavo.feed.documents import pretraining
from octavo.feed.looking import Look, changed, look
from octavo.feed.rows import Feed, has_held_out, rows_of_step, seq_len_of, validation_batches
from octavo.feed.stage import of_stage, settings, stages
from octavo.feed.table import KINDS, kind_of, tuning

__all__ = [
    "KINDS",
    "Feed",
    "Look",
    "changed",
    "check",
    "conversations",
    "has_held_out",
    "kind_of",
    "look",
    "of_stage",
    "pretraining",
    "rows_of_step",
    "seq_len_of",
    "settings",
    "stages",
    "tuning",
    "validation_batches",
]
