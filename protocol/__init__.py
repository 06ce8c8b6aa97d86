"""What the coordinator and the agents say to each other: no I/O, no clock, no event loop."""
