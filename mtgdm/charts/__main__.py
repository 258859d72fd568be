"""`python -m mtgdm.charts`: the child process that draws; see `mtgdm.charts.export`."""

import sys

from mtgdm.charts.export import draw_requested

if __name__ == "__main__":
    sys.exit(draw_requested(int(sys.argv[1])))
