import sys

from ci.faults.kills import main

sys.exit(main(sys.argv[1:]))
