import sys

from common.doctor import main

sys.exit(main())
