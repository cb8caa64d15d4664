"""`python -m vlmfast.cli` is `vlmfast`."""

import sys

from . import main

sys.exit(main())
