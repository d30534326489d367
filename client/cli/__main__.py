"""`python -P -m penstock.client.cli`: the command line where the console script is not on the path."""

import sys

from penstock.client.cli import main

sys.exit(main())
