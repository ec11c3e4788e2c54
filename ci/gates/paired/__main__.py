import sys

from ci.gates.paired.gate import main

sys.exit(main())
