"""``python -m tests.cuda_stub PYTHON ARGUMENTS...``: a command of another environment on the stub."""

import os
import sys

from tests.cuda_stub.build import environment

if len(sys.argv) < 2:
    sys.exit(__doc__)
os.execvpe(sys.argv[1], sys.argv[1:], environment(sys.argv[1]))
