"""`python -m broker_filter`: the command line."""

import sys

from broker_filter.cli import main

sys.exit(main())
