"""`python -m fewstep` is the command `fewstep`."""

import sys

from .cli import main

sys.exit(main())
