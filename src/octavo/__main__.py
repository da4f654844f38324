"""``python -m octavo``: the same as the ``octavo`` command."""

import sys

from octavo.cli.main import entry_point

sys.exit(entry_point())
