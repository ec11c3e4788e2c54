"""Make one rank table of the servers' tables: the name users know; the code is in rank_table/."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by its path: common/ itself is no place to import from
    from common.rank_table.merge_hccl import main

    main()
