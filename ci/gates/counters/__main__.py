import sys

from ci.gates.counters.gate import main

sys.exit(main())
