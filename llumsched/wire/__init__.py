"""Messages between the processes of a pool, and the keys they prove themselves with."""
