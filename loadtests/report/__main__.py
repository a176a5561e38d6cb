"""`python -m loadtests.report FOLDER`."""

import sys

from loadtests.report.report import main

sys.exit(main())
