"""The world that a rank table, a host file or flags describe, printed: the code is in launch/world.py."""

from common.launch.world import main

if __name__ == "__main__":
    main()
