import sys

from ci.gates.losses.gate import main

sys.exit(main())
