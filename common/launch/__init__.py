"""From a shell script's flags to running ranks, on one server or many."""
