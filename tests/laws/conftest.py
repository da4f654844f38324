"""The example component is imported by name, as a user's own module is."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
