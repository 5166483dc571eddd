"""`python -m compot_deploy`, the same as the command `compot-deploy`."""

import sys

from compot_deploy.cli import main

sys.exit(main())
