import sys

from ci.gates.nightly.gate import main

sys.exit(main())
