"""What the ranks of a sharded replica and their group say to each other, where they run, and how one is missed."""
