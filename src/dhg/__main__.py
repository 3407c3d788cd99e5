"""`python -m dhg`."""

import sys

from .cli import main

sys.exit(main())
