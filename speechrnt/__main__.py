"""``python -m speechrnt`` is the ``speechrnt`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
