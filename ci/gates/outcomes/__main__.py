import sys

from ci.gates.outcomes.gate import main

sys.exit(main())
