"""``python -m llumsched`` is ``llumsched``."""

import sys

from llumsched.cli import main

if __name__ == "__main__":
    sys.exit(main())
