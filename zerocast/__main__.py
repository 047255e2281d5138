"""``python -m zerocast``."""

from zerocast.cli import main

main()
